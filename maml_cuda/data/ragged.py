"""Tasks of different sizes as one meta-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maml_cuda import pytrees
from maml_cuda.pytrees import Tree

_NAMES = ("x_spt", "y_spt", "x_qry", "y_qry")


class RaggedBatch(NamedTuple):
    """A meta-batch of tasks of different sizes: ``maml(*batch.sets, **batch.weights)``.

    Attributes:
        x_spt, y_spt: support sets, padded: tensors ``[tasks, n_support, ...]`` or pytrees of such.
        x_qry, y_qry: query sets, padded: ``[tasks, n_query, ...]``.
        spt_weights, qry_weights: 1 for a sample, 0 for padding: ``[tasks, n_support]``, ``[tasks, n_query]``.
        order: the number of each task among those that were given, int64 ``[tasks]``, on the CPU.
    """

    x_spt: Tree
    y_spt: Tree
    x_qry: Tree
    y_qry: Tree
    spt_weights: Tensor
    qry_weights: Tensor
    order: Tensor

    @property
    def sets(self) -> tuple[Tree, Tree, Tree, Tree]:
        """The first four fields, in the order of FusedMAML's arguments."""
        return self[:4]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of the samples, as keyword arguments of FusedMAML."""
        return {"spt_weights": self.spt_weights, "qry_weights": self.qry_weights}


def collate(tasks: Sequence[tuple[Tree, Tree, Tree, Tree]]) -> RaggedBatch:
    """Pads tasks of any sizes to one meta-batch, those with most samples first.

    The largest tasks come first so that threads of a CPU end at about the same time, and so that parts of a batch can
    be cut to the size of their first task.

    Args:
        tasks: (x_spt, y_spt, x_qry, y_qry) of each task, without an axis of tasks: tensors `[samples, ...]`, or pytrees
            of such tensors. The number of samples may differ from task to task; other sizes and dtypes may not.

    Returns:
        Padded tensors, filled with zeros, and the weights of their samples, in the dtype of the first tensor of x_spt
            with a floating-point dtype (without one: torch's default dtype).

    Raises:
        ValueError, TypeError: there are no tasks; a set has no samples, or tensors of different numbers of samples;
            tasks that do not fit each other.
    """
    if not tasks:
        raise ValueError("collate must have at least 1 task, got none")
    sizes = [_sizes(t, task) for t, task in enumerate(tasks)]
    order = sorted(range(len(tasks)), key=lambda t: -sum(sizes[t]))
    sets = [_padded(name, [tasks[t][i] for t in order], order) for i, name in enumerate(_NAMES)]
    tensors = pytrees.tensors(sets[0])
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0, device=tensors[0].device))
    spt_weights, qry_weights = (
        torch.stack([(torch.arange(max(n), device=like.device) < own).to(like.dtype) for own in n])
        for n in ([sizes[t][i] for t in order] for i in range(2))
    )
    x_spt, y_spt, x_qry, y_qry = sets
    return RaggedBatch(x_spt, y_spt, x_qry, y_qry, spt_weights, qry_weights, torch.tensor(order))


def _sizes(t: int, task: Any) -> tuple[int, int]:
    """The numbers of support and query samples of a task."""
    if not isinstance(task, (tuple, list)) or len(task) != len(_NAMES):
        got = f"{type(task).__name__} of {len(task)}" if isinstance(task, (tuple, list)) else type(task).__name__
        raise TypeError(f"task {t} must be (x_spt, y_spt, x_qry, y_qry), got {got}")
    sizes = []
    for names, parts in ((_NAMES[:2], task[:2]), (_NAMES[2:], task[2:])):
        leaves = [leaf for name, part in zip(names, parts, strict=True) for leaf in pytrees.named_leaves(name, part)]
        tensors = [(name, leaf) for name, leaf in leaves if leaf is not None]
        for name, leaf in tensors:
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                got = "a scalar" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"{name} of task {t} must be a tensor [samples, ...], got {got}")
            if len(leaf) != len(tensors[0][1]):
                raise ValueError(
                    f"{name} of task {t} must have {len(tensors[0][1])} samples like {tensors[0][0]}, got {len(leaf)}"
                )
        if not tensors or len(tensors[0][1]) == 0:
            raise ValueError(f"{names[0]} of task {t} must have at least 1 sample, got none")
        sizes.append(len(tensors[0][1]))
    return sizes[0], sizes[1]


def _padded(name: str, parts: list[Tree], order: list[int]) -> Tree:
    """The sets of all tasks as one pytree of tensors [tasks, samples, ...]."""
    structures = [pytree.tree_structure(part) for part in parts]
    for t, structure in zip(order, structures, strict=True):
        if structure != structures[0]:
            raise ValueError(f"{name} must have one structure in all tasks, got another one in task {t}")
    rows = list(zip(*map(pytree.tree_leaves, parts), strict=True))
    names = [where for where, _ in pytrees.named_leaves(name, parts[0])]
    leaves = [_padded_leaf(where, row, order) for where, row in zip(names, rows, strict=True)]
    return pytree.tree_unflatten(leaves, structures[0])


def _padded_leaf(name: str, row: Sequence[Any], order: list[int]) -> Tensor | None:
    like = row[0]
    for t, leaf in zip(order, row, strict=True):
        if (leaf is None) != (like is None):
            raise ValueError(f"{name} must be None in all tasks or in none, got both, in tasks {order[0]} and {t}")
        if leaf is not None and (leaf.shape[1:], leaf.dtype) != (like.shape[1:], like.dtype):
            raise ValueError(
                f"{name} must have samples of shape {list(like.shape[1:])} and {like.dtype} in all tasks, got "
                f"{list(leaf.shape[1:])} and {leaf.dtype} in task {t}"
            )
    return None if like is None else torch.nn.utils.rnn.pad_sequence(list(row), batch_first=True)
