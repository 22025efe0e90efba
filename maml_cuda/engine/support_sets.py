"""Support sets of which each inner step has its own.

With FusedMAML(per_step_support=True) the user gives them, as [inner_steps, tasks, samples, ...]; with support_batch=b
they are minibatches of one set. Behind this module the sets of a task follow each other, [tasks * inner_steps, samples,
...]: as if each were a task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maml_cuda import minibatches, pytrees
from maml_cuda.engine.binder import in_the_models_dtype, read
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.settings import Settings
from maml_cuda.masks import Seed
from maml_cuda.pytrees import Tree
from maml_cuda.targets import Target


def count(maml: Settings, steps: int) -> int:
    """The number of support sets of a task, for so many inner steps.

    Raises:
        ValueError: each step has its own, and there is no step.
    """
    if maml._options.support_batch is not None:
        return max(steps, 1)
    if not maml._options.per_step_support:
        return 1
    if steps == 0:
        raise ValueError("steps must be at least 1 with per_step_support=True, got 0")
    return steps


def in_order(
    maml: Settings, seed: Seed, steps: int, x: Tree, y: Target = None, weights: Tensor | None = None
) -> tuple[Tree, Target, Tensor | None]:
    """The support sets of `steps` inner steps, those of a task after each other.

    Args:
        seed: of the minibatches.

    Raises:
        ValueError: there is not one set for each of the steps; some leaf has another number of tasks or samples.
    """
    if (batch := maml._options.support_batch) is not None:
        return _drawn(batch, seed, max(steps, 1), x, y, weights)
    if not maml._options.per_step_support:
        return x, y, weights
    given = [pair for name, tree in (("x_spt", x), ("y_spt", y)) for pair in pytrees.named_leaves(name, tree)]
    tensors = [(name, t) for name, t in [*given, ("spt_weights", weights)] if isinstance(t, Tensor)]
    for name, t in tensors:
        if t.dim() < 2 or (name in ("x_spt", "spt_weights") and t.dim() < 3):
            raise ValueError(
                f"{name} must have shape [inner_steps, tasks, samples, ...] with per_step_support=True, got "
                f"{list(t.shape)}"
            )
        if len(t) != steps:
            raise ValueError(
                f"{name} must have {steps} sets, one for each inner step (per_step_support=True), got {len(t)}"
            )
        first, like = tensors[0]
        if t.shape[1] != like.shape[1]:
            raise ValueError(f"{name} must have {like.shape[1]} tasks like {first}, got {t.shape[1]}")
    x, y, weights = pytrees.mapped(lambda t: t.transpose(0, 1).flatten(0, 1), (x, y, weights))
    return x, y, weights


def _drawn(
    batch: int, seed: Seed, steps: int, x: Tree, y: Target, weights: Tensor | None
) -> tuple[Tree, Target, Tensor | None]:
    if not pytrees.tensors(x):
        return x, y, weights  # which `read` refuses
    minibatches.check(batch, ("x_spt", x), ("y_spt", y), ("spt_weights", weights))
    tasks, samples = pytrees.tensors(x)[0].shape[:2]
    chosen = torch.ops.maml_cuda_data.minibatches(seed(), tasks, samples, batch, steps)
    x, y, weights = minibatches.drawn((x, y, weights), chosen)
    return x, y, weights


def read_in_order(
    maml: Settings, binding: Binding, sets: int, x: Tree, y_name: str | None = None, y: Target = None
) -> Tree:
    """`read` for support sets, so many a task."""
    if sets == 1:
        return read(maml, binding, "x_spt", x, y_name, y)
    of_y = None if y_name is None else f"{y_name} of an inner step"  # the sets are parts of the same tensors
    read(maml, binding, "x_spt of an inner step", first(x, sets), of_y, first(y, sets))
    return in_the_models_dtype(binding, x)


def first(tree: Tree, sets: int) -> Tree:
    """The set of the first inner step, [tasks, samples, ...]."""
    return pytrees.mapped(lambda t: t[::sets], tree)


def part(tree: Tree, sets: int, begin: int, end: int) -> Tree:
    """The sets of these inner steps, in order; the one set of a task that has the same for all."""
    if sets == 1:
        return tree
    return pytrees.mapped(lambda t: t.unflatten(0, (-1, sets))[:, begin:end].flatten(0, 1), tree)


def by_task(tree: Tree, sets: int) -> Tree:
    """[tasks, sets, samples, ...]; unchanged where a task has one set for all steps."""
    return tree if sets == 1 else pytrees.mapped(lambda t: t.unflatten(0, (-1, sets)), tree)
