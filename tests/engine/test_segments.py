"""checkpoint="sqrt": the same bits, and parameters of about the square root of the inner steps in memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, optim
from tests.conftest import episode, run
from tests.engine.double_backward import VARIANTS, check, make


def with_checkpoint(net, steps, **options):
    """FusedMAMLs that keep everything and about the square root of the steps, and data."""
    one, data, how = make(net, steps, **options)
    other, *_ = make(net, steps, checkpoint="sqrt", **options)
    return one, other, data, how


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 8, 9, 10, 13])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_same_bits(machine, net, steps, first_order):
    for options in ({"rates": "layer"}, {"weights": [1.0 * (k % 3 > 0) for k in range(steps + 1)]}):
        one, other, data, how = with_checkpoint(net, steps, first_order=first_order, **options)
        loss, grads = run(one, data)
        again, found = run(other, data)
        assert torch.equal(loss, again)
        assert all(torch.equal(g, found[n]) for n, g in grads.items())
        with torch.no_grad():
            assert torch.equal(one(*data).loss, other(*data).loss)
    check(other, data, how)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_variants(machine, net, variant):
    options = dict(VARIANTS[variant])
    if "weights" in options:
        options["weights"] = [0.2, 0.0, 0.1, 0.1, 0.0, 0.3, *options["weights"]]
    one, other, data, how = with_checkpoint(net, 8, tasks=2, **options)
    grads, found = run(one, data)[1], run(other, data)[1]
    assert all(torch.equal(g, found[n]) for n, g in grads.items())
    check(other, data, how)


def test_truncated(machine):
    for options in ({}, {"rates": "sgd"}, {"weights": [0.1] * 13}):
        one, other, data, _ = with_checkpoint("conv", 12, meta_gradient="truncated", truncate=7, **options)
        grads, found = run(one, data)[1], run(other, data)[1]
        assert all(torch.equal(g, found[n]) for n, g in grads.items())


def test_differentiable_adaptation_and_fisher_products(machine):
    one, other, data, _ = with_checkpoint("mlp", 7)
    found = []
    for maml in (one, other):
        fast = maml.adapt(*data[:2], differentiable=True)
        loss = sum((p**2).sum() for p in fast.values())
        found.append(torch.autograd.grad(loss, list(maml.model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 9])
def test_optimizers_of_the_inner_loop(machine, steps, first_order):
    """Their states, too, are kept of the starts of segments and of one segment."""
    for options in (
        {"inner_optimizer": optim.Adam(), "inner_clip_norm": 0.3},
        {"inner_optimizer": optim.SGD(momentum=0.9), "rates": "layer"},
    ):
        one, other, data, _ = with_checkpoint("mlp", steps, first_order=first_order, **options)
        loss, grads = run(one, data)
        again, found = run(other, data)
        assert torch.equal(loss, again)
        assert all(torch.equal(g, found[n]) for n, g in grads.items())
        assert one.backend == other.backend != "reference"


def test_dropout(machine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()
    data = make("mlp", 1)[1]
    found = []
    for checkpoint in (None, "sqrt"):
        torch.manual_seed(1)
        found.append(run(FusedMAML(model, 0.1, 7, backend="fused", checkpoint=checkpoint), data)[1])
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


@pytest.mark.parametrize("learned", [False, True])
def test_memory_grows_with_the_square_root(machine, learned):
    """Exactly by packed parameter vectors: starts of segments, and those of one segment; with learned rates also its
    gradients."""
    data = episode((6,), dtype=torch.float32, tasks=1, n=(40, 40), target=(40,))
    model = nn.Sequential(nn.Linear(6, 100), nn.ReLU(), nn.Linear(100, 40))
    rate = nn.Parameter(torch.tensor(0.1)) if learned else 0.1

    def taken(steps, checkpoint):
        maml = FusedMAML(model, rate, steps, loss="mse", checkpoint=checkpoint, backend="fused")
        return maml.memory_estimate(data[0], data[2])

    vector = taken(9, "recompute") - taken(8, "recompute")
    padded = 4 * sum(math.ceil(p.numel() / 16) * 16 for p in model.parameters())
    assert vector == padded * (2 if learned else 1)

    def vectors(steps):
        segment = math.ceil(math.sqrt(steps))
        return steps // segment + segment - 1 + (segment if learned else 0)

    base = taken(100, "sqrt") - vectors(100) * padded
    for steps in (101, 400, 1000):
        assert taken(steps, "sqrt") - vectors(steps) * padded == base
    assert taken(1000, "sqrt") < taken(100, "recompute")
