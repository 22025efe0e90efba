"""The variants that the paper's tables need, against a double backward of its own: written out here, layer by layer and
step by step, and sharing nothing with reference.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, PerStepBatchNorm1d, PerStepBatchNorm2d, convert_per_step, gradcheck
from tests.conftest import assert_close, run

TOLERANCE = 1e-10


# -- the nets, as modules and written out ----------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Softplus(), nn.Linear(5, 3))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def features() -> nn.Sequential:
    """BatchNorm first, on the input itself, and last."""
    return nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)
    )


NETS = {"mlp": (mlp, (3,)), "conv": (conv, (2, 9, 8)), "features": (features, (3,))}


def written_out(model: nn.Sequential, p: dict[str, Tensor], x: Tensor, slot: int) -> Tensor:
    for name, m in model.named_children():
        w, b = p.get(f"{name}.weight"), p.get(f"{name}.bias")
        if isinstance(m, nn.Linear):
            x = x @ w.T + b
        elif isinstance(m, nn.Conv2d):
            x = F.conv2d(x, w, b, m.stride, m.padding)
        elif "BatchNorm" in type(m).__name__:
            axes = [a for a in range(x.dim()) if a != 1]
            channels = [1, -1] + [1] * (x.dim() - 2)
            mean, var = m.running_mean, m.running_var
            if "PerStep" in type(m).__name__:
                k = min(slot, len(m.weight) - 1)
                w, b, mean, var = w[k], b[k], mean[k], var[k]
            if m.training:
                mean = x.mean(axes)
                var = ((x - mean.view(channels)) ** 2).mean(axes)
            xh = (x - mean.view(channels)) / (var.view(channels) + m.eps) ** 0.5
            x = xh * w.view(channels) + b.view(channels)
        elif isinstance(m, nn.MaxPool2d):
            x = F.max_pool2d(x, m.kernel_size)
        elif isinstance(m, nn.Flatten):
            x = x.reshape(len(x), -1)
        else:
            x = {nn.Tanh: torch.tanh, nn.Softplus: F.softplus, nn.ReLU: torch.relu}[type(m)](x)
    return x


def double_backward(
    maml: FusedMAML, data: list[Tensor], adapted: list[str], rates: dict[str, Tensor], weights: list[float],
    first_order: bool,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """loss, task losses, logits, gradients by name; rates: name -> [steps, ...], one a step."""
    model = maml.model
    theta = dict(model.named_parameters())
    leaves = {**theta, **{f"inner_lr.{n}": r for n, r in rates.items() if r.requires_grad}}
    losses, logits = [], []
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        phi, total = dict(theta), torch.zeros((), dtype=torch.float64)
        for k in range(len(weights)):
            z = written_out(model, phi, x_q, max(k - 1, 0))
            total = total + weights[k] * F.cross_entropy(z, y_q)
            if k == len(weights) - 1:
                break
            support = F.cross_entropy(written_out(model, phi, x_s, k), y_s)
            grads = torch.autograd.grad(support, [phi[n] for n in adapted], create_graph=True)
            for n, g in zip(adapted, grads, strict=True):
                step = rates[n][min(k, len(rates[n]) - 1)] * (g.detach() if first_order else g)
                phi = {**phi, n: phi[n] - step}
        losses.append(total)
        logits.append(z)
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}
    return loss.detach(), torch.stack(losses).detach(), torch.stack(logits).detach(), found


def make(
    net: str, steps: int, *, rates: str = "constant", head: bool = False, weights: list[float] | None = None,
    first_order: bool = False, batch_norm: str = "transductive", seed: int = 0, tasks: int = 3, backend: str = "fused",
) -> tuple[FusedMAML, list[Tensor], dict]:  # fmt: skip
    """A FusedMAML, its data, and the arguments of double_backward."""
    torch.manual_seed(seed)
    build, sample = NETS[net]
    model = build().double()
    if batch_norm == "per_step" or batch_norm == "per_step running":
        model = convert_per_step(model, max(steps, 1))
        batch_norm = "running" if "running" in batch_norm else batch_norm
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and (t.dim() == 1 or "running" in name or isinstance(t, nn.Parameter)):
                t += 0.3 * torch.rand_like(t)
        for name, t in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                t.fill_(1)
    norms = {n for n, m in model.named_modules() if "PerStep" in type(m).__name__}
    adapted = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in norms]
    if head:
        adapted = adapted[-2:] if net != "features" else [n for n in adapted if n.startswith("4.")]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    if rates == "constant":
        inner_lr: object = 0.1
        by_step = {n: torch.full((1,), 0.1, dtype=torch.float64) for n in adapted}
    else:
        shape = {"layer": lambda n: (), "step": lambda n: (max(steps, 1),), "sgd": lambda n: shapes[n]}[rates]
        inner_lr = {n: nn.Parameter(0.05 + 0.1 * torch.rand(shape(n), dtype=torch.float64)) for n in adapted}
        by_step = {n: r if rates == "step" else r[None] for n, r in inner_lr.items()}
    maml = FusedMAML(
        model, inner_lr, steps, first_order=first_order, adapt_params=adapted, backend=backend, batch_norm=batch_norm,
        query_weights=weights,
    )  # fmt: skip
    data = [torch.randn(tasks, n, *sample).double() if x else torch.randint(0, 3, (tasks, n))
            for n in (5, 7) for x in (1, 0)]  # fmt: skip
    last = [0.0] * steps + [1.0]
    return maml, data, {"adapted": adapted, "rates": by_step, "weights": weights or last, "first_order": first_order}


def check(maml: FusedMAML, data: list[Tensor], how: dict) -> None:
    loss, task_losses, logits, expected = double_backward(maml, data, **how)
    _, grads = run(maml, data)
    expected = {n: g.reshape(grads[n].shape) for n, g in expected.items()}
    assert_close(grads, expected, TOLERANCE)
    out = maml(*data)
    for got, value in ((out.loss, loss), (out.task_losses, task_losses), (out.logits, logits)):
        torch.testing.assert_close(got.detach(), value, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(maml(*data).loss, loss, rtol=1e-12, atol=1e-12)


# -- every variant ---------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict] = {
    "ANIL": {"head": True},
    "Meta-SGD": {"rates": "sgd"},
    "rates of layers and steps": {"rates": "step"},
    "multi-step loss": {"weights": [0.0, 0.25, 0.5]},
    "multi-step loss, phi_0 too": {"weights": [0.3, 0.25, 0.5], "rates": "layer"},
    "multi-step loss without the last": {"weights": [0.0, 1.5, 0.0], "rates": "sgd"},
    "multi-step loss, ANIL": {"weights": [0.2, 0.3, 0.4], "head": True, "rates": "step"},
}
NORMS = ("per_step", "running", "per_step running")


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
    """Rates of each layer and step, the multi-step loss and its zeros, BatchNorm in every mode."""
    weights = [0.0, 0.4, 0.0, 0.3, 0.2, 0.1][: steps + 1]
    check(*make("conv", steps, batch_norm=batch_norm, rates="step", weights=weights, tasks=2))
    check(*make("features", steps, batch_norm="transductive" if "per" in batch_norm else batch_norm, weights=weights))


def test_no_inner_step(machine):
    check(*make("features", 0, batch_norm="per_step", weights=[0.7]))


@pytest.mark.parametrize("frozen", ["gamma of the input", "all of BatchNorm", "the first convolution"])
def test_frozen(machine, frozen):
    """A per-step constant is not a constant: what comes behind it changes from step to step."""
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
    """Where the states of the steps are not kept, the gradient pass is run again with the step's own slots."""
    import json

    maml, data, how = make("conv", 3, batch_norm="per_step", weights=[0.0, 0.2, 0.3, 0.5])
    binding = maml._binding()
    binding.text = json.dumps({**json.loads(binding.text), "recompute": True})
    check(maml, data, how)


