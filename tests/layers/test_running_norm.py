"""running_norm: BatchNorm with given statistics (eval mode), on features and on images."""

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML


def with_statistics(norm):
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(1)
    return norm.eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 17])
@pytest.mark.parametrize("n", [1, 3, 300])
def test_features(check_passes, affine, channels, n):
    norm = with_statistics(nn.BatchNorm1d(channels, affine=affine))
    check_passes(nn.Sequential(nn.Linear(3, channels), norm, nn.Tanh(), nn.Linear(channels, 2)), (3,), n, tasks=1)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1, 3), (9, 8)])
def test_images(check_passes, affine, n, size):
    """On the input, which is constant, and behind a convolution."""
    first, second = (with_statistics(nn.BatchNorm2d(channels, eps=0.3, affine=affine)) for channels in (2, 9))
    model = nn.Sequential(first, nn.Conv2d(2, 9, 3, 1, 1), second, nn.Tanh(), nn.Conv2d(9, 3, 3))
    check_passes(model, (2, size, size), n)


def test_a_sample_alone_has_the_same_prediction(machine):
    """Given statistics do not mix samples."""
    model = nn.Sequential(nn.Linear(3, 6), with_statistics(nn.BatchNorm1d(6)), nn.Tanh(), nn.Linear(6, 2)).double()
    maml = FusedMAML(model, 0.1, 1, loss="mse", backend="fused")
    fast = {name: p.detach()[None].clone() for name, p in model.named_parameters()}
    x = torch.randn(1, 7, 3).double()
    assert torch.equal(maml.predict(fast, x)[:, 4:5], maml.predict(fast, x[:, 4:5]))
