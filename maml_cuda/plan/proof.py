"""Compares a plan with its model on random data.

A plan comes from reading a model's code, and code can be misread. So before a plan is used for samples of a shape, its
results are compared with those of plain autograd on a copy of the model in float64: the prediction, the gradient of the
loss, and one Hessian-vector product.

The copy has the model's modules and training flags, but random parameters, and buffers with small random changes. With
the model's own values, a layer that is initialised to zero, or an infinite weight, could hide a difference.

This module does not depend on how the plan was made. It needs the model, and functions that compute the three results.
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

# The largest relative error. In 57,000 comparisons by the tests, the largest error from rounding in float64 was 2e-9,
# and all but 19 were less than 1e-10. A misread forward has an error of 1e-3 or more.
TOLERANCE = 1e-7
SMALL = 1e-5  # a norm below this counts as this one in a relative error; values here are of order 1

Named = Mapping[str, Tensor]  # by name of a parameter or buffer


class Results(Protocol):
    """The functions that a plan provides for the comparison, in float64 on the CPU, for one task.

    fast: parameters and buffers, name -> [1, *shape]; per-step layers are at step 0.
    x, y: [1, samples, ...].
    Gradients and Hessian-vector products are name -> [1, *shape], for each trainable parameter.
    """

    def predict(self, fast: Named, x: Tensor) -> Any: ...

    def loss_and_grad(self, fast: Named, x: Tensor, y: Target) -> tuple[Tensor, Named]: ...

    def hvp(self, fast: Named, x: Tensor, y: Target, v: Named) -> Named: ...


def why_not(
    model: nn.Module, loss: str, results: Results, sample: tuple[int, ...], samples: int, second_order: bool
) -> str:
    """The reason why a plan must not be used, or "" if its results are those of the model.

    Args:
        loss: the name of the loss.
        results: the plan's results.
        sample: the shape of one sample.
        samples: the number of samples.
        second_order: compare a Hessian-vector product too.
    """
    # A new thread has none of the caller's modes (autocast, no_grad, inference, devices, fake tensors, transforms).
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_compare, model, loss, results, sample, samples, second_order).result()


def _compare(
    model: nn.Module, loss: str, results: Results, sample: tuple[int, ...], samples: int, second_order: bool
) -> str:
    generator = Generator().manual_seed(0)
    try:
        with _generators_restored(), uncompiled():  # compiled modules cannot be differentiated twice
            copied = _copied(model, generator)
            state = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
            fast = {name: t.detach().clone().unsqueeze(0) for name, t in state.items()}
            x = torch.randn(samples, *sample, dtype=torch.float64, generator=generator)
            expected = _Expected(copied, loss, x.clone(), second_order, generator)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"it could not be compared with the model on random data: {reason}"
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
                f"the {what}{difference}; maml_cuda has misread the code of forward"
            )
    return ""


class _Expected:
    """The results of a model by plain autograd, and the target and direction for which they were computed."""

    def __init__(self, model: nn.Module, loss: str, x: Tensor, second_order: bool, generator: Generator) -> None:
        with at_step(model, 0):
            self.prediction = model(x)
        self.target = _target(loss, self.prediction, generator)
        self.loss = LOSSES[loss](self.prediction, self.target)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters = list(trainable.values())
        grads = torch.autograd.grad(self.loss, parameters, create_graph=second_order, materialize_grads=True)
        self.gradient = dict(zip(trainable, grads, strict=True))
        if not second_order:
            return
        self.direction = {name: _normal(p.shape, generator) for name, p in trainable.items()}
        slope = torch.stack([(g * self.direction[name]).sum() for name, g in self.gradient.items()]).sum()
        product = [torch.zeros_like(p) for p in parameters]
        if slope.requires_grad:
            product = list(torch.autograd.grad(slope, parameters, materialize_grads=True))
        self.product = dict(zip(trainable, product, strict=True))


def _copied(model: nn.Module, generator: Generator) -> nn.Module:
    """A copy of the model in float64 on the CPU, with random parameters and changed buffers.

    The copy shares with the model those of its other attributes that cannot be copied (locks, files, loggers).
    """
    memo: dict[int, Any] = {}  # of copy.deepcopy: id of an object -> its copy
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(_random_parameter(p, generator), p.requires_grad)
                memo[id(p)].__dict__.update(p.__dict__)  # attributes that the user has set on it
        for t in [*module._buffers.values(), *vars(module).values()]:
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = _changed_buffer(t, generator)
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:
        attributes = [value for module in model.modules() for value in vars(module).values()]
        for value in attributes:  # the list grows in the loop, by the items of containers
            if isinstance(value, dict):
                attributes += value.values()
            elif isinstance(value, (list, tuple, set)):
                attributes += value
            elif not isinstance(value, (Tensor, nn.Module)):
                memo[id(value)] = value
        return copy.deepcopy(model, memo)


def _random_parameter(p: Tensor, generator: Generator) -> Tensor:
    """Random values for a parameter.

    Weights are scaled so that outputs have the size of inputs. Other parameters, which may be scales or shifts, have
    mean 0.5 and standard deviation 0.5.
    """
    if p.dim() > 1:
        root: float = max(1, p[0].numel()) ** 0.5
        return _normal(p.shape, generator) / root
    return 0.5 + 0.5 * _normal(p.shape, generator)


def _changed_buffer(t: Tensor, generator: Generator) -> Tensor:
    """The values of a buffer with small random changes. Numbers that are at least 0, such as variances, stay so."""
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
    """The tensors of a prediction, by number."""
    return {str(i): t for i, t in enumerate(prediction if isinstance(prediction, tuple) else (prediction,))}


def _first(by_task: Named) -> dict[str, Tensor]:
    """The tensors of the first task."""
    return {name: t[0] for name, t in by_task.items()}


def _difference(got: Named, expected: Named) -> str:
    """Text that says how two results differ by more than rounding, or ""."""
    total = torch.stack([e.detach().norm() for e in expected.values()]).norm().item()
    for name, e in expected.items():
        g, e = got[name].detach(), e.detach()
        of = f" of {name}" if name and len(expected) > 1 else ""
        if g.shape != e.shape:
            return f"{of} has shape {list(g.shape)}, not {list(e.shape)}"
        error = (g - e).norm().item() / max(e.norm().item(), 1e-4 * total, SMALL)
        if not error <= TOLERANCE:  # in this form, a NaN is a difference too
            return f"{of} is off by {100 * error:.2g} %"
    return ""


@contextmanager
def _generators_restored() -> Iterator[None]:
    """A context that restores the state of the global random generators. One that was not used is not set."""
    generators: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
    ]
    before = [get() for get, _ in generators]
    try:
        yield
    finally:
        for (get, restore), state in zip(generators, before, strict=True):
            if pickle.dumps(get()) != pickle.dumps(state):
                restore(state)
