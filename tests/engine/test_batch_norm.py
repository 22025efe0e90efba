"""BatchNorm's running statistics are neither read nor written in train mode; dropout's random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, reference
from tests.engine.nets import BACKENDS, CLASSES, close, episode, equal, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_running_statistics_are_never_written(mode: str, backend: str) -> None:
    model = net()
    model(torch.randn(6, 3).double())
    getattr(model, mode)()
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert len(before) == 3
    maml = FusedMAML(model, 0.3, 2, backend=backend)
    x_spt, y_spt, x, y = episode()
    step(maml, [x_spt, y_spt, x, y])
    fast = maml.adapt(x_spt, y_spt)
    maml.predict(fast, x)
    maml.loss_and_grad(fast, x, y)
    maml.hvp(fast, x, y, fast)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(m.training is (mode == "train") for m in model.modules())


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_never_read_in_train_mode(backend: str) -> None:
    model = net()
    maml = FusedMAML(model, 0.3, 2, backend=backend)
    expected = step(maml, episode())
    model[1].running_mean.fill_(float("nan"))
    model[1].running_var.fill_(float("nan"))
    equal(step(maml, episode()), expected)


def test_dropout_draws_what_the_reference_draws() -> None:
    """Each forward draws one mask, in the order of the inner loop: the same seed gives the reference's numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, CLASSES)).double()
    maml = FusedMAML(model, 0.3, 2, backend="reference")
    torch.manual_seed(9)
    got = step(maml, episode())
    torch.manual_seed(9)
    loss, truth = reference.meta_gradient(model, "cross_entropy", *episode(), 0.3, 2)
    close(got[0], loss)
    for name, g in truth.items():
        close(got[1][f"model.{name}"], g, name)
