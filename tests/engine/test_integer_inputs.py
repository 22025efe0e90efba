"""Models whose input is a tensor of integers. The right values come from the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import run
from tests.engine.test_indexing import check, integers

pytestmark = pytest.mark.usefixtures("one_thread")


class Tokens(nn.Module):
    """A language model: positions, a mask of token 0, and the embedding's weight as that of the last layer."""

    def __init__(self, tied: bool = True, padding: int | None = None) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6, padding_idx=padding), nn.Embedding(5, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        mask = (x[:, None, :] != 0).to(h.dtype)
        h = self.block(h) + mask @ h / 5
        return self.head(h).mean(1)


class Factors(nn.Module):
    """A row of ids and of numbers: embeddings of a user and a film of which one is frozen, and indicators."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.film, self.last = nn.Embedding(4, 3), nn.Embedding(9, 3), nn.Linear(6, 2)
        self.film.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        user, film, kind = self.user(x[:, 0]), self.film(x[:, 1]), F.one_hot(x[:, 2], 3).to(self.last.weight.dtype)
        return self.last(torch.cat([user * film, kind * x[:, 3:4]], 1))


class Function(nn.Module):
    """A function of x and two parameters; the result depends on both."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = forward
        self.table, self.b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4))
        self.register_buffer("flags", torch.tensor([1, 0, 1, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x) + torch.sin(self.table.sum() * self.b.sum())


def rows_of_factors(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    columns = [torch.randint(high, (2, samples, 1), generator=generator) for high in (4, 9, 3, 100)]
    return torch.cat(columns, -1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, 0, -2])
def test_tokens(tied, padding):
    torch.manual_seed(0)
    check(Tokens(tied, padding).double(), integers(7, 5))


def test_tokens_of_float32_and_int32():
    torch.manual_seed(0)
    support, query = integers(7, 5)
    check(Tokens(), (support.int(), query.int()), tolerance=3e-5)


def test_adapted_and_shared_tables():
    torch.manual_seed(0)
    check(Tokens(False).double(), integers(7, 5), adapted=["head.weight", "block.linear1.weight"])
    check(Tokens(False).double(), integers(7, 5), adapted=["tokens.weight"])


def test_ids_and_numbers():
    torch.manual_seed(0)
    check(Factors().double(), (rows_of_factors(4), rows_of_factors(3)))


@pytest.mark.parametrize("forward", {
    "rows": lambda m, x: m.table[x].sum(1),
    "indices of axes": lambda m, x: m.table[x[:, 0], x[:, 1].clamp(max=3)][:, None] * m.b,
    "comparisons": lambda m, x: torch.where(x > 2, x, -x) * m.b,
    "counts": lambda m, x: (x == 1).sum(1, keepdim=True) * m.b,
    "bags": lambda m, x: torch.zeros(len(x), 5, dtype=m.b.dtype).scatter_add(1, x, m.b.expand(len(x), 4)),
    "a number at indices": lambda m, x: torch.zeros(len(x), 5, dtype=m.b.dtype).scatter(1, x, 1.0) @ m.table,
    "bools": lambda m, x: x.bool() * m.b,
}.values())  # fmt: skip
def test_operations(forward):
    torch.manual_seed(0)
    check(Function(forward).double(), integers(5, 4))


def maml_of(model: nn.Module, **options: object) -> FusedMAML:
    return FusedMAML(model, 0.1, backend="fused", loss="mse", **options)


def test_a_mask_is_an_input():
    torch.manual_seed(0)
    support, query = integers(2, 4)
    check(Function(lambda m, x: torch.where(x, m.b, 0.0) @ m.table.T).double(), (support.bool(), query.bool()))


@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("name", ["x_spt", "x_qry"])
def test_an_index_outside_of_its_table(wrong, name):
    torch.manual_seed(0)
    data = dict(zip(("x_spt", "x_qry"), integers(7, 5), strict=True))
    targets = {f"y_{key[2:]}": torch.randn(2, x.shape[1], 7) for key, x in data.items()}
    maml = maml_of(Tokens())
    maml(**data, **targets)
    data[name][1, 2, 3] = wrong
    text = f"{name} must hold indices in [0, 7), got {wrong} (task 1, sample 2)"
    with pytest.raises(ValueError, match=re.escape(text)):
        maml(**data, **targets)
    with pytest.raises(ValueError, match=re.escape("x_spt must hold indices in [0, 7)")):
        maml.adapt(torch.full((2, 3, 5), wrong), torch.randn(2, 3, 7))


def test_building_blocks():
    torch.manual_seed(0)
    maml, plain = maml_of(Tokens().double()), FusedMAML(Tokens().double(), 0.1, backend="reference", loss="mse")
    plain.model.load_state_dict(maml.model.state_dict())
    x, _ = integers(7, 5)
    y = torch.randn(2, 4, 7, dtype=torch.float64)
    fast, expected = (m.adapt(x, y, steps=2) for m in (maml, plain))
    for name in expected:
        torch.testing.assert_close(fast[name], expected[name])
    v = {name: torch.randn_like(p) for name, p in fast.items()}
    calls = (
        lambda m: m.predict(fast, x),
        lambda m: m.loss_and_grad(fast, x, y)[1],
        lambda m: m.hvp(fast, x, y, v),
        lambda m: list(m.inner_loop(x, y, steps=1))[-1],
    )
    for call in calls:
        torch.testing.assert_close(call(maml), call(plain))
    assert maml.memory_estimate(x, x) > 0


def test_integers_that_are_too_large():
    """16777217 is no number of float32; as one of float64 it is right."""
    torch.manual_seed(0)
    model = Function(lambda m, x: (x == 16777217) * m.b)
    x = torch.full((2, 3, 1), 16777217)
    y = torch.zeros(2, 3, 4)
    text = (
        "x_spt must hold integers of at most 16777216, up to which torch.float32 has all, got 16777217 "
        '(task 0, sample 0); backend="reference" takes larger ones'
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        maml_of(model)(x, y, x, y)
    check(model.double(), (x, x))


@pytest.mark.parametrize(("forward", "reason"), [
    (lambda m, x: m.table[x + 1].sum(1), "arithmetic on the integers of x is not fused (add)"),
    (lambda m, x: m.table[x % 5].sum(1), "arithmetic on the integers of x is not fused (remainder)"),
    (lambda m, x: (m.b[:2] * 3).to(torch.int64)[x], "a conversion of torch.float32 to torch.int64 is not fused"),
    (lambda m, x: x.to(torch.int8) * m.b, "a conversion of torch.int64 to torch.int8 is not fused"),
    (lambda m, x: -x.to(torch.int32) * m.b, "arithmetic on the integers of x is not fused (neg)"),
    (lambda m, x: m.b * ((x > 1) + (x > 2)), "arithmetic on masks whose result is a mask is not fused (add)"),
    (lambda m, x: m.b * ((x > 1).to(torch.uint8) * 200), "arithmetic in torch.uint8 is not fused (mul)"),
    (lambda m, x: m.b * ((x > 1).long() * 2**60 - 2**60), f"arithmetic of integers with {2**60} is not fused (mul)"),
    (lambda m, x: m.b * (m.flags & 6) * x, "arithmetic on the bits of integers is not fused (bitwise_and)"),
    (lambda m, x: m.b * (m.flags | x), "arithmetic on the bits of integers is not fused (bitwise_or)"),
    (lambda m, x: m.b * ~x, "arithmetic on the bits of integers is not fused (bitwise_not)"),
    (lambda m, x: F.embedding(x, m.table, max_norm=1.0).sum(1), "it changes table in place"),
    (lambda m, x: F.embedding(x, m.table, scale_grad_by_freq=True).sum(1), "scale_grad_by_freq=True is not fused"),
    (lambda m, x: F.embedding(x, m.table, sparse=True).sum(1), "sparse=True is not fused"),
    (lambda m, x: m.table[x].sum(1).scatter(1, x, m.table[x].sum(1)), "a scatter of a tensor is not fused"),
    (lambda m, x: (m.table[x].sum(1) * x.to(torch.float16)).to(m.b.dtype), "it computes in torch.float16"),
])  # fmt: skip
def test_what_is_refused(forward, reason):
    x, y = torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=re.escape(reason)):
        maml_of(Function(forward))(x, y, x, y)


class Rated(nn.Module):
    """Numbers of a user, the ids of films and a mask, as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.film, self.last = nn.Embedding(6, 3), nn.Linear(3, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.last((self.film(x["films"]) * x["mask"].unsqueeze(-1)).sum(1) * x["user"])


def rated(samples: int, tasks: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return {
        "films": torch.randint(6, (tasks, samples, 4), generator=generator),
        "mask": torch.rand(tasks, samples, 4, generator=generator) < 0.5,
        "user": torch.randn(tasks, samples, 3, generator=generator, dtype=torch.float64),
    }


def test_integers_among_several_inputs():
    torch.manual_seed(0)
    model, (x_spt, x_qry) = Rated().double(), (rated(4), rated(3))
    data = x_spt, torch.randn(2, 4, 2, dtype=torch.float64), x_qry, torch.randn(2, 3, 2, dtype=torch.float64)
    maml = maml_of(model)
    value, grads = run(maml, data)
    expected_value, expected = oracle.meta_gradient(model, "mse", *data, 0.1, 1, False)
    torch.testing.assert_close(value, expected_value)
    for name, e in expected.items():
        torch.testing.assert_close(grads[name], e)
    x_qry["films"][0, 1, 2] = 6
    text = "x_qry['films'] must hold indices in [0, 6), got 6 (task 0, sample 1)"
    with pytest.raises(ValueError, match=re.escape(text)):
        run(maml, data)


def test_one_id_a_sample():
    """x [tasks, samples]"""
    torch.manual_seed(0)
    check(nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 2)).double(), integers(5))


def test_compiled(compiled):
    torch.manual_seed(0)
    x, y = rows_of_factors(4), torch.randn(2, 4, 2, dtype=torch.float64)
    maml = maml_of(Factors().double())
    losses = [call(maml)(x, y, x, y).loss for call in (lambda maml: maml, compiled)]
    assert torch.equal(*losses)
    x[0, 0, 1] = 9
    with pytest.raises(ValueError, match=re.escape("x_spt must hold indices in [0, 9), got 9 (task 0, sample 0)")):
        compiled(maml)(x, y, x, y)


def test_tiles_of_samples_and_threads():
    """More samples than go through the layers at once; the sums of rows have the same bits for any threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 70), nn.Flatten(), nn.Linear(420, 3)).double()
    x, y = torch.randint(5, (1, 150, 6)), torch.randn(1, 150, 3, dtype=torch.float64)
    check(model, (x, x[:, :3]), steps=1)
    maml = maml_of(model)
    gradients = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gradients.append(run(maml, [x, y, x, y])[1])
    assert all(torch.equal(g, gradients[0][name]) for other in gradients[1:] for name, g in other.items())
