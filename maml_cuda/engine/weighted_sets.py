"""The weights of samples of a call: their checks, and the sets in the form in which fused layers take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.engine import data_checks
from maml_cuda.engine.autograd import support_gradient
from maml_cuda.engine.problem import is_double, problem_of
from maml_cuda.engine.program import Program
from maml_cuda.engine.settings import Settings
from maml_cuda.losses import OF_SAMPLES, Loss
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import with_weights
from maml_cuda.targets import POLICY_LOSSES

_OF_WEIGHTS = ("unrolled", "truncated")  # the meta-gradients that are those of weights too


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


def _of_tasks(task_weights: Tensor | None, sets: int, of_task: int = 1) -> Tensor | float:
    """The weights in the loss of a call of the tasks of so many sets."""
    if task_weights is None:
        return of_task / sets
    return task_weights.repeat_interleave(of_task).unsqueeze(1)


def not_learned(maml: Settings, **given: Tensor | None) -> None:
    """Raises ValueError where weights require grad, and the meta-gradient that was chosen has none of them."""
    how = maml._options.meta_gradient.kind
    for name, weights in given.items():
        if weights is not None and weights.requires_grad and torch.is_grad_enabled() and how not in _OF_WEIGHTS:
            raise ValueError(f'{name} must not require grad with meta_gradient="{how}", got requires_grad=True')


class Packed(NamedTuple):
    """A set as fused layers take it: the samples of each task that count stand before its padding, and padding repeats
    the first of them, so that its values are as harmless as theirs.

    Attributes:
        x, y, weights: [tasks, n, ...]; weights are None where samples have none.
        order: the sample at each place [tasks, n]; None: they are where they were.
        counts: how many samples of each task count, int64 [tasks]; None: all.
    """

    x: Tree
    y: Any
    weights: Tensor | None = None
    order: Tensor | None = None
    counts: Tensor | None = None

    def is_learned(self, loss: Loss) -> bool:
        """Whether the weights are to receive a gradient, which they do not as part of what the loss compares."""
        return self.weights is not None and self.weights.requires_grad and isinstance(loss, str)

    def target(self, program: Program) -> list[Tensor | None]:
        """The target as the ops take it. Its weights have the graph that they were given with. A loss of the user's own
        has them in what it compares, too."""
        if self.weights is None:
            return program.target(self.y)
        y = self.y if isinstance(program.loss, str) else with_weights(self.y, self.weights)
        return [program.target(y)[0], self.weights]

    def unpacked(self, prediction: Tensor) -> Tensor:
        """A prediction [tasks, n, features], in which padding has zeros, with each sample where it was."""
        if self.order is None:
            return prediction
        return prediction.gather(1, self.order.argsort(1).unsqueeze(-1).expand_as(prediction))

    def query_gradient(
        self, loss: str, prediction: Tensor, target: Tensor, task_weights: Tensor | None
    ) -> Tensor:  # fmt: skip
        """The gradient of a meta-step's loss in `weights` of its query samples: the weight of the task times
        (l_n - L) / sum_n w_n.

        Args:
            loss: a name of ours.
            prediction, target: on the query sets at phi_K, as the ops take them.
        """
        assert self.weights is not None
        weights = self.weights.detach()
        z, y = prediction.flatten(0, 1), target.flatten(0, 1)
        losses = OF_SAMPLES[loss](z, y.reshape(z.shape) if loss == "mse" else y).view_as(weights)
        sums = weights.sum(1, keepdim=True)
        gradient = (losses - (weights * losses).sum(1, keepdim=True) / sums) / sums
        return torch.where(weights > 0, gradient, 0) * _of_tasks(task_weights, len(weights))

    def support_gradient(self, slopes: Tensor, task_weights: Tensor | None, sets: int) -> Tensor:
        """The gradient of a meta-step's loss in `weights` of its support samples, from their slopes (autograd.py).

        sets: of a task, which follow each other.
        """
        assert self.weights is not None
        gradient = support_gradient(slopes, self.weights.detach())
        return gradient * _of_tasks(task_weights, len(gradient), sets)

    def first(self) -> Tree:
        """x of the first task alone, [1, samples, ...]."""
        n = None if self.counts is None else int(self.counts[0])
        return pytrees.mapped(lambda t: t[:1, :n], self.x)


def packed(x: Tree, y: Any, weights: Tensor | None) -> Packed:
    """A set of a call as fused layers take it."""
    if weights is None:
        return Packed(x, y)
    counted = weights > 0
    if bool(counted.all()):
        return Packed(x, y, weights)
    order, counts = counted.logical_not().argsort(dim=1, stable=True), counted.sum(1)
    places = torch.arange(weights.shape[1], device=weights.device)
    is_set = places < counts.unsqueeze(1)
    taken, tasks = torch.where(is_set, order, order[:, :1]), torch.arange(len(weights), device=weights.device)
    x, y = pytrees.mapped(lambda t: t[tasks.unsqueeze(1), taken], (x, y))
    weights = torch.where(is_set, weights.gather(1, order), 0)
    return Packed(x, y, weights, None if bool((order == places).all()) else order, counts)


def sizes(weights: Tensor | None) -> list[int]:
    """The numbers of samples that tasks have, where there is padding."""
    counted = None if weights is None else weights > 0
    return [] if counted is None or bool(counted.all()) else counted.sum(1).unique().tolist()


def why_not(maml: Settings, support: Any, query: Any) -> str:
    """The reason why fused layers do not take the weights of the samples of these sets, or ""."""
    sets = [each for each in (support, query) if each is not None and each.weights is not None]
    if not sets:
        return ""
    if torch.compiler.is_compiling():
        return "weights of samples are not looked at inside torch.compile"
    learned = [each is support for each in sets if torch.is_grad_enabled() and each.weights.requires_grad]
    if isinstance(maml.loss, str) and not all(learned) and maml._query_weights.steps:
        return "weights of query samples require grad, and there are query losses of several inner steps"
    return ""


def why_not_padding(program: Program, x: Tree) -> str:
    """The reason why a program does not leave out padding in x, or ""."""
    if not isinstance(program.loss, str):
        return "a loss of your own does not leave out padding"
    numbers = program.values(x)
    sample, n = tuple(numbers.shape[2:]), numbers.shape[1]
    if problem_of(program.text, "predict", sample, 0, n, 0, False, is_double(numbers)).core.combines_samples:
        return "the model combines the samples of a set, of which some are padding"
    return ""
