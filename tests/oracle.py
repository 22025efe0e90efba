"""An independent meta-gradient: a plain loop in float64 that shares no code with the package.

A task's parameters take the places of those of a copy of the model, wherever it holds them. Every forward gets new leaf
tensors of x, and the buffers that the model had at first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": lambda prediction, target: ((prediction - target) ** 2).mean(),
}


class WeightNorm(TorchFunctionMode):
    """Weight normalisation from its formula: torch's second derivative takes the norms for constants."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._weight_norm:
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return function(*args, **(kwargs or {}))


class Plain:
    """A float64 (complex128) copy of a model, called with given tensors as its parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.places = [
            (m, key, names[id(p)]) for m in self.model.modules() for key, p in m._parameters.items() if p is not None
        ]
        self.parameters = {n: in_double(p.detach()) for n, p in self.model.named_parameters()}
        self.trainable = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.buffers = [(m, key, in_double(b)) for m in self.model.modules() for key, b in m._buffers.items()]
        self.recurrent = [m for m in self.model.modules() if isinstance(m, nn.RNNBase)]

    def __call__(self, parameters: Mapping[str, Tensor], *x: Any) -> Any:
        for m, key, name in self.places:
            m._parameters[key] = parameters[name]
        for m in self.recurrent:  # which keep a list of them too
            m._flat_weights = [getattr(m, name) for name in m._flat_weights_names]
        for m, key, b in self.buffers:
            setattr(m, key, None if b is None else b.clone())
        with WeightNorm(), sdpa_kernel(SDPBackend.MATH):  # the one attention that has second derivatives
            return self.model(*tree_map_only(Tensor, lambda t: t.detach().clone(), x))


def in_double(tree: Any) -> Any:
    """Casts floating-point tensors to float64 and complex ones to complex128; others stay."""

    def double(t: Tensor) -> Tensor:
        return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t

    return tree_map_only(Tensor, double, tree)


def tasks_of(*trees: Any) -> Iterator[tuple[Any, ...]]:
    """Each task's part of trees whose tensors are [tasks, ...], in float64."""
    for t in range(len(tree_leaves(trees)[0])):
        yield tuple(tree_map_only(Tensor, lambda leaf, t=t: in_double(leaf[t]), tree) for tree in trees)


def adapted_by(
    model: Plain, loss: Callable[..., Tensor], theta: dict[str, Tensor], names: Iterable[str], x: Any, y: Any,
    inner_lr: float, steps: int, first_order: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """One task's parameters after the inner loop, with their graph."""
    phi = theta
    for _ in range(steps):
        value = loss(model(phi, x), y)
        grads = torch.autograd.grad(value, [phi[n] for n in names], create_graph=not first_order)
        phi = {**phi, **{n: phi[n] - inner_lr * g for n, g in zip(names, grads, strict=True)}}
    return phi


def meta_gradient(
    model: nn.Module,
    loss: str | Callable[..., Tensor],
    x_spt: Any,
    y_spt: Any,
    x_qry: Any,
    y_qry: Any,
    inner_lr: float,
    steps: int,
    first_order: bool = False,
    adapted: Iterable[str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean query loss over tasks and its gradient by each trainable parameter that it depends on.

    Args:
        model: its parameters, buffers and flags are only read.
        loss: "cross_entropy", "mse" or (prediction, target) -> scalar.
        x_spt, y_spt, x_qry, y_qry: [tasks, samples, ...], or any pytree of such tensors.
        adapted: names of the parameters that the inner loop changes; None: the trainable ones.
    """
    plain, function = Plain(model), LOSSES[loss] if isinstance(loss, str) else loss
    names = plain.trainable if adapted is None else list(adapted)
    leaves = {n: p.clone().requires_grad_(n in plain.trainable) for n, p in plain.parameters.items()}
    losses = []
    with torch.enable_grad():
        for xs, ys, xq, yq in tasks_of(x_spt, y_spt, x_qry, y_qry):
            phi = adapted_by(plain, function, leaves, names, xs, ys, inner_lr, steps, first_order)
            losses.append(function(plain(phi, xq), yq))
        mean = torch.stack(losses).mean()
        grads = torch.autograd.grad(mean, [leaves[n] for n in plain.trainable], allow_unused=True)
    return mean.detach(), {n: g for n, g in zip(plain.trainable, grads, strict=True) if g is not None}


def adapt(
    model: nn.Module,
    loss: str | Callable[..., Tensor],
    x: Any,
    y: Any,
    inner_lr: float,
    steps: int,
    adapted: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """name -> [tasks, *shape] of the adapted parameters, detached."""
    plain, function = Plain(model), LOSSES[loss] if isinstance(loss, str) else loss
    names = plain.trainable if adapted is None else list(adapted)
    theta = {n: p.clone().requires_grad_(n in names) for n, p in plain.parameters.items()}
    with torch.enable_grad():
        tasks = [adapted_by(plain, function, theta, names, *task, inner_lr, steps, True) for task in tasks_of(x, y)]
    return {n: torch.stack([phi[n] for phi in tasks]).detach() for n in names}


def predict(model: nn.Module, fast: Mapping[str, Tensor], x: Any) -> Any:
    """Each task's prediction at its own parameters [tasks, *shape], as a list; differentiable in `fast`."""
    plain = Plain(model)
    with torch.enable_grad():
        return [
            plain({n: in_double(p[t]) for n, p in fast.items()}, task) for t, (task,) in enumerate(tasks_of(x))
        ]  # fmt: skip
