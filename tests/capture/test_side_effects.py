"""A capture runs the model's forward: its side effects are ignored or refused, and undone; other threads go on."""

from __future__ import annotations

import copy
import cProfile
import pickle
import random
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.plan.small_models import Net, episode, fused_is_right, why_not


def layer(function) -> Net:
    """A model that calls function(module, h) on the output h of a linear layer, and returns h."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.o(x)
        function(m, h)
        return h

    model = Net(forward, o=nn.Linear(3, 4), w=torch.ones(1))
    model.w.requires_grad_(False)
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
    m.other = m.__dict__.pop("feature", None)


IGNORED = {  # the prediction does not depend on them
    "an attribute": (lambda m, h: setattr(m, "feature", h), "sets self.feature"),
    "a new attribute": (lambda m, h: setattr(m, "new", 1), "sets self.new"),
    "an attribute deleted": (rename, "sets self.feature"),
    "a counter": (count, "sets self.count"),
    "a list": (lambda m, h: m.log.append(h), "changes self.log"),
    "a dict": (lambda m, h: m.by_name.update(last=h), "changes self.by_name"),
    "a set": (lambda m, h: m.seen.add(2), "changes self.seen"),
    "a deque": (lambda m, h: m.recent.append(h), "changes self.recent"),
    "a layer": (lambda m, h: setattr(m, "p", nn.Identity()), "sets self.p"),
}
WRITTEN = {  # buffers, which a training step moves by a forward of the model itself
    "a buffer assigned": assign_average,
    "a buffer in place": average,
    "buffers in place": lambda m, h: torch._foreach_add_([m.average], 1),
}
REFUSED = {
    "a list in a dict": (lambda m, h: m.by_name["last"].append(h), "changes self.by_name, and reads"),
    "a layer replaced": (lambda m, h: setattr(m, "o", nn.Identity()), "sets self.o, and reads"),
    "a parameter assigned": (lambda m, h: setattr(m, "w", None), "sets self.w, which a fused layer would not do"),
    "a part of a buffer": (lambda m, h: m.average[1:].fill_(1), "changes average in place"),
    "a tensor in place": (lambda m, h: torch.add(m.constant, 1, out=m.constant), "changes constant in place"),
    "tensors in place": (lambda m, h: torch._foreach_add_([m.constant], 1), "changes constant in place"),
    "a parameter": (lambda m, h: m.o.weight.data.mul_(2), "changes o.weight in place"),
    "a generator's draw": (lambda m, h: torch.rand(1, generator=torch.Generator()), "draws random numbers"),
    "a draw of Python's": (lambda m, h: random.gauss(0, 1), "draws random numbers"),
}


@pytest.mark.parametrize("case", [*IGNORED, *WRITTEN, *REFUSED])
def test_an_effect_of_forward_is_undone(case):
    effect, sentence = (IGNORED | REFUSED)[case] if case not in WRITTEN else (WRITTEN[case], "")
    model = layer(effect)
    before = copy.deepcopy([vars(model), dict(model.named_buffers()), list(model.state_dict())])
    drawn = torch.get_rng_state(), random.getstate()
    table = FusedMAML(model, 0.1, loss="mse").explain(torch.zeros(2, 5, 3))
    if case in IGNORED:
        assert table.startswith("backend: cpu\n")
        assert f"the model (Net): its forward {sentence}; fused layers do not" in table.splitlines()
    elif case in WRITTEN:
        assert table.startswith("backend: cpu\n")
        assert "forward writes average: a training step calls the model itself for that" in table.splitlines()
    else:
        assert table.startswith("backend: reference, because ")
        assert sentence in table.splitlines()[0]
    now = [vars(model), dict(model.named_buffers()), list(model.state_dict())]
    assert str(now) == str(before)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    pickle.dumps({**vars(model), "run": None, "_modules": None})


def test_a_write_that_is_no_result_and_is_read():
    model = layer(lambda m, h: (torch._foreach_add_([m.average], 1), h.add_(m.average)))
    assert "reads a value that _foreach_add_ in the model (Net) has changed in place" in why_not(model, (3,))


@pytest.mark.parametrize("case", IGNORED)
def test_an_effect_that_is_ignored_changes_no_number(case):
    model = layer(IGNORED[case][0]).double()
    fused_is_right(model, episode(target=(4,)), loss="mse")


def test_a_draw_that_forward_hides():
    def hide(m: Net, h: Tensor) -> None:
        try:
            m.slope = float(torch.rand(()))
        except Exception:
            m.slope = 0.1

    assert "draws random numbers" in why_not(layer(hide), (3,))


def test_what_is_no_effect():
    """Setting an attribute to its own value, and changing a tensor that forward made."""

    def idle(m: Net, h: Tensor) -> None:
        m.count = int("0")
        m.feature = None
        own = torch.zeros(4)
        own += 1

    table = FusedMAML(layer(idle), 0.1, loss="mse").explain(torch.zeros(2, 5, 3))
    assert table.startswith("backend: cpu\n")
    assert "its forward" not in table


def test_constants_leave_nothing_in_the_model():
    model = Net(lambda m, x: m.o(x) * torch.ones(4), o=nn.Linear(3, 4))
    before = dict(vars(model))
    maml = FusedMAML(model, 0.1, loss="mse", backend="fused")
    x, y = torch.ones(2, 5, 3), torch.ones(2, 5, 4)
    maml(x, y, x, y).loss.backward()
    assert vars(model) == before


ENTERED, GO = threading.Event(), threading.Event()


def wait(m: Net, h: Tensor) -> None:
    ENTERED.set()
    GO.wait(60)


@contextmanager
def a_capture_that_waits(model: Net) -> Iterator[None]:
    """A context in which another thread is inside of the model's forward, for a capture that succeeds."""
    ENTERED.clear()
    GO.clear()
    with ThreadPoolExecutor(1) as thread:
        table = thread.submit(lambda: FusedMAML(model, 0.1, loss="mse").explain(torch.zeros(2, 5, 3)))
        assert ENTERED.wait(60)
        try:
            yield
        finally:
            GO.set()
        assert table.result().startswith("backend: cpu\n")


def test_other_threads_call_modules_while_one_captures():
    model, strange = layer(wait), nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    x = torch.ones(2, 3)
    with a_capture_that_waits(model):
        results = strange(x), model.o(x), model.o.weight
    for got, expected in zip(results, (strange(x), model.o(x), model.o.weight), strict=True):
        assert type(got) is type(expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_other_threads_draw_while_one_captures():
    """Their random numbers are not taken for the model's, and are not drawn twice."""
    model = layer(wait)
    torch.manual_seed(1)
    random.seed(1)
    expected = [(torch.rand(()).item(), random.random()) for _ in range(2)]
    torch.manual_seed(1)
    random.seed(1)
    with a_capture_that_waits(model):
        results = [(torch.rand(()).item(), random.random())]
    assert [*results, (torch.rand(()).item(), random.random())] == expected


def test_draws_are_seen_under_a_profiler():
    model = Net(lambda m, x: F.leaky_relu(m.o(x), random.random()), o=nn.Linear(3, 4))
    before = random.getstate()
    profile = cProfile.Profile()
    profile.enable()
    try:
        assert "draws random numbers" in why_not(model, (3,))
    finally:
        profile.disable()
    assert random.getstate() == before
