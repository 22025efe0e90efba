"""What goes in and out of a model on the general path: pytrees of tensors, integers, samples of other shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import TanhTransform
from torch.utils import _pytree as pytree

from maml_cuda import FusedMAML, PolicyTarget, gradcheck
from tests import oracle
from tests.conftest import assert_close, run

RATE, STEPS, TASKS, SUPPORT, QUERY = 0.1, 2, 3, 5, 4
GENERAL = "ignore:maml_cuda runs this model on the general path:UserWarning"


class Net(nn.Module):
    """Two layers, whose forward is the function given."""

    def __init__(self, forward: Callable[[Net, Any], Any], features: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.of = nn.Linear(features, 6), nn.Linear(6, 2), forward
        self.double()

    def h(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Any) -> Any:
        return self.of(self, x)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def episode() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return randn(TASKS, SUPPORT, 3), randn(TASKS, SUPPORT, 2), randn(TASKS, QUERY, 3), randn(TASKS, QUERY, 2)


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean()


def right(maml: FusedMAML, data: Any, loss: str | Callable) -> None:
    """Loss, meta-gradient, adapted parameters, per-task gradients and Hessian-vector products, by hand."""
    value, grads = run(maml, data)
    expected_value, expected = oracle.meta_gradient(maml.model, loss, *data, RATE, STEPS)
    assert torch.allclose(value, expected_value, rtol=1e-12)
    assert_close(grads, expected, 1e-10)
    x, y, x_qry, y_qry = data
    fast = maml.adapt(x, y)
    assert_close(fast, oracle.adapt(maml.model, loss, x, y, RATE, STEPS), 1e-11)

    leaves = {n: p.clone().requires_grad_() for n, p in fast.items()}
    of = oracle.LOSSES[loss] if isinstance(loss, str) else loss
    predictions = oracle.predict(maml.model, leaves, x_qry)
    losses = torch.stack([of(p, target) for p, (target,) in zip(predictions, oracle.tasks_of(y_qry), strict=True)])
    first = torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=True)
    v = {n: torch.randn_like(p) for n, p in fast.items()}
    along = sum((g * d).sum() for g, d in zip(first, v.values(), strict=True))
    second = torch.autograd.grad(along, list(leaves.values()), allow_unused=True, materialize_grads=True)
    got, gradients = maml.loss_and_grad(fast, x_qry, y_qry)
    assert torch.allclose(got, losses, rtol=1e-12)
    assert_close(gradients, dict(zip(leaves, first, strict=True)), 1e-11)
    assert_close(maml.hvp(fast, x_qry, y_qry, v), dict(zip(leaves, second, strict=True)), 1e-10)


# -- outputs -------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    out: Tensor
    hidden: Tensor


def half(net: Net, x: Tensor) -> Tensor:
    return net.h(x).square() + 0.5


def of_normal(d: Any, y: Tensor) -> Tensor:
    return -d.log_prob(y).mean()


def of_classes(d: Any, y: Tensor) -> Tensor:
    return -d.log_prob((y[..., 0] > 0).long()).mean()


OUTPUTS: dict[str, tuple[Callable, Callable]] = {
    "tuple": (lambda m, x: (m.h(x), m.a(x)), lambda p, y: squared(p[0], y) + p[1].square().mean()),
    "named tuple": (lambda m, x: Pair(m.h(x), m.a(x)), lambda p, y: squared(p.out, y)),
    "list in a dict": (
        lambda m, x: {"out": [m.h(x)], "mask": x[..., 0] > 0}, lambda p, y: squared(p["out"][0], y),
    ),
    "None beside": (lambda m, x: (m.h(x), None), lambda p, y: squared(p[0], y)),
    "constants beside": (lambda m, x: {"out": m.h(x), "n": 3, "kind": "net"}, lambda p, y: squared(p["out"], y)),
    "normal": (lambda m, x: Normal(m.h(x), 0.5), of_normal),
    "diagonal normal": (
        lambda m, x: {"pi": Independent(Normal(m.h(x), half(m, x)), 1)}, lambda p, y: of_normal(p["pi"], y),
    ),
    "normal of one covariance": (lambda m, x: MultivariateNormal(m.h(x), 2 * torch.eye(2).double()), of_normal),
    "beta": (lambda m, x: Beta(half(m, x), half(m, x)), lambda d, y: of_normal(d, y.sigmoid())),
    "logits": (lambda m, x: Categorical(logits=m.h(x)), of_classes),
    "probabilities": (lambda m, x: Categorical(probs=half(m, x)), of_classes),
    "coins": (lambda m, x: Bernoulli(logits=m.h(x)), lambda d, y: of_normal(d, (y > 0).double())),
}  # fmt: skip


def parameters(output: Any) -> Any:
    """Distributions as what they come to: their log-probabilities are functions of these."""
    if isinstance(output, Independent):
        return parameters(output.base_dist)
    if isinstance(output, Distribution):
        return {name: getattr(output, name) for name in output.arg_constraints}
    return output


def leaves_of(output: Any) -> list[Any]:
    return pytree.tree_leaves(pytree.tree_map(parameters, output))


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_are_put_together_leaf_by_leaf(case: str) -> None:
    forward, loss = OUTPUTS[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss=loss, backend="reference")
    data = episode()
    right(maml, data, loss)
    fast = maml.adapt(*data[:2])
    got, expected = maml.predict(fast, data[2]), oracle.predict(maml.model, fast, data[2])
    assert type(got) is type(expected[0])
    own = [leaves_of(e) for e in expected]
    for leaf, *rows in zip(leaves_of(got), *own, strict=True):
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(leaf, torch.stack(rows), rtol=1e-12, atol=1e-14)
        else:
            assert all(leaf == row for row in rows)
    logits = maml(*data).logits
    assert type(logits) is type(got)
    for leaf, again in zip(leaves_of(logits), leaves_of(got), strict=True):
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(leaf, again.detach(), rtol=1e-12, atol=1e-14)
            assert not leaf.requires_grad


@pytest.mark.parametrize("case", ["list in a dict", "diagonal normal", "probabilities"])
def test_predictions_are_differentiable_leaf_by_leaf(case: str) -> None:
    forward, loss = OUTPUTS[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss=loss, backend="reference")
    data = episode()
    leaves = {n: p.clone().requires_grad_() for n, p in maml.adapt(*data[:2]).items()}
    results = []
    for outputs in ([maml.predict(leaves, data[2])], oracle.predict(maml.model, leaves, data[2])):
        total = sum(t.sin().sum() for t in leaves_of(outputs) if isinstance(t, Tensor) and t.requires_grad)
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        results.append(dict(zip(leaves, grads, strict=True)))
    assert_close(*results, 1e-10)


@dataclass
class Opaque:
    out: Tensor


UNLIKE: dict[str, tuple[Callable, Callable, type[Exception], str]] = {
    "another distribution": (
        lambda m, x: TransformedDistribution(Normal(m.h(x), 0.5), [TanhTransform()]),
        lambda d, y: of_normal(d, y.tanh()), TypeError,
        "the model's output must be a tensor, .*got the distribution TransformedDistribution.*return its parameters",
    ),
    "an object": (
        lambda m, x: (Opaque(m.h(x)),), lambda p, y: squared(p[0].out, y), TypeError,
        r"the model's output\[0\] must be a tensor, .*got Opaque; torch.export.register_dataclass makes",
    ),
    "numbers that differ": (
        lambda m, x: {"out": m.h(x), "n": int((x > 0).sum())}, lambda p, y: squared(p["out"], y), ValueError,
        r"the model's output\['n'\] must be the same in all tasks, got 4 and, in task 1, 8",
    ),
    "shapes that differ": (
        lambda m, x: (m.h(x), x[x > 0]), lambda p, y: squared(p[0], y), ValueError,
        r"the model's output\[1\] must have one shape in all tasks, got \[4\] and, in task 1, \[8\]",
    ),
    "types that differ": (
        lambda m, x: (m.h(x), x if (x > 0).sum() > 5 else None), lambda p, y: squared(p[0], y), ValueError,
        r"the model's output\[1\] must be of one type in all tasks, got NoneType and, in task 1, Tensor",
    ),
    "predictions that differ": (
        lambda m, x: m.h(x[: 1 + int((x > 0).sum() > 5)]), lambda p, y: squared(p, y[: len(p)]), ValueError,
        r"the model's output must have one shape in all tasks, got \[1, 2\] and, in task 1, \[2, 2\]",
    ),
    "structures that differ": (
        lambda m, x: (m.h(x),) * (1 + int((x > 0).sum() > 5)), lambda p, y: squared(p[0], y), ValueError,
        "the model's output must have one structure in all tasks, got another one in task 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_what_cannot_be_put_together(case: str) -> None:
    """The loss has no need of it: a call works, without logits. `predict` says what to return instead."""
    forward, loss, error, text = UNLIKE[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss=loss, backend="reference")
    x_spt, y_spt, x_qry, y_qry = episode()
    x_qry = x_qry.abs() * torch.tensor([-1.0, 1.0, 1.0]).double()  # 8 positive numbers
    x_qry[0, :4, 1:] *= torch.tensor([1.0, -1.0]).double()  # and in the first task 4
    right(maml, (x_spt, y_spt, x_qry, y_qry), loss)
    assert maml(x_spt, y_spt, x_qry, y_qry).logits is None
    with pytest.raises(error, match=text):
        maml.predict(maml.adapt(x_spt, y_spt), x_qry)


def test_a_named_loss_never_broadcasts() -> None:
    """The first task's prediction is looked at beforehand; those of the others may differ."""
    x, y, _, _ = episode()
    x[0, :, 0], x[1:, :, 0] = 1, -1
    maml = FusedMAML(Net(lambda m, x: m.h(x) if x[0, 0] > 0 else m.h(x)[:1]), RATE, loss="mse", backend="reference")
    with pytest.raises(ValueError, match=r"must have the target's shape \[5, 2\] for mse, got \[1, 2\]"):
        maml(x, y, x, y)


