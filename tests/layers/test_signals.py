"""Signals [n, channels, length]: convolution, pools, BatchNorm and residual sums along one axis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_cuda import FusedMAML
from tests.conftest import check_meta_gradient

WINDOWS = [  # kernel, stride, padding, length
    (1, 1, 0, 1),
    (3, 1, 1, 11),
    (3, 2, 1, 12),
    (3, 2, 0, 7),
    (2, 2, 0, 9),
    (5, 3, 2, 14),
    (4, 3, 1, 6),
]


def small_net(layer):
    return nn.Sequential(nn.Conv1d(2, 5, 1), nn.Tanh(), layer, nn.Conv1d(5, 2, 1))


@pytest.mark.parametrize(("kernel", "stride", "padding", "length"), WINDOWS)
def test_windows(check_passes, kernel, stride, padding, length):
    for layer in (
        nn.Conv1d(5, 5, kernel, stride, padding),
        nn.MaxPool1d(kernel, stride, min(padding, kernel // 2)),
        nn.AvgPool1d(kernel, stride, min(padding, kernel // 2)),
        nn.AvgPool1d(kernel, stride, min(padding, kernel // 2), count_include_pad=False),
    ):
        check_passes(small_net(layer), (2, length), n=3)


# torch's own convolution warns that "same" padding of an even kernel is slow.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid", (3,)])
def test_paddings(check_passes, padding):
    check_passes(small_net(nn.Conv1d(5, 5, 4, padding=padding, bias=False)), (2, 9), n=2)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("length", [16, 25])
def test_a_net_of_blocks(check_passes, channels, length):
    """The blocks of few-shot nets: a first layer on the constant input, strides and pools of 2."""
    model = nn.Sequential(
        nn.Conv1d(1, channels, 5, 2, 2), nn.BatchNorm1d(channels), nn.ReLU(),
        nn.Conv1d(channels, channels, 3, padding=1), nn.BatchNorm1d(channels), nn.ReLU(), nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 3),
    )  # fmt: skip
    check_passes(model, (1, length), n=4)


def test_long_kernel(check_passes):
    """A first kernel of 64 samples, as used for raw vibration signals."""
    model = nn.Sequential(nn.Conv1d(1, 8, 64, 16, 24), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    check_passes(model, (1, 128), n=3)


class Spelled(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.norm, self.head, self.mean = nn.BatchNorm1d(6), nn.Linear(6, 3), mean

    def forward(self, x):
        x = F.conv1d(x, self.first.weight, self.first.bias, padding=1)
        x = torch.conv1d(x, self.second.weight, self.second.bias, padding=1) + x
        x = F.max_pool1d(F.leaky_relu(self.norm(x), 0.1), 2)
        return self.head(self.mean(F.avg_pool1d(x, 2)))


@pytest.mark.parametrize(
    "mean",
    [
        lambda x: x.mean(-1),
        lambda x: torch.mean(x, dim=2),
        lambda x: x.mean((2,)),
        lambda x: F.adaptive_avg_pool1d(x, 1).flatten(1),
        lambda x: x.mean(2, keepdim=True).view(x.size(0), -1),
    ],
)
def test_functions_and_residuals(check_passes, mean):
    check_passes(Spelled(mean), (2, 13), n=3)


def test_signals_out(check_passes):
    """A prediction at every position, [n, channels, length]."""
    model = nn.Sequential(nn.Conv1d(2, 7, 3, padding=1), nn.Tanh(), nn.Conv1d(7, 3, 1))
    check_passes(model, (2, 9), n=4)


@pytest.mark.parametrize("batch_norm", ["transductive", "per_step", "running"])
def test_meta_gradient(machine, batch_norm):
    model = nn.Sequential(
        nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(20, 3)
    ).double()
    if batch_norm == "running":
        model[1].running_mean.uniform_(-0.1, 0.1)
        model[1].num_batches_tracked.fill_(1)
    x, y = torch.randn(2, 3, 4, 2, 10).double(), torch.randint(3, (2, 3, 4))
    data = [x[0], y[0], x[1], y[1]]
    check_meta_gradient(model, "cross_entropy", data, 0.1, 2, batch_norm=batch_norm)


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (nn.Conv1d(2, 3, 3), (2, 4, 5), r"0 \(Conv1d\): Expected 2D \(unbatched\) or 3D"),
        (nn.Conv2d(2, 3, 3), (2, 9), r"0 \(Conv2d\): .*Kernel size"),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm1d(3)), (2, 5, 5), r"0.1 \(BatchNorm1d\).*: expected 2D or 3D"),
    ],
)
def test_what_is_not_fused_says_so(model, shape, why):
    x = torch.randn(1, 2, *shape)
    with pytest.raises(ValueError, match=why):
        FusedMAML(nn.Sequential(model), 0.1, loss="mse", backend="fused").adapt(x, x)
