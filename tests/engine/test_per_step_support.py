"""per_step_support: each inner step has a support set of its own. The oracle is a loop of plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_cuda
from maml_cuda import FusedMAML, PolicyTarget, reference
from tests.conftest import assert_close
from tests.engine import policy_models
from tests.engine.unrolled import STEPS, Field, conv_net, mlp, mse, sets, unrolled

BACKENDS = ("fused", "reference")


def check(
    model: nn.Module, loss: Any, data: list[Any], steps: int = STEPS, function: Any = None, rate: Any = 0.1,
    backend: str = "fused", oracle: dict[str, Any] | None = None, **options: Any,
) -> FusedMAML:  # fmt: skip
    """Compares two meta-steps (the second is the one that skips the checks) with the unrolled loop."""
    maml = FusedMAML(model, rate, steps, loss=loss, per_step_support=True, backend=backend, **options)
    of_step = (lambda _, k: rate[min(k, len(rate) - 1)]) if isinstance(rate, Tensor) and rate.dim() else lambda *_: rate
    function = function or {"mse": mse, "cross_entropy": F.cross_entropy}[loss]
    truth, _, inner = unrolled(model, function, data, of_step, steps, **(oracle or {}))
    named = {n: p for n, p in maml.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(truth, list(named.values()), allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}
    for call in (lambda: maml(*data).loss.backward(), lambda: maml.backward(*data)):
        maml.zero_grad()
        call()
        assert_close({n: p.grad for n, p in named.items()}, expected, 1e-9)
    with torch.no_grad():
        out = maml(*data)
    assert_close({"loss": out.loss}, {"loss": truth.detach()}, 1e-9)
    assert_close({"support": out.support_losses}, {"support": torch.stack([torch.stack(t) for t in inner])}, 1e-9)
    return maml


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("tasks", [1, 3, 17])  # 17: tasks in lanes
def test_an_mlp(machine, steps, tasks, first_order):
    data = sets((3,), (2,), steps, tasks)
    options = {"first_order": first_order}
    check(mlp(3, 7, 2), "mse", data, steps, oracle=options, **options)


@pytest.mark.parametrize("model", [mlp(3, 7, 4), mlp(3, 150, 4)])  # that fit a block of a GPU, and that do not
def test_labels(machine, model):
    check(model, "cross_entropy", sets((3,), None, tasks=9))


def test_two_sets_of_many_samples(machine):
    """Samples in tiles."""
    check(mlp(3, 9, 2), "mse", sets((3,), (2,), 2, 2, n=301, n_qry=157), 2)


@pytest.mark.parametrize("checkpoint", [None, "recompute"])
def test_a_convolutional_network(machine, checkpoint):
    """Its first layer has statistics of the images; they are other images in every step."""
    check(conv_net(), "cross_entropy", sets((2, 6, 6), None), checkpoint=checkpoint)


def test_values_of_data_and_of_constants(machine):
    check(Field(), "mse", sets((3,), (2,)))


def test_anil(machine):
    head = ["2.weight", "2.bias"]
    check(
        mlp(3, 7, 2), "mse", sets((3,), (2,)), adapt_params=head, oracle={"adapted": lambda n: n in head}
    )  # fmt: skip


def test_learned_rates_and_a_multi_step_loss(machine):
    weights = [0.25, 0.0, 0.5, 0.25]
    rate = nn.Parameter(torch.tensor([0.1, 0.2, 0.05]).double())
    check(
        mlp(3, 7, 2), "mse", sets((3,), (2,)), rate=rate, query_weights=weights, oracle={"weights": weights}
    )  # fmt: skip


def test_a_loss_of_the_users_own(machine):
    def huber(prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        return ((error**2 + 0.1).sqrt() * (1 + target**2)).mean()

    check(mlp(3, 7, 2), huber, sets((3,), (2,)), function=huber)


def test_weights_of_samples():
    """On the general path, as padding; [inner_steps, tasks, n] and [tasks, n]."""
    x_spt, y_spt, x_qry, y_qry = sets((3,), (2,))
    w_spt, w_qry = torch.rand(STEPS, 3, 5).double(), torch.rand(3, 4).double()
    w_spt[1, 2, 3:] = 0
    model = mlp(3, 7, 2)

    def weighted(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        y, w = target
        return (w * ((prediction - y) ** 2).mean(-1)).sum() / w.sum()

    data = [x_spt, (y_spt, w_spt), x_qry, (y_qry, w_qry)]
    truth, _, _ = unrolled(model, weighted, data, lambda *_: 0.1)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(truth, list(model.parameters())), strict=True)
    )
    maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend="reference")
    maml.backward(x_spt, y_spt, x_qry, y_qry, spt_weights=w_spt, qry_weights=w_qry)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, 1e-9)
    w_spt[1, 2, 0] = -1
    with pytest.raises(ValueError, match=r"at least 0, got -1.0 \(task 2, inner step 1, sample 0\)"):
        maml(x_spt, y_spt, x_qry, y_qry, spt_weights=w_spt)
    with pytest.raises(
        ValueError, match=r"spt_weights must have shape \[3, 3, 5\], one a sample of x_spt, got \[3, 3, 4\]"
    ):
        maml(x_spt, y_spt, x_qry, y_qry, spt_weights=w_spt[..., :4])


def policy_loss(output: Any, y: PolicyTarget) -> Tensor:
    mean, log_std = output
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(y.actions).sum(-1)
    log_prob = log_prob if y.old_log_probs is None else (log_prob - y.old_log_probs).exp()
    return -(y.weights * y.advantages * log_prob).sum() / y.weights.sum()


def policy_data(tasks: int, n: int = 5) -> list[Any]:
    of_steps = [policy_models.target("gaussian", tasks, n, True, True) for _ in range(STEPS)]
    y_spt = PolicyTarget(*map(torch.stack, zip(*of_steps, strict=True)))
    y_qry = policy_models.target("gaussian", tasks, 6, True, True)
    return [torch.randn(STEPS, tasks, n, 3).double(), y_spt, torch.randn(tasks, 6, 3).double(), y_qry]


@pytest.mark.parametrize("tasks", [2, 9])
def test_a_policy(machine, tasks):
    data = policy_data(tasks)
    check(policy_models.policy("gaussian"), policy_models.LOSSES["gaussian"], data, function=policy_loss)


def test_a_policys_fisher_matrix(machine):
    data = policy_data(3)
    model, loss = policy_models.policy("gaussian"), policy_models.LOSSES["gaussian"]
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    fused, general = (FusedMAML(model, 0.1, STEPS, loss=loss, per_step_support=True, backend=b) for b in BACKENDS)
    expected = general.fisher_vector_product(*data[:3], v)
    assert_close(fused.fisher_vector_product(*data[:3], v), expected, 1e-9)
    product = fused.fisher(*data[:3])
    for _ in range(2):
        assert_close(product(v), expected, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapt(machine, backend):
    """Detached, differentiable, and step by step; more steps than inner_steps repeat the last rate."""
    model, steps = mlp(3, 7, 2), 4
    rate = torch.tensor([0.1, 0.2, 0.05]).double()
    data = sets((3,), (2,), steps)
    maml = FusedMAML(model, rate, STEPS, loss="mse", per_step_support=True, backend=backend)

    def of_step(_: str, k: int) -> Tensor:
        return rate[min(k, 2)]

    def stacked(ends: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {n: torch.stack([phi[n] for phi in ends]) for n in ends[0]}

    cotangents = {n: torch.randn(3, *p.shape).double() for n, p in model.named_parameters()}
    ends = stacked(unrolled(model, mse, data, of_step, steps)[1])
    expected = torch.autograd.grad(sum((ends[n] * c).sum() for n, c in cotangents.items()), list(model.parameters()))
    fast = maml.adapt(*data[:2], steps=steps, differentiable=True)
    sum((fast[n] * c).sum() for n, c in cotangents.items()).backward()
    names = list(cotangents)
    assert_close(
        {n: p.grad for n, p in model.named_parameters()}, dict(zip(names, expected, strict=True)), 1e-9
    )  # fmt: skip
    assert_close(maml.adapt(*data[:2], steps=steps), {n: e.detach() for n, e in ends.items()}, 1e-9)
    for k, at in enumerate(maml.inner_loop(*data[:2], steps)):
        before = stacked(unrolled(model, mse, data, of_step, k)[1])
        assert_close({n: at[n].detach() for n in names}, {n: e.detach() for n, e in before.items()}, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_and_pytrees_are_those_of_the_reference(machine, backend):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 7), nn.Linear(9, 4)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.b(torch.cat([F.dropout(self.a(x["a"]).tanh(), 0.4, self.training), x["b"]], -1))

    model = Net().double()
    x_spt, y_spt, x_qry, y_qry = sets((3,), None)
    x_spt, x_qry = ({"a": x, "b": x[..., :2] ** 2} for x in (x_spt, x_qry))
    torch.manual_seed(3)
    value, expected = reference.meta_gradient(
        model, "cross_entropy", x_spt, y_spt, x_qry, y_qry, 0.1, STEPS, per_step_support=True
    )
    maml = FusedMAML(model, 0.1, STEPS, per_step_support=True, backend=backend)
    torch.manual_seed(3)
    out = maml.backward(x_spt, y_spt, x_qry, y_qry)
    assert_close({"loss": out.loss}, {"loss": value}, 1e-9)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, 1e-9)


def test_the_general_path():
    check(conv_net(), "cross_entropy", sets((2, 6, 6), None), backend="reference")
    data = policy_data(2)
    loss = policy_models.LOSSES["gaussian"]
    check(policy_models.policy("gaussian"), loss, data, function=policy_loss, backend="reference")


def test_per_step_batch_norm_and_its_statistics(machine):
    """The statistics of step k are those of set k."""
    model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 4)).double()
    data = sets((3,), None)
    maml = FusedMAML(model, 0.1, STEPS, per_step_support=True, batch_norm="per_step", backend="fused")
    maml.update_statistics(*data[:3])
    mean = maml.model[1].running_mean
    fast = list(maml.inner_loop(*data[:2], STEPS))
    for k in range(STEPS):
        total = torch.zeros(7).double()
        for t in range(3):
            for phi, x in ((fast[k], data[0][k, t]), (fast[k + 1], data[2][t])):
                total += F.linear(x, phi["0.weight"][t], phi["0.bias"][t]).mean(0) / 6
        torch.testing.assert_close(mean[k], 0.1 * total)


def test_gradcheck_memory_explain_and_layouts(machine):
    data = sets((3,), (2,))
    maml = FusedMAML(mlp(3, 7, 2), 0.1, STEPS, loss="mse", per_step_support=True, backend="fused")
    maml_cuda.gradcheck(maml, *data)
    maml_cuda.gradcheck(maml, *[d.transpose(0, 1).contiguous().transpose(0, 1) for d in data[:2]], *data[2:])
    assert maml.memory_estimate(data[0], data[2]) > 0
    assert "linear" in maml.explain(data[0][0], data[1][0]).lower()


def test_torch_compile(machine, compiled):
    data = sets((3,), (2,))
    model = mlp(3, 7, 2)
    maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend="fused")
    maml(*data).loss.backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters()}
    maml.zero_grad()
    compiled(lambda *d: maml(*d).loss)(*data).backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, eager, 1e-12)


def test_other_sets_give_other_gradients_and_tasks_are_independent(machine):
    model = mlp(3, 7, 2)
    maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend="fused")
    data = sets((3,), (2,), tasks=5)
    all_tasks = maml.adapt(*data[:2])
    one = maml.adapt(data[0][:, 3:4].contiguous(), data[1][:, 3:4].contiguous())
    for name, value in all_tasks.items():
        assert torch.equal(value[3:4], one[name])
    swapped = maml.adapt(data[0][[0, 2, 1]], data[1][[0, 2, 1]])
    assert not torch.equal(swapped["0.weight"], all_tasks["0.weight"])


# -- errors ------------------------------------------------------------------------------------------------------


def test_constructor_errors():
    with pytest.raises(TypeError, match="per_step_support must be a bool, got int"):
        FusedMAML(mlp(3, 2), 0.1, 2, per_step_support=1)
    with pytest.raises(ValueError, match="inner_steps must be at least 1 with per_step_support=True, got 0"):
        FusedMAML(mlp(3, 2), 0.1, 0, per_step_support=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_errors(machine, backend, labels_at_once):
    x_spt, y_spt, x_qry, y_qry = sets((3,), None)
    maml = FusedMAML(mlp(3, 7, 4), 0.1, STEPS, per_step_support=True, backend=backend)

    def raises(message: str, *data: Any, error: type[Exception] = ValueError, call: Any = maml) -> None:
        with pytest.raises(error, match=message):
            call(*data)

    raises(
        r"x_spt must have 3 sets, one for each inner step \(per_step_support=True\), got 2",
        x_spt[:2],
        y_spt,
        x_qry,
        y_qry,
    )
    raises(r"y_spt must have 3 sets, one for each inner step", x_spt, y_spt[:2], x_qry, y_qry)
    raises(r"x_spt must have 4 sets", x_spt, y_spt, 4, call=maml.adapt)
    raises(r"steps must be at least 1 with per_step_support=True, got 0", x_spt, y_spt, 0, call=maml.adapt)
    raises(r"y_spt must have 3 tasks like x_spt, got 2", x_spt, y_spt[:, :2], x_qry, y_qry)
    raises(r"x_qry must have 3 tasks like x_spt, got 2", x_spt, y_spt, x_qry[:2], y_qry[:2])
    raises(
        r"x_spt must have shape \[inner_steps, tasks, samples, ...\] with per_step_support=True, got \[3, 5\]",
        x_spt[0, :, :, 0], y_spt, x_qry, y_qry,
    )  # fmt: skip
    raises("y_spt of an inner step must have 5 samples a task like x_spt of an inner step, got 4",
           x_spt, y_spt[:, :, :4], x_qry, y_qry)  # fmt: skip
    raises("y_spt of an inner step must hold int64 labels", x_spt, y_spt.int(), x_qry, y_qry, error=TypeError)
    wrong = y_spt.clone()
    wrong[2, 1, 4] = 9
    raises(r"y_spt must hold labels in \[0, 4\), got 9 \(task 1, inner step 2, sample 4\)", x_spt, wrong, x_qry, y_qry)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_policies_and_integers(machine, backend, labels_at_once):
    data = policy_data(2)
    loss = policy_models.LOSSES["gaussian"]
    maml = FusedMAML(policy_models.policy("gaussian"), 0.1, STEPS, loss=loss, per_step_support=True, backend=backend)
    for value, message in (
        (-1.0, r"at least 0, got -1.0 \(task 1, inner step 2, sample 3\)"),
        (0.0, "every set, got 0 in task 1, inner step 2"),
    ):
        y = PolicyTarget(*(t.clone() for t in data[1]))
        if value < 0:
            y.weights[2, 1, 3] = value
        else:
            y.weights[2, 1] = 0
        with pytest.raises(ValueError, match=message):
            maml(data[0], y, *data[2:])
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend=backend)
    x, y = torch.randint(6, (STEPS, 2, 5, 2)), torch.randn(STEPS, 2, 5, 2).double()
    x[1, 1, 2, 0] = 6
    with pytest.raises((ValueError, IndexError), match="inner step 1, sample 2" if backend == "fused" else "range"):
        maml(x, y, x[0] % 6, y[0])
