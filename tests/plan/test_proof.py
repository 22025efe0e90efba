"""A plan is compared with autograd before use: misread models, planted faults in each result, state afterwards."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maml_cuda import FusedMAML
from maml_cuda.capture.capture import Like
from maml_cuda.plan import proof
from tests import oracle
from tests.conftest import assert_close, fast_parameters, run

TASKS, SAMPLES = 2, 5
LIKE = Like((SAMPLES, 4), torch.float64)  # one task's x


class TwoLayers(nn.Module):
    """4 features to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)


def model_of(function) -> nn.Module:
    """A model whose forward has the given signature."""
    return type("Model", (TwoLayers,), {"forward": function})()


def episode(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x_spt, x_qry = torch.randn(2, TASKS, SAMPLES, 4, dtype=dtype)
    y_spt, y_qry = torch.randint(3, (2, TASKS, SAMPLES))
    return [x_spt, y_spt, x_qry, y_qry]


def an_optional_tensor(self, x, mask=None):
    h = self.a(x)
    return self.b(torch.tanh(h) if mask is None else h)


def an_optional_flag(self, x, is_feat=False):
    h = torch.tanh(self.a(x))
    if is_feat:
        return h
    return self.b(h)


def a_flag_that_is_false(self, x, linear=False):
    h = self.a(x)
    return self.b(torch.tanh(h) if linear is False else h)


def a_name(self, x, activation="tanh"):
    return self.b({"tanh": torch.tanh, "relu": torch.relu}[activation](self.a(x)))


def a_number(self, x, *, slope=0.3):
    return self.b(F.leaky_relu(self.a(x), slope))


def anything(self, x, *args, **options):
    h = self.a(x)
    return self.b(h if args or "linear" in options else torch.tanh(h))


def is_instance(self, x):
    h = self.a(x)
    return self.b(torch.tanh(h) if isinstance(x, Tensor) else h)


def is_tensor(self, x):
    h = self.a(x)
    return self.b(torch.tanh(h) if torch.is_tensor(x) else h)


def is_exactly(self, x):
    h = self.a(x)
    return self.b(torch.tanh(h) if type(x) is Tensor else h)


def has_a_length(self, x):
    h = self.a(x)
    try:
        len(h)
    except Exception:
        return self.b(h)
    return self.b(torch.tanh(h))


def has_no_fake_mode(self, x):
    h = self.a(x)
    return self.b(h if hasattr(x, "fake_mode") else torch.tanh(h))


READ = [
    *(an_optional_tensor, an_optional_flag, a_flag_that_is_false, a_name, a_number, anything),
    *(is_instance, is_tensor, has_a_length),
]
MISREAD = [is_exactly, has_no_fake_mode]  # on tensors without values


def check_against_the_oracle(maml: FusedMAML, first_order: bool = False) -> None:
    data = episode()
    loss, grads = run(maml, data)
    expected_loss, expected = oracle.meta_gradient(maml.model, "cross_entropy", *data, 0.3, 2, first_order)
    assert_close({"loss": loss, **grads}, {"loss": expected_loss, **expected})
    fast = maml.adapt(data[0], data[1], 0)
    assert_close({"": maml.predict(fast, data[2])}, {"": maml.model(data[2]).detach()})


@pytest.mark.parametrize("forward", READ, ids=lambda f: f.__name__)
def test_arguments_with_defaults_and_questions_about_types_are_fused(machine: str, forward) -> None:
    check_against_the_oracle(FusedMAML(model_of(forward).double(), 0.3, 2, backend="fused"))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("forward", MISREAD, ids=lambda f: f.__name__)
def test_a_branch_that_is_misread_is_refused(machine: str, forward, first_order: bool) -> None:
    maml = FusedMAML(model_of(forward).double(), 0.3, 2, first_order=first_order)
    sentence = "do not compute what forward computes: the prediction is off by .* %; maml_cuda has misread the model"
    with pytest.warns(UserWarning, match=sentence):
        check_against_the_oracle(maml, first_order)
    assert maml.backend == "reference"
    assert "misread" in maml.explain()
    fused = FusedMAML(model_of(forward).double(), 0.3, 2, first_order=first_order, backend="fused")
    data = episode()
    calls = [
        lambda: fused(*data),
        lambda: fused.backward(*data),
        lambda: fused.adapt(*data[:2]),
        lambda: fused.predict(fast_parameters(fused.model, TASKS, torch.Generator()), data[0]),
        lambda: fused.loss_and_grad(fast_parameters(fused.model, TASKS, torch.Generator()), *data[:2]),
        lambda: fused.hvp(fast_parameters(fused.model, TASKS, torch.Generator()), *data[:2], {}),
        lambda: fused.memory_estimate(data[0], data[2]),
        lambda: list(fused.inner_loop(*data[:2], 1)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f'backend="fused" cannot serve this model: .*{sentence}'):
            call()
    assert all(p.grad is None for p in fused.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_meets_the_proof(dynamic: bool) -> None:
    maml = FusedMAML(model_of(is_exactly), 0.3, 2, backend="fused")
    call = torch.compile(maml, backend="aot_eager", dynamic=dynamic)
    with pytest.raises(Exception, match="misread"):
        call(*episode(torch.float32))


class Autograd:
    """Stands in for a plan, and returns the results of another module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.double()
        self.trainable = dict(module.named_parameters())

    def predict(self, fast, x: Tensor) -> Tensor:
        own = {name: t[0] for name, t in fast.items()}
        return torch.func.functional_call(self.module, own, x[0]).unsqueeze(0)

    def loss_and_grad(self, fast, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        at = {name: t.clone().requires_grad_(name in self.trainable) for name, t in fast.items()}
        loss = F.cross_entropy(self.predict(at, x)[0], y[0])
        at = {name: t for name, t in at.items() if name in self.trainable}
        grads = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        self.at = at
        return loss.unsqueeze(0), dict(zip(at, grads, strict=True))

    def hvp(self, fast, x: Tensor, y: Tensor, v) -> dict[str, Tensor]:
        _, grads = self.loss_and_grad(fast, x, y)
        along = sum((grads[name] * v[name]).sum() for name in v)
        return dict(zip(self.at, torch.autograd.grad(along, list(self.at.values())), strict=True))


class WrongGradient(torch.autograd.Function):
    """tanh with a derivative that is too large by 1e-6."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2) * (1 + 1e-6)


class NoSecondDerivative(WrongGradient):
    """tanh whose derivative autograd takes for a constant."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.detach().tanh() ** 2)


def with_activation(function) -> nn.Module:
    return model_of(lambda self, x: self.b(function(self.a(x))))


@pytest.mark.parametrize(
    ("function", "found", "found_in_first_order"),
    [
        (torch.tanh, "", ""),
        (lambda h: h.tanh() * (1 + 1e-6), "the prediction is off by", "the prediction is off by"),
        (WrongGradient.apply, "the gradient of a.weight is off by", "the gradient of a.weight is off by"),
        (NoSecondDerivative.apply, "the Hessian-vector product of a.weight is off by", ""),
        (lambda h: h.tanh() * float("nan"), "the prediction is off by nan", "the prediction is off by nan"),
    ],
    ids=["right", "value", "gradient", "second derivative", "nan"],
)  # fmt: skip
def test_each_result_is_compared(function, found: str, found_in_first_order: str) -> None:
    model = with_activation(torch.tanh)
    results = Autograd(with_activation(function))
    for second_order, expected in ((True, found), (False, found_in_first_order)):
        why_not = proof.why_not(model, "cross_entropy", results, LIKE, second_order)
        assert expected in why_not
        assert bool(why_not) == bool(expected)


def test_a_prediction_of_another_shape() -> None:
    results = Autograd(model_of(lambda self, x: self.b(self.a(x))[:, :2]))
    why_not = proof.why_not(model_of(lambda self, x: self.b(self.a(x))), "cross_entropy", results, LIKE, True)
    assert "the prediction has shape [5, 2], not [5, 3]" in why_not


def test_a_layer_that_starts_at_zero_hides_nothing() -> None:
    model = model_of(is_exactly)
    nn.init.zeros_(model.b.weight)
    nn.init.zeros_(model.b.bias)
    with pytest.warns(UserWarning, match="misread"):
        FusedMAML(model, 0.3)(*episode(torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_have_diverged_are_no_difference(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(value)
        model[1].running_var.fill_(value)
        model[1].num_batches_tracked += 1
    maml = FusedMAML(model, 0.3, backend="fused")
    maml(*episode(torch.float32))
    assert maml.backend == "cpu"


def test_buffers_that_stand_at_their_start_hide_nothing() -> None:
    """With a mean of 0 and a variance of 1 a plan without the normalisation would pass: other values are used."""
    layers = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
    model, without = nn.Sequential(*layers).eval(), WithoutTheFirst(*layers).eval()
    assert "prediction" in proof.why_not(model, "cross_entropy", Autograd(without), LIKE, False)


class WithoutTheFirst(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](x)


def test_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    maml = FusedMAML(model, 0.3, backend="fused")
    data = [torch.ones(1, 4, 4), torch.zeros(1, 4, dtype=torch.int64)] * 2
    maml(*data)
    drawn = torch.rand(()).item(), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.rand())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_generators_that_a_forward_uses_are_put_back() -> None:
    def draws(self, x):
        random.random(), np.random.rand(), torch.rand(())
        return self.b(self.a(x))

    model, results = model_of(draws), Autograd(model_of(lambda self, x: self.b(self.a(x))))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # type: ignore[index]
    assert proof.why_not(model, "cross_entropy", results, LIKE, True) == ""
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]


@contextmanager
def half_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(before)


class Zeros(TorchFunctionMode):
    """The results of tanh are zero."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 0 if function is torch.tanh else result


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        half_by_default,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t[:1], lambda t: t),
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        torch.autograd.forward_ad.dual_level,
        Zeros,
    ],
    ids=[
        *("no_grad", "inference mode", "autocast", "another device", "another dtype", "hooks of saved tensors"),
        *("no such hooks", "forward mode", "a function mode"),
    ],
)
def test_the_surroundings_of_the_first_call_do_not_count(surroundings) -> None:
    """What is found there is right, and serves calls with gradients later."""
    maml = FusedMAML(with_activation(torch.tanh), 0.3, backend="fused")
    data = episode(torch.float32)
    with surroundings():
        adapted = maml.adapt(*data[:2])
    expected = oracle.adapt(maml.model, "cross_entropy", *data[:2], 0.3, 1)
    torch.testing.assert_close({n: p.double() for n, p in adapted.items()}, expected, rtol=1e-5, atol=1e-6)
    loss, grads = run(maml, data)
    value, expected = oracle.meta_gradient(maml.model, "cross_entropy", *data, 0.3, 1)
    got = {n: g.double() for n, g in {"loss": loss, **grads}.items()}
    assert_close(got, {"loss": value, **expected}, 1e-5)


