"""Tasks of an ordinary gymnasium environment, which runs one episode at a time, as an ``Environment``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from maml_cuda.extras import require
from maml_cuda.rl.environment import Environment, Step
from maml_cuda.rl.task_numbers import TaskNumbers

METHODS = "sample_task(rng) or sample_tasks(number), and set_task(task)"


class GymnasiumEnvironment(Environment):
    """Copies of a ``gymnasium.Env``, one for each episode of each task, stepped one after the other.

    The environment, or one that it wraps, has two methods more than gymnasium asks for. ``set_task(task)`` is called
    before every ``reset(seed=...)``. ``sample_task(rng)`` draws a task from a ``numpy.random.Generator``; or
    ``sample_tasks(number)`` draws a list of tasks from ``self.np_random``, which ``reset(seed=...)`` has seeded just
    before, as in the ``MetaEnv`` of learn2learn and of Ray. A task is a number, an array, or a dict, list or tuple of
    these; its numbers are the goal.

    Observations are flattened (``gymnasium.spaces.flatten``) and converted to float32. Actions are ``Discrete``, or a
    ``Box`` with bounds, to which actions of policies in [-1, 1] are scaled. An episode ends if it is terminated or
    truncated.

    Args:
        make: creates a copy; the class, if it needs no arguments.
        name: a short name, for messages.

    Raises:
        ValueError: a method is missing, or a space or the tasks are of another kind.
        ModuleNotFoundError: gymnasium is not installed.
    """

    def __init__(self, make: Callable[[], Any], name: str = "the environment") -> None:
        require("gymnasium", extra="rl")
        from gymnasium import spaces

        self.name, self._make = name, make
        self._copies = [make()]
        for method in ("set_task", "reset", "step"):
            if self._method(method) is None:
                raise ValueError(f"{name} must have {METHODS}, got no {method}")
        self._flatten, self._box = spaces.flatten, spaces.Box
        self._seen_space, self._action_space = self._copies[0].observation_space, self._copies[0].action_space
        if not (isinstance(self._seen_space, spaces.Space) and self._seen_space.is_np_flattenable):
            raise ValueError(
                f"observation_space of {name} must be one that gymnasium flattens to an array, got {self._seen_space}"
            )
        self.observation_size = spaces.flatdim(self._seen_space)
        self.discrete = isinstance(self._action_space, spaces.Discrete)
        self.action_size = self._action_size(spaces)
        self._tasks = TaskNumbers(name, self._draw(1, 0)[0])
        self.goal_size = self._tasks.size

    def _action_size(self, spaces: Any) -> int:
        space = self._action_space
        if self.discrete:
            return int(space.n)
        if not isinstance(space, spaces.Box) or space.dtype.kind != "f" or not space.is_bounded() or not space.shape:
            raise ValueError(
                f"action_space of {self.name} must be Discrete or a Box of floating point with bounds, got {space}"
            )
        return int(np.prod(space.shape))

    def _actions(self) -> str:
        space = self._action_space
        if self.discrete:
            return super()._actions()
        return f"actions {list(space.shape)} from {space.low.tolist()} to {space.high.tolist()}"

    def _method(self, name: str) -> Any:
        try:
            return self._copies[0].get_wrapper_attr(name)
        except AttributeError:
            return None

    def _draw(self, tasks: int, seed: int) -> list[Any]:
        if (sample := self._method("sample_task")) is not None:
            rng = np.random.default_rng(seed)
            return [sample(rng) for _ in range(tasks)]
        if (several := self._method("sample_tasks")) is None:
            raise ValueError(f"{self.name} must have {METHODS}, got neither sample_task nor sample_tasks")
        self._copies[0].reset(seed=seed)
        found = list(several(tasks))
        if len(found) != tasks:
            raise ValueError(f"sample_tasks({tasks}) of {self.name} must return {tasks} tasks, got {len(found)}")
        return found

    def sample_goals(self, tasks: int, generator: Generator) -> Tensor:
        """The numbers of new tasks, float64 ``[tasks, goal_size]``."""
        drawn = self._draw(tasks, int(_seeds(1, generator)[0]))
        return torch.tensor([self._tasks.numbers(task) for task in drawn], dtype=torch.float64)

    def _reset(self, episodes: int, generator: Generator) -> Tensor:
        goals = self.goals.tolist()
        seeds = _seeds(len(goals) * episodes, generator)
        while len(self._copies) < len(seeds):
            self._copies.append(self._make())
        self._observations = np.zeros((len(seeds), self.observation_size), np.float32)
        for index, seed in enumerate(seeds):
            copy = self._copies[index]
            copy.get_wrapper_attr("set_task")(self._tasks.task(goals[index // episodes]))
            self._observations[index] = self._observed(_parts("reset", copy.reset(seed=seed), self.name)[0])
        return self._seen()

    def _step(self, actions: Tensor) -> Step:
        alive = self.alive.flatten().tolist()
        rewards, done = np.zeros(len(alive), np.float32), np.zeros(len(alive), bool)
        for index, (is_alive, action) in enumerate(zip(alive, self._scaled(actions), strict=True)):
            if not is_alive:
                continue
            found = _parts("step", self._copies[index].step(action), self.name)
            self._observations[index] = self._observed(found[0])
            rewards[index] = self._number(found[1])
            done[index] = found[2] or found[3]
        shape = self.alive.shape
        return Step(self._seen(), torch.from_numpy(rewards).view(shape), torch.from_numpy(done).view(shape))

    def _scaled(self, actions: Tensor) -> Any:
        """The actions of all episodes, as the environment takes them."""
        space = self._action_space
        if self.discrete:
            return actions.flatten().numpy() + space.start
        middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        rows = actions.numpy().reshape(-1, *space.shape).astype(space.dtype)
        return np.clip(middle + half * rows, space.low, space.high)

    def _observed(self, observation: Any) -> np.ndarray:
        space = self._seen_space
        if isinstance(space, self._box):
            fits = np.shape(observation) == space.shape
        else:
            fits = space.contains(observation)
        if not fits:
            raise ValueError(f"an observation of {self.name} must be in {space}, got {observation!r:.80}")
        return np.asarray(self._flatten(space, observation))

    def _number(self, reward: Any) -> float:
        if np.ndim(reward) or not isinstance(reward, (int, float, np.number, np.bool_, np.ndarray)):
            raise ValueError(f"a reward of {self.name} must be a number, got {reward!r:.80}")
        return float(reward)

    def _seen(self) -> Tensor:
        return torch.from_numpy(self._observations.copy()).view(*self.alive.shape, self.observation_size)


def _seeds(number: int, generator: Generator) -> list[int]:
    seeds: list[int] = torch.randint(2**31, (number,), generator=generator).tolist()
    return seeds


def _parts(method: str, found: Any, name: str) -> tuple[Any, ...]:
    """What ``reset`` or ``step`` returned, which must have gymnasium's number of parts."""
    parts = {"reset": "observation, info", "step": "observation, reward, terminated, truncated, info"}[method]
    if not isinstance(found, tuple) or len(found) != parts.count(",") + 1:
        got = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"{method} of {name} must return ({parts}), as in gymnasium, got {got}")
    return found