# -- inputs --------------------------------------------------------------------------------------------------


def words() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def ids(n: int, *more: int) -> Tensor:
    return torch.randint(7, (TASKS, n, *more))


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_id_a_sample(backend: str) -> None:
    model = words()
    data = ids(SUPPORT), torch.randint(3, (TASKS, SUPPORT)), ids(QUERY), torch.randint(3, (TASKS, QUERY))
    maml = FusedMAML(model, RATE, STEPS, backend=backend)
    right(maml, data, "cross_entropy")
    assert maml.predict(maml.adapt(*data[:2]), data[2]).shape == (TASKS, QUERY, 3)
    weights = torch.tensor([0.5, 0.25, 0.25]).double()
    out = maml(*data, task_weights=weights)
    assert torch.allclose(out.loss, (weights * out.task_losses).sum())


def test_backend_fused_refuses_an_embedding() -> None:
    with pytest.raises(ValueError, match=r'backend="fused" cannot serve this model: 0 \(Embedding\)'):
        FusedMAML(words(), RATE, backend="fused")


def test_numbers_as_samples() -> None:
    model = Net(lambda m, x: m.h(x[:, None]), features=1)
    data = randn(TASKS, SUPPORT), randn(TASKS, SUPPORT, 2), randn(TASKS, QUERY), randn(TASKS, QUERY, 2)
    right(FusedMAML(model, RATE, STEPS, loss="mse", backend="reference"), data, "mse")
    with pytest.warns(UserWarning, match="general path"):
        maml = FusedMAML(model, RATE, STEPS, loss=squared)
    right(maml, data, squared)
    model.of = lambda m, x: m.h(x.view(-1, 1))  # which has a plan, for samples of one feature
    maml = FusedMAML(model, RATE, STEPS, loss="mse")
    with pytest.warns(UserWarning, match="general path.*because samples are numbers without axes"):
        right(maml, data, "mse")
    assert maml.explain(data[0]).startswith("backend: reference, because samples are numbers")
    with pytest.raises(ValueError, match=r"fused.*cannot serve.*samples are numbers without axes"):
        FusedMAML(model, RATE, loss="mse", backend="fused")(*data)


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("features", [1, 3])
def test_features_are_not_taken_for_samples(features: int, backend: str) -> None:
    """Without the axis of tasks a set of samples looks like tasks of numbers, and a Linear takes each for a sample."""
    maml = FusedMAML(Net(lambda m, x: m.h(x)[..., :1].expand(x.shape), features), RATE, loss=squared, backend=backend)
    x = randn(8, features)
    fast = {n: p.detach().expand(8, *p.shape) for n, p in maml.model.named_parameters()}
    calls = (
        lambda: maml(x, x, x, x),
        lambda: maml.adapt(x, x),
        lambda: maml.predict(fast, x),
        lambda: maml.loss_and_grad(fast, x, x),
        lambda: maml.hvp(fast, x, x, fast),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"must have shape \[tasks, samples, \.\.\.\], got \[8, {features}\].*unsq"
        ):
            call()


