"""Models that call autograd themselves: activation checkpoints, and forces as gradients of an energy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maml_cuda.batch_norm import PerStepBatchNorm1d
from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.general_path import STEPS, check_entries, episode, held, maml_of


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing; BatchNorm has a slot for each inner step."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5))
        self.norm = PerStepBatchNorm1d(5, STEPS)
        self.last = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(h))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.block, self.last):
            x = part(x) if self.how is None else checkpoint(part, x, use_reentrant=self.how)
        return x


def test_checkpoints():
    """With one slot, so that the oracle can treat BatchNorm as a plain layer."""
    model = Checkpointed(False)
    model.norm = PerStepBatchNorm1d(5, 1)
    plain = copy.deepcopy(model)
    plain.how = None
    for p in (*model.norm.parameters(), *plain.norm.parameters()):
        p.requires_grad_(False)
    check_entries(model.double(), episode(3), plain=plain)


@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]])
def test_checkpoints_of_layers_with_a_slot_for_each_step(weights):
    """With and without query losses at every step, the gradients are those without checkpoints."""
    data, results = episode(3), []
    torch.manual_seed(3)
    state = Checkpointed(None).state_dict()
    state["norm.weight"] = torch.rand(STEPS, 5)
    for how in (None, False):
        model = Checkpointed(how)
        model.load_state_dict(state)
        maml = maml_of(model.double(), query_weights=weights)
        _, grads = run(maml, data)
        maml.zero_grad()
        fast = maml.adapt(*data[:2], differentiable=True)
        maml.predict(fast, data[2], slot=0).square().sum().backward()
        results.append({**grads, **{f"blocks.{n}": p.grad for n, p in model.named_parameters()}})
    assert_close(*results, 1e-13)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpoints_are_refused():
    model = Checkpointed(True).double()
    maml, (x_spt, y_spt, x_qry, y_qry) = maml_of(model), episode(3)
    leaf = x_spt.clone().requires_grad_()  # a reentrant checkpoint has a gradient only if its input requires one
    fast = {n: p.detach().expand(2, *p.shape).clone().requires_grad_() for n, p in model.named_parameters()}
    before = held(model)
    for entry in (
        lambda: maml(leaf, y_spt, x_qry, y_qry),
        lambda: maml.adapt(leaf, y_spt, differentiable=True),
        lambda: maml.predict(fast, leaf),
    ):
        with pytest.raises(ValueError, match="must have use_reentrant=False, got use_reentrant=True"):
            entry()
    assert held(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_a_reentrant_checkpoint_before_the_model_is_the_users():
    below, x = nn.Linear(3, 3).double(), torch.randn(2, 4, 3).double().requires_grad_()
    model = nn.Linear(3, 2).double()
    fast = {n: p.detach().expand(2, *p.shape) for n, p in model.named_parameters()}
    (expected,) = torch.autograd.grad(model(below(x)).square().sum(), below.weight)
    maml_of(model).predict(fast, checkpoint(below, x, use_reentrant=True)).square().sum().backward()
    torch.testing.assert_close(below.weight.grad, expected, rtol=1e-12, atol=1e-14)


class Force(nn.Module):
    """Returns the negative gradient of an energy with respect to the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_(True)
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_forces():
    model, data = Force().double(), episode(2)
    model.net[2].bias.requires_grad_(False)  # no force depends on it
    check_entries(model, data)
    with torch.inference_mode():
        maml = maml_of(model)
        prediction = maml.predict(maml.adapt(*data[:2]), data[2])
    expected = oracle.predict(model, {**maml.adapt(*data[:2])}, data[2])
    torch.testing.assert_close(prediction, torch.stack(expected).detach(), rtol=1e-12, atol=1e-14)
