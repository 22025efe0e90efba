"""Models that return pytrees or distributions, which are not fused: with backend="auto" they are refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
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

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import assert_close
from tests.engine.pytree_models import GENERAL, RATE, STEPS, Net, episode, right, squared


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
    """Replaces a distribution by its parameters, of which its log-probabilities are functions."""
    if isinstance(output, Independent):
        return parameters(output.base_dist)
    if isinstance(output, Distribution):
        return {name: getattr(output, name) for name in output.arg_constraints}
    return output


def leaves_of(output: Any) -> list[Any]:
    return pytree.tree_leaves(pytree.tree_map(parameters, output))


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_are_put_together_leaf_by_leaf(case: str, backend: str) -> None:
    forward, loss = OUTPUTS[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss=loss, backend=backend)
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


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", UNLIKE)
def test_what_cannot_be_put_together(case: str, backend: str) -> None:
    """A call works, because the loss needs no stacked output, but has no logits; `predict` raises."""
    forward, loss, error, text = UNLIKE[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss=loss, backend=backend)
    x_spt, y_spt, x_qry, y_qry = episode()
    x_qry = x_qry.abs() * torch.tensor([-1.0, 1.0, 1.0]).double()  # 8 positive numbers
    x_qry[0, :4, 1:] *= torch.tensor([1.0, -1.0]).double()  # but 4 in the first task
    right(maml, (x_spt, y_spt, x_qry, y_qry), loss)
    assert maml(x_spt, y_spt, x_qry, y_qry).logits is None
    with pytest.raises(error, match=text):
        maml.predict(maml.adapt(x_spt, y_spt), x_qry)


def test_a_named_loss_never_broadcasts() -> None:
    """The first task's prediction has the right shape, those of the others do not."""
    x, y, _, _ = episode()
    x[0, :, 0], x[1:, :, 0] = 1, -1
    maml = FusedMAML(Net(lambda m, x: m.h(x) if x[0, 0] > 0 else m.h(x)[:1]), RATE, loss="mse", backend="reference")
    with pytest.raises(ValueError, match=r"must have the target's shape \[5, 2\] for mse, got \[1, 2\]"):
        maml(x, y, x, y)