class Signals(nn.Module):
    """Of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean(-1))


def signals(support: int, query: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(3, (2, TASKS, SUPPORT))
    return randn(TASKS, SUPPORT, 2, support), labels[0], randn(TASKS, SUPPORT, 2, query), labels[1]


def test_queries_longer_than_the_support_samples() -> None:
    """The plan serves one shape: such a call goes to the general path in words, and the next one is fused again."""
    maml = FusedMAML(Signals(), RATE, STEPS)
    data = signals(8, 11)
    with pytest.warns(UserWarning, match=r"general path.*samples are of shape \[2, 8\] and \[2, 11\]"):
        out = maml(*data)
    assert maml.backend == "reference"
    right(maml, data, "cross_entropy")  # its building blocks see one set at a time, and are fused
    for again in (signals(8, 8), data, signals(8, 8)):
        got = maml(*again).loss
        assert torch.allclose(got, oracle.meta_gradient(maml.model, "cross_entropy", *again, RATE, STEPS)[0])
        assert maml.backend == ("reference" if again is data else "cpu")
    assert torch.equal(out.loss, maml(*data).loss)
    right(FusedMAML(maml.model, RATE, STEPS, backend="reference"), data, "cross_entropy")
    with pytest.raises(ValueError, match=r"fused.*cannot serve.*\[2, 8\] and \[2, 11\]"):
        FusedMAML(maml.model, RATE, STEPS, backend="fused")(*data)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_queries_shorter_than_the_kernel(backend: str) -> None:
    maml = FusedMAML(Signals(), RATE, backend=backend)
    with pytest.raises(ValueError, match=r"x_qry must have samples of shape \[2, 8\] like x_spt.*got \[2, 2\].*ernel"):
        maml(*signals(8, 2))


class Graph(nn.Module):
    """A mean over neighbours: nodes [n, 3], edges [2, m], an optional mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, graph: Any) -> Tensor:
        nodes, (source, target), mask = (graph[k] for k in ("nodes", "edges", "mask"))
        messages = torch.tanh(self.inner(nodes))[source]
        if mask is not None:
            messages = messages * mask[:, None]
        return self.out(torch.zeros(len(nodes), 6).to(messages).index_add(0, target, messages))


