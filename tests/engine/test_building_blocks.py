"""adapt, predict, loss_and_grad and hvp against the reference and a loop by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from maml_cuda import FusedMAML
from tests.engine.nets import BACKENDS, close, dotted_rates, episode, learned, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(model: nn.Module, x: Tensor, y: Tensor, rate: Callable[[int], float], steps: int) -> dict[str, Tensor]:
    """The inner loop of one task, in plain torch."""
    phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for k in range(steps):
        loss = nn.functional.cross_entropy(functional_call(model, (phi, buffers), (x,)), y)
        grads = torch.autograd.grad(loss, list(phi.values()))
        phi = {n: (p - rate(k) * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
    return {name: p.detach() for name, p in phi.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [None, 0, 1, 5])
def test_adapt(steps: int | None, backend: str) -> None:
    model, rates = net(), torch.tensor([0.3, 0.1, 0.2]).double()
    maml = FusedMAML(model, rates, 3, backend=backend)
    x, y, *_ = episode()
    fast = maml.adapt(x, y, steps=steps)
    assert list(fast) == [name for name, _ in model.named_parameters()]
    for t in range(3):
        truth = by_hand(model, x[t], y[t], lambda k: float(rates[min(k, 2)]), 3 if steps is None else steps)
        for name, p in truth.items():
            close(fast[name][t], p, name)
    assert not any(t.requires_grad for t in fast.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapt_keeps_the_others_as_expanded_views(backend: str) -> None:
    maml = FusedMAML(net(), 0.3, 2, adapt_params=["3.weight", "3.bias"], backend=backend)
    fast = maml.adapt(*episode()[:2])
    body = fast["0.weight"]
    assert body.shape == (3, 7, 3)
    assert body.stride(0) == 0
    assert body.data_ptr() == maml.model[0].weight.data_ptr()
    assert not body.requires_grad
    assert not torch.equal(fast["3.weight"][0], maml.model[3].weight)


ADAPT: dict[str, dict[str, Any]] = {
    "plain": {"inner_lr": lambda: 0.3},
    "one learned rate": {"inner_lr": lambda: learned(0.3)},
    "learned per step": {"inner_lr": lambda: learned(0.3, 0.2)},
    "more steps than rates": {"inner_lr": lambda: learned(0.3, 0.2), "steps": 4},
    "fewer steps than rates": {"inner_lr": lambda: learned(0.3, 0.2), "steps": 1},
    "no steps": {"inner_lr": lambda: learned(0.3, 0.2), "steps": 0},
    "a dict": {"inner_lr": dotted_rates},
    "ANIL": {"inner_lr": lambda: learned(0.3), "adapt_params": ["3.weight", "3.bias"]},
    "first order": {"inner_lr": lambda: learned(0.3), "first_order": True},
}


@pytest.mark.parametrize("case", ADAPT)
def test_adapt_differentiable_against_the_reference(case: str) -> None:
    given = dict(ADAPT[case])
    inner_lr, steps = given.pop("inner_lr")(), given.pop("steps", None)
    model = net()
    x, y, *_ = episode()
    results = []
    for backend in BACKENDS:
        maml = FusedMAML(model, inner_lr, 2, backend=backend, **given)
        maml.zero_grad()
        fast = maml.adapt(x, y, steps=steps, differentiable=True)
        g = torch.Generator().manual_seed(4)
        total = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in fast.values())
        total.backward()
        detached = maml.adapt(x, y, steps=steps)
        for name, t in fast.items():
            assert torch.equal(t.detach(), detached[name]), name
        results.append((fast, {name: p.grad for name, p in maml.named_parameters()}))
    for name, t in results[0][0].items():
        close(t.detach(), results[1][0][name].detach(), name)
    for name, grad in results[1][1].items():
        own = results[0][1][name]
        if grad is None:  # a rate that no step uses
            assert own is None or not own.any(), name
        else:
            close(own, grad, name)


def test_adapt_in_an_objective_of_your_own_is_the_meta_gradient() -> None:
    rate = learned(0.3)
    maml = FusedMAML(net(), rate, 2)
    x_spt, y_spt, x_qry, y_qry = episode()
    expected = step(maml, episode())
    maml.zero_grad()
    logits = maml.predict(maml.adapt(x_spt, y_spt, differentiable=True), x_qry)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y_qry.flatten())
    loss.backward()
    close(loss.detach(), expected[0])
    for name, p in maml.named_parameters():
        close(p.grad, expected[1][name], name)


@pytest.mark.parametrize("inner_lr", [lambda: 0.3, lambda: learned(0.3), dotted_rates])
def test_building_blocks_against_the_reference(inner_lr: Callable[[], Any]) -> None:
    model = net()
    x_spt, y_spt, x, y = episode()
    rate = inner_lr()
    g = torch.Generator().manual_seed(6)
    results = []
    for backend in BACKENDS:
        maml = FusedMAML(model, rate, 2, backend=backend)
        fast = maml.adapt(x_spt, y_spt)
        if not results:
            v = {name: torch.randn(t.shape, generator=g, dtype=t.dtype) for name, t in fast.items()}
        leaves = {name: t.clone().requires_grad_() for name, t in fast.items()}
        logits = maml.predict(leaves, x)
        grads = torch.autograd.grad(logits.square().sum(), list(leaves.values()))
        losses, gradient = maml.loss_and_grad(fast, x, y)
        results.append(
            {"logits": logits.detach(), "losses": losses}
            | {f"predict {name}": t for name, t in zip(leaves, grads, strict=True)}
            | {f"gradient {name}": t for name, t in gradient.items()}
            | {f"hvp {name}": t for name, t in maml.hvp(fast, x, y, v).items()}
            | {f"part hvp {name}": t for name, t in maml.hvp(fast, x, y, {"3.bias": v["3.bias"]}).items()}
        )
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert not value.requires_grad
        close(value, results[1][name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_at_parameters_that_all_tasks_share(backend: str) -> None:
    """Parameters that are expanded views, as adapt(steps=0) returns frozen ones, are accepted by every block."""
    model = net()
    model[0].requires_grad_(False)
    maml = FusedMAML(model, 0.3, adapt_params=["3.bias"], backend=backend)
    x, y = episode()[2:]
    views = {name: p.detach().expand(3, *p.shape) for name, p in model.named_parameters()}
    dense = {name: t.clone() for name, t in views.items()}
    assert torch.equal(maml.predict(views, x), maml.predict(dense, x))
    for a, b in zip(
        maml.loss_and_grad(views, x, y)[1].items(), maml.loss_and_grad(dense, x, y)[1].items(), strict=True
    ):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    assert "0.weight" not in maml.hvp(views, x, y, dense)
