"""With fewer tasks than threads, several threads share a task; the bits of the results are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import process_time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_cuda import FusedMAML
from tests import conftest
from tests.conftest import run


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pooled() -> nn.Module:
    """A stem, then convolutions fused with BatchNorm and pool."""
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 36, 3, padding=1), nn.BatchNorm2d(36), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36 * 49, 5),
    )  # fmt: skip


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 33, 3, 2, 1), nn.BatchNorm2d(33), nn.ReLU(), nn.Conv2d(33, 64, 3, 2, 1), nn.BatchNorm2d(64),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def grouped() -> nn.Module:
    """A net with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.GroupNorm(5, 20), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 36, 3, 2, 1), nn.LayerNorm([36, 7, 7]), nn.ReLU(), nn.Flatten(), nn.Linear(36 * 49, 5),
    )  # fmt: skip


class Residual(nn.Module):
    """Layers that are not fused with others: convolutions with bias, overlapping pools, activations, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        x = F.max_pool2d(x + self.norm(F.gelu(self.second(x))), 3, 2, 1)
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 90), nn.Tanh(), nn.Linear(90, 70), nn.Softplus(), nn.Linear(70, 5))


NETS = {pooled: (3, 28, 28), strided: (3, 28, 28), grouped: (3, 28, 28), Residual: (3, 28, 28), mlp: (2,)}


def episode(make, tasks: int, dtype: torch.dtype) -> list[Tensor]:
    n = 300 if make is mlp else 7
    return conftest.episode(NETS[make], tasks=tasks, n=(n, n + 4), classes=5, dtype=dtype)


@pytest.mark.parametrize(
    ("make", "dtype", "tasks"),
    [*((make, torch.float32, tasks) for make in NETS for tasks in (1, 4)), (pooled, torch.float64, 1)],
)
def test_same_bits_for_every_number_of_threads(make, dtype, tasks):
    """Four tasks on three threads leave one task to be shared."""
    data = episode(make, tasks, dtype)
    model = make().to(dtype)
    rate = nn.Parameter(torch.tensor(0.1))
    maml = FusedMAML(model, rate, 2, backend="fused")
    torch.set_num_threads(1)
    loss, grads = run(maml, data)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        other_loss, others = run(maml, data)
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(grads[name], others[name]) for name in grads)


def ticks(task: Path) -> int:
    """CPU time of a thread, in 1/100 s."""
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_share_a_task_as_torch_is_told(threads):
    """In a worker of a DataLoader, where torch has one thread, one thread runs."""
    maml = FusedMAML(pooled(), 0.1, 5, backend="fused")
    data = episode(pooled, 1, torch.float32)
    torch.set_num_threads(threads)
    maml(*data)
    tasks = Path("/proc/self/task")
    before = {t.name: ticks(t) for t in tasks.iterdir()}
    begin = process_time()
    while process_time() < begin + 0.5:
        maml(*data)
    worked = {t.name: ticks(t) - before.get(t.name, 0) for t in tasks.iterdir()}
    assert sum(spent > 5 for spent in worked.values()) == threads, worked
