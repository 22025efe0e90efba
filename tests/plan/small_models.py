"""Small models around one layer or expression, and comparisons of FusedMAML with the reference on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from maml_cuda.losses import Loss
from tests import conftest, oracle

CLASSES, RATE, STEPS = 4, 0.3, 2
VECTOR, IMAGE = (3,), (2, 7, 6)


class Net(nn.Module):
    """A module of the given parts, of which tensors become parameters; forward is a function of (module, x)."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module | nn.Parameter) else nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def dense(run: Callable[[Any, Tensor], Tensor], **parts: Any) -> Net:
    """A Net with Linear a: 3 -> 5, b: 3 -> 5, c: 5 -> 4, and the given parts."""
    return Net(run, **{"a": nn.Linear(3, 5), "b": nn.Linear(3, 5), "c": nn.Linear(5, CLASSES), **parts})


def between(layer: Callable[[Tensor], Tensor]) -> Net:
    """A function between two linear layers; b is added behind it."""
    return dense(lambda m, x: m.c(layer(m.a(x)) + m.b(x)))


def around(layer: nn.Module, features: int = 5) -> nn.Sequential:
    """A module between two linear layers."""
    return nn.Sequential(nn.Linear(3, 5), layer, nn.Linear(features, CLASSES))


def conv(run: Callable[[Any, Tensor], Tensor], features: int, **parts: Any) -> Net:
    """A Net with Conv2d a: 2 -> 3, padded, Linear c on `features`, and the given parts."""
    return Net(run, **{"a": nn.Conv2d(2, 3, 3, padding=1), "c": nn.Linear(features, CLASSES), **parts})


def pooled(layer: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), layer, nn.Flatten(), nn.Linear(features, CLASSES))


def episode(sample: tuple[int, ...] = VECTOR, target: tuple[int, ...] | None = None, **to: Any) -> list[Tensor]:
    """Two tasks of 5 and 3 samples; labels, or real targets of shape `target`. The same data at every call."""
    data = conftest.episode(sample, tasks=2, classes=CLASSES, target=target, seed=3)
    return [t.to(**to) if t.is_floating_point() else t for t in data]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, msg=lambda m: f"{what}: {m}")


def right(maml: FusedMAML, data: list[Tensor]) -> None:
    """Asserts that loss and gradients are the reference's, and that a parameter without a path to the loss has none.

    It may warn of the general path.
    """
    maml.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss, grads = reference.meta_gradient(
            maml.model,
            maml.loss,
            *data,
            maml.inner_lr,
            maml.inner_steps,
            maml.first_order,
            maml._adapt_params,
        )
        out = maml(*data)  # after the reference, because a call updates the vectors of a spectral norm
        out.loss.backward()
    close(out.loss.detach(), loss, "loss")
    for name, p in maml.model.named_parameters():
        assert (p.grad is not None) == (name in grads), name
        if p.grad is not None:
            close(p.grad, grads[name], name)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def fused_is_right(model: nn.Module, data: list[Tensor], loss: Loss = "cross_entropy", **given: Any) -> None:
    """Compares every output and gradient of both backends, at first and second order."""
    fused = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused", **given)
    plain = FusedMAML(model, RATE, STEPS, loss=loss, backend="reference", **given)
    for first_order in (False, True):
        results = []
        for maml in (fused, plain):
            maml.first_order = first_order
            maml.zero_grad()
            out = maml(*data)
            out.loss.backward()
            assert maml.backend == ("cpu" if maml is fused else "reference")
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append((vars(out), grads))
        for got, expected in zip(*results, strict=True):
            for name, value in got.items():
                assert (value is None) == (expected[name] is None), name
                if value is not None:
                    close(value.detach(), expected[name].detach(), name)


def computed_is_right(
    model: nn.Module,
    data: list[Any],
    loss: Loss,
    rate: float = RATE,
    first_order: bool = False,
    tolerance: float = 1e-9,
) -> FusedMAML:
    """Asserts that layers compute the loss, and that it and the meta-gradient are those of the oracle."""
    maml = FusedMAML(model, rate, STEPS, loss=loss, first_order=first_order, backend="fused")
    out = maml(*data)
    out.loss.backward()
    assert "the loss is served by layers" in maml.explain()
    expected, grads = oracle.meta_gradient(model, loss, *data, rate, STEPS, first_order)
    got = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(out.loss.detach().double(), expected, rtol=tolerance, atol=tolerance)
    conftest.assert_close(got, grads, tolerance)
    return maml


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A model whose first layer has a normalised weight."""

    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the older functions
            return nn.Sequential(norm(nn.Linear(3, 5).double()), nn.Tanh(), nn.Linear(5, CLASSES))

    return make


def trained_norm(affine: bool = True) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(5, affine=affine)
    norm(torch.randn(9, 5) * 3 + 1)
    return norm


def trained_instance_norm() -> nn.InstanceNorm2d:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    norm(torch.randn(9, 3, 2, 2) * 3 + 1)
    return norm


def sentences(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "general path" in str(w.message)]


def says(text: str, pieces: tuple[str, ...]) -> None:
    for piece in pieces:
        assert piece in text, f"{piece!r} is not in: {text}"


def why_not(model: nn.Module, sample: tuple[int, ...]) -> str:
    """Why a model is not fused on such samples, as `explain` says it."""
    x = torch.zeros(2, 5, *sample, dtype=next(model.parameters()).dtype)
    head = FusedMAML(model, 0.1, loss="mse").explain(x).splitlines()[0]
    before = "backend: reference, because "
    assert head.startswith(before)
    return head.removeprefix(before)
