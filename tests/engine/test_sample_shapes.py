"""Samples that are integers or single numbers, and query samples of another shape than support samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import oracle
from tests.engine.pytree_models import GENERAL, QUERY, RATE, STEPS, SUPPORT, TASKS, Net, randn, right, squared


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


def test_several_ids_a_sample() -> None:
    maml = FusedMAML(words().append(nn.Flatten()), RATE, STEPS, backend="fused")
    labels = (torch.randint(6, (TASKS, n)) for n in (SUPPORT, QUERY))
    right(maml, (ids(SUPPORT, 2), next(labels), ids(QUERY, 2), next(labels)), "cross_entropy")


def test_numbers_as_samples() -> None:
    model = Net(lambda m, x: m.h(x[:, None]), features=1)
    data = randn(TASKS, SUPPORT), randn(TASKS, SUPPORT, 2), randn(TASKS, QUERY), randn(TASKS, QUERY, 2)
    right(FusedMAML(model, RATE, STEPS, loss="mse", backend="reference"), data, "mse")
    with pytest.warns(UserWarning, match="general path.*because samples are numbers without axes"):
        right(FusedMAML(model, RATE, STEPS, loss=squared), data, squared)
    model.of = lambda m, x: m.h(x.view(-1, 1))  # it can be fused, for samples of one feature
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
    """Without the axis of tasks, x [samples, features] could be read as tasks of scalar samples: it is refused."""
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
    """A model for signals of any length."""

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
    """A plan has one sample shape: such a call runs on the general path with a warning; the next one is fused."""
    maml = FusedMAML(Signals(), RATE, STEPS)
    data = signals(8, 11)
    with pytest.warns(UserWarning, match=r"general path.*samples are of shape \[2, 8\] and \[2, 11\]"):
        out = maml(*data)
    assert maml.backend == "reference"
    right(maml, data, "cross_entropy")  # building blocks get one set at a time, and are fused
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
