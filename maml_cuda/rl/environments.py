"""All environments by name."""

from maml_cuda.rl.environment import Environment
from maml_cuda.rl.locomotion import AntDirection, AntGoal, AntVelocity, CheetahDirection, CheetahVelocity
from maml_cuda.rl.navigation import Navigation

ENVIRONMENTS: dict[str, type[Environment]] = {
    environment.name: environment
    for environment in (Navigation, CheetahDirection, CheetahVelocity, AntDirection, AntVelocity, AntGoal)
}


def make_environment(name: str) -> Environment:
    """Creates an environment.

    Args:
        name: one of ``ENVIRONMENTS``: navigation, cheetah-direction, cheetah-velocity, ant-direction, ant-velocity,
            ant-goal.

    Raises:
        ValueError: there is no environment of this name.
        ModuleNotFoundError: the environment needs the extra [rl], which is not installed.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"name must be one of {', '.join(ENVIRONMENTS)}, got {name!r}")
    return ENVIRONMENTS[name]()
