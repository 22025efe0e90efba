"""Policy-gradient losses on every backend: Gaussian and categorical policies, score and likelihood-ratio form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks import rl_policy
from maml_cuda import FusedMAML, PolicyTarget, gradcheck, losses, policies, reference
from tests.conftest import assert_close, check_meta_gradient, fast_parameters, run
from tests.engine.policy_models import LOSSES, Gaussian, cast, episode, pick, policy, target

pytestmark = pytest.mark.usefixtures("machine")

FORMS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_exact(kind, forms, steps, ragged):
    check_meta_gradient(policy(kind), LOSSES[kind], episode(kind, forms=forms, ragged=ragged), 0.2, steps)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("steps", [1, 3])
def test_first_order(kind, steps):
    check_meta_gradient(policy(kind), LOSSES[kind], episode(kind), 0.2, steps, first_order=True)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("n_support", "n_query"), [(128, 129), (300, 127)])
def test_many_samples(kind, n_support, n_query):
    """Samples in tiles; the weights of a task are summed over all of them."""
    check_meta_gradient(policy(kind), LOSSES[kind], episode(kind, n_support, n_query, 2), 0.2, 2)


@pytest.mark.parametrize("tasks", [1, 17, 33])
@pytest.mark.parametrize("kind", LOSSES)
def test_tasks(kind, tasks):
    check_meta_gradient(policy(kind), LOSSES[kind], episode(kind, 1, 1, tasks, ragged=False), 0.1, 2)


@pytest.mark.parametrize("form", ["plain", "expand", "expand_as", "floored"])
def test_forms_of_log_std(form):
    model = policy("gaussian", form=form)
    with torch.no_grad():
        model.log_std.copy_(torch.tensor([-0.4, 0.1]))  # one of them below the floor
    data = episode("gaussian")
    maml = check_meta_gradient(model, LOSSES["gaussian"], data, 0.2, 2)
    oracle = FusedMAML(model, 0.2, 2, loss=LOSSES["gaussian"], backend="reference")
    fast = maml.adapt(*data[:2])
    for ours, theirs in zip(maml.predict(fast, data[2]), oracle.predict(fast, data[2]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", LOSSES)
def test_learned_rates(kind):
    model = policy(kind)
    rates = {n: nn.Parameter(0.2 * torch.rand(2, *p.shape).double()) for n, p in model.named_parameters()}
    check_meta_gradient(model, LOSSES[kind], episode(kind), rates, 2)
    check_meta_gradient(model, LOSSES[kind], episode(kind), nn.Parameter(torch.tensor(0.1).double()), 2)


PARTS = {
    "log_std": lambda n: n == "log_std",
    "means": lambda n: n != "log_std",
    "head": lambda n: n.startswith(("body.2", "2.")),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("first_order", [False, True])
def test_partly_adapted(part, first_order):
    data = episode("gaussian", 130, 6)
    check_meta_gradient(
        policy("gaussian"), LOSSES["gaussian"], data, 0.2, 2, adapt_params=PARTS[part], first_order=first_order
    )


def test_frozen_log_std():
    model = policy("gaussian")
    model.log_std.requires_grad_(False)
    check_meta_gradient(model, LOSSES["gaussian"], episode("gaussian"), 0.2, 2)
    assert model.log_std.grad is None


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("n", [1, 17, 129])
def test_building_blocks(kind, ratio, n):
    """Loss, gradient, Hessian-vector product and the backward of predict, at each task's own parameters."""
    model, generator = policy(kind), torch.Generator().manual_seed(0)
    fused = FusedMAML(model, 0.1, loss=LOSSES[kind], backend="fused")
    oracle = FusedMAML(model, 0.1, loss=LOSSES[kind], backend="reference")
    fast, v = fast_parameters(model, 2, generator), fast_parameters(model, 2, generator)
    x, y = torch.randn(2, n, 3).double(), target(kind, 2, n, ratio, True)
    assert_close(*({"losses": m.loss_and_grad(fast, x, y)[0]} for m in (fused, oracle)), 1e-12)
    assert_close(fused.loss_and_grad(fast, x, y)[1], oracle.loss_and_grad(fast, x, y)[1], 1e-11)
    assert_close(fused.hvp(fast, x, y, v), oracle.hvp(fast, x, y, v), 1e-10)
    grads = []
    for maml in (fused, oracle):
        leaves = {name: p.clone().requires_grad_() for name, p in fast.items()}
        torch.sin(policies.log_prob(maml.predict(leaves, x), y.actions)).sum().backward()
        grads.append({name: p.grad for name, p in leaves.items()})
    assert_close(*grads, 1e-11)


