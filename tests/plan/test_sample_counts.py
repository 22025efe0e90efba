"""Numbers of samples in losses and models: support set and query set have each its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from maml_cuda.capture.record import Operand, Operation, Record
from maml_cuda.plan.graph import SampleCount
from maml_cuda.plan.sample_counts import counted
from tests.conftest import check_meta_gradient
from tests.plan.small_models import computed_is_right
from tests.plan.test_computed_losses import FEATURES, RATE, STEPS, TASKS, data_of, mlp, values

pytestmark = pytest.mark.usefixtures("one_thread")


class Centred(nn.Module):
    """Subtracts the mean of the samples, by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(4, 8), nn.Linear(8, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x).tanh()
        return self.outside(h - h.sum(0) / len(x))


@pytest.mark.parametrize("sizes", [(5, 7), (7, 2), (1, 3), (3, 1), (4, 4)], ids=str)
def test_each_set_has_its_own_number_of_samples(sizes: tuple[int, int]) -> None:
    data = [t for n in sizes for t in (torch.randn(TASKS, n, 4).double(), values(n))]
    for model in (mlp(), Centred().double()):
        computed_is_right(model, data, lambda p, y: 3 * (p - y).abs().sum() / len(p) + len(y) ** 2 * p.mean(), RATE)


def test_the_number_of_samples_in_a_model_with_a_loss_of_ours() -> None:
    check_meta_gradient(Centred().double(), "mse", data_of(values), RATE, STEPS)


# -- which numbers follow from n ------------------------------------------------------------------------------------


def record(n: int, number: float, name: str = "div") -> Record:
    x = Operand((n, 3), torch.float64, "x")
    return Record((x,), [Operation(name, (x, number), {}, "", "", "", [Operand((n, 3), torch.float64)])], None)


def number_of(given: Record) -> object:
    return given.operations[0].args[1]


@pytest.mark.parametrize(
    ("of", "count"),
    [
        (lambda n: n, SampleCount(1.0, 0, 1.0)),
        (lambda n: 1 / n, SampleCount(1.0, 0, -1.0)),
        (lambda n: 0.3 * n**2, SampleCount(0.3, 0, 2.0)),
        (lambda n: n**-0.5, SampleCount(1.0, 0, -0.5)),
        (lambda n: 2 * (n - 1), SampleCount(2.0, -1, 1.0)),
    ],
)
def test_a_number_that_follows(of, count):
    found = {number_of(r) for r in counted([record(4, of(4)), record(9, of(9))])}
    assert len(found) == 1
    (got,) = found
    assert (got.offset, got.power) == (count.offset, count.power)
    assert got.factor == pytest.approx(count.factor, rel=1e-12)


@pytest.mark.parametrize(
    "records",
    [
        [record(4, 2.0), record(9, 2.0)],  # the same number
        [record(4, 4.0), record(4, 4.0)],  # the same size
        [record(4, 0.0), record(9, 1.0)],
        [record(4, 7.0), record(9, 12.0)],  # n + 3
        [record(4, 4, "view"), record(9, 9, "view")],  # a size
        [record(4, 4), replace(record(9, 9), operations=[])],
    ],
)
def test_other_numbers_stay(records):
    assert [list(map(str, r.operations)) for r in counted(records)] == [list(map(str, r.operations)) for r in records]
