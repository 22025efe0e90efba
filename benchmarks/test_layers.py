"""pytest-benchmark cases of the layers of maml_cuda, to find regressions. Each network is dominated by one layer.

Forward is `predict`, backward is `loss_and_grad` and the tangents are `hvp`, with separate parameters for each task.
test_meta_step.py has the commands.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML

TASKS, SAMPLES = 4, 10


def image(*layers: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with the layers after a 1 x 1 convolution, so that their input has a tangent; and a sample's shape."""
    return nn.Sequential(nn.Conv2d(16, 16, 1), *layers), (16, 28, 28)


def with_statistics(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """The layer in eval mode, with a batch count above zero, which avoids a warning."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.fill_(1)
    return norm.eval()


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)), (100,)),
    "linear, tasks in lanes": lambda: (nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8)), (8,)),
    "pointwise": lambda: image(nn.Tanh()),
    "conv2d": lambda: image(nn.Conv2d(16, 32, 3, padding=1)),
    "conv2d, in tiles": lambda: image(nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 16, 3, padding=1)),
    "conv2d, stride 2": lambda: image(nn.Conv2d(16, 32, 3, 2, 1)),
    "conv2d, stride 2, in tiles": lambda: image(nn.Conv2d(16, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, 2, 1)),
    "batch_norm": lambda: (nn.Sequential(nn.BatchNorm2d(16)), (16, 28, 28)),
    "running_norm": lambda: image(with_statistics(nn.BatchNorm2d(16))),
    "group_norm": lambda: image(nn.GroupNorm(4, 16)),
    "conv_block": lambda: image(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)),
    "conv_block, pooled": lambda: image(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.MaxPool2d(2)),
    "stem": lambda: (nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)), (3, 84, 84)),
    "stem, pooled": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.MaxPool2d(2)),
        (3, 84, 84),
    ),
    "max_pool": lambda: image(nn.MaxPool2d(3, 2)),
    "avg_pool": lambda: image(nn.AvgPool2d(2)),
    "flatten": lambda: image(nn.Flatten(), nn.Linear(16 * 28 * 28, 5)),
}


@pytest.mark.parametrize("passes", ["forward", "backward", "tangents"])
@pytest.mark.parametrize("name", NETS)
def test_layer(benchmark, name: str, passes: str) -> None:
    torch.manual_seed(0)
    model, sample = NETS[name]()
    tasks = 32 if "lanes" in name else TASKS
    maml = FusedMAML(model, 0.1, 1, loss="mse", backend="fused")
    x = torch.randn(tasks, SAMPLES, *sample)
    fast = {n: p.detach().expand(tasks, *p.shape).contiguous() for n, p in model.named_parameters()}
    y = torch.randn_like(maml.predict(fast, x))
    v = {n: torch.randn_like(p) for n, p in fast.items()}
    calls = {
        "forward": lambda: maml.predict(fast, x),
        "backward": lambda: maml.loss_and_grad(fast, x, y),
        "tangents": lambda: maml.hvp(fast, x, y, v),
    }
    benchmark.group = name
    benchmark(calls[passes])
