"""Models that read at indices: embeddings, integer inputs, gather, scatter, sort. The right values come from the
oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import relative_errors, run

pytestmark = pytest.mark.usefixtures("one_thread")


class Function(nn.Module):
    """forward(self, x), with some parameters and tables of indices."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = forward
        self.a, self.w = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5, 5))
        self.b = nn.Parameter(torch.randn(5))
        self.register_buffer("index", torch.tensor([[2, 0], [2, 1]]))
        self.register_buffer("pairs", torch.tensor([0, 3, 3, 4]))
        self.register_buffer("from_the_end", torch.tensor([-1, 0, -5, -1]))
        self.register_buffer("first", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def hidden(m: Function, x: Tensor) -> Tensor:
    """[n, 3, 5]"""
    return torch.tanh(x[:, :3, None] * m.a + x[:, :1, None] * m.b @ m.w)


def check(
    model: nn.Module, x: tuple[Tensor, Tensor], tolerance: float = 1e-9, loss: Any = "mse", steps: int = 2,
    adapted: list[str] | None = None,
) -> FusedMAML:  # fmt: skip
    """Compares a fused meta-step on support and query inputs [tasks, n, ...] with the oracle in float64."""
    generator, dtype = torch.Generator().manual_seed(2), next(model.parameters()).dtype
    data = []
    for each in x:
        shape = each.shape[:2] + model(each[0]).shape[1:]
        data += [each, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)]
    maml = FusedMAML(model, 0.05, steps, loss=loss, backend="fused", adapt_params=adapted)
    value, grads = run(maml, data)
    double = [t.double() if t.is_floating_point() else t for t in data]
    expected_value, expected = oracle.meta_gradient(model.double(), loss, *double, 0.05, steps, False, adapted)
    assert abs(value.item() - expected_value.item()) <= tolerance * max(1, abs(expected_value.item()))
    worst = max(relative_errors({name: grads[name].double() for name in expected}, expected).values())
    assert worst <= tolerance
    assert not any(grads[name].any() for name in grads.keys() - expected.keys())
    return maml


def floats(*sample: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(2, n, *sample, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 3))
    return support, query


def integers(high: int, *sample: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randint(high, (2, n, *sample), generator=generator) for n in (4, 3))
    return support, query


SELECTIONS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "index of a parameter by a buffer": lambda m, x: hidden(m, x)[:, 0] * m.w[m.index].sum((0, 1)),
    "index of a value by a buffer": lambda m, x: hidden(m, x)[:, m.index],
    "index of the last axis": lambda m, x: hidden(m, x)[..., m.pairs],
    "negative indices": lambda m, x: hidden(m, x)[:, :, m.from_the_end],
    "two indices": lambda m, x: hidden(m, x)[:, [0, 2, 2], [4, 0, 0]],
    "two indices that are broadcast": lambda m, x: hidden(m, x)[:, m.index, m.pairs[:2]],
    "index_select": lambda m, x: hidden(m, x).index_select(2, m.pairs),
    "index_select of one element": lambda m, x: hidden(m, x)[:, :1].index_select(1, m.first),
    "gather": lambda m, x: hidden(m, x).gather(1, m.index.unsqueeze(0).expand(len(x), 2, 2)),
    "gather of a part": lambda m, x: hidden(m, x).permute(0, 2, 1).gather(1, m.pairs[:2, None].expand(len(x), 2, 1)),
    "take_along_dim": lambda m, x: torch.take_along_dim(hidden(m, x), m.index[None, :, :1], 1),
    "a view as a table": lambda m, x: hidden(m, x).transpose(1, 2)[:, 1:].flip(1)[:, m.index],
    "windows as a table": lambda m, x: hidden(m, x).unfold(2, 3, 1)[:, :, m.index],
    "sorted": lambda m, x: hidden(m, x).sort(-1).values * m.b,
    "sorted in descending order": lambda m, x: hidden(m, x).sort(1, descending=True)[0] * m.b,
    "argsort": lambda m, x: m.b[hidden(m, x)[:, 0].argsort(-1)] * hidden(m, x)[:, 0],
    "topk": lambda m, x: hidden(m, x).topk(2, -1).values.flatten(1),
    "topk smallest": lambda m, x: hidden(m, x).flatten(1).topk(4, largest=False)[0],
    "scatter_add": lambda m, x: torch.zeros(len(x), 4, 5, dtype=x.dtype).scatter_add(
        1, m.index[:, :1].expand(len(x), 2, 5), hidden(m, x)[:, 1:]
    ),
    "scatter of a number": lambda m, x: hidden(m, x).scatter(2, m.index.expand(len(x), 2, 2), 0.5),
    "index_add": lambda m, x: hidden(m, x).index_add(2, m.pairs, hidden(m, x)[..., :4], alpha=0.5),
    "index_put": lambda m, x: hidden(m, x) @ m.w.index_put((m.pairs,), m.w[1:] * m.b, accumulate=True),
    "index_put of several axes": lambda m, x: hidden(m, x) @ m.w.index_put((m.index,), m.b, accumulate=True),
    "index_put of samples": lambda m, x: hidden(m, x) * m.b.index_put(
        (m.pairs.expand(len(x), 4),), hidden(m, x)[:, 0, :4], accumulate=True
    ),
    "index_put at one place": lambda m, x: hidden(m, x) * m.b.index_put((m.pairs[1],), m.b[0], accumulate=True),
    "one_hot of a buffer": lambda m, x: hidden(m, x)[:, 0] @ F.one_hot(m.pairs, 5).to(x.dtype).T,
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str) -> None:
    torch.manual_seed(0)
    check(Function(SELECTIONS[name]).double(), floats(4))


@pytest.mark.parametrize("name", ["index of a value by a buffer", "gather", "sorted", "scatter_add"])
def test_selections_in_float32(name: str) -> None:
    torch.manual_seed(0)
    check(Function(SELECTIONS[name]), floats(4, dtype=torch.float32), tolerance=3e-5)
