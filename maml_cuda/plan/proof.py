"""The proof of a plan: on random data it computes what its model computes, or the sentence why it is not trusted.

A plan comes from reading a model's code, and code can be misread. So before a plan serves samples of a shape, three of
its results are compared with those of plain autograd on a copy of the model in float64: the prediction, the gradient of
the loss, and one Hessian-vector product. The copy has the model's modules and flags. Its parameters are drawn at random
and its buffers are varied, so that neither a layer that starts at zero nor a weight that has become infinite can hide a
difference.

Nothing here knows how the plan was made: a proof needs the model and functions that compute the three results.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn

from maml_cuda import pytrees
from maml_cuda.batch_norm import at_step
from maml_cuda.losses import LOSSES
from maml_cuda.policies import mean_of
from maml_cuda.targets import PolicyTarget, Target
from maml_cuda.torch_wrappers import uncompiled

# Relative. Of 57,000 comparisons in the tests, rounding in float64 leaves 2e-9 in the worst and less than 1e-10 in all
# but 19; a misread forward is off by 1e-3 and more.
TOLERANCE = 1e-7
SMALL = 1e-5  # what is smaller than this is compared absolutely; all values here are of order 1

Named = Mapping[str, Tensor]


class Results(Protocol):
    """What is to be proven, at parameters and buffers name -> [1, *shape] of one task, in float64 on the CPU. Per-step
    layers are at step 0. A gradient and a product are by the name of each trainable parameter."""

    def predict(self, fast: Named, x: Tensor) -> Any: ...

    def loss_and_grad(self, fast: Named, x: Tensor, y: Target) -> tuple[Tensor, Named]: ...

    def hvp(self, fast: Named, x: Tensor, y: Target, v: Named) -> Named: ...


def why_not(
    model: nn.Module, loss: str, results: Results, sample: tuple[int, ...], samples: int, second_order: bool
) -> str:
    """The sentence why `results` are not those of the model on that many samples of this shape, or nothing.

    second_order: compare a Hessian-vector product too.
    """
    # A new thread has none of the caller's modes: autocast, no_grad, inference, devices, fake tensors, transforms.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_compare, model, loss, results, sample, samples, second_order).result()


def _compare(
    model: nn.Module, loss: str, results: Results, sample: tuple[int, ...], samples: int, second_order: bool
) -> str:
    generator = Generator().manual_seed(0)
    try:
        with _generators_put_back(), uncompiled():  # a second derivative is not compiled
            own = _copied(model, generator)
            state = {**dict(own.named_parameters()), **dict(own.named_buffers())}
            fast = {name: t.detach().clone().unsqueeze(0) for name, t in state.items()}
            x = torch.randn(samples, *sample, dtype=torch.float64, generator=generator)
            expected = _Expected(own, loss, x.clone(), second_order, generator)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"it could not be compared with the model itself, which on random data raises {reason}"
    x, y = x.unsqueeze(0), pytrees.mapped(lambda t: t.unsqueeze(0), expected.target)
    prediction = results.predict(fast, x)
    losses, gradient = results.loss_and_grad(fast, x, y)
    pairs = [
        ("prediction", _first(_parts(prediction)), _parts(expected.prediction)),
        ("loss", {"": losses[0]}, {"": expected.loss}),
        ("gradient", _first(gradient), expected.gradient),
    ]
    if second_order:
        v = {name: t.unsqueeze(0) for name, t in expected.direction.items()}
        pairs.append(("Hessian-vector product", _first(results.hvp(fast, x, y, v)), expected.product))
    for what, got, wanted in pairs:
        if difference := _difference(got, wanted):
            return (
                "on random data the fused layers do not compute what forward computes: "
                f"the {what}{difference}, so its code has been misread"
            )
    return ""


class _Expected:
    """The model's own results, by plain autograd; `own` is its float64 copy."""

    def __init__(self, own: nn.Module, loss: str, x: Tensor, second_order: bool, generator: Generator) -> None:
        with at_step(own, 0):
            self.prediction = own(x)
        self.target = _target(loss, self.prediction, generator)
        self.loss = LOSSES[loss](self.prediction, self.target)
        trainable = {name: p for name, p in own.named_parameters() if p.requires_grad}
        at = list(trainable.values())
        grads = torch.autograd.grad(self.loss, at, create_graph=second_order, materialize_grads=True)
        self.gradient = dict(zip(trainable, grads, strict=True))
        if not second_order:
            return
        self.direction = {name: _normal(p.shape, generator) for name, p in trainable.items()}
        along = torch.stack([(g * self.direction[name]).sum() for name, g in self.gradient.items()]).sum()
        product = [torch.zeros_like(p) for p in at]
        if along.requires_grad:
            product = list(torch.autograd.grad(along, at, materialize_grads=True))
        self.product = dict(zip(trainable, product, strict=True))


