"""Attention in a model becomes one layer, however it is written; what is not quite attention stays as it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.capture.capture import capture
from maml_cuda.plan.reader import graph_of
from tests.plan.small_models import CLASSES, Net, episode, fused_is_right, made, weight

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WIDTH, HEADS = 5, 8, 2
SAMPLE = (TOKENS, 3)
BELOW = torch.ones(TOKENS, TOKENS).tril()


def kinds(model: nn.Module, sample: tuple[int, ...] = SAMPLE) -> Counter[str]:
    """How many nodes of each kind the graph of a model has."""
    record = capture(model, torch.zeros(3, *sample, dtype=torch.float64)).record
    return Counter(node.kind for node in graph_of(model, record).nodes)


def tokens(run: Callable[[Any, Tensor], Tensor], **parts: Any) -> Net:
    """A Net that maps tokens [n, TOKENS, WIDTH] to tokens, between two linear layers."""
    first, last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
    return Net(lambda m, x: m.last(run(m, m.first(x)).mean(1)), first=first, last=last, **parts)


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def of_projection(attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor], **parts: Any) -> Callable[[], Net]:
    """attend(m, q, k, v) on the heads of one projection."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        y = merged(attend(m, heads(q), heads(k), heads(v)))
        return y.unflatten(2, (-1, WIDTH)).mean(2)

    return lambda: tokens(run, qkv=nn.Linear(WIDTH, 3 * WIDTH), **{k: make() for k, make in parts.items()})


def by_hand(change: Callable[[Any, Tensor], Tensor] = lambda m, s: s, **parts: Any) -> Callable[[], Net]:
    """softmax of changed scores, times the values."""

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return change(m, q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v

    return of_projection(attend, **parts)


def by_torch(**given: Any) -> Callable[[], Net]:
    return of_projection(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **given))


def with_einsum(m: Any, x: Tensor) -> Tensor:
    """Several heads of queries with one of keys and values (Shazeer 2019, arXiv 1911.02150)."""
    q, (k, v) = m.q(x).unflatten(-1, (HEADS, -1)), m.kv(x).chunk(2, -1)
    weights = (torch.einsum("nlhd,nmd->nhlm", q, k) * 0.5).softmax(-1)
    return torch.einsum("nhlm,nmd->nlhd", weights, v).flatten(2)


