"""Meta-reinforcement learning (Finn, Abbeel and Levine 2017, section 5.3): environments, sampling and outer steps."""

from typing import TYPE_CHECKING

from maml_cuda.lazy_imports import lazily

if TYPE_CHECKING:
    from maml_cuda.rl.environment import Environment, Step
    from maml_cuda.rl.environments import ENVIRONMENTS, make_environment
    from maml_cuda.rl.gymnasium_environment import GymnasiumEnvironment
else:
    __getattr__ = lazily(
        __name__,
        {
            "ENVIRONMENTS": "environments",
            "Environment": "environment",
            "GymnasiumEnvironment": "gymnasium_environment",
            "Step": "environment",
            "make_environment": "environments",
        },
    )

__all__ = ["ENVIRONMENTS", "Environment", "GymnasiumEnvironment", "Step", "make_environment"]
