"""Operations on tensors of any shape: each gives the gradients of the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from maml_cuda import FusedMAML
from tests import conftest
from tests.plan.small_models import (
    CLASSES,
    IMAGE,
    Net,
    around,
    between,
    conv,
    dense,
    episode,
    fused_is_right,
    made,
    normed,
    pooled,
    weight,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Between two linear layers, on [n, 5].
EXPRESSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number added": lambda h: h + 1,
    "a number less a value": lambda h: 1 - h,
    "a square": lambda h: h * h,
    "a power": lambda h: h**3,
    "a quotient": lambda h: h / (1 + h * h),
    "True": lambda h: h * True,
    "a number made in forward": lambda h: h * torch.ones(()),
    "numbers made in forward": lambda h: h + torch.ones(5),
    "numbers in another dtype": lambda h: h * torch.arange(5),
    "numbers in an expansion": lambda h: h + torch.ones(5).double().expand(len(h), 5),
    "softmax": lambda h: h.softmax(-1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "logsumexp": lambda h: h - h.logsumexp(-1, keepdim=True),
    "logsumexp transposed": lambda h: h - h.logsumexp(-1, keepdim=True).t().t(),
    "logsumexp repeated": lambda h: h - h.logsumexp(-1, keepdim=True)[:, :1].repeat(1, 5),
    "a mask": lambda h: h * (h > 0),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "clamp": lambda h: h.clamp(-0.5, 0.5),
    "clamp to a tensor": lambda h: h.clamp(h.mean(0)),
    "a norm": lambda h: h / h.norm(dim=1, keepdim=True),
    "the 1-norm": lambda h: h / h.norm(1, dim=1, keepdim=True),
    "standardised": lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True),
    "the largest": lambda h: h - h.max(1, keepdim=True)[0],
    "a slice": lambda h: h[:, 1:4].sum(1, keepdim=True) + h,
    "one feature": lambda h: h[:, 2:3] * h,
    "selected": lambda h: h[:, 2].unsqueeze(1) * h,
    "backwards": lambda h: h.flip(1),
    "gated": lambda h: F.glu(torch.cat([h, h.sin()], 1), 1),
    "soft shrink": lambda h: F.softshrink(h, 0.3) + h,
    "hard shrink": lambda h: F.hardshrink(h, 0.3) + h,
    "threshold": lambda h: F.threshold(h, 0.1, -2.0) + h,
    "leaky in eval mode": lambda h: F.rrelu(h, 0.1, 0.4),
    "tangent": lambda h: (h / 2).sin().tan(),
    "atanh": lambda h: (h.sin() / 2).atanh(),
    "logit": lambda h: torch.logit(h.sigmoid(), 0.4),
    "logarithms": lambda h: (1 + h.abs()).log2() + (1 + h.abs()).log10(),
    "logaddexp": lambda h: torch.logaddexp(h, -3 * h),
    "hypot": lambda h: torch.hypot(h, h + 1) * torch.sgn(h),
    "no NaN": lambda h: torch.where(h.isnan(), 0.0, h),
    "the largest of all": lambda h: h / h.norm(float("inf"), dim=1, keepdim=True),
    "a product so far": lambda h: h.cumprod(1),
    "the sum so far": lambda h: h.cumsum(1),
    "rolled": lambda h: h.roll(2, 1),
    "split": lambda h: torch.cat(h.split([1, 4], 1)[::-1], 1),
    "stacked": lambda h: torch.stack([h, h.sin()], 1).flatten(1)[:, 2:7],
    "padded": lambda h: F.pad(h, (2, -2)),
    "padded with a number": lambda h: F.pad(h, (2, -2), value=0.5),
    "transposed twice": lambda h: (h.t() * torch.arange(5)[:, None]).t(),
    "in one axis with the samples": lambda h: (h.reshape(-1) * 2).view(len(h), 5),
    "an expansion over the samples": lambda h: h.unsqueeze(0).expand(3, len(h), 5).mean(0),
    "the mean of an expansion": lambda h: h.unsqueeze(2).expand(len(h), 5, 3).mean(2),
    "the mean of an expansion and more": lambda h: h - h.unsqueeze(2).expand(len(h), 5, 3).mean((1, 2)).unsqueeze(1),
    "less the mean over the samples": lambda h: h - h.mean(0),
    "less the largest of the samples": lambda h: h - h.amax(0),
    "times the sum of all": lambda h: h * h.sum(),
    "the Gram matrix of the features": lambda h: h @ torch.einsum("ni,nj->ij", h, h),
}
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "the number of samples": lambda: dense(lambda m, x: m.c(m.a(x) + m.b(x)) * len(x)),
    "deviation of samples": lambda: between(lambda h: h / h.std(0) + h.var((0, 1), correction=0)),
    "RMSNorm": lambda: around(nn.RMSNorm(5)),
    "Softmax": lambda: around(nn.Softmax(1)),
    "PReLU": lambda: around(nn.PReLU()),
    "a subclass of ReLU": lambda: around(Squared()),
    "a parameter added": lambda: dense(lambda m, x: m.c(m.a(x) + m.d + m.b(x)), d=weight(5)),
    "a weight transposed": lambda: dense(lambda m, x: m.c(F.linear(x, m.w.t()) + m.a(x) + m.b(x)), w=weight(3, 5)),
    "a computed weight": lambda: dense(lambda m, x: m.c(F.linear(m.a(x) + m.b(x), m.w.outer(m.w))), w=weight(5)),
    "a part of a weight": lambda: dense(lambda m, x: m.c((m.a(x) + m.b(x)) @ m.w.tril()), w=weight(5, 5)),
    "a product by einsum": lambda: dense(
        lambda m, x: m.c(torch.einsum("ni,ij->nj", m.a(x) + m.b(x), m.w)), w=weight(5, 5)
    ),
    "one number as bias": lambda: dense(
        lambda m, x: m.c(F.linear(m.a(x) + m.b(x), m.w, m.d)), w=weight(5, 5), d=weight()
    ),
    "a bias of one element": lambda: dense(
        lambda m, x: m.c(F.linear(m.a(x) + m.b(x), m.w, m.d)), w=weight(5, 5), d=weight(1)
    ),
    "a column added": lambda: dense(lambda m, x: m.c(m.a(x) + m.b(x) + m.s(x)), s=nn.Linear(3, 1)),
    "weight norm": normed(parametrizations.weight_norm),
    "old weight norm": normed(nn.utils.weight_norm),
    "detach": lambda: dense(lambda m, x: m.c(m.a(x) + m.b(x)) + m.c(m.a(x)).detach()),
    "no_grad": lambda: dense(lambda m, x: m.c(m.a(x) * without_gradients(m.a(x)) + m.b(x))),
}  # fmt: skip
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "a permutation": lambda: conv(lambda m, x: m.c(m.a(x).permute(0, 2, 3, 1).flatten(1)), 126),
    "the mean over channels": lambda: conv(lambda m, x: m.c(m.a(x).mean(1).flatten(1)), 42),
    "the mean over the width": lambda: conv(lambda m, x: m.c(m.a(x).mean(-1).flatten(1)), 21),
    "the mean over all axes": lambda: conv(lambda m, x: m.c(m.a(x).mean((1, 2, 3)).view(-1, 1)), 1),
    "LayerNorm over the width": lambda: pooled(nn.LayerNorm(6), 126),
    "LayerNorm over height and width": lambda: pooled(nn.LayerNorm([7, 6]), 126),
    "a pool, one number": lambda: conv(lambda m, x: m.c(F.max_pool2d(m.a(x), 3, (), (1,)).flatten(1)), 18),
    "a dilated pool, one number": lambda: conv(
        lambda m, x: m.c(F.max_pool2d(m.a(x), (2,), (), 0, (2,)).flatten(1)), 18
    ),
    "a mean pool, one number": lambda: conv(
        lambda m, x: m.c(F.avg_pool2d(m.a(x), (2,), (), (1,), divisor_override=3).flatten(1)), 48
    ),
    "a convolution, one number": lambda: conv(
        lambda m, x: m.c(F.conv2d(m.a(x), m.w, padding=(1,)).flatten(1)), 84, w=weight(2, 3, 3, 3)
    ),
    "pixels added": lambda: conv(lambda m, x: m.c((m.a(x) + m.p(m.a(x))).flatten(1)), 126, p=nn.AdaptiveAvgPool2d(1)),
    "gates of channels": lambda: conv(
        lambda m, x: m.c((m.a(x) * m.g(m.a(x).mean((2, 3))).sigmoid()[..., None, None]).flatten(1)), 126,
        g=nn.Linear(3, 3),
    ),
    "a part of the pixels": lambda: conv(lambda m, x: m.c(m.a(x)[:, :, 1:-1, ::2].flatten(1)), 45),
    "the last channel": lambda: conv(lambda m, x: m.c(m.a(x)[:, 2:].flatten(1)), 42),
    "a linear layer of the width": lambda: conv(lambda m, x: m.c(m.l(m.a(x)).flatten(1)), 42, l=nn.Linear(6, 2)),
    "padded before a linear layer": lambda: conv(lambda m, x: m.c(F.pad(m.a(x), (1, 0, 0, 2)).flatten(1)), 189),
}  # fmt: skip


class Squared(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.sin()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name: str) -> None:
    fused_is_right(made(lambda: between(EXPRESSIONS[name])), episode())


@pytest.mark.parametrize("name", VECTORS)
def test_on_features(name: str) -> None:
    fused_is_right(made(VECTORS[name]), episode())


@pytest.mark.parametrize("name", IMAGES)
def test_on_images(name: str) -> None:
    fused_is_right(made(IMAGES[name]), episode(IMAGE))


def test_linear_layers_on_rows() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, CLASSES)))
    fused_is_right(model, episode((2, 3)))


@pytest.mark.parametrize("function", [lambda h: h[..., :1].squeeze(-1), lambda h: h[:, 0], lambda h: h.sum(1)])
def test_a_prediction_of_one_number(function: Any) -> None:
    model = made(lambda: Net(lambda m, x: function(torch.tanh(m.a(x))), a=nn.Linear(3, 5)))
    fused_is_right(model, episode(target=()), "mse")


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_as_many_samples_as_features(name: str) -> None:
    """The axis of the samples is told from others of the same size."""
    fused_is_right(made(lambda: between(EXPRESSIONS[name])), conftest.episode((3,), tasks=2, n=(5, 5), seed=3))


@pytest.mark.parametrize("name", [name for name in EXPRESSIONS if "Gram" not in name])
def test_one_sample(name: str) -> None:
    """The axis of the samples is told from others of size 1, but in a product that torch views with more of them."""
    fused_is_right(made(lambda: between(EXPRESSIONS[name])), conftest.episode((3,), tasks=2, n=(1, 3), seed=3))


def test_the_hyperbolic_sine_of_small_numbers():
    """In float32 a difference of exponentials near 1 has few digits."""
    torch.manual_seed(0)
    model = between(lambda h: (h / 1e4).sinh() * 1e4).float()
    maml = FusedMAML(model, 0.1, 1, backend="fused")
    support, labels, *_ = episode(dtype=torch.float32)
    predictions = maml.predict(maml.adapt(support, labels, steps=0), support)
    with torch.no_grad():
        expected = torch.stack([copy.deepcopy(model).double()(x.double()) for x in support])
    torch.testing.assert_close(predictions.double(), expected, rtol=1e-5, atol=1e-6)
