"""Weights of samples (`spt_weights`, `qry_weights`): tasks of different sizes in tensors of one shape, and samples that
count more than others. The oracle runs each task alone, on its samples of positive weight, with a loss that is weighted
in this file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from maml_cuda import FusedMAML, PolicyTarget, reference
from tests.conftest import assert_close, episode, fast_parameters
from tests.oracle import Plain

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda z, y: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1),
    "mse": lambda z, y: ((z - y) ** 2).flatten(1).mean(1),
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def bn_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).double()


def ragged(tasks: int, n: int, smallest: int = 1, seed: int = 0) -> Tensor:
    """Weights [tasks, n] of `smallest` to n samples a task, anywhere in the task."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(tasks, n, dtype=torch.float64)
    for t in range(tasks):
        count = n if t == 0 else smallest + (t - 1) % (n - smallest + 1)
        where = torch.randperm(n, generator=generator)[:count]
        weights[t, where] = 0.2 + torch.rand(count, generator=generator, dtype=torch.float64)
    return weights


def poisoned(data: list[Tensor], spt: Tensor, qry: Tensor) -> list[Tensor]:
    """The data with what must not be read at padding: NaN, and labels out of range."""
    given = [t.clone() for t in data]
    for t, w in zip(given, (spt, spt, qry, qry), strict=True):
        t[w == 0] = -100 if t.dtype == torch.int64 else torch.nan
    return given


