"""Tracing runs the model's forward: its side effects are refused and undone, and other threads are not affected."""

from __future__ import annotations

import copy
import cProfile
import pickle
import random
import threading
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.plan.small_models import Net, why_not


def layer(function) -> Net:
    """A model that calls function(module, h) on the output h of a linear layer, and returns h."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.o(x)
        function(m, h)
        return h

    model = Net(forward, o=nn.Linear(3, 4))
    model.feature, model.count, model.log, model.by_name = None, 0, [], {"last": [None]}
    model.seen, model.recent = {1}, deque([1], 2)
    model.register_buffer("average", torch.zeros(4))
    model.constant = torch.zeros(4)
    return model


def count(m: Net, h: Tensor) -> None:
    m.count += 1


def average(m: Net, h: Tensor) -> None:
    m.average += 1


def assign_average(m: Net, h: Tensor) -> None:
    m.average = m.average + 1


def rename(m: Net, h: Tensor) -> None:
    m.other = m.feature
    del m.feature


EFFECTS = {
    "an attribute": (lambda m, h: setattr(m, "feature", h), "sets self.feature"),
    "a new attribute": (lambda m, h: setattr(m, "new", 1), "sets self.new"),
    "an attribute deleted": (rename, "sets self.feature"),
    "a counter": (count, "sets self.count"),
    "a list": (lambda m, h: m.log.append(h), "changes self.log"),
    "a dict": (lambda m, h: m.by_name.update(last=h), "changes self.by_name"),
    "a list in a dict": (lambda m, h: m.by_name["last"].append(h), "changes self.by_name"),
    "a set": (lambda m, h: m.seen.add(2), "changes self.seen"),
    "a deque": (lambda m, h: m.recent.append(h), "changes self.recent"),
    "a buffer assigned": (assign_average, "sets self.average"),
    "a buffer in place": (average, "changes average in place"),
    "a part of a buffer": (lambda m, h: m.average[1:].fill_(1), "changes average in place"),
    "a tensor in place": (lambda m, h: torch.add(m.constant, 1, out=m.constant), "changes constant in place"),
    "tensors in place": (lambda m, h: torch._foreach_add_([m.average], 1), "changes average in place"),
    "a parameter": (lambda m, h: next(m.parameters()).data.mul_(2), "changes o.weight in place"),
    "a layer": (lambda m, h: setattr(m, "p", nn.Identity()), "sets self.p"),
    "a layer replaced": (lambda m, h: setattr(m, "o", nn.Identity()), "sets self.o"),
    "a generator's draw": (lambda m, h: torch.rand(1, generator=torch.Generator()), "draws random numbers"),
    "a draw of Python's": (lambda m, h: random.gauss(0, 1), "draws random numbers"),
}


@pytest.mark.parametrize("case", EFFECTS)
def test_an_effect_of_forward_is_refused_and_undone(case):
    effect, sentence = EFFECTS[case]
    model = layer(effect)
    before = copy.deepcopy([vars(model), dict(model.named_buffers()), list(model.state_dict())])
    drawn = torch.get_rng_state(), random.getstate()
    assert sentence in why_not(model)
    now = [vars(model), dict(model.named_buffers()), list(model.state_dict())]
    assert str(now) == str(before)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    pickle.dumps({**vars(model), "run": None, "_modules": None})


def test_a_draw_that_forward_hides():
    def hide(m: Net, h: Tensor) -> None:
        try:
            m.slope = float(torch.rand(()))
        except Exception:
            m.slope = 0.1

    assert "draws random numbers" in why_not(layer(hide))


def test_what_is_no_effect():
    """Setting an attribute to its own value, and changing a tensor that forward made."""

    def idle(m: Net, h: Tensor) -> None:
        m.count = int("0")
        m.feature = None
        own = torch.zeros(4)
        own += 1

    assert FusedMAML(layer(idle), 0.1, loss="mse").backend == "cpu"


def test_constants_leave_nothing_in_the_model():
    model = Net(lambda m, x: m.o(x) * torch.ones(4), o=nn.Linear(3, 4))
    before = dict(vars(model))
    assert "mul" in why_not(model)
    assert vars(model) == before


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Conv2d(1, 2, 1), "_conv_forward"),
        (lambda: nn.BatchNorm1d(3), "_check_input_dim"),
        (lambda: nn.Linear(3, 4), "extra_repr"),
    ],
)
def test_a_method_set_on_an_instance_is_not_fused(make, name):
    model = nn.Sequential(make())
    setattr(model[0], name, lambda *given: given[0])
    assert f"has a {name} of its own" in why_not(model)


def elsewhere(function) -> list:
    """What function returns or raises in another thread, as a list."""
    results: list = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results


def test_other_threads_call_modules_while_one_traces():
    results = []
    x = torch.ones(2, 3)
    strange = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

    def busy(m: Net, h: Tensor) -> None:
        results.extend(elsewhere(lambda: strange(x)) + elsewhere(lambda: m.o(x)) + elsewhere(lambda: m.o.weight))

    model = layer(busy)
    assert FusedMAML(model, 0.1, loss="mse").backend == "cpu"
    assert len(results) == 3
    for got, expected in zip(results, (strange(x), model.o(x), model.o.weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_other_threads_draw_while_one_traces():
    """Their random numbers are not taken for the model's, and are not drawn twice."""
    results = []
    busy = layer(lambda m, h: results.extend(elsewhere(lambda: (torch.rand(()).item(), random.random()))))
    torch.manual_seed(1)
    random.seed(1)
    expected = [(torch.rand(()).item(), random.random()) for _ in range(2)]
    torch.manual_seed(1)
    random.seed(1)
    maml = FusedMAML(busy, 0.1, loss="mse")
    assert maml.backend == "cpu"
    assert [*results, (torch.rand(()).item(), random.random())] == expected


def test_draws_are_seen_under_a_profiler():
    model = Net(lambda m, x: F.leaky_relu(m.o(x), random.random()), o=nn.Linear(3, 4))
    before = random.getstate()
    profile = cProfile.Profile()
    profile.enable()
    try:
        assert "draws random numbers" in why_not(model)
    finally:
        profile.disable()
    assert random.getstate() == before