def test_a_model_that_holds_what_cannot_be_copied() -> None:
    model = with_activation(torch.tanh)
    model.lock = threading.Lock()
    model.logs = [threading.Lock()]
    maml = FusedMAML(model, 0.3, backend="fused")
    maml(*episode(torch.float32))
    assert maml.backend == "cpu"


def test_a_forward_that_raises_on_the_copy_is_refused() -> None:
    def forward(self, x):
        if not torch.jit.is_tracing() and type(x) is Tensor:
            raise RuntimeError("not today")
        return self.b(self.a(x))

    maml = FusedMAML(model_of(forward), 0.3, backend="fused")
    with pytest.raises(ValueError, match="could not be compared with the model on random data: not today"):
        maml(*episode(torch.float32))


def test_once_for_each_number_of_samples_and_mode() -> None:
    """Also when the mode changes back and forth, as in training with validation."""
    maml = FusedMAML(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), 0.3)
    maml.model[1].num_batches_tracked += 1  # as after one batch
    x, y = torch.randn(2, 6, 4), torch.randint(3, (2, 6))
    with mock.patch.object(proof, "why_not", side_effect=proof.why_not) as proofs:
        for _ in range(3):
            maml.train()
            maml(x[:, :5], y[:, :5], x, y)
            maml.predict(maml.adapt(x[:, :5], y[:, :5]), x)
            maml.eval()
            maml.predict(maml.adapt(x[:, :5], y[:, :5]), x)
    asked = [(call.args[3].shape[0], call.args[4]) for call in proofs.call_args_list]
    assert asked == [(5, True), (6, False)] * 2


def test_first_order_asks_for_no_product_until_it_is_changed() -> None:
    maml = FusedMAML(with_activation(torch.tanh), 0.3, first_order=True)
    data = episode(torch.float32)
    with mock.patch.object(proof, "why_not", side_effect=proof.why_not) as proofs:
        maml(*data)
        maml.first_order = False
        maml(*data)
    assert [call.args[4] for call in proofs.call_args_list] == [False, True]
