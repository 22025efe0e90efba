"""The losses of torch.nn.functional: each is fused and right against plain double backward, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import assert_close
from tests.plan.small_models import computed_is_right
from tests.plan.test_computed_losses import FEATURES, RATE, STEPS, WEIGHTS, bits, data_of, labels, mlp, values

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Any, Any], Tensor]


def signs(n: int) -> Tensor:
    return 2 * bits(n) - 1


def pair(n: int) -> tuple[Tensor, Tensor]:
    return values(n), values(n)


def compared(n: int) -> dict[str, Tensor]:
    return {"value": values(n), "sign": signs(n)[..., 0]}


def ignored(n: int) -> Tensor:
    y = labels(n)
    y[0, 0] = y[1, 1] = 1
    return y


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(a, b)


def variance(p: Tensor) -> Tensor:
    return p.exp() - 0.5  # partly below the bound


FUSED: dict[str, tuple[Loss, Callable[[int], Any]]] = {
    "cross_entropy, smoothed, weights": (
        lambda p, y: F.cross_entropy(p, y, weight=WEIGHTS, label_smoothing=0.1), labels,
    ),
    "cross_entropy, smoothed, weights, sum": (
        lambda p, y: F.cross_entropy(p, y, weight=WEIGHTS, label_smoothing=0.3, reduction="sum"), labels,
    ),
    "cross_entropy, smoothed, weights, ignored": (
        lambda p, y: F.cross_entropy(p, y, weight=WEIGHTS, label_smoothing=0.1, ignore_index=1), ignored,
    ),
    "cross_entropy of probabilities": (
        lambda p, y: F.cross_entropy(p, y.softmax(-1), weight=WEIGHTS, label_smoothing=0.1), values,
    ),
    "gaussian_nll_loss": (lambda p, y: F.gaussian_nll_loss(p, y, torch.ones_like(p)), values),
    "gaussian_nll_loss, one variance": (lambda p, y: F.gaussian_nll_loss(p, y, 2.0, full=True), values),
    "gaussian_nll_loss, a variance for each sample": (
        lambda p, y: F.gaussian_nll_loss(p, y, p[:, :1].exp(), reduction="sum"), values,
    ),
    "gaussian_nll_loss, bounded": (lambda p, y: F.gaussian_nll_loss(p, y, p.exp(), eps=1.0), values),
    "poisson_nll_loss": (lambda p, y: F.poisson_nll_loss(p, y.abs()), values),
    "poisson_nll_loss, full": (
        lambda p, y: F.poisson_nll_loss(p.exp(), 3 * y.abs(), log_input=False, full=True), values,
    ),
    "triplet_margin_loss": (lambda p, y: F.triplet_margin_loss(p, y[0], y[1]), pair),
    "triplet_margin_loss, swap": (lambda p, y: F.triplet_margin_loss(p, y[0], y[1], 2.0, 1, swap=True), pair),
    "triplet_margin_with_distance_loss": (
        lambda p, y: F.triplet_margin_with_distance_loss(
            p, y[0], y[1], distance_function=cosine_distance, swap=True, reduction="sum"
        ), pair,
    ),
    "cosine_embedding_loss": (
        lambda p, y: F.cosine_embedding_loss(p, y["value"], y["sign"], margin=0.2), compared,
    ),
    "hinge_embedding_loss": (F.hinge_embedding_loss, signs),
    "margin_ranking_loss": (lambda p, y: F.margin_ranking_loss(p[:, 0], p[:, 1], y[:, 0], 0.5), signs),
    "multilabel_soft_margin_loss": (lambda p, y: F.multilabel_soft_margin_loss(p, y, WEIGHTS), bits),
    "soft_margin_loss": (F.soft_margin_loss, signs),
    "kl_div": (lambda p, y: F.kl_div(p.log_softmax(-1), y.softmax(-1), reduction="sum"), values),
    "kl_div, log_target": (
        lambda p, y: F.kl_div(p.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True), values,
    ),
    "huber_loss, sum": (lambda p, y: F.huber_loss(p, y, reduction="sum", delta=0.5), values),
    "binary_cross_entropy, weights": (lambda p, y: F.binary_cross_entropy(p.sigmoid(), y, WEIGHTS), bits),
    "pairwise_distance": (lambda p, y: F.pairwise_distance(p, y).mean(), values),
    "log-probability of 0 and 1": (lambda p, y: -Bernoulli(logits=p).log_prob(y).mean(), bits),
    "focal loss of 0 and 1": (
        lambda p, y: (1 - (-F.binary_cross_entropy_with_logits(p, y, reduction="none")).exp()).square().mean(), bits,
    ),
    "deviation over samples": (lambda p, y: (p - y).std() + (p - y).var(0).sum(), values),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_is_fused(name: str) -> None:
    loss, target = FUSED[name]
    computed_is_right(mlp(), data_of(target), loss, RATE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_smoothed_cross_entropy_with_weights_of_pixels(reduction: str, ignore_index: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, FEATURES, 3, padding=1), nn.Tanh()).double()
    data = data_of(lambda n: torch.randint(FEATURES, (2, n, 4, 5)), (2, 4, 5))
    loss = nn.CrossEntropyLoss(WEIGHTS, reduction=reduction, ignore_index=ignore_index, label_smoothing=0.2)
    computed_is_right(model, data, loss, RATE / 10)


# -- multi_margin_loss, of which torch has no second derivative ------------------------------------------------------


def margins(p: Tensor, y: Tensor, power: int, weight: Tensor | None) -> Tensor:
    """multi_margin_loss with margin 1, class by class."""
    total = torch.zeros((), dtype=p.dtype)
    for row, label in zip(p, y.tolist(), strict=True):
        for i in range(len(row)):
            term = 1 - row[label] + row[i]
            if i != label and term > 0:
                total = total + term**power * (1 if weight is None else weight[label])
    return total / p.numel()


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(("power", "weight"), [(1, None), (2, None), (2, WEIGHTS)], ids=["1", "2", "weights"])
def test_multi_margin_loss(power: int, weight: Tensor | None, backend: str) -> None:
    model, data = mlp(), data_of(labels)
    maml = FusedMAML(
        model, RATE, STEPS, loss=lambda p, y: F.multi_margin_loss(p, y, p=power, weight=weight), backend=backend
    )
    out = maml(*data)
    out.loss.backward()
    expected, grads = oracle.meta_gradient(model, lambda p, y: margins(p, y, power, weight), *data, RATE, STEPS)
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-10, atol=0)
    assert_close({n: p.grad for n, p in model.named_parameters()}, grads)


# -- gaussian_nll_loss of a negative variance ------------------------------------------------------------------------


def test_a_negative_variance_gives_nan() -> None:
    """torch raises; fused layers cannot, so that the loss is no number."""
    model, data = mlp(), data_of(lambda n: {"value": values(n), "variance": values(n).abs() + 0.1})
    loss = lambda p, y: F.gaussian_nll_loss(p, y["value"], y["variance"])  # noqa: E731
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
    assert maml(*data).loss.isfinite()
    data[3]["variance"][1, 2, 0] = -0.1
    out = maml(*data)
    assert out.task_losses[0].isfinite()
    assert out.task_losses[1].isnan()


# -- what is refused -------------------------------------------------------------------------------------------------


def several(n: int) -> Tensor:
    """The classes of each sample, then -1."""
    y = torch.full((2, n, FEATURES), -1)
    y[..., 0] = labels(n)
    return y


REFUSED: dict[str, tuple[Loss, Callable[[int], Any], str]] = {
    "multilabel_margin_loss": (F.multilabel_margin_loss, several, "no fused layer serves it"),
    "ctc_loss": (
        lambda p, y: F.ctc_loss(
            p.log_softmax(-1).unsqueeze(1), torch.tensor([[1, 2]]), torch.tensor([len(p)]), torch.tensor([2])
        ), values, "depends on values of tensors",
    ),
    "lgamma": (lambda p, y: (p.square().lgamma() - y).mean(), values, "no fused layer serves it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    loss, target, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        FusedMAML(mlp(), RATE, STEPS, loss=loss, first_order=True, backend="fused")(*data_of(target))


def test_every_loss_is_here() -> None:
    elsewhere = {"l1_loss", "mse_loss", "nll_loss", "smooth_l1_loss", "multi_margin_loss"}  # test_computed_losses.py
    elsewhere |= {"linear_cross_entropy", "binary_cross_entropy_with_logits"}
    named = {name for name in vars(F) if name.endswith(("_loss", "_entropy", "_entropy_with_logits", "kl_div"))}
    named -= {name for name in named if name.startswith("_") or not callable(getattr(F, name))}
    tested = {name.partition(",")[0] for name in (*FUSED, *REFUSED)}
    assert named - tested <= elsewhere
