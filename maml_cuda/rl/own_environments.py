"""Environments of the user: a class or function by its name, and what is checked before they are used."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Generator, Tensor

from maml_cuda.rl.environment import Environment
from maml_cuda.rl.gymnasium_environment import GymnasiumEnvironment
from maml_cuda.rl.own_jobs import registered, short_name
from maml_cuda.user_code import load_object

KINDS = "maml_cuda.rl.Environment or gymnasium.Env"
TRIED_STEPS = 5


def own_environment(name: str) -> Environment:
    """Creates an environment of the user.

    Args:
        name: ``package.module:NAME``, ``FILE.py:NAME``, or a name that an installed package has registered. NAME is a
            subclass of ``Environment`` or of ``gymnasium.Env`` (see ``GymnasiumEnvironment``), or a function that
            returns one; it is called without arguments.

    Raises:
        ValueError: there is no such class, it cannot be imported or created, or its sizes are wrong.
        FileNotFoundError: there is no such file.
    """
    make = load_object(registered()[name] if ":" not in name else name)
    if not callable(make):
        raise ValueError(f"{name} must be a subclass of {KINDS}, or a function that returns one, got {make!r:.80}")
    try:
        found = make()
    except Exception as error:
        raise ValueError(f"{name} must be created without arguments, got {type(error).__name__}: {error}") from error
    if _is_gymnasium(found):
        return GymnasiumEnvironment(make, short_name(name))
    if not isinstance(found, Environment):
        raise ValueError(f"{name} must be a {KINDS}, got an object of {type(found).__module__}.{type(found).__name__}")
    for size in ("observation_size", "action_size", "goal_size"):
        value = getattr(found, size, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{size} of {name} must be an integer of at least 1, got {value}")
    return found


def _is_gymnasium(found: Any) -> bool:
    gymnasium = sys.modules.get("gymnasium")  # imported by the user's code, if it is one
    return gymnasium is not None and isinstance(found, gymnasium.Env)


def try_episodes(environment: Environment) -> None:
    """Runs a few steps of random actions, to find errors of the environment before anything is computed.

    Raises:
        ValueError: shapes or types are wrong, or a second run from the same seed has other numbers.
        FloatingPointError: an observation or a reward is NaN or infinity.
    """
    first, second = _episodes(environment), _episodes(environment)
    for what, mine, other in zip(("goals", "observations", "rewards", "ends"), first, second, strict=True):
        if mine.shape != other.shape or not torch.equal(mine, other):
            raise ValueError(
                f"{what} of {environment.name} must be the same if the seed is, got other ones: all random numbers "
                "must come from the generator that a method is given (gymnasium: self.np_random after reset(seed=...)),"
                " and a reset must restore everything that an episode changes"
            )


def _episodes(environment: Environment, tasks: int = 2, episodes: int = 2) -> tuple[Tensor, ...]:
    """Goals, observations, rewards and ends of a few steps from seed 0."""
    generator = Generator().manual_seed(0)
    goals = environment.sample_goals(tasks, generator)
    if not isinstance(goals, Tensor) or not goals.is_floating_point():
        got = goals.dtype if isinstance(goals, Tensor) else type(goals).__name__
        raise ValueError(f"goals of {environment.name} must be a tensor of floating point, got {got}")
    if len(goals) != tasks:
        raise ValueError(f"sample_goals of {environment.name} must return {tasks} goals, got {list(goals.shape)}")
    observations, rewards, ends = [environment.reset(goals, episodes, generator)], [], []
    for _ in range(TRIED_STEPS):
        if environment.discrete:
            actions = torch.randint(environment.action_size, (tasks, episodes), generator=generator)
        else:
            actions = torch.randn(tasks, episodes, environment.action_size, generator=generator)
        step = environment.step(environment.clip(actions))
        observations.append(step.observations.clone())
        rewards.append(step.rewards.clone())
        ends.append(step.done.clone())
        if not environment.alive.any():
            break
    return goals, torch.stack(observations), torch.stack(rewards), torch.stack(ends)
