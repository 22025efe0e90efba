"""Tasks of a gymnasium environment as rows of numbers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

EXAMPLES = "a number, an array, or a dict, list or tuple of these"


class TaskNumbers:
    """How the tasks of one environment are written as numbers. All of them must have the structure of ``example``.

    Args:
        name: the environment's name, for errors.
        example: a task.

    Attributes:
        size: the count of numbers of a task.

    Raises:
        ValueError: the task holds something that is not a number.
    """

    def __init__(self, name: str, example: Any) -> None:
        self._name = name
        leaves, self._structure = pytree.tree_flatten(example)
        self._leaves = [np.asarray(leaf) for leaf in leaves]
        self._is_array = [isinstance(leaf, np.ndarray) for leaf in leaves]
        self.size = sum(leaf.size for leaf in self._leaves)
        if not self.size or any(leaf.dtype.kind not in "biuf" for leaf in self._leaves):
            raise ValueError(f"a task of {name} must be {EXAMPLES}, got {example!r:.80}")

    def numbers(self, task: Any) -> list[float]:
        """The task as ``size`` numbers.

        Raises:
            ValueError: its structure is another one, or float64 does not hold one of its numbers exactly.
        """
        leaves, structure = pytree.tree_flatten(task)
        arrays = [np.asarray(leaf) for leaf in leaves]
        if structure != self._structure or any(
            (mine.shape, mine.dtype) != (leaf.shape, leaf.dtype)
            for mine, leaf in zip(arrays, self._leaves, strict=True)
        ):
            raise ValueError(f"all tasks of {self._name} must have one structure and type, got {task!r:.80}")
        row = np.concatenate([array.ravel().astype(np.float64) for array in arrays])
        for array, back in zip(arrays, self._arrays(row), strict=True):
            if not np.array_equal(array, back, equal_nan=array.dtype.kind == "f"):
                raise ValueError(f"the numbers of a task of {self._name} must fit float64, got {task!r:.80}")
        return [float(number) for number in row]

    def task(self, numbers: Sequence[float]) -> Any:
        """The task that ``numbers`` made these numbers of."""
        arrays = self._arrays(np.asarray(numbers, np.float64))
        leaves = [back if keep else back.item() for back, keep in zip(arrays, self._is_array, strict=True)]
        return pytree.tree_unflatten(leaves, self._structure)

    def _arrays(self, row: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([leaf.size for leaf in self._leaves])
        parts = np.split(row, ends[:-1])
        return [part.astype(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, self._leaves, strict=True)]