class Oracle:
    """Each task alone, in float64, by plain autograd."""

    def __init__(self, model: nn.Module, loss: str, alpha: Any, steps: int, first_order: bool = False) -> None:
        self.plain, self.loss, self.alpha, self.steps = Plain(model), LOSSES[loss], alpha, steps
        self.first_order = first_order
        self.leaves = {n: p.clone().requires_grad_(n in self.plain.trainable) for n, p in self.plain.parameters.items()}

    def value(self, phi: dict[str, Tensor], x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        counts = w.detach() > 0
        prediction = self.plain(phi, x[counts])
        return (w[counts] * self.loss(prediction, y[counts])).sum() / w[counts].sum(), prediction

    def adapted(self, x: Tensor, y: Tensor, w: Tensor) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        path, losses, names = [self.leaves], [], self.plain.trainable
        for _ in range(self.steps):
            phi = path[-1]
            value, _ = self.value(phi, x, y, w)
            grads = torch.autograd.grad(value, [phi[n] for n in names], create_graph=not self.first_order)
            path.append({**phi, **{n: phi[n] - self.alpha * g for n, g in zip(names, grads, strict=True)}})
            losses.append(value.detach())
        return path, losses

    def __call__(
        self, data: list[Tensor], spt: Tensor, qry: Tensor, of_steps: list[float] | None = None
    ) -> dict[str, Any]:
        task_losses, logits, inner = [], [], []
        with torch.enable_grad():
            for xs, ys, xq, yq, ws, wq in zip(*data, spt, qry, strict=True):
                path, losses = self.adapted(xs, ys, ws)
                inner.append(torch.stack(losses))
                values = [self.value(phi, xq, yq, wq)[0] for phi in path] if of_steps else []
                value, prediction = self.value(path[-1], xq, yq, wq)
                task_losses.append(sum(w * v for w, v in zip(of_steps, values, strict=True)) if of_steps else value)
                whole = torch.zeros(len(wq), *prediction.shape[1:], dtype=torch.float64)
                whole[wq > 0] = prediction.detach()
                logits.append(whole)
            loss = torch.stack(task_losses).mean()
            loss.backward()
        return {
            "loss": loss.detach(),
            "task_losses": torch.stack(task_losses).detach(),
            "logits": torch.stack(logits),
            "support_losses": torch.stack(inner),
            "grads": {n: self.leaves[n].grad for n in self.plain.trainable if self.leaves[n].grad is not None},
        }


def check(
    model: nn.Module, loss: str, data: list[Tensor], spt: Tensor, qry: Tensor, backend: str, steps: int = 2,
    first_order: bool = False, tolerance: float = 1e-9, **options: Any,
) -> FusedMAML:  # fmt: skip
    """A meta-step against the oracle."""
    expected = Oracle(model, loss, 0.3, steps, first_order)(data, spt, qry)
    maml = FusedMAML(model, 0.3, steps, loss=loss, backend=backend, first_order=first_order, **options)
    out = maml(*poisoned(data, spt, qry), spt_weights=spt, qry_weights=qry)
    model.zero_grad()
    out.loss.backward()
    for what in ("loss", "task_losses", "logits", "support_losses"):
        torch.testing.assert_close(getattr(out, what).detach(), expected[what], rtol=1e-9, atol=1e-11)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(grads, expected["grads"], tolerance)
    return maml


# -- the meta-step ------------------------------------------------------------------------------------------------


BACKENDS = ("fused", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("first_order", [False, True])
def test_each_task_is_what_it_is_alone(machine: str, backend: str, loss: str, first_order: bool) -> None:
    data = episode(tasks=5, n=(5, 4), target=None if loss == "cross_entropy" else (4,))
    check(mlp(), loss, data, ragged(5, 5), ragged(5, 4, seed=1), backend, first_order=first_order)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_counts_each_sample_of_positive_weight_once(machine: str, backend: str) -> None:
    data = episode(tasks=5, n=(5, 4))
    check(bn_mlp(), "cross_entropy", data, ragged(5, 5, 2), ragged(5, 4, 2, seed=1), backend)


def test_one_set_alone_has_weights() -> None:
    data, spt = episode(tasks=4, n=(5, 4)), ragged(4, 5)
    model, ones = mlp(), torch.ones(4, 4, dtype=torch.float64)
    for given, (ws, wq) in ({"spt_weights": spt}, (spt, ones)), ({"qry_weights": spt[:, :4] + 0.1}, (None, None)):
        if ws is None:
            ws, wq = torch.ones(4, 5, dtype=torch.float64), given["qry_weights"]
        expected = Oracle(model, "cross_entropy", 0.3, 1)(data, ws, wq)
        maml = FusedMAML(model, 0.3, 1, backend="reference")
        model.zero_grad()
        maml.backward(*data, **given)
        assert_close({n: p.grad for n, p in model.named_parameters()}, expected["grads"], 1e-9)


def test_the_oracle_function_has_the_same_weights() -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5), ragged(3, 4, seed=1)
    model = mlp()
    learned = [spt.clone().requires_grad_(), qry.clone().requires_grad_()]
    oracle = Oracle(model, "cross_entropy", 0.3, 2)
    expected = oracle(data, *learned)
    value, grads = reference.meta_gradient(
        model, "cross_entropy", *poisoned(data, spt, qry), 0.3, 2,
        spt_weights=spt.clone().requires_grad_(), qry_weights=qry.clone().requires_grad_(),
    )  # fmt: skip
    torch.testing.assert_close(value, expected["loss"])
    expected["grads"].update(spt_weights=learned[0].grad, qry_weights=learned[1].grad)
    assert_close(grads, expected["grads"], 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_weights_that_require_grad_receive_it(machine: str, backend: str, steps: int, first_order: bool) -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5, 2), ragged(3, 4, 2, seed=1)
    model = bn_mlp()
    own = [w.clone().requires_grad_() for w in (spt, qry)]
    Oracle(model, "cross_entropy", 0.3, steps, first_order)(data, *own) if steps else None
    maml = FusedMAML(model, 0.3, steps, backend=backend, first_order=first_order)
    given = [w.clone().requires_grad_() for w in (spt, qry)]
    maml(*data, spt_weights=given[0], qry_weights=given[1]).loss.backward()
    assert (given[0].grad is None) == (steps == 0 or first_order)
    if not steps:
        return
    for mine, expected in zip(given, own, strict=True):
        if expected.grad is not None:
            assert_close({"w": mine.grad}, {"w": expected.grad}, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_from_a_network_receive_their_gradient(machine: str, backend: str) -> None:
    """As in learning to weight samples: the weights are a function of the data."""
    data, model = episode(tasks=2, n=(5, 4)), mlp()
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    twin = scores.detach().clone().requires_grad_()
    ones = torch.ones(2, 4, dtype=torch.float64)
    Oracle(model, "cross_entropy", 0.3, 1)(data, twin.sigmoid(), ones)
    FusedMAML(model, 0.3, 1, backend=backend)(*data, spt_weights=scores.sigmoid()).loss.backward()
    assert_close({"scores": scores.grad}, {"scores": twin.grad}, 1e-9)


def test_a_loss_of_ones_own_returns_one_value_a_sample() -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4), target=(4,)), ragged(3, 5), ragged(3, 4, seed=1)
    model = mlp()
    expected = Oracle(model, "mse", 0.3, 2)(data, spt, qry)
    maml = FusedMAML(model, 0.3, 2, loss=lambda z, y: ((z - y) ** 2).mean(1), backend="reference")
    maml.backward(*data, spt_weights=spt, qry_weights=qry)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected["grads"], 1e-9)


