"""Fused models whose forward writes buffers: every forward begins with those of the model, and a training step
moves them once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from maml_cuda import FusedMAML, gradcheck
from maml_cuda.capture.capture import capture
from maml_cuda.engine import programs
from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.general_path import RATE, STEPS, episode

pytestmark = pytest.mark.usefixtures("one_thread")


def normed(make: Callable[..., nn.Module], **given: Any) -> nn.Module:
    """Two layers; the weight of the first is divided by its largest singular value."""
    return nn.Sequential(make(nn.Linear(3, 5), **given), nn.Tanh(), nn.Linear(5, 2))


class Shared(nn.Module):
    """One layer that is called twice: its second power iteration goes on from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Averaging(nn.Module):
    """A moving average of the samples, which the prediction reads, a count, and a buffer that is assigned anew."""

    def __init__(self, stops: bool = True) -> None:
        super().__init__()
        self.layer, self.head, self.stops = nn.Linear(3, 4), nn.Linear(4, 2), stops
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            mean = h.mean(0)
            self.count += 1
            self.mean.mul_(0.9).add_(0.1 * (mean.detach() if self.stops else mean))
            self.last = h[0]
        return self.head(torch.tanh(h - self.mean))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = parametrizations.spectral_norm(nn.Conv1d(1, 4, 2)), nn.BatchNorm1d(4)
        self.head = parametrizations.spectral_norm(nn.Linear(8, 2), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x[:, None]))).flatten(1))


CASES: dict[str, Callable[[], nn.Module]] = {
    "parametrization": lambda: normed(parametrizations.spectral_norm),
    "three iterations": lambda: normed(parametrizations.spectral_norm, n_power_iterations=3),
    "the columns": lambda: normed(parametrizations.spectral_norm, dim=1),
    "hook": lambda: normed(spectral_norm),
    "shared": Shared,
    "convolution": Convolutional,
    "average": Averaging,
    "average with a derivative": lambda: Averaging(stops=False),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES)
def test_as_the_general_path(case: str) -> None:
    torch.manual_seed(0)
    model, data = CASES[case]().double(), episode(3)
    with torch.no_grad():  # away from the vectors' fixed point
        for name, p in model.named_parameters():
            p.mul_(2) if "weight" in name else p.add_(0.1)
    model_before, once = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    once(data[0][0])
    maml = FusedMAML(model, RATE, STEPS, loss="mse", backend="fused")
    for first_order in (False, True):
        model.load_state_dict(model_before)
        maml.first_order = first_order
        value, expected = oracle.meta_gradient(model, "mse", *data, RATE, STEPS, first_order)
        loss, grads = run(maml, data)
        torch.testing.assert_close(loss, value, rtol=1e-12, atol=0)
        assert_close(grads, expected, 1e-10)
        for name, b in once.named_buffers():
            if not name.startswith("norm."):
                torch.testing.assert_close(dict(model.named_buffers())[name], b.detach(), rtol=1e-12, atol=1e-14)
    assert "a training step calls the model itself for that" in maml.explain()


@pytest.mark.parametrize("case", ["parametrization", "hook", "average"])
def test_what_moves_them(case: str) -> None:
    """A call with gradients on, and a differentiable adaptation, whose backward is that of the buffers before."""
    torch.manual_seed(0)
    model, data = CASES[case]().double(), episode(3)
    before = copy.deepcopy(model.state_dict())
    fused, general = (FusedMAML(model, RATE, STEPS, loss="mse", backend=b) for b in ("fused", "reference"))

    def unmoved() -> bool:
        return all(torch.equal(b, before[name]) for name, b in model.state_dict().items())

    fast = fused.adapt(*data[:2])
    fused.predict(fast, data[2])
    fused.loss_and_grad(fast, *data[2:])
    fused.hvp(fast, *data[2:], fast)
    with torch.no_grad():
        fused(*data)
    with pytest.raises(ValueError, match="y_qry must have the prediction's shape"):
        fused(*data[:3], data[3][..., :1])
    gradcheck(fused, *data, finite_difference_tolerance=10)
    assert unmoved()
    results = []
    for maml in (fused, general):
        model.load_state_dict(before)
        adapted = maml.adapt(*data[:2], differentiable=True)
        assert not unmoved()
        loss = torch.stack([t.sin().sum() for t in adapted.values()]).sum()
        results.append((torch.autograd.grad(loss, list(model.parameters())), dict(model.state_dict())))
        assert fused.backend == "cpu"
    torch.testing.assert_close(*results)
    model.load_state_dict(before)
    model.eval()
    for maml in (fused, general):
        results.append(run(maml, data))
    torch.testing.assert_close(*results[2:])
    assert unmoved()


@pytest.mark.parametrize("case", ["parametrization", "hook"])
def test_captured_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the call itself changes of the model's state does not make it be looked at again."""
    captured = []
    monkeypatch.setattr(programs, "capture", lambda *a: (captured.append(1), capture(*a))[1])
    maml = FusedMAML(CASES[case]().double(), RATE, STEPS, loss="mse", backend="fused")
    for _ in range(3):
        run(maml, episode(3))
    assert len(captured) == 2  # the support and the query set


def test_many_steps_keep_the_norm() -> None:
    """The vectors go on from step to step: after 300 of them the norm is 1, in float32."""
    torch.manual_seed(0)
    model = normed(parametrizations.spectral_norm)
    maml = FusedMAML(model, RATE, STEPS, loss="mse", backend="fused")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        maml.backward(*(t.float() for t in episode(3)))
        optimizer.step()
    model.eval()
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")
def test_inside_a_compiled_step() -> None:
    torch._dynamo.reset()
    model, data = normed(parametrizations.spectral_norm).double(), episode(3)
    with pytest.raises(ValueError, match=r"_u, which fused layers inside torch.compile do not"):
        torch.compile(FusedMAML(model, RATE, STEPS, loss="mse", backend="fused"), backend="aot_eager")(*data)
    torch._dynamo.reset()