def test_more_steps_than_slots(machine):
    """The last slot serves every later step."""
    maml, data, how = make("features", 2, batch_norm="per_step")
    with pytest.raises(ValueError, match="query_weights must hold 5 weights"):
        FusedMAML(maml.model, 0.1, 4, query_weights=[0.0, 1.0, 1.0])
    longer = FusedMAML(maml.model, 0.1, 4, adapt_params=how["adapted"], backend="fused")
    check(longer, data, {**how, "weights": [0.0] * 4 + [1.0]})


@pytest.mark.parametrize("batch_norm", NORMS)
def test_building_blocks(machine, batch_norm):
    """predict, loss_and_grad, hvp and adapt, at every slot, against the general path."""
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


# -- weights of the query losses -------------------------------------------------------------------------------------


def test_weights_are_a_schedule(machine):
    """A new value is a new tensor of the call; only other zeros are another problem. None is the old call, bit by
    bit."""
    from maml_cuda.engine.problem import problem_of

    maml, data, how = make("mlp", 2)
    plain = run(maml, data)
    maml.query_weights = torch.tensor([0.0, 0.5, 0.5])
    run(maml, data)
    text, misses = maml._binding().text, problem_of.cache_info().misses
    for last in (0.6, 0.7, 0.8):
        maml.query_weights = [0.0, 1 - last, last]
        check(maml, data, {**how, "weights": [0.0, 1 - last, last]})
    assert maml.query_weights == (0.0, 1 - 0.8, 0.8)
    assert maml._binding().text == text
    assert problem_of.cache_info().misses <= misses + 1  # the same without gradients
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
    """Losses and gradients of the tiles of a set add up before they are weighted."""
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


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_update_statistics(per_step, momentum):
    """Against means and variances of the layer's inputs, taken by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh(), nn.Linear(4, 3)).double()
    maml = FusedMAML(model, 0.1, 2, batch_norm="per_step" if per_step else "transductive")
    x_s, x_q, y_s = torch.randn(3, 6, 3).double(), torch.randn(3, 5, 3).double(), torch.randint(0, 3, (3, 6))
    before = {n: p.clone() for n, p in model.named_parameters()}
    norm = model[1]
    for update in (1, 2):
        old = [norm.running_mean.clone(), norm.running_var.clone()]
        fast = [maml.adapt(x_s, y_s, steps=k) for k in range(3)]
        maml.update_statistics(x_s, y_s, x_q)
        moments: dict[int, list] = {0: [], 1: []}
        for t in range(3):
            for k in range(2):
                for at, x in ((k, x_s), (k + 1, x_q)):
                    z = x[t] @ fast[at]["0.weight"][t].T + fast[at]["0.bias"][t]
                    moments[k].append((z.mean(0), z.var(0)))
        share = 1 / update if momentum is None else momentum
        for got, was, which in ((norm.running_mean, old[0], 0), (norm.running_var, old[1], 1)):
            means = [torch.stack([m[which] for m in moments[k]]).mean(0) for k in range(2)]
            target = torch.stack(means) if per_step else torch.stack(means).mean(0)
            torch.testing.assert_close(got, (1 - share) * was + share * target)
        assert norm.num_batches_tracked.tolist() == ([update, update] if per_step else update)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model[1]._forward_pre_hooks


def test_running_layers_stay_in_eval_mode(machine):
    maml, data, _ = make("conv", 2, batch_norm="running")
    assert maml.train() is maml
    norms = [m for m in maml.modules() if isinstance(m, nn.BatchNorm2d)]
    assert maml.model.training
    assert not any(m.training for m in norms)
    text = maml._binding().text
    maml.update_statistics(data[0], data[1], data[2])
    assert not any(m.training for m in norms)
    assert maml._binding().text == text
    assert "running_norm" in maml.explain()
    maml(*data).loss.backward()


# -- conversion ------------------------------------------------------------------------------------------------------


def test_conversion():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, eps=0.01), nn.Flatten(), nn.BatchNorm1d(2, affine=False)
    )
    model[1].weight.data.fill_(3.0)
    model[1].bias.requires_grad_(False)
    model.eval()
    converted = convert_per_step(model, 3)
    assert converted is model
    norm = model[1]
    assert type(norm) is PerStepBatchNorm2d
    assert norm.weight.tolist() == [[3.0, 3.0]] * 3
    assert (norm.eps, norm.training, norm.bias.requires_grad) == (0.01, False, False)
    assert type(model[3]) is PerStepBatchNorm1d
    assert model[3].weight is None
    assert convert_per_step(model, 5)[1] is norm  # already
    assert type(convert_per_step(nn.BatchNorm1d(4), 2)) is PerStepBatchNorm1d
    shared = nn.BatchNorm1d(2)
    twice = convert_per_step(nn.Sequential(shared, nn.Linear(2, 2), shared), 2)
    assert twice[0] is twice[2]


@pytest.mark.parametrize("batch_norm", ["per_step", "running"])
def test_a_model_that_is_refused_stays_as_it_was(batch_norm):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.rand(2, 2, 5, 5))
    norm = model[1]
    with pytest.raises(ValueError, match="dilation"):
        FusedMAML(model, 0.1, batch_norm=batch_norm, backend="fused")
    assert model[1] is norm
    assert norm.training


def test_per_step_parameters_are_not_adapted_by_default():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    maml = FusedMAML(model, dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), 0.1), 2, batch_norm="per_step")
    assert maml.model[1].weight.shape == (2, 4)
    assert "batch_norm" in maml.explain()
    x, y = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    fast = maml.adapt(x, y)
    assert fast["1.weight"].shape == (2, 2, 4)
    assert fast["1.weight"].stride(0) == 0


def lone() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class OwnNorm(nn.BatchNorm1d):
    pass


def hooked() -> nn.Module:
    model = lone()
    model[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (lone, {"batch_norm": "eval"}, ValueError, "batch_norm must be one of transductive, per_step, running, got 'e"),
        (mlp, {"batch_norm": "per_step"}, ValueError, "batch_norm='per_step' must have a model with BatchNorm layers"),
        (mlp, {"batch_norm": "running"}, ValueError, "batch_norm='running' must have a model with BatchNorm layers"),
        (lambda: nn.Sequential(nn.Linear(3, 4), OwnNorm(4)), {"batch_norm": "per_step"}, ValueError,
         r"converts BatchNorm1d and BatchNorm2d, got 1 \(OwnNorm\)"),
        (hooked, {"batch_norm": "per_step"}, ValueError, r"would lose the hooks of 1 \(BatchNorm1d\)"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
         {"batch_norm": "running"}, ValueError, r"layers that track running statistics, got 1 \(BatchNorm1d\)"),
        (lone, {"batch_norm": "per_step", "adapt_params": ["0.weight", "1.bias"]}, ValueError,
         "must leave out the parameters of per-step BatchNorm layers, of which each step has its own, got 1.bias"),
        (lone, {"query_weights": [0.0, 1.0]}, ValueError,
         r"query_weights must hold 3 weights, of phi_0 to phi_2 \(inner_steps=2\), got 2"),
        (lone, {"query_weights": [0.0, -1.0, 1.0]}, ValueError, "finite, at least 0 and not all 0"),
        (lone, {"query_weights": [0.0, float("nan"), 1.0]}, ValueError, "finite, at least 0 and not all 0"),
        (lone, {"query_weights": [0.0, 0.0, 0.0]}, ValueError, "finite, at least 0 and not all 0"),
        (lone, {"query_weights": [0.0, "1", 1.0]}, TypeError, "query_weights must hold numbers, got str"),
        (lone, {"query_weights": 1.0}, TypeError, "query_weights must be a tensor or a sequence of numbers, got float"),
        (lone, {"query_weights": torch.ones(3, requires_grad=True)}, ValueError, "query_weights must not require grad"),
    ],
)  # fmt: skip
def test_bad_arguments(model, options, error, text):
    net = model()
    state = {n: t.shape for n, t in net.state_dict().items()}
    with pytest.raises(error, match=text):
        FusedMAML(net, 0.1, 2, **options)
    assert {n: t.shape for n, t in net.state_dict().items()} == state


def test_bad_calls():
    maml = FusedMAML(lone(), 0.1, 2)
    x, y = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    fast = maml.adapt(x, y)
    with pytest.raises(ValueError, match="slot must be at least 0, got -1"):
        maml.predict(fast, x, slot=-1)
    with pytest.raises(TypeError, match="slot must be an int or None, got float"):
        maml.predict(fast, x, slot=1.0)
    with pytest.raises(ValueError, match="update_statistics must have BatchNorm layers that track running statistics"):
        FusedMAML(mlp(), 0.1, 2).update_statistics(x, y, x)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        PerStepBatchNorm1d(3, 0)
    with pytest.raises(ValueError, match="PerStepBatchNorm2d must have an input of 4 axes, got 2"):
        PerStepBatchNorm2d(3, 1)(torch.randn(4, 3))
    maml.query_weights = [0.0, 0.5, 0.5]
    maml.inner_steps = 3
    with pytest.raises(ValueError, match="query_weights must hold 4 weights"):
        maml(x, y, x, y)
