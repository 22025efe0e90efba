"""Losses of the user's own: fused where the core has them; the parameters of a loss module are meta-learned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from tests.plan.small_models import (
    CLASSES,
    IMAGE,
    RATE,
    STEPS,
    around,
    close,
    computed_is_right,
    episode,
    fused_is_right,
    made,
    right,
)

pytestmark = pytest.mark.usefixtures("one_thread")


OF_CLASSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "CrossEntropyLoss": nn.CrossEntropyLoss(),
    "nll_loss": lambda p, y: F.nll_loss(F.log_softmax(p, -1), y),
    "gather": lambda p, y: -p.log_softmax(-1).gather(1, y[:, None]).mean(),
    "logsumexp": lambda p, y: (p.logsumexp(1) - p.gather(1, y.unsqueeze(1)).squeeze(1)).mean(),
    "sum": lambda p, y: F.cross_entropy(p, y, reduction="sum"),
    "a multiple": lambda p, y: F.cross_entropy(p, y) / 3,
    "weights of samples": lambda p, y: ((1 + y) * F.cross_entropy(p, y, reduction="none")).mean(),
}
OF_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_loss": F.mse_loss,
    "MSELoss": nn.MSELoss(),
    "square": lambda p, y: ((p - y) ** 2).mean(),
    "half of the sum": lambda p, y: 0.5 * (y - p).pow(2).sum(),
    "weights of samples": lambda p, y: ((p - y).square().mean(1) * y[:, 0].exp()).mean(),
}
# Those of classes end in "on classes".
OTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label smoothing on classes": lambda p, y: F.cross_entropy(p, y, label_smoothing=0.1),
    "an index ignored on classes": lambda p, y: F.cross_entropy(p, y, ignore_index=2),
    "a square on classes": lambda p, y: (F.cross_entropy(p, y, reduction="none") ** 2).mean(),
    "entropy on classes": lambda p, y: F.cross_entropy(p, y) + (p.softmax(1) * p.log_softmax(1)).sum(1).mean(),
    "detach on classes": lambda p, y: F.cross_entropy(p - p.detach().mean(), y),
    "maximum on classes": lambda p, y: F.cross_entropy(p - p.max(), y),
    "root": lambda p, y: F.mse_loss(p, y).sqrt(),
    "a constant added": lambda p, y: F.mse_loss(p, y) + 1,
    "huber": F.huber_loss,
    "absolute": F.l1_loss,
}


@pytest.mark.parametrize("spelling", OF_CLASSES)
def test_a_cross_entropy_is_fused(spelling: str) -> None:
    fused_is_right(made(lambda: around(nn.Tanh())), episode(), OF_CLASSES[spelling])


@pytest.mark.parametrize("spelling", OF_VALUES)
def test_a_squared_error_is_fused(spelling: str) -> None:
    fused_is_right(made(lambda: around(nn.Tanh())), episode(target=(CLASSES,)), OF_VALUES[spelling])


@pytest.mark.parametrize("spelling", [s for s in OF_VALUES if s != "weights of samples"])
def test_a_squared_error_of_images_is_fused(spelling: str) -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2)))
    fused_is_right(model, episode(IMAGE, target=(2, 4, 3)), OF_VALUES[spelling])


@pytest.mark.parametrize("case", OTHER)
def test_another_loss_is_computed_by_layers(case: str) -> None:
    data = episode() if case.endswith("on classes") else episode(target=(CLASSES,))
    computed_is_right(made(lambda: around(nn.Tanh())), data, OTHER[case])


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * self.scale, target)


def test_a_loss_module_is_meta_learned() -> None:
    model, loss = made(lambda: around(nn.Tanh())), Temperature().double()
    maml = FusedMAML(model, RATE, STEPS, loss=loss)
    assert any(p is loss.scale for p in maml.parameters())
    right(maml, episode())
    _, grads = reference.meta_gradient(model, loss, *episode(), RATE, STEPS)
    assert loss.scale.grad is not None
    close(loss.scale.grad, grads["loss.scale"])
    with torch.no_grad():
        up = _loss_at(maml, loss.scale, 1e-5)
        down = _loss_at(maml, loss.scale, -1e-5)
    torch.testing.assert_close((up - down) / 2e-5, loss.scale.grad, rtol=1e-6, atol=0)


def _loss_at(maml: FusedMAML, p: Tensor, by: float) -> Tensor:
    """The meta-loss at p + by; p is restored."""
    before = p.clone()
    p += by
    loss = maml(*episode()).loss
    p.copy_(before)
    return loss
