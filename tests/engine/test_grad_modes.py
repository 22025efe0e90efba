"""Gradients under no_grad, over several calls and backwards, and with changes between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from maml_cuda import FusedMAML
from tests.engine.nets import BACKENDS, close, episode, equal, learned, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(mode: Callable, backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    out = maml(*episode())
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.task_losses, out.logits, out.support_losses))
    with mode():
        plain = maml(*episode())
        fast = maml.adapt(*episode()[:2], differentiable=True)
        logits = maml.predict(fast, episode()[2])
    outputs = {name: value for name, value in vars(plain).items() if value is not None}
    assert not any(t.requires_grad for t in (*outputs.values(), *fast.values(), logits))
    assert outputs.keys() == {name for name, value in vars(out).items() if value is not None}
    for name, value in outputs.items():
        assert torch.equal(value, getattr(out, name).detach()), name
    close(logits, out.logits)
    assert all(p.grad is None for p in maml.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_on_one_model(backend: str) -> None:
    model = net()
    one = FusedMAML(model, 0.3, 2, backend=backend)
    two = FusedMAML(model, 0.1, 3, first_order=True, backend=backend)
    expected = [step(maml, episode())[1] for maml in (one, two)]
    model.zero_grad()
    first, second = one(*episode()).loss, two(*episode()).loss
    second.backward()
    first.backward()
    for name, p in model.named_parameters():
        close(p.grad, expected[0][f"model.{name}"] + expected[1][f"model.{name}"], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_calls_before_one_backward(backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    expected = [step(maml, episode(seed=s))[1] for s in range(3)]
    maml.zero_grad()
    losses = [maml(*episode(seed=s)).loss for s in range(3)]
    (losses[0] - 2 * losses[1] + 0.5 * losses[2]).backward()
    for name, p in maml.named_parameters():
        close(p.grad, expected[0][name] - 2 * expected[1][name] + 0.5 * expected[2][name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_with_retain_graph(backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    _, once = step(maml, episode())
    maml.zero_grad()
    loss = maml(*episode()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, p in maml.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_step_between_forward_and_backward(backend: str) -> None:
    """The gradient is taken at the parameters of the call."""
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    _, expected = step(maml, episode())
    maml.zero_grad()
    loss = maml(*episode()).loss
    with torch.no_grad():
        for p in maml.parameters():
            p.mul_(3)
    loss.backward()
    for name, p in maml.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_reused_between_forward_and_backward(backend: str) -> None:
    maml = FusedMAML(net(), 0.3, 2, backend=backend)
    _, expected = step(maml, episode())
    data = episode()
    maml.zero_grad()
    out = maml(*data)
    for t in data:
        t.zero_()
    out.loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in maml.named_parameters())


def test_adapt_does_not_hide_a_changed_parameter() -> None:
    """The backward of `adapt` recomputes from the parameters, so that a change in between must raise."""
    maml = FusedMAML(net(), 0.3, 2)
    total = sum(t.square().sum() for t in maml.adapt(*episode()[:2], differentiable=True).values())
    with torch.no_grad():
        maml.model[0].weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_order_may_change_at_any_time(backend: str) -> None:
    maml = FusedMAML(net(), 0.3, 2, backend=backend)
    second = step(maml, episode())
    maml.first_order = True
    first = step(maml, episode())
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1]["model.0.weight"], second[1]["model.0.weight"])
    maml.first_order = False
    equal(step(maml, episode()), second)
