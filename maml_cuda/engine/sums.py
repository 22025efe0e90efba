"""Gradients that the general path adds up over tasks and inner steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def whole(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Leaf:
    """A leaf that takes the place of a tensor of the user's, or of a part of it, so that hooks of the tensor are not
    called with gradients of inner steps or single tasks.

    Attributes:
        tensor: the leaf.
        of: the tensor.
        part: a view of `of`, or of a tensor like it, whose place the leaf takes.
        step: of a leaf that is itself phi_k of a task, the step k and the name of the parameter; None otherwise.
    """

    tensor: Tensor
    of: Tensor
    part: Callable[[Tensor], Tensor] = whole
    step: tuple[int, str] | None = None

    @classmethod
    def of_itself(cls, t: Tensor) -> Leaf:
        return cls(t, t)


class Sums:
    """The gradient of each tensor, so far.

    Args:
        zero: leaves of tensors whose gradient is zero, not None, if nothing adds to it.

    Attributes:
        weight: of the task at hand, by which what is added is multiplied. Its own gradients do without, so that code
            whose backward is not linear gets what it gets in a plain loop.
        of_steps: what is added to phi_k of the task at hand, without weight; by k, by name.
    """

    def __init__(self, zero: Iterable[Leaf] = ()) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._own: set[int] = set()  # whose memory nothing else uses
        self.weight: float | Tensor = 1.0
        self.of_steps: dict[int, dict[str, Tensor]] = {}
        for leaf in zero:
            self._whole(leaf)

    def add(self, leaf: Leaf, g: Tensor | None) -> None:
        if g is None:
            return
        if leaf.step is not None:
            k, name = leaf.step
            so_far = self.of_steps.setdefault(k, {})
            so_far[name] = so_far[name] + g if name in so_far else g
            return
        t, scaled = leaf.of, not (isinstance(self.weight, float) and self.weight == 1)
        if id(t) in self._own and leaf.part is whole and isinstance(self.weight, float):
            self._sums[id(t)].add_(g, alpha=self.weight)
            return
        if scaled:
            g = self.weight * g
        if leaf.part is not whole:
            leaf.part(self._whole(leaf)).add_(g)
        elif id(t) not in self._sums:
            self._tensors[id(t)], self._sums[id(t)] = t, g
            if scaled:
                self._own.add(id(t))
        elif id(t) in self._own:
            self._sums[id(t)].add_(g)
        else:
            self._sums[id(t)] = self._sums[id(t)] + g
            self._own.add(id(t))

    def _whole(self, leaf: Leaf) -> Tensor:
        """The sum of a tensor, in the dtype of its leaf."""
        t = leaf.of
        if id(t) not in self._sums or id(t) not in self._own:
            so_far = self._sums.get(id(t), torch.zeros_like(t, dtype=leaf.tensor.dtype))
            self._tensors[id(t)], self._sums[id(t)] = t, so_far.clone()
            self._own.add(id(t))
        return self._sums[id(t)]

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """(tensor, gradient) of each tensor that has one."""
        return [(t, self._sums[i].to(t.dtype)) for i, t in self._tensors.items()]
