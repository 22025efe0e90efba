"""The kernel of small multilayer perceptrons: what it serves, and that it agrees with the megakernel's interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from tests.conftest import EMULATIONS, relative_errors, run
from tests.cuda.kernel_models import KERNELS
from tests.emulated import log

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

ACTIVATIONS = {
    "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "elu": nn.ELU(0.7), "silu": nn.SiLU(), "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"), "softplus": nn.Softplus(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
}  # fmt: skip


def mlp(*widths: int, function: nn.Module = ACTIVATIONS["tanh"], bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), function]
    return nn.Sequential(*layers[:-1]).double()


def episode(loss: str, inputs: int, outputs: int, n: int = 5) -> list[Tensor]:
    x = torch.randn(2, 2 * n - 1, inputs, dtype=torch.float64)
    y = torch.randn(2, 2 * n - 1, outputs, dtype=torch.float64)
    if loss == "cross_entropy":
        y = torch.randint(outputs, (2, 2 * n - 1))
    return [x[:, :n], y[:, :n], x[:, n:], y[:, n:]]


def kernels_of(maml: FusedMAML, data: list[Tensor], machine: str) -> tuple[dict[str, Tensor], set[str]]:
    """The meta-gradient, and which of the two kernels of one block a task computed it."""
    if machine not in EMULATIONS:
        return run(maml, data)[1], set()
    with log() as logged:
        _, grads = run(maml, data)
        names = {launch["kernel"].partition("<")[0].rpartition("::")[2] for launch in logged()}
    return grads, names & {"small_mlp", "megakernel"}


def check(maml: FusedMAML, data: list[Tensor], loss: str, machine: str, kernel: str, adapted: Any = None) -> None:
    grads, kernels = kernels_of(maml, data, machine)
    assert kernels <= {kernel}
    assert kernels or machine not in EMULATIONS
    _, expected = reference.meta_gradient(maml.model, loss, *data, 0.1, maml.inner_steps, maml.first_order, adapted)
    assert max(relative_errors({name: grads[name] for name in expected}, expected).values()) < 1e-10


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_function(name: str, machine: str) -> None:
    loss = "mse" if name in ("relu", "gelu", "tanh") else "cross_entropy"
    maml = FusedMAML(mlp(3, 7, 6, 4, function=ACTIVATIONS[name]), 0.1, 2, loss=loss, backend="fused")
    check(maml, episode(loss, 3, 4), loss, machine, "small_mlp")


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("widths", [(5, 3), (1, 40, 1), (9, 8, 16, 5, 2), (2, 65, 33)])
def test_any_widths(widths: tuple[int, ...], loss: str, first_order: bool, machine: str) -> None:
    maml = FusedMAML(mlp(*widths, bias=len(widths) != 4), 0.1, 3, loss=loss, first_order=first_order, backend="fused")
    check(maml, episode(loss, widths[0], widths[-1], 3), loss, machine, "small_mlp")


def test_the_interpreter_serves_the_rest(machine: str) -> None:
    """Learned rates, parameters that are not adapted, a function at the end, and a fifth linear layer."""
    data = episode("mse", 3, 2)
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    cases: list[tuple[nn.Module, Any, Any]] = [
        (mlp(3, 5, 2), rate, None),
        (mlp(3, 5, 2), 0.1, ["2.weight"]),
        (nn.Sequential(mlp(3, 5, 2), nn.Tanh()), 0.1, None),
        (mlp(3, 4, 4, 4, 4, 2), 0.1, None),
    ]
    for model, inner_lr, adapted in cases:
        maml = FusedMAML(model, inner_lr, 2, loss="mse", adapt_params=adapted, backend="fused")
        check(maml, data, "mse", machine, "megakernel", adapted)


def test_it_agrees_with_the_interpreter(machine: str) -> None:
    """A learned rate of the same value runs in the interpreter. Losses and logits agree as well."""
    model, data = mlp(3, 17, 9, 4), episode("cross_entropy", 3, 4)
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    fast, plain = (FusedMAML(model, r, 3, backend="fused") for r in (0.1, rate))
    found = []
    for maml, kernel in ((fast, "small_mlp"), (plain, "megakernel")):
        grads, kernels = kernels_of(maml, data, machine)
        assert kernels <= {kernel}
        out = maml(*data)
        found.append(
            [grads[n].clone() for n, _ in model.named_parameters()]
            + [out.logits, out.support_losses, out.loss.detach()]
        )
        model.zero_grad()
    for ours, interpreted in zip(*found, strict=True):
        assert torch.allclose(ours, interpreted, rtol=1e-11, atol=1e-13)
