"""Variants of MAML (ANIL, Meta-SGD, multi-step loss, MAML++'s BatchNorm) against an independent double backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, gradcheck
from tests.conftest import assert_close, program_of, run
from tests.engine.double_backward import NORMS, TOLERANCE, VARIANTS, check, double_backward, make


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(machine, variant, net, first_order):
    check(*make(net, 2, first_order=first_order, **VARIANTS[variant]))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("net", ["conv", "features"])
@pytest.mark.parametrize("batch_norm", NORMS)
def test_batch_norm(machine, batch_norm, net, head, first_order):
    check(*make(net, 2, batch_norm=batch_norm, head=head, first_order=first_order))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("batch_norm", ["transductive", *NORMS])
def test_all_of_maml_plus_plus(machine, batch_norm, steps):
    """Rates per layer and step, the multi-step loss with zero weights, BatchNorm in every mode."""
    weights = [0.0, 0.4, 0.0, 0.3, 0.2, 0.1][: steps + 1]
    check(*make("conv", steps, batch_norm=batch_norm, rates="step", weights=weights, tasks=2))
    check(*make("features", steps, batch_norm="transductive" if "per" in batch_norm else batch_norm, weights=weights))


def test_no_inner_step(machine):
    check(*make("features", 0, batch_norm="per_step", weights=[0.7]))


@pytest.mark.parametrize("frozen", ["gamma of the input", "all of BatchNorm", "the first convolution"])
def test_frozen(machine, frozen):
    """Frozen per-step parameters still differ from step to step, so that the layers behind them change."""
    names = {"gamma of the input": ("features", ["0.weight", "0.bias"]),
             "all of BatchNorm": ("conv", [f"{i}.{n}" for i in (1, 5, 9) for n in ("weight", "bias")]),
             "the first convolution": ("conv", ["0.weight", "0.bias"])}  # fmt: skip
    net, chosen = names[frozen]
    maml, data, how = make(net, 3, batch_norm="per_step")
    parameters = dict(maml.model.named_parameters())
    for name in chosen:
        parameters[name].requires_grad_(False)
    adapted = [n for n in how["adapted"] if n not in chosen]
    maml = FusedMAML(maml.model, 0.1, 3, adapt_params=adapted, backend="fused")
    how |= {"adapted": adapted}
    theta = {n: p for n, p in parameters.items() if p.requires_grad}
    for p in parameters.values():
        p.requires_grad_()
    *_, expected = double_backward(maml, data, **how)
    for name in chosen:
        parameters[name].requires_grad_(False)
    _, grads = run(maml, data)
    assert grads.keys() == theta.keys()
    assert_close(grads, {n: expected[n] for n in theta}, TOLERANCE)


def test_recomputed_states(machine):
    """Where states are not kept, the gradient pass is run again with the slots of its step."""
    import json

    maml, data, how = make("conv", 3, batch_norm="per_step", weights=[0.0, 0.2, 0.3, 0.5])
    program = program_of(maml, data)
    program.text = json.dumps({**json.loads(program.text), "recompute": True})
    check(maml, data, how)


def test_more_steps_than_slots(machine):
    """Steps beyond the last slot use the last slot."""
    maml, data, how = make("features", 2, batch_norm="per_step")
    with pytest.raises(ValueError, match="query_weights must hold 5 weights"):
        FusedMAML(maml.model, 0.1, 4, query_weights=[0.0, 1.0, 1.0])
    longer = FusedMAML(maml.model, 0.1, 4, adapt_params=how["adapted"], backend="fused")
    check(longer, data, {**how, "weights": [0.0] * 4 + [1.0]})


@pytest.mark.parametrize("batch_norm", NORMS)
def test_building_blocks(machine, batch_norm):
    """predict, loss_and_grad, hvp and adapt at every slot, against the general path."""
    maml, data, how = make("conv", 2, batch_norm=batch_norm)
    twin = FusedMAML(maml.model, 0.1, 2, adapt_params=how["adapted"], backend="reference")
    for steps in (0, 1, 4):
        assert_close(maml.adapt(*data[:2], steps=steps), twin.adapt(*data[:2], steps=steps), TOLERANCE)
    fast = {n: p + 0.05 * torch.randn_like(p) for n, p in maml.adapt(*data[:2]).items()}
    v = {n: torch.randn_like(p) for n, p in fast.items()}
    for slot in (0, 1, 7, None):
        x, y = data[2:]
        torch.testing.assert_close(
            maml.predict(fast, x, slot=slot), twin.predict(fast, x, slot=slot), rtol=1e-11, atol=1e-11
        )
        got, expected = maml.loss_and_grad(fast, x, y, slot=slot), twin.loss_and_grad(fast, x, y, slot=slot)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-11, atol=1e-11)
        assert_close(got[1], expected[1], TOLERANCE)
        assert_close(maml.hvp(fast, x, y, v, slot=slot), twin.hvp(fast, x, y, v, slot=slot), TOLERANCE)
        gradients = []
        for each in (maml, twin):
            leaves = {n: p.clone().requires_grad_() for n, p in fast.items()}
            each.predict(leaves, x, slot=slot).square().sum().backward()
            gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()})
        assert_close(*gradients, TOLERANCE)
    ends = []
    for each in (maml, twin):
        each.zero_grad()
        adapted = each.adapt(*data[:2], differentiable=True)
        sum((adapted[n] * v[n]).sum() for n in how["adapted"]).backward()
        ends.append({n: p.grad.clone() for n, p in each.model.named_parameters()})
    assert_close(*ends, TOLERANCE)


def test_weights_are_a_schedule(machine):
    """New weights are a new input of the same plan; only another set of zeros makes another plan. None has the bits of
    a call without weights."""
    from maml_cuda.engine.problem import problem_of

    maml, data, how = make("mlp", 2)
    plain = run(maml, data)
    maml.query_weights = torch.tensor([0.0, 0.5, 0.5])
    run(maml, data)
    text, misses = program_of(maml, data).text, problem_of.cache_info().misses
    for last in (0.6, 0.7, 0.8):
        maml.query_weights = [0.0, 1 - last, last]
        check(maml, data, {**how, "weights": [0.0, 1 - last, last]})
    assert maml.query_weights == (0.0, 1 - 0.8, 0.8)
    assert program_of(maml, data).text == text
    assert problem_of.cache_info().misses <= misses + 1  # one more, for the call without gradients
    maml.query_weights = [0.0, 0.0, 2.0]
    twice = run(maml, data)
    maml.query_weights = None
    again = run(maml, data)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][n], g) for n, g in again[1].items())
    assert_close({n: g / 2 for n, g in twice[1].items()}, plain[1], 1e-14)


def test_task_weights_and_query_weights(machine):
    maml, data, how = make("mlp", 2, weights=[0.0, 0.25, 0.5], rates="layer")
    weights = torch.tensor([0.2, 0.0, 1.5], dtype=torch.float64)
    out = maml(*data, task_weights=weights)
    _, task_losses, _, _ = double_backward(maml, data, **how)
    torch.testing.assert_close(out.task_losses, task_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss.detach(), (weights * task_losses).sum(), rtol=1e-12, atol=1e-12)


def test_many_samples_in_tiles(machine):
    """Losses and gradients are summed over the tiles of a set before they are weighted."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    adapted = [n for n, _ in model.named_parameters()]
    weights = [0.1, 0.0, 0.4]
    data = [torch.randn(2, 300, 3).double(), torch.randint(0, 3, (2, 300))] * 2
    maml = FusedMAML(model, 0.1, 2, backend="fused", query_weights=weights)
    rates = {n: torch.full((1,), 0.1, dtype=torch.float64) for n in adapted}
    check(maml, data, {"adapted": adapted, "rates": rates, "weights": weights, "first_order": False})


def test_compiled(machine):
    maml, data, how = make("features", 2, batch_norm="per_step", weights=[0.0, 0.25, 0.75])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda *batch: maml(*batch).loss, fullgraph=True, backend=backend)
    for weights in ([0.0, 0.25, 0.75], [0.0, 0.5, 0.5]):
        maml.query_weights = weights
        maml.zero_grad()
        step(*data).backward()
        *_, expected = double_backward(maml, data, **{**how, "weights": weights})
        assert_close({n: p.grad for n, p in maml.model.named_parameters()}, expected, TOLERANCE)
    assert len(graphs) == 1


@pytest.mark.parametrize("batch_norm", ["transductive", "per_step", "running"])
def test_gradcheck(machine, batch_norm):
    maml, data, _ = make("features", 2, batch_norm=batch_norm, weights=[0.1, 0.2, 0.7], rates="step")
    gradcheck(maml, *data)
