"""What the choice of a program depends on of the data of a call: the shapes and dtypes of a task's sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from maml_cuda.capture.capture import Like


@dataclass(frozen=True)
class TreeLike:
    """What is known of a task's x, or of its target: a pytree of tensors.

    Attributes:
        structure: of the pytree; older versions of torch cannot hash it.
        leaves: of the pytree; None for None.
    """

    structure: pytree.TreeSpec = field(hash=False)
    leaves: tuple[Like | None, ...]

    def tree(self) -> Any:
        """The pytree of the leaves."""
        return pytree.tree_unflatten(self.leaves, self.structure)

    @property
    def tensors(self) -> list[Like]:
        return [like for like in self.leaves if like is not None]

    def mapped(self, f: Callable[[tuple[int, ...]], tuple[int, ...]]) -> TreeLike:
        """The same with f applied to each shape."""
        return replace(self, leaves=tuple(like and replace(like, shape=f(like.shape)) for like in self.leaves))


class SetLike(NamedTuple):
    """What the choice of a program depends on of a task's support or query set.

    Attributes:
        x: the input of the model.
        y: the target of a loss of the user's own; None: the loss is one of ours, or there is no target.
    """

    x: TreeLike
    y: TreeLike | None = None

    @property
    def n(self) -> int:
        """The number of samples: the first axis of the first tensor of x."""
        return self.x.tensors[0].shape[0]

    def of(self, n: int) -> SetLike:
        """A set of n samples instead."""

        def resized(shape: tuple[int, ...]) -> tuple[int, ...]:
            return (n, *shape[1:]) if shape[:1] == (self.n,) else shape

        return SetLike(self.x.mapped(resized), None if self.y is None else self.y.mapped(resized))


class Signature(NamedTuple):
    """What the choice of a program depends on, beside the model.

    Attributes:
        support, query: the sets; None: there is none.
        second_order: whether Hessian-vector products on the support set are asked for.
    """

    support: SetLike | None
    query: SetLike | None
    second_order: bool


def tree_like(tree: Any) -> TreeLike:
    """Of a pytree of tensors [tasks, ...], or of Likes of one task."""
    leaves, structure = pytree.tree_flatten(tree)
    likes = (Like(tuple(t.shape[1:]), t.dtype) if isinstance(t, Tensor) else t for t in leaves)
    return TreeLike(structure, tuple(like if isinstance(like, Like) else None for like in likes))
