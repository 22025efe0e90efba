"""Autocast and GradScaler: the meta-step keeps the model's dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml_cuda import FusedMAML
from tests.engine.nets import episode, equal, gradients, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_ignored(backend: str, dtype: torch.dtype) -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2, backend=backend)
    data = episode(dtype=torch.float32)
    expected = step(maml, data)
    with torch.autocast("cpu", dtype=dtype):
        out = maml(*data)
        fast = maml.adapt(data[0], data[1])
        blocks = blocks_of(maml, fast, data[2], data[3])
    maml.zero_grad()
    out.loss.backward()
    equal((out.loss.detach(), gradients(maml)), expected)
    for name, t in maml.adapt(data[0], data[1]).items():
        assert torch.equal(fast[name], t)
    for got, plain in zip(blocks, blocks_of(maml, fast, data[2], data[3]), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, plain)


def blocks_of(maml: FusedMAML, fast: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    losses, gradient = maml.loss_and_grad(fast, x, y)
    return [maml.predict(fast, x), losses, *gradient.values(), *maml.hvp(fast, x, y, gradient).values()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_backward_inside_autocast(backend: str) -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2, backend=backend)
    data = episode(dtype=torch.float32)
    expected = step(maml, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal(step(maml, data), expected)


def test_inputs_cast_by_autocast_come_back() -> None:
    """Inputs that an earlier layer computed in bfloat16 are cast to the model's dtype."""
    maml = FusedMAML(net(torch.float32), 0.3, 2)
    data = [t.bfloat16() if t.is_floating_point() else t for t in episode(dtype=torch.float32)]
    widened = [t.float() if t.is_floating_point() else t for t in data]
    expected = step(maml, widened)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal(step(maml, data), expected)


def test_the_scale_of_a_grad_scaler_passes() -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2)
    data = episode(dtype=torch.float32)
    _, plain = step(maml, data)
    optimizer = torch.optim.SGD(maml.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    maml.zero_grad()
    scaler.scale(maml(*data).loss).backward()
    assert all(torch.equal(p.grad, g * 2**10) for p, g in zip(maml.parameters(), plain.values(), strict=True))
    before = [p.detach().clone() for p in maml.parameters()]
    scaler.unscale_(optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(maml.parameters(), plain.values(), strict=True))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b - g) for p, b, g in zip(maml.parameters(), before, plain.values(), strict=True))