def grouped(m: Any, x: Tensor) -> Tensor:
    """Each of two heads of keys and values serves two of queries (Ainslie et al. 2023, arXiv 2305.13245)."""
    q, (k, v) = heads(m.q(x), 4), m.kv(x).chunk(2, -1)
    k, v = (heads(t, 2).unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
    return merged(F.scaled_dot_product_attention(q, k, v))


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "TransformerEncoderLayer": lambda: tokens(
        lambda m, x: m.block(x), block=nn.TransformerEncoderLayer(WIDTH, HEADS, 6, 0.0, batch_first=True)
    ),
    "MultiheadAttention": lambda: tokens(
        lambda m, x: m.layer(x, x, x, need_weights=False)[0],
        layer=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    ),
    "MultiheadAttention with a mask": lambda: tokens(
        lambda m, x: m.layer(x, x, x, need_weights=False, attn_mask=BELOW == 0)[0],
        layer=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    ),
    "scaled_dot_product_attention": by_torch(),
    "causal": by_torch(is_causal=True),
    "with a scale": by_torch(scale=0.3),
    "a boolean mask": by_torch(attn_mask=BELOW > 0),
    "an added mask": by_torch(attn_mask=BELOW.double().log()),
    "a row that is masked out": by_torch(attn_mask=BELOW.roll(1, 0).tril(-1) > 0),
    "a learned bias": of_projection(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias),
        bias=lambda: weight(HEADS, TOKENS, TOKENS),
    ),
    "by hand": by_hand(),
    "by hand, causal": by_hand(lambda m, s: s.masked_fill(BELOW == 0, -math.inf)),
    "by hand, where": by_hand(lambda m, s: torch.where(BELOW > 0, s, -math.inf)),
    "by hand, with a bias": by_hand(lambda m, s: m.bias + s, bias=lambda: weight(HEADS, TOKENS, TOKENS)),
    "by hand, with a bias of distances": by_hand(
        lambda m, s: s + torch.tanh(m.slope).view(HEADS, 1, 1) * torch.arange(TOKENS).sub(2.0),
        slope=lambda: weight(HEADS),
    ),
    "by hand, causal with a bias": by_hand(
        lambda m, s: (s + m.bias).masked_fill(BELOW == 0, -math.inf) * 1.5, bias=lambda: weight(TOKENS, TOKENS)
    ),
    "shared keys": lambda: tokens(with_einsum, q=nn.Linear(WIDTH, WIDTH), kv=nn.Linear(WIDTH, WIDTH)),
    "groups of heads": lambda: tokens(grouped, q=nn.Linear(WIDTH, WIDTH), kv=nn.Linear(WIDTH, WIDTH)),
    "learned queries": lambda: tokens(
        lambda m, x: F.scaled_dot_product_attention(m.queries.expand(len(x), -1, -1), m.keys(x), x),
        queries=weight(3, WIDTH),
        keys=nn.Linear(WIDTH, WIDTH),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_one_layer(name):
    model = made(ATTENTION[name])
    found = kinds(model)
    assert found["attention"] == 1
    assert not found.keys() & {"softmax", "contract", "extreme", "move"}
    fused_is_right(model, episode(SAMPLE))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeated": lambda y: y.repeat(1, 1, 2, 1),
    "a part": lambda y: F.pad(y[:, :, 1:], (0, 0, 1, 0)),
    "twice": lambda y: torch.cat([y, y.flip(3)], 1),
    "backwards": lambda y: y.flip(2).transpose(1, 2).contiguous().reshape(len(y), TOKENS, HEADS, -1).transpose(1, 2),
    "padded": lambda y: F.pad(y, (0, 0, 0, 2)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_result(name):
    """Some of them are not made, because the layer writes its result where the copy would be."""
    size = WIDTH // HEADS
    attend = of_projection(
        lambda m, q, k, v: m.out(COPIES[name](F.scaled_dot_product_attention(q, k, v))),
        out=lambda: nn.Linear(size, size),
    )
    model = made(attend)
    assert kinds(model)["attention"] == 1
    fused_is_right(model, episode(SAMPLE))


def test_one_layer_a_block():
    blocks = [nn.TransformerEncoderLayer(WIDTH, HEADS, 6, 0.0, batch_first=True) for _ in range(3)]
    model = made(lambda: tokens(lambda m, x: m.blocks(x), blocks=nn.Sequential(*blocks)))
    assert kinds(model)["attention"] == 3


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "weights that are read twice": of_projection(
        lambda m, q, k, v: (w := (q @ k.transpose(-2, -1)).softmax(-1)) @ v + w.sum(-1, keepdim=True) * w[..., :1]
    ),
    "a finite number for what is masked": by_hand(lambda m, s: s.masked_fill(BELOW == 0, -1.0)),
    "a learned temperature": by_hand(lambda m, s: s * m.scale, scale=lambda: weight(1)),
    "a curved function of the scores": by_hand(lambda m, s: torch.tanh(s)),
    "scores that a linear layer computes": lambda: tokens(
        lambda m, x: (m.queries @ m.keys(x).transpose(1, 2)).softmax(-1) @ x,
        queries=weight(3, WIDTH),
        keys=nn.Linear(WIDTH, WIDTH),
    ),
    "softmax over the queries": of_projection(lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-2) @ v),
    "the transpose of the weights": of_projection(
        lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_attention(name):
    model = made(OTHERS[name])
    assert kinds(model)["attention"] == 0
    fused_is_right(model, episode(SAMPLE))


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    """Of two models with the same parameters, the one whose weights are read again stores them."""

    def bytes_of(model: nn.Module, length: int) -> int:
        data = [torch.zeros(2, 4, length, 3, dtype=torch.float64)] * 2
        return FusedMAML(model, 0.1, 3, backend="fused").memory_estimate(*data)

    one, several = (made(make[name]) for make, name in ((ATTENTION, "by hand"), (OTHERS, next(iter(OTHERS)))))
    short, long = (bytes_of(one, length) for length in (64, 256))
    assert long < 5 * short
    assert 5 * long < bytes_of(several, 256)
