"""The record of what a model runs, and what a capture leaves of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.capture.capture import Like, capture
from maml_cuda.capture.copies import copied, places
from maml_cuda.capture.errors import DoesNotFit, Unfusable
from maml_cuda.engine import programs
from maml_cuda.plan.reader import graph_of
from tests import oracle
from tests.conftest import assert_close, episode, fast_parameters, run

X = Like((5, 3), torch.float32)


class Calls(nn.Module):
    """A forward that is a function of its layer and x."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.body = nn.Linear(3, 4), forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def recorded(forward: Any, x: Like = X) -> list[tuple[str, str, str]]:
    """name, module and call of the operations that the prediction needs."""
    record = capture(Calls(forward), x).record
    return [(o.name, o.module, o.call) for o in record.needed_for(record.prediction)]


def test_operations_name_the_users_module() -> None:
    assert recorded(lambda self, x: torch.tanh(self.a(x)) + 1) == [
        ("t", "a", "a (Linear)"),
        ("addmm", "a", "a (Linear)"),
        ("tanh", "", "tanh in the model (Calls)"),
        ("add", "", "add in the model (Calls)"),
    ]


def test_what_is_not_needed_is_left_out() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        torch.sin(self.a(x))
        return self.a(x)

    assert [name for name, _, _ in recorded(forward)] == ["t", "addmm"]


def test_operations_in_place() -> None:
    assert [name for name, _, _ in recorded(lambda self, x: self.a(x).relu_().mul_(2))] == ["t", "addmm", "relu", "mul"]


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: (h := self.a(x), h.view(5, 4).relu_(), h)[2], "reads a value that relu_? in .* has changed"),
        (lambda self, x: self.a(x.relu_()), "changes the model's input in place"),
        (lambda self, x: (self.a.weight.data.mul_(2), self.a(x))[1], r"changes a\.weight in place"),
        (lambda self, x: self.a(x).detach(), "the model's prediction depends on no parameter"),
        (lambda self, x: self.a(x).data, "the model's prediction depends on no parameter"),
        (lambda self, x: no_grad(self.a(x)), "the model's prediction depends on no parameter"),
        (lambda self, x: self.a(x) if self.a(x).sum() > 0 else x, "depends on values of tensors"),
        (lambda self, x: self.a(x) * self.a(x).sum().item(), "depends on values of tensors"),
        (lambda self, x: self.a(x) * torch.rand(3), "draws random numbers"),
        (lambda self, x: self.a(x) if self.a.weight.is_leaf else x, "reads is_leaf of a tensor"),
    ],
)
def test_refused(forward: Any, words: str) -> None:
    model = Calls(forward)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(Unfusable, match=words):
        graph_of(model, capture(model, X).record)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Stops(nn.Module):
    """What derivatives do not pass: `stopped`, of a value and of a weight."""

    def __init__(self, stopped: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.stopped = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4), stopped

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(h * self.stopped(h.sin()) + self.b(x) @ self.stopped(self.c.weight.exp()))


def no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h * 1


