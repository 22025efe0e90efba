"""FusedMAML copied, saved, loaded, moved to another dtype, and on memory that is not contiguous."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.engine.nets import BACKENDS, close, dotted_rates, episode, equal, learned, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_and_loaded(maml: FusedMAML) -> FusedMAML:
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner_lr", [lambda: 0.3, lambda: learned(0.3, 0.2), dotted_rates])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_the_same_and_apart(duplicate: Callable, inner_lr: Callable[[], Any], backend: str) -> None:
    maml = FusedMAML(net(), inner_lr(), 2, backend=backend)
    expected = step(maml, episode())
    twin = duplicate(maml)
    equal(step(twin, episode()), expected)
    assert twin.backend == maml.backend
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in maml.parameters()}
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert not torch.equal(step(twin, episode())[0], expected[0])
    equal(step(maml, episode()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_dict_goes_round(backend: str) -> None:
    maml = FusedMAML(net(), dotted_rates(), 2, backend=backend)
    keys = set(maml.state_dict())
    assert {f"model.{name}" for name in net().state_dict()} < keys
    assert {k for k in keys if not k.startswith("model.")} == {
        "inner_lr.0.weight", "inner_lr.0.bias", "inner_lr.1.weight", "inner_lr.1.bias", "inner_lr.3.bias",
    }  # fmt: skip
    with torch.no_grad():
        for p in maml.parameters():
            p.add_(0.05)
    expected = step(maml, episode())
    fresh = FusedMAML(net(), dotted_rates(), 2, backend=backend)
    assert not torch.equal(step(fresh, episode())[0], expected[0])
    fresh.load_state_dict(maml.state_dict())
    equal(step(fresh, episode()), expected)


def test_state_dict_keys_of_one_rate() -> None:
    def others(inner_lr: Any) -> set[str]:
        return {k for k in FusedMAML(net(), inner_lr, 2).state_dict() if not k.startswith("model.")}

    assert others(0.3) == set()
    assert others(torch.tensor(0.3).double()) == {"inner_lr"}
    assert others(learned(0.3)) == {"inner_lr"}
    assert others(learned(0.3, 0.1)) == {"inner_lr"}


def test_learned_rates_are_the_objects_that_were_passed() -> None:
    rate = learned(0.3)
    assert any(p is rate for p in FusedMAML(net(), rate).parameters())
    rates = dotted_rates()
    maml = FusedMAML(net(), rates, 2)
    held = {id(p) for p in maml.parameters()}
    passed = [r for r in rates.values() if isinstance(r, nn.Parameter)]
    assert {id(p) for p in passed} < held
    assert len(held) == len(passed) + len(list(maml.model.parameters()))
    step(maml, episode())
    del rates["0.bias"]  # a bias before BatchNorm has no effect
    passed = [r for r in rates.values() if isinstance(r, nn.Parameter)]
    assert all(r.grad is not None and r.grad.abs().sum() > 0 for r in passed)


def test_an_optimizer_step_on_a_learned_rate_is_seen() -> None:
    rate = learned(0.3)
    maml = FusedMAML(net(), rate, 2)
    before = step(maml, episode())[0]
    with torch.no_grad():
        rate.fill_(0.05)
    assert not torch.equal(step(maml, episode())[0], before)
    equal(step(maml, episode()), step(FusedMAML(maml.model, rate, 2), episode()))


def test_to_double_and_back() -> None:
    maml = FusedMAML(net(torch.float32), learned(0.3).float(), 2)
    single = step(maml, episode(dtype=torch.float32))
    assert maml.to(torch.float64) is maml
    double = step(maml, episode())
    assert double[0].dtype == torch.float64
    assert all(g.dtype == torch.float64 for g in double[1].values())
    maml.float()
    equal(step(maml, episode(dtype=torch.float32)), single)
    assert maml.backend == "cpu"


def every_other(t: Tensor) -> Tensor:
    """The same values with a stride of 2."""
    return torch.stack([t, t + 1], dim=-1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_everything(backend: str) -> None:
    maml = FusedMAML(net(), torch.tensor([0.3, 0.2]).double(), 2, backend=backend)
    weights = torch.tensor([0.2, 0.7, -0.4]).double()
    expected = step(maml, episode(), task_weights=weights)
    blocks = maml.predict(maml.adapt(*episode()[:2]), episode()[2])
    data = [every_other(t) for t in episode()]
    assert not any(t.is_contiguous() for t in data)
    maml.model[0].weight.data = maml.model[0].weight.data.t().contiguous().t()
    maml.inner_lr.data = torch.stack([maml.inner_lr, maml.inner_lr], 1)[:, 0]
    got = step(maml, data, task_weights=torch.stack([weights, weights], 1)[:, 0])
    close(got[0], expected[0])
    for name, g in got[1].items():
        close(g, expected[1][name], name)
    fast = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in maml.adapt(*data[:2]).items()}
    close(maml.predict(fast, data[2]), blocks)


def test_it_is_freed_with_its_last_reference() -> None:
    gc.disable()  # a cycle would keep it, and the memory of its workspaces on a GPU, until the next collection
    try:
        maml = FusedMAML(net(), 0.3, 2)
        for _ in range(2):
            step(maml, episode())
        freed = weakref.ref(maml)
        del maml
        assert freed() is None
    finally:
        gc.enable()