@pytest.mark.parametrize("kind", LOSSES)
def test_differentiable_adapt(kind):
    data, grads = episode(kind), []
    for backend in ("fused", "reference"):
        torch.manual_seed(1)
        maml = FusedMAML(policy(kind), 0.2, 2, loss=LOSSES[kind], backend=backend)
        fast = maml.adapt(*data[:2], differentiable=True)
        policies.log_prob(maml.predict(fast, data[2]), data[3].actions).sum().backward()
        grads.append({n: p.grad for n, p in maml.named_parameters()})
    assert_close(*grads)


@pytest.mark.parametrize("kind", LOSSES)
def test_outputs(kind):
    data = episode(kind)
    maml = FusedMAML(policy(kind), 0.2, 2, loss=LOSSES[kind], backend="fused")
    out = maml(*data)
    fast = maml.adapt(*data[:2])
    prediction = maml.predict(fast, data[2])
    torch.testing.assert_close(out.logits, policies.mean_of(prediction))
    for t in range(3):
        one = prediction[t] if kind == "categorical" else (prediction[0][t], prediction[1][t])
        y = PolicyTarget(*(None if f is None else f[t] for f in data[3]))
        torch.testing.assert_close(out.task_losses[t], losses.policy_gradient(one, y))
    torch.testing.assert_close(
        out.support_losses[:, 0], maml.loss_and_grad(maml.adapt(*data[:2], steps=0), *data[:2])[0]
    )
    with torch.no_grad():
        assert torch.equal(maml(*data).loss, out.loss.detach())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("n", [6, 200])
