"""Small networks: several tasks in the lanes of a vector have the bits that each has alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import conftest
from tests.conftest import assert_close

TASKS = [3, 7, 16, 21, 45]  # fewer than the lanes, whole vectors, vectors and single tasks, more than one wave


class Residual(nn.Module):
    """A shared layer and a residual sum, which take every branch of the tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 7), nn.Linear(7, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.nn.functional.softplus(self.middle(h))
        return self.last(torch.relu(self.middle(h)))


def network(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Residual() if name == "residual" else nn.Sequential(nn.Linear(3, 11), nn.ELU(), nn.Linear(11, 5))
    return model.to(dtype)


def episode(tasks: int, n: int, loss: str, dtype: torch.dtype) -> list[Tensor]:
    target = (5,) if loss == "mse" else None
    return conftest.episode(tasks=tasks, n=(n, n + 2), classes=5, target=target, dtype=dtype, seed=1)


def rates(kind: str, model: nn.Module) -> object:
    if kind == "one":
        return 0.1
    if kind == "learned":
        return nn.Parameter(torch.tensor([0.1, 0.05], dtype=next(model.parameters()).dtype))
    return {name: nn.Parameter(torch.full_like(p, 0.1)) for name, p in model.named_parameters()}


def run(maml: FusedMAML, data: list[Tensor], first: int, end: int) -> dict[str, Tensor]:
    """All results of a call for the tasks [first, end)."""
    data = [d[first:end] for d in data]
    weights = torch.ones(end - first, dtype=data[0].dtype)
    maml.zero_grad()
    out = maml(*data, task_weights=weights)
    out.loss.backward()
    fast = maml.adapt(*data[:2])
    losses, grads = maml.loss_and_grad(fast, *data[:2])
    products = maml.hvp(fast, *data[:2], grads)
    return {
        "losses": out.task_losses.detach(), "logits": out.logits.detach(), "support": out.support_losses.detach(),
        "predictions": maml.predict(fast, data[2]), "at fast": losses,
        **{f"fast {n}": v for n, v in fast.items()}, **{f"gradient {n}": v for n, v in grads.items()},
        **{f"product {n}": v for n, v in products.items()},
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(
    ("name", "loss", "n"), [("plain", "mse", 9), ("residual", "cross_entropy", 6), ("residual", "mse", 300)]
)
def test_the_bits_of_a_task_alone(name, loss, n, tasks, dtype):
    maml = FusedMAML(network(name, dtype), 0.1, 2, loss=loss)
    data = episode(tasks, n, loss, dtype)
    together = run(maml, data, 0, tasks)
    for t in range(tasks):
        alone = run(maml, data, t, t + 1)
        for key, value in alone.items():
            assert torch.equal(value[0], together[key][t]), (key, t)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", ["one", "learned", "elementwise"])
@pytest.mark.parametrize(("name", "loss"), [("plain", "cross_entropy"), ("residual", "mse")])
def test_exact(name, loss, kind, first_order):
    model = network(name, torch.float64)
    data = episode(21, 6, loss, torch.float64)
    got = {}
    for backend in ("fused", "reference"):
        twin = copy.deepcopy(model)
        rate = rates(kind, twin)
        maml = FusedMAML(twin, rate, 2, loss=loss, backend=backend, first_order=first_order)
        maml(*data).loss.backward()
        got[backend] = {n: p.grad for n, p in maml.named_parameters()}
    assert_close(got["fused"], got["reference"])


def test_some_adapted_some_not():
    model = network("residual", torch.float64)
    data = episode(9, 6, "mse", torch.float64)
    got = {}
    for backend in ("fused", "reference"):
        twin = copy.deepcopy(model)
        twin.first.bias.requires_grad_(False)
        maml = FusedMAML(twin, 0.1, 3, loss="mse", backend=backend, adapt_params=["last.weight", "middle.bias"])
        maml(*data).loss.backward()
        got[backend] = {n: p.grad for n, p in maml.named_parameters() if p.grad is not None}
    assert_close(got["fused"], got["reference"])
