"""meta_gradient="truncated" and "reptile", against loops written out here."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck, reference
from tests.conftest import assert_close, episode, run
from tests.engine import refusals
from tests.engine.double_backward import VARIANTS, make, written_out
from tests.engine.refusals import refuses

TOLERANCE = 1e-9


def support_gradients(maml: FusedMAML, phi: dict[str, Tensor], names: list[str], k: int, x: Tensor, y: Tensor, graph):
    loss = F.cross_entropy(written_out(maml.model, phi, x, k), y)
    return torch.autograd.grad(loss, [phi[n] for n in names], create_graph=graph)


def rate(rates: dict[str, Tensor], name: str, k: int) -> Tensor:
    return rates[name][min(k, len(rates[name]) - 1)]


def truncated(maml, data, truncate, adapted, rates, weights, first_order) -> tuple[Tensor, dict[str, Tensor]]:
    """The inner loop up to step K - truncate without a graph; from there on a plain one, of theta plus a constant."""
    theta = dict(maml.model.named_parameters())
    leaves = {**theta, **{f"inner_lr.{n}": r for n, r in rates.items() if r.requires_grad}}
    steps, losses = len(weights) - 1, []
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        shifts = [{n: torch.zeros_like(theta[n]) for n in adapted}]
        for k in range(max(steps - truncate, 0)):
            phi = {n: p.detach().clone().requires_grad_() for n, p in theta.items()}
            phi |= {n: (phi[n].detach() + shifts[-1][n]).requires_grad_() for n in adapted}
            grads = support_gradients(maml, phi, adapted, k, x_s, y_s, False)
            moved = {n: rate(rates, n, k).detach() * g for n, g in zip(adapted, grads, strict=True)}
            shifts.append({n: shifts[-1][n] - moved[n] for n in adapted})
        path = [theta | {n: theta[n] + shift[n] for n in adapted} for shift in shifts]
        for k in range(len(shifts) - 1, steps):
            grads = support_gradients(maml, path[-1], adapted, k, x_s, y_s, True)
            grads = [g.detach() for g in grads] if first_order else grads
            moved = {n: path[-1][n] - rate(rates, n, k) * g for n, g in zip(adapted, grads, strict=True)}
            path.append(path[-1] | moved)
        query = [written_out(maml.model, phi, x_q, max(k - 1, 0)) for k, phi in enumerate(path)]
        losses.append(sum(w * F.cross_entropy(z, y_q) for w, z in zip(weights, query, strict=True)))
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}
    return loss.detach(), found


def check_truncated(net, steps, truncate, **options):
    maml, data, how = make(net, steps, meta_gradient="truncated", truncate=truncate, **options)
    value, expected = truncated(maml, data, truncate, **how)
    loss, grads = run(maml, data)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=1e-12)
    assert_close(grads, {n: expected[n].reshape(g.shape) for n, g in grads.items()}, TOLERANCE)
    return maml, data, grads


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("steps", "truncate"), [(1, 1), (3, 1), (4, 2), (4, 4), (5, 4)])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_truncated(machine, net, steps, truncate, first_order):
    check_truncated(net, steps, truncate, first_order=first_order)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_truncated_variants(machine, net, variant):
    options = dict(VARIANTS[variant])
    if "weights" in options:
        options["weights"] = [0.2, 0.0, 0.1, 0.1, 0.0, 0.3, *options["weights"]]
    check_truncated(net, 8, 3, tasks=2, **options)
    check_truncated(net, 8, 3, tasks=2, checkpoint="recompute", **options)


@pytest.mark.parametrize("batch_norm", ["per_step", "running"])
def test_truncated_with_batch_norm(machine, batch_norm):
    check_truncated("conv", 2, 1, batch_norm=batch_norm, rates="step")


@pytest.mark.parametrize("tasks", [1, 17])
def test_truncated_in_lanes(machine, tasks):
    check_truncated("mlp", 6, 2, tasks=tasks, rates="sgd")


def test_all_steps_are_the_exact_gradient_to_the_bit(machine):
    for name in ("mlp", "conv"):
        maml, data, _ = make(name, 3, meta_gradient="truncated", truncate=3)
        exact = FusedMAML(maml.model, 0.1, 3, backend="fused")
        for name, g in run(exact, data)[1].items():
            assert torch.equal(g, run(maml, data)[1][name])


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_general_path_and_the_reference_truncate(net):
    for options in ({}, {"rates": "step", "weights": [0.1, 0.2, 0.7]}, {"head": True, "first_order": True}):
        maml, data, _ = check_truncated(net, 2, 1, backend="reference", **options)
        _, grads = run(maml, data)
        _, expected = reference.meta_gradient(
            maml.model, "cross_entropy", *data, maml.inner_lr, 2, maml.first_order, maml._adapt_params,
            maml.query_weights, meta_gradient="truncated", truncate=1,
        )  # fmt: skip
        assert_close(grads, {n: expected[n] for n in grads}, TOLERANCE)
        check = gradcheck(maml, *data)
        assert all(row.autograd_error < 1e-9 and row.finite_difference_error != 0 for row in check)


def test_truncated_memory_is_flat_in_the_steps(machine):
    """But for the losses, which the caller has."""
    data = episode((2, 9, 8), dtype=torch.float32, classes=3)
    model = make("conv", 1)[0].model.float()

    def taken(steps, **options):
        return FusedMAML(model, 0.1, steps, backend="fused", **options).memory_estimate(data[0], data[2])

    cut = [taken(steps, meta_gradient="truncated", truncate=2) for steps in (3, 10, 100)]
    assert cut[0] == cut[1] == cut[2] < taken(10)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_adapt_truncates(backend):
    maml, data, how = make("mlp", 4, meta_gradient="truncated", truncate=2, backend=backend)
    fast = maml.adapt(*data[:2], differentiable=True)
    prediction = maml.predict(fast, data[2])
    loss = F.cross_entropy(prediction.flatten(0, 1), data[3].flatten())
    grads = torch.autograd.grad(loss, list(maml.model.parameters()))
    _, expected = truncated(maml, data, 2, **how)
    names = [n for n, _ in maml.model.named_parameters()]
    assert_close(dict(zip(names, grads, strict=True)), expected, TOLERANCE)


def reptile(maml, data, adapted, rates, weights, first_order) -> tuple[Tensor, dict[str, Tensor]]:
    theta = {n: p.detach() for n, p in maml.model.named_parameters()}
    losses, grads = [], {n: torch.zeros_like(p) for n, p in theta.items()}
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        phi = {n: p.clone().requires_grad_() for n, p in theta.items()}
        for k in range(len(weights) - 1):
            found = support_gradients(maml, phi, adapted, k, x_s, y_s, False)
            phi = {n: (phi[n] - rate(rates, n, k) * g).detach() for n, g in zip(adapted, found, strict=True)}
            phi = {n: p.requires_grad_() for n, p in phi.items()}
        losses.append(F.cross_entropy(written_out(maml.model, phi, x_q, 0), y_q).detach())
        grads = {n: g + (theta[n] - phi[n].detach()) / len(data[0]) for n, g in grads.items()}
    return torch.stack(losses).mean(), grads


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(("steps", "tasks"), [(0, 2), (1, 3), (4, 17)])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_reptile(machine, net, steps, tasks, backend):
    maml, data, how = make(net, steps, tasks=tasks, meta_gradient="reptile", backend=backend)
    value, expected = reptile(maml, data, **how)
    loss, grads = run(maml, data)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=1e-12)
    assert_close(grads, expected, TOLERANCE)
    _, of_reference = reference.meta_gradient(
        maml.model, "cross_entropy", *data, 0.1, steps, meta_gradient="reptile"
    )  # fmt: skip
    assert_close(grads, of_reference, TOLERANCE)
    weights = torch.rand(tasks, dtype=torch.float64)
    maml.zero_grad()
    maml.backward(*data, task_weights=weights)
    alone = [reptile(maml, [d[t : t + 1] for d in data], **how)[1] for t in range(tasks)]
    weighted = {n: sum(w * a[n] for w, a in zip(weights, alone, strict=True)) for n in expected}
    assert_close({n: p.grad for n, p in maml.model.named_parameters()}, weighted, TOLERANCE)


def test_reptile_needs_less_memory_than_maml(machine):
    data = episode((2, 9, 8), dtype=torch.float32, classes=3)
    model = make("conv", 1)[0].model.float()
    kinds = {kind: FusedMAML(model, 0.1, 5, meta_gradient=kind, backend="fused") for kind in ("unrolled", "reptile")}
    taken = {kind: maml.memory_estimate(data[0], data[2]) for kind, maml in kinds.items()}
    assert taken["reptile"] < taken["unrolled"]


@pytest.mark.parametrize("options", [{"meta_gradient": "truncated", "truncate": 2}, {"meta_gradient": "reptile"}])
def test_copies_and_compiled_code(options):
    maml, data, _ = make("mlp", 3, **options)
    loss, grads = run(maml, data)
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert other.meta_gradient == options["meta_gradient"]
        for name, g in run(other, data)[1].items():
            assert torch.equal(g, grads[name])
    maml.zero_grad()
    compiled = torch.compile(lambda *d: maml(*d).loss, fullgraph=True, backend="aot_eager")
    again = compiled(*data)
    again.backward()
    assert torch.equal(again.detach(), loss)
    for name, p in maml.model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, grads[name])


REFUSED = {
    "unknown": ({"meta_gradient": "exact"}, ValueError, ("meta_gradient must be one of unrolled", "'exact'")),
    "truncate alone": ({"truncate": 2}, ValueError, ('truncate must be None unless meta_gradient is "truncated"', "2")),
    "no truncate": ({"meta_gradient": "truncated"}, TypeError, ("truncate must be an int", "got NoneType")),
    "truncate a bool": (
        {"meta_gradient": "truncated", "truncate": True}, TypeError, ("truncate must be an int", "got bool"),
    ),
    "truncate 0": (
        {"meta_gradient": "truncated", "truncate": 0}, ValueError, ("truncate must be from 1 to", "2, got 0"),
    ),
    "truncate 3": (
        {"meta_gradient": "truncated", "truncate": 3}, ValueError, ("truncate must be from 1 to", "2, got 3"),
    ),
    "reptile at first order": (
        {"meta_gradient": "reptile", "first_order": True}, ValueError,
        ('first_order must be False with meta_gradient="reptile"', "no Hessians", "got True"),
    ),
    "reptile with query weights": (
        {"meta_gradient": "reptile", "query_weights": [0.0, 0.5, 1.0]}, ValueError,
        ('query_weights must be None with meta_gradient="reptile"', "got [0.0, 0.5, 1.0]"),
    ),
    "reptile with learned rates": (
        {"meta_gradient": "reptile", "inner_lr": nn.Parameter(torch.tensor(0.1, dtype=torch.float64))}, ValueError,
        ('inner_lr must not require grad with meta_gradient="reptile"', "got requires_grad=True of inner_lr"),
    ),
    "reptile of a head": (
        {"meta_gradient": "reptile", "adapt_params": ["3.weight", "3.bias"]}, ValueError,
        ('meta_gradient="reptile" must have adapted parameters alone', "got 0.weight, 0.bias, 1.weight, 1.bias"),
    ),
    "reptile of a loss": (
        {"meta_gradient": "reptile", "loss": nn.PReLU()}, ValueError, ("must have adapted parameters", "loss.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, pieces = REFUSED[case]
    model = refusals.net()
    refuses(model, lambda: FusedMAML(model, **({"inner_lr": 0.1, "inner_steps": 2} | options)), error, *pieces)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused_later(backend):
    """first_order and query_weights may change between calls."""
    maml = FusedMAML(refusals.net(), 0.1, 2, meta_gradient="reptile", backend=backend)
    data = list(refusals.episode().values())
    maml.backward(*data)
    maml.first_order = True
    refuses(maml, lambda: maml(*data), ValueError, "first_order must be False", "reptile")
    maml.first_order, maml.query_weights = False, [1, 0, 1]
    refuses(maml, lambda: maml(*data), ValueError, "query_weights must be None", "reptile")
    maml.query_weights = None
    refuses(maml, lambda: maml.adapt(*data[:2], differentiable=True), ValueError, "differentiable must be False")
    x = data[0].clone().requires_grad_()
    if backend == "reference":
        refuses(maml, lambda: maml(x, *data[1:]), ValueError, "data must not require grad", "reptile")


def test_no_fisher_products_of_a_truncated_inner_loop():
    model = nn.Linear(3, 2).double()
    maml = FusedMAML(model, 0.1, 2, loss="categorical_policy_gradient", meta_gradient="truncated", truncate=1)
    v = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    x = torch.rand(2, 4, 3).double()
    with pytest.raises(ValueError, match="must have meta_gradient=\"unrolled\", got 'truncated'"):
        maml.fisher_vector_product(x, None, x, v)
