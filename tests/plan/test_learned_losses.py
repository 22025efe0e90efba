"""Losses with parameters of their own, which receive a meta-gradient, against plain double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maml_cuda import FusedMAML, reference
from tests.conftest import assert_close
from tests.plan.test_computed_losses import RATE, STEPS, data_of, labels, mlp, values

pytestmark = pytest.mark.usefixtures("one_thread")


class Learned(nn.Module):
    """A network of each prediction and its target, and squares with learned precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.log_variance = nn.Parameter(torch.zeros(3))

    def forward(self, p: Tensor, y: Tensor) -> Tensor:
        squares = (p - y).square() * (-self.log_variance).exp() + self.log_variance
        return self.net(torch.stack([p, y], -1)).square().mean() + squares.sum() / len(p)


class Case(NamedTuple):
    loss: Callable[[Any, Any], Tensor]
    parameters: list[Tensor]
    data: list[Tensor]


def learned() -> Case:
    loss = Learned().double()
    return Case(loss, list(loss.parameters()), data_of(values))


def temperature() -> Case:
    log = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    return Case(lambda p, y: F.cross_entropy(p / log.exp(), y), [log], data_of(labels))


def weights_of_terms() -> Case:
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    return Case(
        lambda p, y: (p - y).square().mean() * (-w[0]).exp() + (p - y).abs().mean() * (-w[1]).exp() + w.sum(),
        [w],
        data_of(values),
    )


CASES = {"module": learned, "temperature": temperature, "weights of terms": weights_of_terms}


def expected(
    model: nn.Module, case: Case, first_order: bool = False, steps: int = STEPS
) -> tuple[Tensor, list[Tensor]]:
    """The meta-loss, and its gradient by the parameters of the model and of the loss."""
    theta = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for x_spt, y_spt, x_qry, y_qry in zip(*case.data, strict=True):
        phi = dict(theta)
        for _ in range(steps):
            value = case.loss(functional_call(model, phi, (x_spt,)), y_spt)
            grads = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            phi = {
                n: p - RATE * (g.detach() if first_order else g) for (n, p), g in zip(phi.items(), grads, strict=True)
            }
        total = total + case.loss(functional_call(model, phi, (x_qry,)), y_qry) / len(case.data[0])
    return total.detach(), list(torch.autograd.grad(total, [*theta.values(), *case.parameters]))


