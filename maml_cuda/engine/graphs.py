"""What the graph of a computation holds: leaf tensors, and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from maml_cuda.torch_private import memory_of

_LEAF: Any = type(torch.autograd.graph.get_gradient_edge(torch.zeros((), requires_grad=True)).node)  # AccumulateGrad


def nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graphs of these tensors, once."""
    pending = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                pending.append(before)


def leaves(roots: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that require grad and on which these tensors depend."""
    return walked(roots)[0]


def edge(t: Tensor) -> Any:
    """The node at which the graphs of what is computed from a tensor that requires grad reach it."""
    return torch.autograd.graph.get_gradient_edge(t).node if t.grad_fn is None else t.grad_fn


def walked(roots: Iterable[Tensor], known: Iterable[Any] = ()) -> tuple[list[Tensor], set[Any]]:
    """The leaf tensors that require grad and on which these tensors depend other than by the known nodes; and the nodes
    of their graphs."""
    roots = list(roots)
    found = [t for t in roots if t.grad_fn is None and t.requires_grad]
    pending: list[Any] = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = {*known, *pending}
    while pending:  # as `nodes`, but it is called for every graph
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                if type(node) is _LEAF:
                    found.append(node.variable)
                else:
                    pending.append(node)
    return found, seen


def differentiable_once(nodes: Iterable[Any]) -> bool:
    """Whether one of the nodes is that which torch puts into the gradient of an autograd.Function whose backward is
    marked ``@once_differentiable``. No edge leads from it to the inputs: torch.autograd.grad leaves the term out, in
    silence.
    """
    return any(node.name() == "torch::autograd::Error" for node in nodes)


def saved_bytes(roots: Iterable[Tensor], given: Iterable[Tensor]) -> int:
    """The memory of the tensors that the graphs of `roots` keep for a backward, without that of the given tensors."""
    counted = {memory_of(t) for t in given}
    total = 0
    for node in nodes(roots):
        for t in _saved(node):
            if t.layout is torch.strided and (memory := memory_of(t)) not in counted:
                counted.add(memory)
                total += t.untyped_storage().nbytes()
    return total


def _saved(node: Any) -> list[Tensor]:
    found: list[Tensor] = []
    kind: Any = type(node)
    for name in _names(kind):
        try:
            value = getattr(node, name)
        except RuntimeError:  # changed in place, of which the backward tells
            continue
        found += [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor)]
    return found


@lru_cache(maxsize=1024)
def _names(kind: Any) -> tuple[str, ...]:
    """The attributes in which a kind of node keeps tensors."""
    if hasattr(kind, "saved_tensors"):
        return ("saved_tensors",)
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, hooks of these leaf tensors are not called: they are for the whole gradient, not for parts of it."""
    held = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in held:
            hooks.update(own)
