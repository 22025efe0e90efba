"""Weights of samples: tasks of different sizes in tensors of one shape, and samples that count more than others.

With weights w_n from 0, the loss of a task is sum_n w_n l_n / sum_n w_n, where l_n is the loss of sample n. A sample of
weight 0 is padding. It counts nowhere: a task is what it would be on its other samples alone, also in the batch
statistics of BatchNorm, which count each sample of positive weight once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.pytrees import Tree


class Weighted(NamedTuple):
    """A target with the weights of its samples.

    Attributes:
        y: the target, a pytree of tensors `[tasks, samples, ...]`; of one task, `[samples, ...]`.
        weights: w, `[tasks, samples]`; of one task, `[samples]`.
    """

    y: Any
    weights: Tensor

    def mean(self, losses: Any) -> Tensor:
        """The loss of a task from those of its samples.

        Raises:
            TypeError, ValueError: they are no real floating-point tensor `[samples]`.
        """
        n = len(self.weights)
        if not isinstance(losses, Tensor):
            raise TypeError(f"the loss must return a tensor [samples] where samples have weights, got {_kind(losses)}")
        if tuple(losses.shape) != (n,):
            raise ValueError(
                f"the loss must return one value a sample, [{n}], where samples have weights, got one of shape "
                f"{list(losses.shape)}: without its mean over samples"
            )
        if not losses.is_floating_point():
            raise TypeError(f"the loss must return a real floating-point tensor, got {losses.dtype}")
        return (self.weights * losses).sum() / self.weights.sum()


def _kind(value: Any) -> str:
    return type(value).__name__


def with_weights(y: Any, weights: Tensor | None) -> Any:
    """The target, with its weights if there are any."""
    return y if weights is None else Weighted(y, weights)


def without_padding(x: Tree, y: Any) -> tuple[Tree, Any]:
    """The samples of one task that count: x and its target, where this is Weighted."""
    if not isinstance(y, Weighted):
        return x, y
    counts = y.weights.detach() > 0
    if bool(counts.all()):
        return x, y
    x, y = pytrees.mapped(lambda t: t[counts], (x, y))
    return x, y


def with_padding(prediction: Tree, weights: Tensor) -> Tree:
    """A prediction for the samples of one task that count, with zeros for the others, `[samples, ...]`.

    Raises:
        ValueError: a tensor of it has no axis of samples.
    """
    counts = weights.detach() > 0
    if bool(counts.all()):
        return prediction
    n = int(counts.sum())

    def padded(t: Tensor) -> Tensor:
        if t.shape[:1] != (n,):
            raise ValueError(
                f"the model's output must have an axis of samples, [{n}, ...], where samples have weights, got one of "
                f"shape {list(t.shape)}"
            )
        whole = t.new_zeros((len(counts), *t.shape[1:]))
        return whole.index_put((counts,), t)

    return pytrees.mapped(padded, prediction)
