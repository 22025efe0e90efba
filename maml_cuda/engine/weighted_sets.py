"""The weights of samples of a call: their checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.engine import data_checks
from maml_cuda.losses import Loss
from maml_cuda.pytrees import Tree
from maml_cuda.targets import POLICY_LOSSES


def weights_of_sets(
    loss: Loss, like: Tensor, *sets: tuple[str, Any, str, Tree, str, Any], support_sets: int = 1
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The weights of each set [tasks, n], checked; where one set has weights, those of the others are ones.

    Args:
        like: a trainable parameter of the model.
        sets: the name of the weights and the weights, of x and x, of y and y; y is None where there is no target.
        support_sets: of a task, which follow each other.

    Raises:
        ValueError, TypeError: they do not fit the set.
    """
    if all(weights is None for _, weights, *_ in sets):
        return (None,) * len(sets)
    return tuple(
        _ones(x, like) if w is None else _checked(loss, like, n, w, xn, x, yn, y, support_sets)
        for n, w, xn, x, yn, y in sets
    )


def _ones(x: Tree, like: Tensor) -> Tensor:
    return like.new_ones(pytrees.tensors(x)[0].shape[:2], requires_grad=False)


def _checked(
    loss: Loss, like: Tensor, name: str, weights: Any, x_name: str, x: Tree, y_name: str, y: Any, support_sets: int
) -> Tensor:  # fmt: skip
    if loss in POLICY_LOSSES:
        raise ValueError(
            f"{name} must be None for {loss}, whose targets have weights of their own (PolicyTarget.weights), got "
            f"{'a tensor' if isinstance(weights, Tensor) else type(weights).__name__}"
        )
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weights).__name__}")
    leaves = [*pytrees.named_leaves(x_name, x), *pytrees.named_leaves(y_name, y)]
    tensors = [(where, leaf) for where, leaf in leaves if isinstance(leaf, Tensor)]
    first, like_first = tensors[0]
    if weights.dim() != 2 or weights.shape != like_first.shape[:2]:
        expected, got = list(like_first.shape[:2]), list(weights.shape)
        if name == "spt_weights" and support_sets > 1:
            expected, got = ([support_sets, s[0] // support_sets, *s[1:]] for s in (expected, got))
        raise ValueError(f"{name} must have shape {expected}, one a sample of {first}, got {got}")
    for where, leaf in tensors:
        if leaf.shape[1:2] != weights.shape[1:]:
            raise ValueError(
                f"{where} must have {weights.shape[1]} samples a task, as {name} has, got {list(leaf.shape)}: where "
                "samples have weights, each tensor of a set is [tasks, samples, ...]"
            )
    data_checks.is_like(name, weights, like)
    of_steps = name == "spt_weights" and support_sets > 1
    _values(name, weights.unflatten(0, (-1, support_sets)) if of_steps else weights)
    return weights


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _values(name: str, weights: Tensor) -> None:
    data_checks.sample_weights(name, weights.detach())
    sums = weights.detach().sum(-1)
    if bool((endless := sums.isinf()).any()):
        raise ValueError(f"{name} must have a finite sum in every task, got inf in task {int(endless.nonzero()[0, 0])}")