def _copied(model: nn.Module, generator: Generator) -> nn.Module:
    """A copy in float64 on the CPU. What it holds beside modules, tensors and containers is shared with the model where
    it cannot be copied (locks, files, loggers)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(_drawn(p, generator), p.requires_grad)
                memo[id(p)].__dict__.update(p.__dict__)  # what the user has noted on it
        for t in [*module._buffers.values(), *vars(module).values()]:
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = _varied(t, generator)
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:
        held = [value for module in model.modules() for value in vars(module).values()]
        for value in held:  # grows meanwhile
            if isinstance(value, dict):
                held += value.values()
            elif isinstance(value, (list, tuple, set)):
                held += value
            elif not isinstance(value, (Tensor, nn.Module)):
                memo[id(value)] = value
        return copy.deepcopy(model, memo)


def _drawn(p: Tensor, generator: Generator) -> Tensor:
    """In place of a parameter: a matrix that keeps a signal's size; numbers around 0.5, as both scales and shifts."""
    if p.dim() > 1:
        root: float = max(1, p[0].numel()) ** 0.5
        return _normal(p.shape, generator) / root
    return 0.5 + 0.5 * _normal(p.shape, generator)


def _varied(t: Tensor, generator: Generator) -> Tensor:
    """In place of a buffer: near what it is, and no number less than 0 that was not (a variance)."""
    t = t.detach().cpu()
    if not t.is_floating_point():
        return t.clone()
    t = t.double()
    relative, absolute = (torch.rand(t.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return torch.where(t.isfinite(), t * (1 + relative / 4) + absolute / 10, 1 + relative)


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _target(loss: str, prediction: Any, generator: Generator) -> Target:
    """A target [n, ...] for a prediction."""
    mean = mean_of(prediction)
    if loss == "mse":
        return _normal(mean.shape, generator)
    classes = torch.randint(mean.shape[-1], mean.shape[:1], generator=generator)
    if loss == "cross_entropy":
        return classes
    actions = classes if loss == "categorical_policy_gradient" else _normal(mean.shape, generator)
    return PolicyTarget(actions, _normal(mean.shape[:1], generator))


def _parts(prediction: Any) -> dict[str, Tensor]:
    """The tensors of a prediction."""
    return {str(i): t for i, t in enumerate(prediction if isinstance(prediction, tuple) else (prediction,))}


def _first(by_task: Named) -> dict[str, Tensor]:
    """Those of the first task."""
    return {name: t[0] for name, t in by_task.items()}


def _difference(got: Named, expected: Named) -> str:
    """How they differ by more than rounding, or nothing."""
    total = torch.stack([e.detach().norm() for e in expected.values()]).norm().item()
    for name, e in expected.items():
        g, e = got[name].detach(), e.detach()
        of = f" of {name}" if name and len(expected) > 1 else ""
        if g.shape != e.shape:
            return f"{of} has shape {list(g.shape)}, not {list(e.shape)}"
        error = (g - e).norm().item() / max(e.norm().item(), 1e-4 * total, SMALL)
        if not error <= TOLERANCE:  # a NaN is a difference too
            return f"{of} is off by {100 * error:.2g} %"
    return ""


@contextmanager
def _generators_put_back() -> Iterator[None]:
    """Every global random generator is afterwards what it was; one that nobody has used is not touched."""
    generators: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
    ]
    before = [get() for get, _ in generators]
    try:
        yield
    finally:
        for (get, put_back), state in zip(generators, before, strict=True):
            if pickle.dumps(get()) != pickle.dumps(state):
                put_back(state)