def graphs(n: int, masked: bool = True) -> dict[str, Tensor | None]:
    mask = (torch.rand(TASKS, 9) < 0.7).double() if masked else None
    return {"nodes": randn(TASKS, n, 3), "edges": torch.randint(n, (TASKS, 2, 9)), "mask": mask}


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_x_a_dict(backend: str) -> None:
    maml = FusedMAML(Graph(), RATE, STEPS, backend=backend)
    data = graphs(SUPPORT), torch.randint(3, (TASKS, SUPPORT)), graphs(QUERY, False), torch.randint(3, (TASKS, QUERY))
    right(maml, data, "cross_entropy")
    assert maml(*data).logits.shape == (TASKS, QUERY, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maml(*data).loss, maml(*data).loss)
    with torch.inference_mode():
        assert maml.predict(maml.adapt(*data[:2]), {**data[2], "nodes": data[2]["nodes"] + 0}).shape == (
            TASKS,
            QUERY,
            3,
        )


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("make", [tuple, list])
def test_x_and_y_tuples_or_lists(make: type) -> None:
    def loss(prediction: Tensor, target: Any) -> Tensor:
        return ((prediction - target[0]).square() * target[1]).sum() / target[1].sum()

    maml = FusedMAML(Net(lambda m, x: m.h(x[0]) * x[1][:, None]), RATE, STEPS, loss=loss)
    data = []
    for n in (SUPPORT, QUERY):
        data += [make([randn(TASKS, n, 3), randn(TASKS, n)]), make([randn(TASKS, n, 2), torch.rand(TASKS, n, 1)])]
    data = [pytree.tree_map(Tensor.double, part) for part in data]
    right(maml, data, loss)
    gradcheck(maml, *data)


