"""Many samples are computed in tiles if no layer mixes samples; the results are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import conftest
from tests.conftest import assert_close, check_meta_gradient, run

pytestmark = pytest.mark.usefixtures("machine")

COUNTS = [(127, 128), (128, 129), (129, 300), (300, 127)]  # of support and query; a tile has 128 samples at most


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 7), nn.Softplus(), nn.Linear(7, 4)).double()


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.Tanh(), nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 4)).double()


SAMPLES = {mlp: (3,), conv: (2, 6, 5), with_batch_norm: (3,)}


def episode(make, loss: str, n_support: int, n_query: int, tasks: int = 2) -> list[Tensor]:
    target = None if loss == "cross_entropy" else (4,)
    return conftest.episode(SAMPLES[make], tasks=tasks, n=(n_support, n_query), target=target)


@pytest.mark.parametrize(("n_support", "n_query"), COUNTS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_exact(n_support, n_query, loss, steps, first_order):
    data = episode(mlp, loss, n_support, n_query)
    check_meta_gradient(mlp(), loss, data, 0.1, steps, first_order=first_order)


@pytest.mark.parametrize("make", [conv, with_batch_norm])
@pytest.mark.parametrize(("steps", "first_order"), [(1, True), (2, False)])
def test_other_layers(make, steps, first_order):
    data = episode(make, "cross_entropy", 129, 130)
    check_meta_gradient(make(), "cross_entropy", data, 0.1, steps, first_order=first_order)


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("part", ["head", "body", "biases"])
def test_partly_adapted(make, first_order, part):
    """Values that do not depend on adapted parameters are computed once per tile; all gradients stay exact."""
    model = make()
    last = [n for n, _ in model.named_parameters()][-2:]
    chosen = {
        "head": lambda n: n in last,
        "body": lambda n: n not in last,
        "biases": lambda n: "bias" in n,
    }[part]
    data = episode(make, "cross_entropy", 261, 129)
    check_meta_gradient(model, "cross_entropy", data, 0.2, 2, adapt_params=chosen, first_order=first_order)


def test_frozen_parameters():
    model = mlp()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    check_meta_gradient(model, "mse", episode(mlp, "mse", 300, 129), 0.2, 2)


def test_tied_parameters():
    """The gradient of a shared weight is summed over layers and tiles."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    model[2].weight = model[0].weight
    check_meta_gradient(model, "mse", episode(mlp, "mse", 300, 129), 0.1, 2)


@pytest.mark.parametrize("first_order", [False, True])
def test_learned_rates(first_order):
    model = mlp()
    rates = {n: nn.Parameter(0.2 * torch.rand(2, *p.shape).double()) for n, p in model.named_parameters()}
    data = episode(mlp, "mse", 300, 129)
    check_meta_gradient(model, "mse", data, rates, 2, first_order=first_order)


@pytest.mark.parametrize(("make", "n"), [(mlp, 128), (mlp, 300), (conv, 129)])
def test_building_blocks(check_passes, make, n):
    check_passes(make(), SAMPLES[make], n)


def test_outputs():
    data = episode(mlp, "cross_entropy", 300, 301)
    weights = torch.tensor([0.3, 1.1]).double()
    results = []
    for backend in ("fused", "reference"):
        torch.manual_seed(1)
        maml = FusedMAML(mlp(), 0.1, 2, backend=backend)
        out = maml(*data, task_weights=weights)
        out.loss.backward()
        fast = maml.adapt(*data[:2], differentiable=True)
        sum(p.square().sum() for p in fast.values()).backward()  # added to the meta-gradient
        results.append(
            {
                "loss": out.loss.detach(),
                "task_losses": out.task_losses,
                "support_losses": out.support_losses,
                "logits": out.logits,
                **{f"adapted {name}": p.detach() for name, p in fast.items()},
                **{name: p.grad for name, p in maml.model.named_parameters()},
            }
        )
        with torch.no_grad():
            quiet = maml(*data, task_weights=weights)
        torch.testing.assert_close(quiet.logits, out.logits, rtol=1e-12, atol=1e-14)
    assert_close(*results, 1e-10)


def test_a_task_has_its_bits_in_any_company():
    data = [d.float() if d.is_floating_point() else d for d in episode(mlp, "cross_entropy", 300, 129, tasks=3)]
    maml = FusedMAML(mlp().float(), 0.1, 2, backend="fused")
    whole, grads = maml(*data), run(maml, data)[1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = maml(*[d[1:2] for d in data])
        assert all(torch.equal(g, grads[name]) for name, g in run(maml, data)[1].items())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.logits[0], whole.logits[1])
    assert torch.equal(alone.support_losses[0], whole.support_losses[1])


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("first_order", [False, True])
def test_memory_is_bounded_in_samples(first_order):
    """Second order keeps the states of all tiles, up to a limit."""
    maml = FusedMAML(mlp(), 0.1, 3, first_order=first_order, backend="fused")
    few, many, most = (maml.memory_estimate(*[torch.zeros(2, n, 3).double()] * 2) for n in (256, 6400, 640 * 128))
    assert (few < many < few + 2 * (16 << 20)) if not first_order else few == many
    assert most == few if first_order else most < many


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("steps", [1, 3])
def test_states_that_are_kept_give_the_same_bits(steps):
    grads = []
    for checkpoint in (None, "recompute"):
        torch.manual_seed(0)
        data = [d.float() if d.is_floating_point() else d for d in episode(mlp, "cross_entropy", 300, 129)]
        maml = FusedMAML(mlp().float(), 0.1, steps, backend="fused", checkpoint=checkpoint)
        grads.append(run(maml, data)[1])
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())


class Crossing(nn.Module):
    """Values that an activation may overwrite, and others that it may not: one is read again, one is the input."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.f, self.first, self.second = function, nn.Linear(3, 8), nn.Linear(8, 8)
        self.third, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.first(self.f(x)))
        z = self.second(x)
        return self.f(self.last(self.f(self.third(self.f(z) + z))))


@pytest.mark.parametrize("function", [nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.5), nn.Hardtanh(-0.3, 0.4)])
@pytest.mark.parametrize("samples", [5, 130])
def test_functions_in_place(function, samples):
    data = episode(mlp, "mse", samples, samples)
    check_meta_gradient(Crossing(function).double(), "mse", data, 0.1, 2)