def test_pytrees_have_padding_in_every_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(2, 4).double()

        def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"z": (self.a(x["a"]) + self.b(x["b"])).tanh()}

    data, spt, qry = episode(tasks=3, n=(5, 4), target=(4,)), ragged(3, 5), ragged(3, 4, seed=1)
    model, more = Two(), torch.randn(3, 5, 2, dtype=torch.float64)
    x_spt, x_qry = {"a": data[0], "b": more}, {"a": data[2], "b": more[:, :4]}
    maml = FusedMAML(model, 0.3, 1, loss=lambda z, y: ((z["z"] - y) ** 2).mean(1), backend="reference")
    out = maml.backward(x_spt, data[1], x_qry, data[3], spt_weights=spt, qry_weights=qry)
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert out.logits["z"].shape == (3, 4, 4)
    assert (out.logits["z"][qry == 0] == 0).all()
    total = []
    for t in range(3):
        alone = copy.deepcopy(model)
        s, q = spt[t] > 0, qry[t] > 0
        sets = [tree_map_only(Tensor, lambda v, t=t, s=s: v[t][s][None], part) for part in (x_spt, data[1])]
        sets += [tree_map_only(Tensor, lambda v, t=t, q=q: v[t][q][None], part) for part in (x_qry, data[3])]
        ws, wq = spt[t][s] / spt[t][s].sum(), qry[t][q] / qry[t][q].sum()
        own = iter((ws, wq))
        total.append(
            reference.meta_gradient(
                alone, lambda z, y, own=own: (next(own) * ((z["z"] - y) ** 2).mean(1)).sum(), *sets, 0.3, 1
            )[1]
        )
    assert_close(got, {n: torch.stack([g[n] for g in total]).mean(0) for n in got}, 1e-9)


# -- the other calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [mlp, bn_mlp])
def test_building_blocks(machine: str, backend: str, make: Callable[[], nn.Module]) -> None:
    data, w = episode(tasks=4, n=(5, 4)), ragged(4, 5, 2)
    x, y, *_ = poisoned(data, w, torch.ones(4, 4))
    model = make()
    maml = FusedMAML(model, 0.3, 2, backend=backend)
    oracle = Oracle(model, "cross_entropy", 0.3, 2)

    path = [oracle.adapted(*part)[0] for part in zip(data[0], data[1], w, strict=True)]
    expected = {n: torch.stack([p[-1][n].detach() for p in path]) for n in oracle.leaves}
    assert_close(maml.adapt(x, y, spt_weights=w), expected, 1e-9)
    for k, fast in enumerate(maml.inner_loop(x, y, 2, spt_weights=w)):
        assert_close(fast, {n: torch.stack([p[k][n].detach() for p in path]) for n in oracle.leaves}, 1e-9)

    cotangents = {n: torch.randn_like(p) for n, p in expected.items()}
    fast = maml.adapt(x, y, spt_weights=w, differentiable=True)
    model.zero_grad()
    sum((fast[n] * c).sum() for n, c in cotangents.items()).backward()
    sum((p[-1][n] * cotangents[n][t]).sum() for t, p in enumerate(path) for n in p[-1]).backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in oracle.leaves.items()}, 1e-9)

    generator = torch.Generator().manual_seed(3)
    fast, v = (fast_parameters(model, 4, generator) for _ in range(2))
    losses, grads = maml.loss_and_grad(fast, x, y, weights=w)
    products, predictions = maml.hvp(fast, x, y, v, weights=w), maml.predict(fast, x, weights=w)
    for t in range(4):
        phi = {n: p[t].clone().requires_grad_() for n, p in fast.items()}
        value, prediction = oracle.value(phi, data[0][t], data[1][t], w[t])
        g = torch.autograd.grad(value, list(phi.values()), create_graph=True)
        slope = sum((a * v[n][t]).sum() for n, a in zip(phi, g, strict=True))
        hv = torch.autograd.grad(slope, list(phi.values()))
        torch.testing.assert_close(losses[t], value.detach(), rtol=1e-9, atol=1e-11)
        assert_close({n: grads[n][t] for n in phi}, dict(zip(phi, g, strict=True)), 1e-9)
        assert_close({n: products[n][t] for n in phi}, dict(zip(phi, hv, strict=True)), 1e-9)
        torch.testing.assert_close(predictions[t][w[t] > 0], prediction.detach(), rtol=1e-9, atol=1e-11)
        assert (predictions[t][w[t] == 0] == 0).all()


def test_padding_does_not_count_in_running_statistics() -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5, 2), ragged(3, 4, 2, seed=1)
    model = bn_mlp()
    norm = model[1]
    maml = FusedMAML(model, 0.3, 1, backend="reference")
    x_spt, y_spt, x_qry, _ = poisoned(data, spt, qry)
    maml.update_statistics(x_spt, y_spt, x_qry, spt_weights=spt, qry_weights=qry)
    oracle, means, variances = Oracle(bn_mlp(), "cross_entropy", 0.3, 1), [], []
    oracle = Oracle(model, "cross_entropy", 0.3, 1)
    for t in range(3):
        path, _ = oracle.adapted(data[0][t], data[1][t], spt[t])
        for phi, x in (path[0], data[0][t][spt[t] > 0]), (path[1], data[2][t][qry[t] > 0]):
            h = F.linear(x, phi["0.weight"], phi["0.bias"]).detach()
            means.append(h.mean(0))
            variances.append(h.var(0))
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))