def test_x_that_requires_grad() -> None:
    maml = FusedMAML(Graph(), RATE, STEPS, backend="reference")
    data = graphs(SUPPORT), torch.randint(3, (TASKS, SUPPORT)), graphs(QUERY), torch.randint(3, (TASKS, QUERY))
    data[0]["nodes"].requires_grad_()
    maml(*data).loss.backward()
    got = data[0]["nodes"].grad
    theta = dict(maml.model.named_parameters())
    losses = []
    for t in range(TASKS):
        phi = theta
        own = [{k: None if v is None else v[t] for k, v in data[i].items()} for i in (0, 2)]
        for _ in range(STEPS):
            inner = F.cross_entropy(torch.func.functional_call(maml.model, phi, own[0]), data[1][t])
            grads = torch.autograd.grad(inner, list(phi.values()), create_graph=True)
            phi = {n: p - RATE * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(maml.model, phi, own[1]), data[3][t]))
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), data[0]["nodes"])
    assert_close({"nodes": got}, {"nodes": expected}, 1e-10)


def test_running_statistics_of_pytrees() -> None:
    model = nn.BatchNorm1d(3).double()
    maml = FusedMAML(Net(lambda m, x: m.h(model(x["x"]))), RATE, 0, loss="mse", backend="reference")
    maml.model.norm = model
    x_spt, y_spt, x_qry, _ = episode()
    maml.update_statistics({"x": x_spt}, y_spt, {"x": x_qry})
    torch.testing.assert_close(model.running_mean, 0.1 * x_qry.mean((0, 1)))
    with pytest.raises(TypeError, match=r"x_qry\['x'\] must have the model's dtype torch.float64, got torch.float32"):
        maml.update_statistics({"x": x_spt}, y_spt, {"x": x_qry.float()})


