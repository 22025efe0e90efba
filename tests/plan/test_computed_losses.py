"""Losses of the user's own that layers compute: each against plain double backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from maml_cuda import FusedMAML, reference
from tests import oracle
from tests.conftest import assert_close, check_meta_gradient
from tests.plan.small_models import computed_is_right, sentences

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, SUPPORT, QUERY, FEATURES = 2, 5, 7, 3
RATE, STEPS = 0.05, 2

Loss = Callable[[Any, Any], Tensor]


def mlp(features: int = FEATURES) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, features)).double()


def data_of(target: Callable[[int], Any], sample: tuple[int, ...] = (4,)) -> list[Any]:
    """Support set and query set, of different sizes."""
    return [part for n in (SUPPORT, QUERY) for part in (torch.randn(TASKS, n, *sample).double(), target(n))]


def labels(n: int) -> Tensor:
    return torch.randint(FEATURES, (TASKS, n))


def values(n: int) -> Tensor:
    return torch.randn(TASKS, n, FEATURES).double()


def bits(n: int) -> Tensor:
    return (values(n) > 0).double()


def both(n: int) -> dict[str, Tensor]:
    return {"class": labels(n), "value": values(n)}


WEIGHTS = torch.tensor([0.3, 1.0, 2.0]).double()


WEIGHTS_32 = WEIGHTS.float()


def weights_like(p: Tensor) -> Tensor:
    return WEIGHTS_32 if p.dtype == torch.float32 else WEIGHTS


def focal(p: Tensor, y: Tensor) -> Tensor:
    right = p.softmax(-1).gather(1, y[:, None]).squeeze(1)
    return ((1 - right) ** 2 * F.cross_entropy(p, y, reduction="none")).mean()


def two_terms(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(p[:, :FEATURES], y["class"]) + F.mse_loss(p[:, FEATURES:], y["value"])


LOSSES: dict[str, tuple[Loss, Callable[[int], Any]]] = {
    "label smoothing": (lambda p, y: F.cross_entropy(p, y, label_smoothing=0.1), labels),
    "weights in a module": (nn.CrossEntropyLoss(weight=WEIGHTS), labels),
    "weights in a closure": (lambda p, y: F.cross_entropy(p, y, weight=weights_like(p)), labels),
    "sum with weights": (lambda p, y: F.cross_entropy(p, y, weight=weights_like(p), reduction="sum"), labels),
    "an ignored class": (lambda p, y: F.cross_entropy(p, y, ignore_index=1), labels),
    "focal": (focal, labels),
    "entropy": (lambda p, y: F.cross_entropy(p, y) + 0.1 * Categorical(logits=p).entropy().mean(), labels),
    "Brier score": (lambda p, y: (p.softmax(-1) - F.one_hot(y, FEATURES)).square().sum(-1).mean(), labels),
    "Huber": (F.huber_loss, values),
    "smooth L1": (F.smooth_l1_loss, values),
    "smooth L1, beta": (lambda p, y: F.smooth_l1_loss(p, y, beta=0.3), values),
    "smooth L1, beta 0": (lambda p, y: F.smooth_l1_loss(p, y, beta=0.0), values),
    "L1": (F.l1_loss, values),
    "Gaussian": (lambda p, y: -Normal(p, 0.5).log_prob(y).mean(), values),
    "cosine similarity": (lambda p, y: 1 - F.cosine_similarity(p, y).mean(), values),
    "log-cosh": (lambda p, y: torch.log(torch.cosh(p - y)).mean(), values),
    "quantile": (lambda p, y: torch.maximum(0.3 * (y - p), -0.7 * (y - p)).mean(), values),
    "the largest error": (lambda p, y: (p - y).abs().max(), values),
    "relative error": (lambda p, y: ((p - y).norm(dim=1) / y.norm(dim=1)).mean(), values),
    "one target": (lambda p, y: (p - y[:, :1]).square().mean() + (p[:, 0] * y[:, 2]).mean() ** 2, values),
    "BCE with logits": (F.binary_cross_entropy_with_logits, bits),
    "BCE with pos_weight": (lambda p, y: F.binary_cross_entropy_with_logits(p, y, pos_weight=weights_like(p)), bits),
    "BCE": (lambda p, y: F.binary_cross_entropy(p.sigmoid(), y), bits),
    "hinge": (lambda p, y: F.relu(1 - p * (2 * y - 1)).mean(), bits),
    "soft margin": (lambda p, y: F.soft_margin_loss(p, 2 * y - 1), bits),
    "two terms": (two_terms, both),
}


def model_of(name: str) -> nn.Module:
    return mlp(2 * FEATURES if name == "two terms" else FEATURES)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_is_computed_by_layers(name: str, first_order: bool) -> None:
    loss, target = LOSSES[name]
    computed_is_right(model_of(name), data_of(target), loss, RATE, first_order)


@pytest.mark.parametrize("name", LOSSES)
def test_in_float32(name: str) -> None:
    """Against the oracle in float64, of the same numbers."""
    loss, target = LOSSES[name]
    data = [single(part) for part in data_of(target)]
    model = model_of(name).float()
    maml = FusedMAML(model, RATE, STEPS, loss=single(loss), backend="fused")
    out = maml(*data)
    out.loss.backward()
    expected, grads = oracle.meta_gradient(model, loss, *data, RATE, STEPS)
    assert "the loss is served by layers" in maml.explain()
    torch.testing.assert_close(out.loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert_close({n: p.grad.double() for n, p in model.named_parameters()}, grads, 1e-5)


def single(given: Any) -> Any:
    """A target in float32; a loss with its weights in float32."""
    if isinstance(given, dict):
        return {key: single(t) for key, t in given.items()}
    if isinstance(given, Tensor):
        return given.float() if given.is_floating_point() else given
    return nn.CrossEntropyLoss(weight=WEIGHTS_32) if isinstance(given, nn.Module) else given