def test_a_shorter_task_is_exact(kind, n):
    """Padding has no effect, whatever it holds."""
    data = episode(kind, n, n, tasks=2, ragged=False)
    short = n // 2 + 1
    for i in (1, 3):
        weights = torch.ones(2, n).double()
        weights[1, short:] = 0
        data[i] = data[i]._replace(weights=weights)
        data[i].advantages[1, short:] = 1e30
        if data[i].old_log_probs is not None:
            data[i].old_log_probs[1, short:] = -1e4  # a ratio beyond any number
        data[i - 1][1, short:] = 50
    maml = FusedMAML(policy(kind), 0.2, 2, loss=LOSSES[kind], backend="fused")
    oracle = FusedMAML(maml.model, 0.2, 2, loss=LOSSES[kind], backend="reference")
    alone = pick(data, (slice(1, 2), slice(0, short)))
    alone[1], alone[3] = (y._replace(weights=None) for y in (alone[1], alone[3]))
    expected = oracle(*alone).task_losses[0].item()
    torch.testing.assert_close(maml(*data).task_losses[1].item(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(oracle(*data).task_losses[1].item(), expected, rtol=1e-12, atol=1e-14)
    _, grads = run(maml, pick(data, slice(1, 2)))
    assert_close(grads, run(oracle, alone)[1])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("n", [6, 200])
def test_bits(kind, n):
    """The same bits for any number of threads, and for a task whatever its neighbours are."""
    data = cast(episode(kind, n, n, tasks=19), torch.float32)
    maml = FusedMAML(policy(kind).float(), 0.2, 2, loss=LOSSES[kind], backend="fused")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.cat([g.flatten() for g in run(maml, data)[1].values()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])
    whole = maml(*data)
    for t in (0, 18):
        alone = maml(*pick(data, slice(t, t + 1)))
        assert torch.equal(alone.task_losses[0], whole.task_losses[t])
        assert torch.equal(alone.logits[0], whole.logits[t])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("n", [12, 150])
@pytest.mark.parametrize("steps", [1, 3])
def test_float32_is_as_good_as_the_reference(kind, n, steps):
    """At most twice the reference's own float32 error (the worst of 8 orders of the samples), plus 2e-6."""
    model = policy(kind).float()
    data = cast(episode(kind, n, n, tasks=2), torch.float32)
    truth = flat(
        reference.meta_gradient(copy.deepcopy(model).double(), LOSSES[kind], *cast(data, torch.float64), 0.1, steps)[1]
    )

    def error(gradients):
        return ((flat(gradients).double() - truth).norm() / truth.norm()).item()

    own = 0.0
    for _ in range(8):
        order = torch.randperm(n)
        shuffled = pick(data, (slice(None), order))
        own = max(own, error(reference.meta_gradient(model, LOSSES[kind], *shuffled, 0.1, steps)[1]))
    assert error(run(FusedMAML(model, 0.1, steps, loss=LOSSES[kind], backend="fused"), data)[1]) <= 2 * own + 2e-6


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind):
    maml = FusedMAML(policy(kind).float(), 0.2, 2, loss=LOSSES[kind], backend="fused")
    table = gradcheck(maml, *cast(episode(kind), torch.float32))
    assert {row.name for row in table} == dict(maml.model.named_parameters()).keys()


@pytest.mark.parametrize("kind", LOSSES)
def test_memory_does_not_depend_on_the_target(kind):
    maml = FusedMAML(policy(kind), 0.2, 2, loss=LOSSES[kind], backend="fused")
    assert maml.memory_estimate(*episode(kind)[::2]) > 0


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("kind", LOSSES)
def test_compiles_whole(kind):
    data = episode(kind)
    maml = FusedMAML(policy(kind), 0.2, 2, loss=LOSSES[kind], backend="fused")
    v = {n: torch.randn_like(p) for n, p in maml.model.named_parameters()}

    def step(x_spt, y_spt, x_qry, y_qry):
        product = maml.fisher_vector_product(x_spt, y_spt, x_qry, v)
        return maml(x_spt, y_spt, x_qry, y_qry).loss, product

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f in (step, compiled):
        maml.zero_grad()
        loss, product = f(*data)
        loss.backward()
        results.append({"loss": loss.detach(), **{n: p.grad for n, p in maml.named_parameters()}})
        results[-1].update({f"F {n}": p for n, p in product.items()})
    assert_close(*results, 1e-12)


# -- Fisher-vector products --------------------------------------------------------------------------------------


def check_fisher(model, kind, data, inner_lr, steps, weights=None, **options):
    """Compares with double backward through the inner loop and the KL divergence."""
    v = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    products = [
        FusedMAML(model, inner_lr, steps, loss=LOSSES[kind], backend=backend, **options).fisher_vector_product(
            *data[:3], v, weights=weights
        )
        for backend in ("fused", "reference")
    ]
    assert_close(*products, 1e-9)
    return products[0]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_fisher_vector_product(kind, steps, ratio, ragged):
    data = episode(kind, forms=(ratio, True), ragged=ragged)
    check_fisher(policy(kind), kind, data, 0.2, steps, data[3].weights)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("n_support", "n_query"), [(129, 300), (5, 129), (300, 6)])
def test_fisher_vector_product_of_many_samples(kind, n_support, n_query):
    data = episode(kind, n_support, n_query, 2)
    check_fisher(policy(kind), kind, data, 0.2, 2, data[3].weights)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("n", [5, 130])
def test_fisher_vector_product_of_partly_adapted(part, n):
    """v has entries for all of theta, also for parameters that are not adapted."""
    check_fisher(policy("gaussian"), "gaussian", episode("gaussian", n), 0.2, 2, adapt_params=PARTS[part])


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(7), nn.LayerNorm(7)], ids=["batch", "layer"])
def test_fisher_vector_product_with_normalisation(norm):
    """torch has no third derivative of BatchNorm."""
    model = nn.Sequential(nn.Linear(3, 7), norm, nn.Tanh(), nn.Linear(7, 4)).double()
    check_fisher(model, "categorical", episode("categorical"), 0.2, 2)


