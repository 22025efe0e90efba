"""Models and checks for pytrees of tensors as inputs, targets and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import assert_close, run

RATE, STEPS, TASKS, SUPPORT, QUERY = 0.1, 2, 3, 5, 4
GENERAL = "ignore:maml_cuda runs this model on the general path:UserWarning"


class Net(nn.Module):
    """Two layers; forward is the given function of (model, x)."""

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
    """Compares loss, meta-gradient, adapted parameters, task gradients and Hessian-vector products with the oracle."""
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
