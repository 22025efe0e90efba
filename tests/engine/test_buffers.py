"""Buffers that a forward writes: a call updates them once, as a plain training loop would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from maml_cuda import gradcheck
from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.general_path import RATE, STEPS, check_entries, episode, held, maml_of


class Counting(nn.Module):
    """forward writes buffers: a counter, a running mean, one that is assigned anew, and BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            self.count += 1
            self.mean.data.mul_(0.9).add_(0.1 * h.mean(0).detach())
            self.last = h[:, 0]
        return self.head(torch.tanh(self.norm(h) + self.mean))


def test_buffers_move_once_a_call():
    """They hold what the first forward leaves: on the first task's support set, at theta. BatchNorm's do not change."""
    model, data = Counting().double(), episode(3)
    once = copy.deepcopy(model)
    once(data[0][0])
    _, expected = oracle.meta_gradient(model, "mse", *data, RATE, STEPS)
    maml = maml_of(model)
    before = [id(model.mean), id(model.count), *held(model.layer)]
    running = {n: b.clone() for n, b in model.norm.named_buffers()}
    _, grads = run(maml, data)
    assert_close(grads, expected)
    assert [id(model.mean), id(model.count), *held(model.layer)] == before
    assert int(model.count) == 1
    torch.testing.assert_close(model.mean, once.mean, rtol=0, atol=0)
    torch.testing.assert_close(model.last, once.last.detach(), rtol=0, atol=0)
    assert not model.last.requires_grad
    for name, b in model.norm.named_buffers():
        torch.testing.assert_close(b, running[name], rtol=0, atol=0)


def test_buffers_move_once_in_a_differentiable_adaptation():
    model, data = Counting().double(), episode(3)
    maml = maml_of(model)
    maml.predict(maml.adapt(*data[:2], differentiable=True), data[2]).sum().backward()
    assert int(model.count) == 1


class Balanced(nn.Module):
    """A loss with a parameter, and a buffer that each call updates."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = self.w * (prediction - target).square().mean()
        self.scale.mul_(0.5).add_(0.5 * error.detach())
        return error / self.scale


def test_buffers_of_a_loss_move_once_a_call():
    model, data, loss = nn.Linear(3, 2).double(), episode(3), Balanced()
    once = copy.deepcopy(loss)
    once(model(data[0][0]), data[1][0])

    def plain(prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target).square().mean()
        return error / (0.5 + 0.5 * error.detach())

    maml = maml_of(model, loss)
    _, grads = run(maml, data)
    assert_close(grads, oracle.meta_gradient(model, plain, *data, RATE, STEPS)[1])
    assert loss.w.grad.abs() > 1e-3
    torch.testing.assert_close(loss.scale, once.scale, rtol=1e-13, atol=0)
    fast = maml.adapt(*data[:2])
    maml.loss_and_grad(fast, *data[2:])
    torch.testing.assert_close(loss.scale, once.scale, rtol=1e-13, atol=0)


class Graph(nn.Module):
    """Sums over neighbours, by a product with a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neighbours", torch.eye(3).roll(1, 0).to_sparse())
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x)).transpose(0, 1).flatten(1)
        return self.head(torch.sparse.mm(self.neighbours, h).view(3, len(x), 4).transpose(0, 1).flatten(1))


def test_sparse_buffers():
    model = Graph().double()
    before = model.neighbours
    check_entries(model, episode(3, 2))
    assert model.neighbours is before


def test_buffers_move_by_nothing_else():
    model, data = Counting().double(), episode(3)
    maml = maml_of(model)
    state = copy.deepcopy(model.state_dict())
    fast = maml.adapt(*data[:2])
    maml.predict(fast, data[2])
    maml.loss_and_grad(fast, *data[2:])
    maml.hvp(fast, *data[2:], fast)
    with torch.no_grad():
        maml(*data)
    model.eval()
    model.training = True  # the model's own flag differs from those of its layers
    model.norm.num_batches_tracked += 1
    state["norm.num_batches_tracked"] += 1
    with pytest.raises(ValueError, match="y_qry must have the prediction's shape"):
        maml(*data[:3], data[3][..., :1])
    model.eval()
    maml(*data)
    for name, b in model.state_dict().items():
        torch.testing.assert_close(b, state[name], rtol=0, atol=0)


def test_gradcheck_starts_every_call_with_the_same_buffers():
    """Finite differences are wrong here, because the mean has no gradient: their tolerance is wide."""
    model, data = Counting().double(), episode(3)
    gradcheck(maml_of(model), *data, finite_difference_tolerance=10)
    assert int(model.count) == 0


def test_spectral_norm_keeps_its_norm():
    """Like a plain loop that updates the state once a step; after 300 steps the norm is 1."""

    def spectral() -> nn.Sequential:
        torch.manual_seed(0)
        layer = parametrizations.spectral_norm(nn.Linear(4, 4))
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()

    model, twin = spectral(), spectral()
    maml = maml_of(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin))
    for step in range(300):
        data = episode(4)
        if step < 3:
            _, grads = oracle.meta_gradient(twin, "mse", *data, RATE, STEPS)
            twin(data[0][0])
            for name, p in twin.named_parameters():
                p.grad = grads[name]
            theirs.step()
        ours.zero_grad()
        maml(*data).loss.backward()
        ours.step()
        if step < 3:
            assert_close(model.state_dict(), twin.state_dict())
    model.eval()
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=0.02)


def test_cached_parametrizations_are_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))).double()
    maml, data = maml_of(model), episode(3)
    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize.cached\(\) must be off"):
        maml(*data)
    check_entries(model, data)