def test_fisher_vector_product_holds_learned_rates_fixed():
    model = policy("gaussian")
    rates = {n: nn.Parameter(0.2 * torch.rand(2, *p.shape).double()) for n, p in model.named_parameters()}
    check_fisher(model, "gaussian", episode("gaussian"), rates, 2)
    check_fisher(model, "gaussian", episode("gaussian"), nn.Parameter(torch.tensor([0.1, 0.3]).double()), 2)
    assert all(rate.grad is None for rate in rates.values())


def test_fisher_vector_product_of_first_order_and_frozen():
    model = policy("gaussian", form="floored")
    check_fisher(model, "gaussian", episode("gaussian"), 0.2, 2, first_order=True)
    model.body[0].weight.requires_grad_(False)
    product = check_fisher(model, "gaussian", episode("gaussian"), 0.2, 2)
    assert "body.0.weight" not in product


@pytest.mark.parametrize(
    ("n", "steps", "first_order"), [(5, 2, False), (130, 0, False), (300, 1, False), (130, 2, False), (130, 2, True)]
)
@pytest.mark.parametrize("memory", [0, 1 << 18, 1 << 30])
def test_fisher_as_a_function(n, steps, first_order, memory):
    """States kept between products, of all tasks or of some, never change a result, nor when data change in place."""
    model, data = policy("gaussian"), episode("gaussian", n, n, 3)
    maml = FusedMAML(model, 0.2, steps, loss=LOSSES["gaussian"], first_order=first_order, backend="fused")
    product = maml.fisher(*data[:3], weights=data[3].weights, memory=memory)
    changes = [lambda: None, lambda: None, lambda: next(model.parameters()).mul_(1.1), lambda: data[0].add_(0.1)]
    for change in changes:
        with torch.no_grad():
            change()
        v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        expected = maml.fisher_vector_product(*data[:3], v, weights=data[3].weights)
        assert all(torch.equal(found, expected[name]) for name, found in product(v).items())


@pytest.mark.parametrize("kind", LOSSES)
def test_fisher_vector_product_is_the_hessian_of_the_divergence(kind):
    """A second derivation from public functions only: K = 1, two tasks."""
    model = policy(kind)
    data = episode(kind, tasks=2, ragged=False)
    maml = FusedMAML(model, 0.2, 1, loss=LOSSES[kind], backend="fused")
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    oracle = FusedMAML(model, 0.2, 1, loss=LOSSES[kind], backend="reference")

    def slope(step):
        """The gradient of the divergence at theta + step v, by a first-order backward through `adapt`."""
        before = oracle.predict(oracle.adapt(*data[:2]), data[2])
        with torch.no_grad():
            for n, p in model.named_parameters():
                p += step * v[n]
        model.zero_grad()
        now = oracle.predict(oracle.adapt(*data[:2], differentiable=True), data[2])
        policies.kl_divergence(before, now).mean().backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p -= step * v[n]
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    up, down = slope(1e-5), slope(-1e-5)
    difference = {n: (up[n] - down[n]) / 2e-5 for n in up}
    assert_close(maml.fisher_vector_product(*data[:3], v), difference, 1e-6)


def test_a_network_of_its_own_size():
    """More dimensions than a vector register has lanes, and all sizes odd."""
    model = Gaussian(hidden=33, dims=17).double()
    x = [torch.randn(2, n, 3).double() for n in (9, 11)]
    y = [PolicyTarget(torch.randn(2, n, 17).double(), torch.randn(2, n).double()) for n in (9, 11)]
    check_meta_gradient(model, LOSSES["gaussian"], [x[0], y[0], x[1], y[1]], 0.1, 2)


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
def test_the_benchmark_proves_before_it_times(monkeypatch):
    milliseconds = rl_policy.run(2, 20, 0.01, ["maml_cuda", "autograd loop"], fisher=True)
    assert min(milliseconds.values()) > 0
    monkeypatch.setitem(
        rl_policy.IMPLEMENTATIONS, "maml_cuda", lambda model, data: rl_policy.fused(model, [*data[:3], data[1]])
    )
    with pytest.raises(rl_policy.WrongGradient, match="maml_cuda: the meta-gradient must be within"):
        rl_policy.run(2, 20, 0.01, ["maml_cuda"], fisher=False)
