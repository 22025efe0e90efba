"""Models that combine the samples of a set with each other: fused layers take a whole set as one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck
from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.pytree_models import GENERAL, RATE, STEPS, SUPPORT, TASKS, Net, randn, right

pytestmark = pytest.mark.usefixtures("one_thread")

N = SUPPORT  # samples of either set


def adjacency(n: int) -> Tensor:
    given = (torch.rand(TASKS, n, n) < 0.5).double() + torch.eye(n)
    return given / given.sum(-1, keepdim=True)


def nodes(n: int) -> Any:
    return {"x": randn(TASKS, n, 3), "adjacency": adjacency(n)}


def convolved(m: Net, graph: dict[str, Tensor]) -> Tensor:
    """Two graph convolutions; the adjacency matrix is an input."""
    h = torch.relu(graph["adjacency"] @ m.a(graph["x"]))
    return graph["adjacency"] @ m.b(h)


def attention(m: Net, x: Tensor) -> Tensor:
    """Attention of the samples to each other."""
    h = m.a(x)
    return m.b((h @ h.T / 6**0.5).softmax(-1) @ h)


CASES: dict[str, tuple[Callable[[Net, Any], Tensor], Callable[[int], Any]]] = {
    "a graph": (convolved, nodes),
    "attention": (attention, lambda n: randn(TASKS, n, 3)),
    "softmax over samples": (lambda m, x: m.b(m.a(x).softmax(0)), lambda n: randn(TASKS, n, 3)),
    "the variance of samples": (lambda m, x: m.h(x) / (1 + m.a(x).var(0).sum()), lambda n: randn(TASKS, n, 3)),
    "neighbours": (lambda m, x: m.h(x) + m.h(x.roll(1, 0)), lambda n: randn(TASKS, n, 3)),
    "distances": (
        lambda m, x: (m.h(x)[:, None] - m.h(x)[None]).square().sum(-1).exp().mean(1, True).expand(-1, 2),
        lambda n: 0.1 * randn(TASKS, n, 3),
    ),
    "a context of the task": (
        lambda m, x: m.h(x[0] + x[1]), lambda n: (randn(TASKS, n, 3), randn(TASKS, 3))
    ),
    "layouts": (attention, lambda n: randn(TASKS, 3, n).transpose(1, 2)),
}  # fmt: skip


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case: str) -> None:
    torch.manual_seed(0)
    forward, x = CASES[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss="mse", backend="fused")
    data = [x(N), randn(TASKS, N, 2), x(N), randn(TASKS, N, 2)]
    right(maml, data, "mse")
    assert maml.backend != "reference"
    assert maml(*data).logits.shape == (TASKS, N, 2)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("n", [1, 2, 7])
def test_cross_entropy(n: int) -> None:
    maml = FusedMAML(Net(convolved), RATE, STEPS, backend="fused")
    data = [nodes(n), torch.randint(2, (TASKS, n)), nodes(n), torch.randint(2, (TASKS, n))]
    right(maml, data, "cross_entropy")
    general = FusedMAML(maml.model, RATE, STEPS, backend="reference")
    torch.testing.assert_close(maml(*data).logits, general(*data).logits)
    torch.testing.assert_close(maml(*data).support_losses, general(*data).support_losses)


def test_many_samples() -> None:
    """More than a tile of samples: a set that mixes them is not cut."""
    maml = FusedMAML(Net(convolved), RATE, STEPS, loss="mse", backend="fused")
    data = [nodes(150), randn(TASKS, 150, 2), nodes(150), randn(TASKS, 150, 2)]
    _, grads = run(maml, data)
    assert_close(grads, oracle.meta_gradient(maml.model, "mse", *data, RATE, STEPS)[1], 1e-10)


@pytest.mark.parametrize("first_order", [False, True])
def test_a_loss_of_ones_own(first_order: bool) -> None:
    """One that combines samples too, in the form of a contrastive loss; weights of inner steps and of tasks."""

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        scores = prediction @ prediction.T
        return F.cross_entropy(scores, y) + prediction.abs().mean()

    model = Net(attention)
    data = [randn(TASKS, N, 3), torch.randint(N, (TASKS, N)), randn(TASKS, N, 3), torch.randint(N, (TASKS, N))]
    results = []
    for backend in ("fused", "reference"):
        maml = FusedMAML(
            model, RATE, STEPS, loss=loss, first_order=first_order, backend=backend, query_weights=[0.2, 0.3, 0.5]
        )
        results.append(run(maml, data))
    torch.testing.assert_close(*results)
    if not first_order:
        right(FusedMAML(model, RATE, STEPS, loss=loss, backend="fused"), data, loss)


def test_everything_else() -> None:
    model = Net(convolved)
    fused, general = (FusedMAML(model, RATE, STEPS, loss="mse", backend=b) for b in ("fused", "reference"))
    data = [nodes(N), randn(TASKS, N, 2), nodes(N), randn(TASKS, N, 2)]
    for a, b in zip(fused.inner_loop(*data[:2], 3), general.inner_loop(*data[:2], 3), strict=True):
        assert_close(a, b, 1e-11)
    results = []
    for maml in (fused, general):
        fast = maml.adapt(*data[:2], differentiable=True)
        loss = maml.predict(fast, data[2]).sin().sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*results)
    assert fused.memory_estimate(data[0], data[2]) > 0
    assert "the samples of a set are combined with each other" in fused.explain(data[0], data[1])
    gradcheck(fused, *data)
    model.float()
    single = [nodes(N), randn(TASKS, N, 2), nodes(N), randn(TASKS, N, 2)]
    single = torch.utils._pytree.tree_map(Tensor.float, single)
    loss, grads = run(fused, single)
    expected = run(general, single)
    torch.testing.assert_close((loss, grads), expected, rtol=1e-4, atol=1e-6)


def test_compiled(compiled: Any) -> None:
    model, data = Net(attention), [randn(TASKS, N, 3), randn(TASKS, N, 2), randn(TASKS, N, 3), randn(TASKS, N, 2)]
    results = []
    for call in (compiled, lambda maml: maml):
        loss = call(FusedMAML(model, RATE, STEPS, loss="mse", backend="fused"))(*data).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings(GENERAL)
def test_labels_inside_a_compiled_step() -> None:
    torch._dynamo.reset()
    maml = torch.compile(FusedMAML(Net(attention), RATE, STEPS, backend="fused"), backend="aot_eager")
    x, y = randn(TASKS, N, 3), torch.randint(2, (TASKS, N))
    with pytest.raises(ValueError, match="samples that depend on each other are not looked at inside"):
        maml(x, y, x, y)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["attention", "distances"])
def test_sets_of_two_sizes_are_refused(case: str) -> None:
    """A plan is of one size. Each set alone is fused, in the building blocks."""
    forward, x = CASES[case]
    maml = FusedMAML(Net(forward), RATE, STEPS, loss="mse", backend="fused")
    data = [x(N), randn(TASKS, N, 2), x(N + 1), randn(TASKS, N + 1, 2)]
    with pytest.raises(ValueError, match="combines the samples with themselves, which is fused where support"):
        maml(*data)
    fast = maml.adapt(*data[:2])
    assert_close(fast, oracle.adapt(maml.model, "mse", *data[:2], RATE, STEPS), 1e-11)
    assert maml.predict(fast, data[2]).shape == (TASKS, N + 1, 2)


def test_integers_are_refused() -> None:
    model = Net(lambda m, x: attention(m, m.table(x).mean(1)))
    model.table = nn.Embedding(7, 3).double()
    x, y = torch.randint(7, (TASKS, N, 2)), randn(TASKS, N, 2)
    with pytest.raises(ValueError, match=r"it combines the samples with themselves$"):
        FusedMAML(model, RATE, STEPS, loss="mse", backend="fused")(x, y, x, y)
    general = FusedMAML(model, RATE, STEPS, loss="mse", backend="reference")
    assert general(x, y, x, y).loss > 0


def test_labels_and_targets_that_do_not_fit() -> None:
    maml = FusedMAML(Net(convolved), RATE, STEPS)
    data = [nodes(N), torch.randint(2, (TASKS, N)), nodes(N), torch.randint(2, (TASKS, N))]
    maml(*data)
    assert maml.backend == "cpu"
    for wrong in (2, -100):
        labels = data[1].clone()
        labels[1, 2] = wrong
        with pytest.raises(ValueError, match=rf"y_spt must hold labels in \[0, 2\), got {wrong}"):
            maml(data[0], labels, *data[2:])
    with pytest.raises(ValueError, match="y_spt must have"):
        maml(data[0], data[1][:, 1:], *data[2:])
    squares = FusedMAML(maml.model, RATE, STEPS, loss="mse")
    with pytest.raises(
        ValueError, match=r"y_spt must have the prediction's shape \[3, 5, 2\] for mse, got \[3, 5, 1\]"
    ):
        squares.adapt(data[0], randn(TASKS, N, 1))
