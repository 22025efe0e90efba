"""All environments by name."""

from maml_cuda.rl.environment import Environment
from maml_cuda.rl.locomotion import AntDirection, AntGoal, AntVelocity, CheetahDirection, CheetahVelocity
from maml_cuda.rl.navigation import Navigation
from maml_cuda.rl.own_environments import own_environment
from maml_cuda.rl.own_jobs import GROUP, is_own, registered
from maml_cuda.rl.settings import RLSettings

ENVIRONMENTS: dict[str, type[Environment]] = {
    environment.name: environment
    for environment in (Navigation, CheetahDirection, CheetahVelocity, AntDirection, AntVelocity, AntGoal)
}


def make_environment(name: str) -> Environment:
    """Creates an environment.

    Args:
        name: one of ``ENVIRONMENTS``: navigation, cheetah-direction, cheetah-velocity, ant-direction, ant-velocity,
            ant-goal. Or an environment of your own: ``package.module:NAME`` or ``FILE.py:NAME``, where NAME is a
            subclass of ``Environment`` or of ``gymnasium.Env``, or a function that returns one; or a name that an
            installed package has registered as an entry point of ``maml_cuda.environments``.

    Raises:
        ValueError: there is no environment of this name, or your own one cannot be imported or created.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the environment needs the extra [rl], which is not installed.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]()
    if is_own(name):
        return own_environment(name)
    known = ", ".join([*ENVIRONMENTS, *registered()])
    raise ValueError(f"name must be one of {known}, or module:NAME or FILE.py:NAME of your own, got {name!r}")


def environment_of(settings: RLSettings) -> Environment:
    """Creates the environment of a run.

    Raises:
        ValueError: it is no longer registered, its spaces are not those that the run was started with, or see
            ``make_environment``.
    """
    if settings.spaces and not is_own(settings.job):
        raise ValueError(
            f"{settings.job} must be an environment that an installed package registers as an entry point of {GROUP}, "
            "got none of that name"
        )
    environment = make_environment(settings.job)
    if settings.spaces and environment.spaces != settings.spaces:
        raise ValueError(
            f"{settings.job} must have the spaces that this run was started with, {settings.spaces}, "
            f"got {environment.spaces}"
        )
    return environment
