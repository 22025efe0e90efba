"""Models on tensors of any shape in every way of running a call: in tiles of samples, with states that are computed
again, on several threads, and in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import conftest
from tests.conftest import check_meta_gradient, run


class Tokens(nn.Module):
    """A block of a transformer with learned positions and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((5, 5), -torch.inf, dtype=x.dtype).triu(1)
        return self.head(self.block(self.embed(x) + self.positions, src_mask=mask).mean(1))


class Modulated(nn.Module):
    """A field whose features a parameter scales, with a normalised weight and a frozen buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(6, 3)
        self.scale, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(6, 8))
        self.g = nn.Parameter(torch.randn(6, 1))
        self.register_buffer("mask", torch.tensor([True, False, True, True, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) * (1 + self.scale))
        weight = self.v * (self.g / self.v.norm(dim=1, keepdim=True))
        h = torch.sin(F.linear(h, weight))
        return self.last(torch.where(self.mask, h, h.abs().sqrt()))


SAMPLES = {Tokens: (5, 6), Modulated: (4,)}


def made(make: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def episode(make: type[nn.Module], n: tuple[int, int], tasks: int = 2) -> list[Tensor]:
    return conftest.episode(SAMPLES[make], tasks=tasks, n=n, classes=3)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("n", [(1, 3), (3, 1), (6, 6)])
@pytest.mark.parametrize("make", SAMPLES)
def test_meta_gradient(make, n):
    check_meta_gradient(made(make), "cross_entropy", episode(make, n), 0.1, 2, tolerance=1e-9)


@pytest.mark.parametrize("n", [(127, 129), (300, 128)])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("make", SAMPLES)
def test_tiles_of_samples(make, n, first_order):
    """What belongs to the task, as the normalised weight, is the same for all tiles."""
    data = episode(make, n)
    check_meta_gradient(made(make), "cross_entropy", data, 0.1, 2, tolerance=1e-9, first_order=first_order)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("make", SAMPLES)
def test_recomputed_states_change_no_bit(make):
    data, model = episode(make, (4, 6)), made(make)
    keeps, recomputes = (FusedMAML(model, 0.1, 3, checkpoint=c, backend="fused") for c in (None, "recompute"))
    (loss, grads), (other, again) = (run(maml, data) for maml in (keeps, recomputes))
    assert torch.equal(loss, other)
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    kept, less = (maml.memory_estimate(data[0], data[2]) for maml in (keeps, recomputes))
    assert less < kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("make", SAMPLES)
def test_threads_change_no_bit(make, tasks, dtype):
    data = [t.to(dtype) if t.is_floating_point() else t for t in episode(make, (70, 90), tasks)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(FusedMAML(made(make, dtype), 0.1, 2, backend="fused"), data))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in grads)
