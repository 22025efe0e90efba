"""Modules and parameters that a model holds in several places, on the general path."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.general_path import RATE, STEPS, check_entries, episode, held, maml_of


class TwoNames(nn.Module):
    """A layer that is a submodule itself and part of another submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, dilation=2)
        self.net = nn.Sequential(self.conv, nn.Tanh())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean(-1))


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin()


class Tied(nn.Module):
    """One parameter in two layers, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(3, 2), nn.Linear(2, 3)
        self.again = nn.Linear(3, 2)
        self.again.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.back(self.into(x))))


def wrapped() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(Wrapper(layer), nn.Linear(3, 3), Wrapper(layer), nn.Linear(3, 2))


SHARED = {"two names": (TwoNames, (2, 7)), "two wrappers": (wrapped, (3,)), "a tied parameter": (Tied, (3,))}


@pytest.mark.parametrize("case", SHARED)
def test_what_stands_in_several_places(case):
    make, sample = SHARED[case]
    check_entries(make().double(), episode(*sample))


@pytest.mark.parametrize("case", SHARED)
def test_an_optimizer_holds_what_the_model_holds(case):
    """Training changes the same parameters as a plain loop does."""
    make, sample = SHARED[case]
    model = make().double()
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    maml = maml_of(model, first_order=True)
    for _ in range(3):
        data = episode(*sample)
        _, grads = oracle.meta_gradient(twin, "mse", *data, RATE, STEPS, True)
        for name, p in twin.named_parameters():
            p.grad = grads[name]
        theirs.step()
        ours.zero_grad()
        maml(*data).loss.backward()
        ours.step()
    assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert list(model.state_dict()) == list(twin.state_dict())


def test_an_error_leaves_the_model_as_it_was():
    model = wrapped().double()
    maml, data = maml_of(model), episode(3)
    calls = []

    def fail(m: nn.Module, args: tuple) -> None:
        calls.append(m)
        if len(calls) > 4:
            raise KeyError("the user's own")

    model[0].layer.register_forward_pre_hook(fail)
    before = held(model)
    with pytest.raises(KeyError, match="the user's own"):
        maml(*data)
    assert held(model) == before
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


def test_attributes_of_parameters_are_there_in_forward():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.weight.scale, self.bias)

    model = Scaled(3, 2).double()
    model.weight.scale, model.weight.names_of_users = 0.5, ["a"]
    scale = {"scale": 0.5, "names_of_users": ["a"]}
    plain = nn.Linear(3, 2).double()
    plain.load_state_dict(model.state_dict())
    data = episode(3)
    parametrize.register_parametrization(plain, "weight", Half())
    _, expected = oracle.meta_gradient(plain, "mse", *data, RATE, STEPS)
    _, grads = run(maml_of(model), data)
    torch.testing.assert_close(grads["weight"], expected["parametrizations.weight.original"], rtol=1e-11, atol=1e-13)
    assert vars(model.weight) == scale


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 0.5 * w
