"""The environments by name."""

from maml_cuda.rl.environment import Environment
from maml_cuda.rl.locomotion import AntDirection, AntGoal, AntVelocity, CheetahDirection, CheetahVelocity
from maml_cuda.rl.navigation import Navigation

ENVIRONMENTS: dict[str, type[Environment]] = {
    environment.name: environment
    for environment in (Navigation, CheetahDirection, CheetahVelocity, AntDirection, AntVelocity, AntGoal)
}


def make_environment(name: str) -> Environment:
    """A new environment. ModuleNotFoundError, in words, where it needs the extra [rl] and it is not installed."""
    if name not in ENVIRONMENTS:
        raise ValueError(f"name must be one of {', '.join(ENVIRONMENTS)}, got {name!r}")
    return ENVIRONMENTS[name]()