# -- errors -------------------------------------------------------------------------------------------------------

HUGE = torch.full((3, 3), 1e308, dtype=torch.float64)
GOOD = {"spt_weights": torch.ones(3, 5, dtype=torch.float64), "qry_weights": torch.ones(3, 3, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("spt_weights", [1.0], TypeError, "spt_weights must be a tensor, got list"),
        ("qry_weights", torch.ones(3, 4), ValueError, r"qry_weights must have shape \[3, 3\], one a sample of x_qry, "),
        ("spt_weights", torch.ones(5), ValueError, r"spt_weights must have shape \[3, 5\], one .*, got \[5\]"),
        ("spt_weights", torch.ones(3, 5, 1), ValueError, r"spt_weights must have shape \[3, 5\]"),
        ("spt_weights", torch.ones(3, 5), TypeError, "spt_weights must be torch.float64 on cpu like the model, got"),
        (
            "qry_weights",
            torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]]).double(),
            ValueError,
            "qry_weights must have a positive sum in every task, got 0 in task 1",
        ),
        (
            "qry_weights",
            torch.tensor([[1.0, 0, 0], [0, -1, 0], [1, 1, 1]]).double(),
            ValueError,
            r"qry_weights must be finite and at least 0, got -1.0 \(task 1, sample 1\)",
        ),
        ("qry_weights", torch.full((3, 3), torch.inf).double(), ValueError, "qry_weights must be finite and at least"),
        ("qry_weights", torch.full((3, 3), torch.nan).double(), ValueError, "qry_weights must be finite and at least"),
        ("qry_weights", HUGE, ValueError, "qry_weights must have a finite sum in every"),
    ],
)
def test_weights_that_do_not_fit(name: str, value: Any, error: type[Exception], text: str) -> None:
    model = mlp()
    maml = FusedMAML(model, 0.1, 1)
    with pytest.raises(error, match=text):
        maml(*episode(), **{**GOOD, name: value})
    assert all(p.grad is None for p in model.parameters())


def test_policy_targets_have_weights_of_their_own() -> None:
    model = nn.Linear(3, 4).double()
    x, actions, _, _ = episode()
    target = PolicyTarget(actions, torch.randn(3, 5).double())
    maml = FusedMAML(model, 0.1, 1, loss="categorical_policy_gradient")
    with pytest.raises(ValueError, match=r"spt_weights must be None for categorical_policy_gradient, whose targets"):
        maml(x, target, x, target, spt_weights=GOOD["spt_weights"])


def test_tensors_without_an_axis_of_samples_have_no_weights() -> None:
    x, y, w = torch.randn(3, 5, 3).double(), torch.randn(3, 4).double(), GOOD["spt_weights"]
    maml = FusedMAML(nn.Linear(3, 4).double(), 0.1, 1, loss=lambda z, y: ((z - y) ** 2).mean(1))
    with pytest.raises(ValueError, match=r"y_spt must have 5 samples a task, as spt_weights has, got \[3, 4\]"):
        maml((x,), y, (x,), y, spt_weights=w)


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda z, y: ((z - y) ** 2).mean(), ValueError, r"the loss must return one value a sample, \[5\], where samp"),
        (lambda z, y: None, TypeError, r"the loss must return a tensor \[samples\] where samples have weights, got N"),
        (lambda z, y: (z - y).sum(1).to(torch.int64), TypeError, "the loss must return a real floating-point tensor"),
    ],
)
def test_a_loss_that_returns_something_else(loss: Any, error: type[Exception], text: str) -> None:
    maml = FusedMAML(nn.Linear(3, 4).double(), 0.1, 1, loss=loss, backend="reference")
    with pytest.raises(error, match=text):
        maml(*episode(target=(4,)), **GOOD)


def test_results_that_are_detached_refuse_weights_with_a_graph() -> None:
    model, w = nn.Linear(3, 4).double(), GOOD["spt_weights"].clone().requires_grad_()
    maml, (x, y, _, _) = FusedMAML(model, 0.1, 1), episode()
    fast = maml.adapt(x, y)
    for method, call in {
        "loss_and_grad": lambda: maml.loss_and_grad(fast, x, y, weights=w),
        "hvp": lambda: maml.hvp(fast, x, y, fast, weights=w),
        "predict": lambda: maml.predict(fast, x, weights=w),
    }.items():
        with pytest.raises(ValueError, match=f"weights must not require grad in {method}"):
            call()
