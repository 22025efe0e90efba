"""Meta-reinforcement learning as in the MAML paper (Finn, Abbeel, Levine 2017, section 5.3)."""

from .environment import Environment, Step
from .environments import ENVIRONMENTS, make_environment

__all__ = ["ENVIRONMENTS", "Environment", "Step", "make_environment"]
