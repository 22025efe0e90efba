"""Inputs and targets that are pytrees of tensors [tasks, ...], on the general path; test_inputs.py has those that fused
layers take."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Normal,
)
from torch.utils import _pytree as pytree

from maml_cuda import FusedMAML, PolicyTarget, gradcheck
from tests.conftest import assert_close
from tests.engine.pytree_models import (
    GENERAL,
    QUERY,
    RATE,
    STEPS,
    SUPPORT,
    TASKS,
    Graph,
    Net,
    episode,
    graphs,
    randn,
    right,
    squared,
)


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


def test_a_model_that_takes_no_pytree() -> None:
    """The call falls back with a warning, and the model then raises itself."""
    maml = FusedMAML(nn.Linear(3, 2).double(), RATE)
    x, y = randn(TASKS, SUPPORT, 3), torch.randint(2, (TASKS, SUPPORT))
    falls_back = pytest.warns(UserWarning, match="general path.*must be Tensor, not tuple")
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
