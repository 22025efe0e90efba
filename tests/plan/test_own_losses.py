"""Losses written by the user run on the reference; the parameters of a loss module are meta-learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from tests.plan.small_models import RATE, STEPS, around, close, episode, made, quiet, right

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_callable_loss_is_general() -> None:
    def smooth(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, label_smoothing=0.1)

    model = made(lambda: around(nn.Tanh()))
    with pytest.warns(UserWarning, match="general path.*loss smooth"):
        maml = FusedMAML(model, RATE, STEPS, loss=smooth)
    right(maml, episode())
    plain = FusedMAML(model, RATE, STEPS)
    assert maml(*episode()).loss != plain(*episode()).loss


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * self.scale, target)


def test_a_loss_module_is_meta_learned() -> None:
    model, loss = made(lambda: around(nn.Tanh())), Temperature().double()
    maml = quiet(model, loss=loss)
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