def set_grad_enabled(h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return h + 1


def data(h: Tensor) -> Tensor:
    return h.data


def detached_view(h: Tensor) -> Tensor:
    return h.t().detach().t()


def enabled_again(h: Tensor) -> Tensor:
    with torch.no_grad(), torch.enable_grad():
        return h * 2


@pytest.mark.parametrize(
    "stopped",
    [Tensor.detach, data, no_grad, set_grad_enabled, detached_view, torch.no_grad()(torch.sin), enabled_again],
    ids=["detach", "data", "no_grad", "set_grad_enabled", "detached_view", "decorator", "enabled_again"],
)
def test_what_derivatives_do_not_pass(machine: str, stopped: Any) -> None:
    """Gradient and Hessian-vector product against autograd, and the meta-gradient against an independent one."""
    model = Stops(stopped).double()
    maml = FusedMAML(model, 0.1, 2, backend="fused")
    x, y, *_ = given = episode()
    for first_order in (False, True):
        maml.first_order = first_order
        loss, grads = run(maml, given)
        expected, gradients = oracle.meta_gradient(model, "cross_entropy", *given, 0.1, 2, first_order)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert_close(grads, gradients)
    generator = torch.Generator().manual_seed(1)
    fast, v = (fast_parameters(model, 3, generator) for _ in range(2))
    grads, products = maml.loss_and_grad(fast, x, y)[1], maml.hvp(fast, x, y, v)
    for task in range(3):
        leaves = {name: p[task].clone().requires_grad_() for name, p in fast.items()}
        loss = F.cross_entropy(oracle.Plain(model)(leaves, x[task]), y[task])
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        along = sum((g * v[name][task]).sum() for name, g in zip(leaves, first, strict=True))
        second = torch.autograd.grad(along, list(leaves.values()))
        assert_close({name: grads[name][task] for name in leaves}, dict(zip(leaves, first, strict=True)))
        assert_close({name: products[name][task] for name in leaves}, dict(zip(leaves, second, strict=True)))


def test_what_does_not_fit_and_what_cannot_be_captured() -> None:
    with pytest.raises(DoesNotFit, match=r"a \(Linear\): "):
        capture(Calls(lambda self, x: self.a(x)), Like((5, 2), torch.float32))
    with pytest.raises(Unfusable, match=r"numpy in the model \(Calls\).* \(when its tensors have no values\)"):
        capture(Calls(lambda self, x: self.a(torch.from_numpy(x.numpy()))), X)
    with pytest.raises(Unfusable, match=r"the model \(Calls\) cannot be captured: no such key"):
        capture(Calls(lambda self, x: {}.get(x) or (_ for _ in ()).throw(ValueError("no such key"))), X)


def test_the_callers_modes_are_not_captured() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) if torch.is_grad_enabled() else self.a(x)

    with torch.no_grad(), torch.autocast("cpu"), torch.inference_mode():
        assert [name for name, _, _ in recorded(forward)] == ["t", "addmm", "tanh"]


# -- copies -----------------------------------------------------------------------------------------------------------


def test_closures_are_copied() -> None:
    model = Calls(None)
    model.body = lambda self, x: model.a(x)
    weight = torch.zeros(4, 3)
    copy, loss = copied((model, None), {id(model.a.weight): weight})
    assert loss is None
    copy.a.bias.data.zero_()
    assert torch.equal(copy(torch.ones(2, 3)), torch.zeros(2, 4))
    assert not torch.equal(model(torch.ones(2, 3)), torch.zeros(2, 4))


def test_the_owner_of_a_loss_is_not_copied() -> None:
    class Trainer:
        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(prediction, target)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("it may hold a whole data set")

    trainer = Trainer()
    _, loss = copied((nn.Linear(2, 2), trainer.loss), {})
    assert loss.__self__ is trainer


def test_places_have_the_first_name_of_a_tensor() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].bias
    model.table = torch.ones(3)
    names = ["0.weight", "0.bias", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked", "table"]
    assert list(places(model)) == names
    assert places(model)["0.bias"].tensor is model[1].weight


def test_a_tensor_attribute_is_read_at_every_call(machine: str) -> None:
    class Fixed(nn.Module):
        """A convolution whose weight is no parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.head = torch.randn(2, 3, 2).double(), nn.Linear(10, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(F.conv1d(x, self.kernel)).flatten(1))

    model = Fixed()
    maml = FusedMAML(model, 0.1, 2, backend="fused")
    plain = FusedMAML(model, 0.1, 2, backend="reference")
    data = episode((3, 6))
    for _ in range(2):
        torch.testing.assert_close(maml(*data).loss, plain(*data).loss, rtol=1e-12, atol=0)
        model.kernel.mul_(-0.5)


# -- what changes unseen ----------------------------------------------------------------------------------------------

SWITCH = np.zeros(1)


def test_what_cannot_be_watched_is_captured_again(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) if SWITCH[0] else self.a(x)

    captured: list[int] = []
    monkeypatch.setattr(programs, "capture", lambda *a: (captured.append(1), capture(*a))[1])
    maml = FusedMAML(Calls(forward).double(), 0.1, backend="fused")
    data = episode()
    counts = [0]
    for _ in range(40):
        maml(*data)
        counts.append(len(captured))
    times = [call for call in range(1, 41) if counts[call] > counts[call - 1]]
    assert times == [1, 2, 5, 12, 27]
    assert "captured again from time to time, as changes of the array `SWITCH`" in maml.explain()
    SWITCH[0] = 1
    try:
        for _ in range(64):
            maml(*data)
        plain = FusedMAML(maml.model, 0.1, backend="reference")
        torch.testing.assert_close(maml(*data).loss, plain(*data).loss, rtol=1e-12, atol=0)
    finally:
        SWITCH[0] = 0