def test_a_plan_takes_no_pytree() -> None:
    """A model that has one, called with something else, falls back in words; here the model itself refuses it."""
    maml = FusedMAML(nn.Linear(3, 2).double(), RATE)
    x, y = randn(TASKS, SUPPORT, 3), torch.randint(2, (TASKS, SUPPORT))
    falls_back = pytest.warns(UserWarning, match="general path.*x is a tuple; fused layers take one tensor")
    with falls_back, pytest.raises(TypeError, match="must be Tensor, not tuple"):
        maml((x,), y, (x,), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml(x, y, x, y)
    assert maml.backend == "cpu"


BAD: dict[str, tuple[Callable[[dict, Any], tuple[Any, Any]], type[Exception], str]] = {
    "other tasks": (
        lambda x, y: ({**x, "mask": x["mask"][:2]}, y), ValueError,
        r"x_spt\['mask'\] must have 3 tasks like x_spt\['nodes'\], got 2",
    ),
    "no axis": (
        lambda x, y: ({**x, "mask": torch.tensor(1.0).double()}, y), ValueError,
        r"x_spt\['mask'\] must have shape \[tasks, \.\.\.\], got \[\]",
    ),
    "no tasks": (
        lambda x, y: ({k: v[:0] for k, v in x.items()}, y), ValueError,
        r"x_spt\['nodes'\] must have at least 1 task, got 0",
    ),
    "an array": (
        lambda x, y: ({**x, "mask": x["mask"].numpy()}, y), TypeError,
        r"x_spt\['mask'\] must be a tensor \[tasks, \.\.\.\], got ndarray",
    ),
    "a number": (
        lambda x, y: ({**x, "mask": 1.0}, y), TypeError,
        r"x_spt\['mask'\] must be a tensor \[tasks, \.\.\.\], got float",
    ),
    "no tensor": (
        lambda x, y: ([None, 1], y), TypeError, "x_spt must be a tensor or a pytree of tensors, got list",
    ),
    "another dtype": (
        lambda x, y: ({**x, "nodes": x["nodes"].float()}, y), TypeError,
        r"x_spt\['nodes'\] must have the model's dtype torch.float64, got torch.float32",
    ),
    "elsewhere": (
        lambda x, y: ({**x, "edges": x["edges"].to("meta")}, y), ValueError,
        r"x_spt\['edges'\] must be on the model's device cpu, got meta",
    ),
    "y of other tasks": (lambda x, y: (x, y[:2]), ValueError, "y_spt must have 3 tasks like x_spt, got 2"),
    "y of other samples": (
        lambda x, y: (x, y[:, 1:]), ValueError,
        "y_spt must have 5 samples a task like the prediction for cross_entropy, got 4",
    ),
    "y a dict": (
        lambda x, y: (x, {"y": y}), TypeError, "y_spt must be a tensor for cross_entropy, got dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_pytrees_that_do_not_fit(case: str) -> None:
    spoil, error, text = BAD[case]
    maml = FusedMAML(Graph(), RATE, STEPS, backend="reference")
    x, y = graphs(SUPPORT), torch.randint(3, (TASKS, SUPPORT))
    bad = spoil(x, y)
    for call in (lambda: maml(*bad, x, y), lambda: maml.adapt(*bad)):
        with pytest.raises(error, match=text):
            call()
    assert all(p.grad is None for p in maml.parameters())


class Policy(Graph):
    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(3).double())

    def forward(self, graph: Any) -> tuple[Tensor, Tensor]:
        return super().forward(graph), self.log_std


def test_a_policy_on_pytrees() -> None:
    maml = FusedMAML(Policy(), RATE, STEPS, loss="gaussian_policy_gradient", backend="reference")
    data = [graphs(SUPPORT), PolicyTarget(randn(TASKS, SUPPORT, 3), randn(TASKS, SUPPORT))]
    data += [graphs(QUERY), PolicyTarget(randn(TASKS, QUERY, 3), randn(TASKS, QUERY))]

    def loss(policy: tuple[Tensor, Tensor], target: PolicyTarget) -> Tensor:
        log_prob = Normal(policy[0], policy[1].exp()).log_prob(target.actions).sum(-1)
        return -(target.advantages * log_prob).mean()

    right(maml, data, loss)
    assert maml(*data).logits.shape == (TASKS, QUERY, 3)
    short = data[1]._replace(advantages=data[1].advantages[:, :1])
    with pytest.raises(ValueError, match=r"y_spt\.advantages must have 5 samples a task like y_spt\.actions, got 1"):
        maml.adapt(data[0], short)
    few = PolicyTarget(*(t[:, :1] for t in data[1][:2]))
    with pytest.raises(ValueError, match=r"y_spt.actions must have the mean's shape \[3, 5, 3\].*got \[3, 1, 3\]"):
        maml.adapt(data[0], few)


def test_a_target_of_a_loss_of_your_own_has_the_tasks_of_x() -> None:
    maml = FusedMAML(Net(Net.h), RATE, loss=lambda p, y: squared(p, y["to"]), backend="reference")
    x, y, _, _ = episode()
    with pytest.raises(ValueError, match=r"y_spt\['to'\] must have 3 tasks like x_spt, got 2"):
        maml.adapt(x, {"to": y[:2]})
    with pytest.raises(TypeError, match=r"y_spt\['to'\] must be a tensor \[tasks, \.\.\.\], got ndarray"):
        maml.adapt(x, {"to": y.numpy(), "from": y})