def assert_same(got: list[Tensor | None], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    assert_close(*({str(i): t for i, t in enumerate(given)} for given in (got, wanted)), tolerance)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_its_parameters_receive_their_meta_gradient(name: str, first_order: bool, backend: str) -> None:
    case, model = CASES[name](), mlp()
    maml = FusedMAML(model, RATE, STEPS, loss=case.loss, first_order=first_order, backend=backend)
    out = maml(*case.data)
    out.loss.backward()
    value, grads = expected(model, case, first_order)
    torch.testing.assert_close(out.loss.detach(), value, rtol=1e-12, atol=0)
    assert_same([p.grad for p in (*model.parameters(), *case.parameters)], grads)


@pytest.mark.parametrize("name", CASES)
def test_on_each_machine(machine: str, name: str) -> None:
    case, model = CASES[name](), mlp()
    maml = FusedMAML(model, RATE, STEPS, loss=case.loss, backend="fused", checkpoint="recompute")
    maml.backward(*case.data)
    assert_same([p.grad for p in (*model.parameters(), *case.parameters)], expected(model, case)[1])


@pytest.mark.parametrize("name", CASES)
def test_adapted_parameters_are_differentiable_in_them(name: str) -> None:
    case, model = CASES[name](), mlp()
    maml = FusedMAML(model, RATE, STEPS, loss=case.loss, backend="fused")
    fast = maml.adapt(case.data[0], case.data[1], differentiable=True)
    predictions = maml.predict(fast, case.data[2])
    torch.stack([case.loss(p, y) for p, y in zip(predictions, case.data[3], strict=True)]).mean().backward()
    assert_same([p.grad for p in (*model.parameters(), *case.parameters)], expected(model, case)[1])


@pytest.mark.parametrize("name", CASES)
def test_building_blocks(name: str) -> None:
    """Where the parameters of the model move alone."""
    case, model = CASES[name](), mlp()
    ours, plain = (FusedMAML(model, RATE, STEPS, loss=case.loss, backend=b) for b in ("fused", "reference"))
    x, y = case.data[:2]
    fast = plain.adapt(x, y)
    v = {n: torch.randn_like(t) for n, t in fast.items()}
    for method, more in (("loss_and_grad", ()), ("hvp", (v,))):
        got, wanted = (getattr(maml, method)(fast, x, y, *more) for maml in (ours, plain))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(ours.inner_loop(x, y, 3), plain.inner_loop(x, y, 3), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_a_loss_after_each_step() -> None:
    case, model, weights = weights_of_terms(), mlp(), [0.2, 0.3, 0.5]
    FusedMAML(model, RATE, STEPS, loss=case.loss, backend="fused", query_weights=weights).backward(*case.data)
    parts = [expected(model, case, steps=steps)[1] for steps in range(STEPS + 1)]
    wanted = [sum(w * g for w, g in zip(weights, of, strict=True)) for of in zip(*parts, strict=True)]
    assert_same([p.grad for p in (*model.parameters(), *case.parameters)], wanted)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_and_learned_again(name: str, backend: str) -> None:
    case, model = CASES[name](), mlp()
    maml = FusedMAML(model, RATE, STEPS, loss=case.loss, backend=backend)
    for learns in (True, False, True):
        for p in case.parameters:
            p.requires_grad_(learns)
            p.grad = None
        maml.backward(*case.data)
        assert all((p.grad is not None) == learns for p in case.parameters)


def test_values_are_read_at_every_call() -> None:
    case, model = temperature(), mlp()
    maml = FusedMAML(model, RATE, STEPS, loss=case.loss, backend="fused")
    for value in (0.3, 1.0, -0.5):
        with torch.no_grad():
            case.parameters[0].fill_(value)
        torch.testing.assert_close(maml(*case.data).loss.detach(), expected(model, case)[0], rtol=1e-12, atol=0)


def test_in_float32() -> None:
    loss, model, data = Learned(), mlp().float(), [t.float() for t in data_of(values)]
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
    maml.backward(*data)
    got = [p.grad.double() for p in (*model.parameters(), *loss.parameters())]
    case = Case(loss.double(), list(loss.parameters()), [t.double() for t in data])
    assert_same(got, expected(model.double(), case)[1], 1e-5)


def test_the_reference_names_those_of_a_module() -> None:
    case, model = learned(), mlp()
    value, grads = reference.meta_gradient(model, case.loss, *case.data, RATE, STEPS)
    wanted_value, wanted = expected(model, case)
    torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=0)
    names = [n for n, _ in model.named_parameters()] + [f"loss.{n}" for n, _ in case.loss.named_parameters()]
    assert_close(grads, dict(zip(names, wanted, strict=True)))


def test_a_tensor_that_the_loss_computed_before() -> None:
    """The general path takes it: its graph is not ours."""
    log = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    factor, model, data = log.exp(), mlp(), data_of(labels)
    maml = FusedMAML(model, RATE, STEPS, loss=lambda p, y: F.cross_entropy(p / factor, y))
    with pytest.warns(UserWarning, match="a tensor that requires grad and is not the model's"):
        maml(*data).loss.backward()
    case = Case(lambda p, y: F.cross_entropy(p / log.exp(), y), [log], data)
    assert_same([p.grad for p in (*model.parameters(), log)], expected(model, case)[1])


def test_a_parameter_of_the_model_is_refused() -> None:
    """It would be read as it was before the inner loop."""
    model, data = mlp(), data_of(values)
    held = model[0].weight
    maml = FusedMAML(model, RATE, STEPS, loss=lambda p, y: F.l1_loss(p, y) + held.square().sum())
    with pytest.warns(UserWarning, match=r"reads 0\.weight, which it holds as it was before the inner loop"):
        maml(*data)
    assert maml.backend == "reference"


def test_a_tensor_in_forward_that_is_no_parameter_is_refused() -> None:
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * factor

    maml = FusedMAML(Scaled(4, 3).double(), RATE, loss="mse")
    with pytest.warns(UserWarning, match="a tensor that requires grad and is not the model's"):
        maml(*data_of(values))
