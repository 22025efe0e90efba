"""Pytrees of tensors (torch.utils._pytree): nested tuples, lists, dicts and other types that are registered there.

x, y and, on the general path, a model's output may be pytrees. A tensor is a pytree with one leaf. The first axis of
every leaf counts tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Categorical, Distribution, Independent, MultivariateNormal, Normal
from torch.utils import _pytree as pytree

Tree = Any

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)  # leaves that must be the same in all tasks
# The parameters from which a distribution is made again.
_PARAMETERS: dict[type, tuple[str, ...]] = {
    Normal: ("loc", "scale"),
    MultivariateNormal: ("loc", "scale_tril"),
    Beta: ("concentration1", "concentration0"),
}


def mapped(f: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The tree with f applied to each tensor. Other leaves are unchanged."""
    return f(tree) if isinstance(tree, Tensor) else pytree.tree_map_only(Tensor, f, tree)


def tensors(tree: Tree) -> list[Tensor]:
    """The leaves that are tensors."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def named_leaves(name: str, tree: Tree) -> list[tuple[str, Any]]:
    """Each leaf with its name, for example x['mask'] or x[0] if the name of the tree is x."""
    return [(name + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def tasks(tree: Tree) -> int:
    """The number of tasks."""
    return len(tensors(tree)[0])


def of_task(tree: Tree, task: int) -> Tree:
    """The tree of one task: each tensor at index `task` of its first axis."""
    return tree[task] if isinstance(tree, Tensor) else mapped(lambda t: t[task], tree)


def stacked(name: str, parts: Sequence[Tree]) -> Tree:
    """Stacks what a model returns for each task into one pytree.

    Tensors become [tasks, ...]. None, numbers and strings must be the same for all tasks. Distributions (Normal,
    MultivariateNormal, Beta, Categorical, Bernoulli, Independent) get parameters [tasks, ...].

    Args:
        name: of the tree, for error messages.
        parts: one pytree for each task.

    Raises:
        TypeError: a leaf is of another type.
        ValueError: structures, types, shapes or constants differ between tasks.
    """
    return _combined(name, torch.stack, parts)


def detached(name: str, part: Tree) -> Tree:
    """What a model returns for one task, detached. Raises the errors of `stacked`."""
    return _combined(name, lambda row: row[0].detach(), [part])


def _combined(name: str, f: Callable[[list[Tensor]], Tensor], parts: Sequence[Tree]) -> Tree:
    """One tree from the trees of all tasks: f gets the tensors of all tasks at one position."""
    structures = [pytree.tree_structure(part) for part in parts]
    for task, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(f"{name} must have one structure in all tasks, got another one in task {task}")
    names = [where for where, _ in named_leaves(name, parts[0])]
    rows = zip(*map(pytree.tree_leaves, parts), strict=True)
    leaves = [_combined_leaf(where, f, list(row)) for where, row in zip(names, rows, strict=True)]
    return pytree.tree_unflatten(leaves, structures[0])


def _combined_leaf(name: str, f: Callable[[list[Tensor]], Tensor], row: list[Any]) -> Any:
    """One leaf from the leaves of all tasks at one position. Raises the errors of `stacked`."""
    first = row[0]
    for task, leaf in enumerate(row):
        if type(leaf) is not type(first):
            got = f"{type(first).__name__} and, in task {task}, {type(leaf).__name__}"
            raise ValueError(f"{name} must be of one type in all tasks, got {got}")
    if isinstance(first, Tensor):
        for task, leaf in enumerate(row):
            if leaf.shape != first.shape:
                got = f"{list(first.shape)} and, in task {task}, {list(leaf.shape)}"
                raise ValueError(f"{name} must have one shape in all tasks, got {got}")
        return f(row)
    if isinstance(first, Distribution):
        arguments = [arguments_of(name, d) for d in row]
        combined = {
            what: _combined_leaf(f"{name}.{what}", f, [of_one[what] for of_one in arguments]) for what in arguments[0]
        }
        return type(first)(**combined, validate_args=first._validate_args)
    if not isinstance(first, _CONSTANTS):
        how = "; torch.export.register_dataclass makes it a pytree" if is_dataclass(first) else ""
        got = f"{type(first).__name__}{how}"
        raise TypeError(f"{name} must be a tensor, or a tuple, list or dict of tensors (any pytree), got {got}")
    for task, leaf in enumerate(row):
        if leaf != first:
            raise ValueError(f"{name} must be the same in all tasks, got {first!r} and, in task {task}, {leaf!r}")
    return first


def arguments_of(name: str, d: Any) -> dict[str, Any]:
    """The arguments that make this distribution again.

    Raises:
        TypeError: the distribution is of another type than those that are known.
    """
    if type(d) is Independent:
        return {"base_distribution": d.base_dist, "reinterpreted_batch_ndims": d.reinterpreted_batch_ndims}
    if type(d) in (Categorical, Bernoulli):
        given = "probs" if vars(d).get("probs") is d._param else "logits"
        return {given: d._param}
    if type(d) not in _PARAMETERS:
        raise TypeError(
            f"{name} must be a tensor, or a tuple, list or dict of tensors (any pytree), got the distribution "
            f"{type(d).__name__}, which cannot be stacked over tasks: return its parameters as tensors, and make the "
            "distribution in the loss"
        )
    return {what: getattr(d, what) for what in _PARAMETERS[type(d)]}
