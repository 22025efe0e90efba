"""Normalisation within a sample: GroupNorm, LayerNorm and InstanceNorm, on features, signals and images."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_cuda import FusedMAML, reference
from tests.conftest import as_good_as_the_reference, check_meta_gradient, run

CONV = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d}


def between(norm, channels, sizes):
    """The layer between adapted layers, so that its input has a tangent, and before a smooth nonlinear function."""
    layer = CONV[1 + len(sizes)]
    window = (1,) if sizes else ()
    return nn.Sequential(layer(2, channels, *window), norm, nn.Tanh(), layer(channels, 2, *window))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 3), (17, 17), (33, 11), (48, 2)])
@pytest.mark.parametrize("sizes", [(), (7,), (5, 3)])
def test_groups(check_passes, affine, channels, groups, sizes):
    """Vector registers that hold many groups, or a group and a part of the next, and groups of one value."""
    norm = nn.GroupNorm(groups, channels, eps=0.1, affine=affine)
    check_passes(between(norm, channels, sizes), (2, *sizes), n=3)


@pytest.mark.parametrize("n", [1, 2, 9, 130, 300])
@pytest.mark.parametrize("norm", [nn.GroupNorm(3, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6, affine=False)])
def test_samples(check_passes, n, norm):
    """One sample, more samples than threads share at once, and several tiles of samples."""
    check_passes(between(norm, 6, ()), (2,), n, tasks=1)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("size", [3, 17])
def test_images(check_passes, eps, size):
    """On the input, which has no tangent, and behind a convolution; many pixels."""
    model = nn.Sequential(
        nn.GroupNorm(1, 2), nn.Conv2d(2, 10, 3, 1, 1), nn.GroupNorm(5, 10, eps=eps), nn.Tanh(), nn.Conv2d(10, 3, 3),
    )  # fmt: skip
    check_passes(model, (2, size, size), n=2)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [(), (5,), (9, 4)])
@pytest.mark.parametrize("channels", [5, 24])
def test_whole_samples(check_passes, affine, sizes, channels):
    """LayerNorm, with an affine map of each of a sample's values."""
    norm = nn.LayerNorm([channels, *sizes], elementwise_affine=affine)
    check_passes(between(norm, channels, sizes), (2, *sizes), n=3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (5, 3)])
@pytest.mark.parametrize("channels", [1, 7, 37])
def test_instances(check_passes, affine, sizes, channels):
    norm = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}[len(sizes)](channels, affine=affine)
    check_passes(between(norm, channels, sizes), (2, *sizes), n=3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("shape", "channels", "sizes"),
    [((9,), 2, (9,)), ((1,), 3, (1,)), ((5,), 2, (4, 5)), ((4, 5), 2, (4, 5)), ((17,), 3, (2, 17))],
)
def test_trailing_axes(check_passes, affine, shape, channels, sizes):
    """LayerNorm of each row of a sample."""
    norm = nn.LayerNorm(shape, eps=0.1, elementwise_affine=affine)
    layer = {1: nn.Conv1d, 2: nn.Conv2d}[len(sizes)]
    model = nn.Sequential(layer(2, channels, 1), norm, nn.Tanh(), layer(channels, 2, 1))
    check_passes(model, (2, *sizes), n=3)


def test_samples_of_four_axes(check_passes):
    model = nn.Sequential(nn.LayerNorm([2, 3, 4, 5]), nn.Tanh(), nn.Flatten(), nn.Linear(120, 2))
    check_passes(model, (2, 3, 4, 5), n=3)


def test_without_bias(check_passes):
    """With a weight: without one torch itself has no second derivative."""
    check_passes(between(nn.LayerNorm([6, 4], bias=False), 6, (4,)), (2, 4), n=3)


class Residual(nn.Module):
    """A value that two layers read, one affine map for two layers, and pools."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(2, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Linear(6, 3),
        )
        self.a, self.b = nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(self.first(x))), 2)
        return self.head((F.relu(self.b(self.second(x)) + x) + self.a(x)).mean((2, 3)))


def test_residual_sums_and_a_shared_affine_map(check_passes):
    check_passes(Residual(), (2, 6, 5), n=4)


class Spelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 3)
        self.gamma, self.beta = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x):
        x = torch.tanh(F.group_norm(self.conv(x), 2, self.gamma, self.beta))
        x = F.silu(F.instance_norm(torch.group_norm(x, 3, eps=0.2), weight=self.gamma))
        x = F.layer_norm(x, (6, 4, 5)).mean((2, 3))
        x = torch.layer_norm(F.layer_norm(x, [6], self.gamma), [6], self.beta, self.gamma, 0.1)
        return self.head(torch.tanh(F.group_norm(x, num_groups=3, weight=self.beta)))


def test_functions(check_passes):
    check_passes(Spelled(), (2, 6, 7), n=3)


def test_statistics_that_are_given(check_passes):
    """InstanceNorm in eval mode normalises as BatchNorm does."""
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    check_passes(between(norm, 6, (4, 3)), (2, 4, 3), n=3)


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.LayerNorm([8, 3, 3]), nn.Tanh(), nn.Flatten(), nn.Linear(72, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4),
    )  # fmt: skip


def episode(dtype, n=5):
    x, y = torch.randn(2, 3, n, 3, 12, 12, dtype=dtype), torch.randint(4, (2, 3, n))
    return [x[0], y[0], x[1], y[1]]


def rates(model, steps):
    return {n: nn.Parameter(0.1 * torch.rand(steps, *p.shape, dtype=p.dtype)) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("steps", "first_order", "n", "adapt"),
    [
        (0, False, 5, None),
        (1, False, 5, None),
        (3, False, 5, None),
        (2, True, 5, None),
        (2, False, 131, None),
        (2, False, 5, ["11.weight", "11.bias"]),
        (2, False, 5, ["1.bias", "5.weight"]),
        (2, False, 5, ["4.weight", "9.weight"]),
    ],
)
def test_meta_gradient(machine, steps, first_order, n, adapt):
    model = conv().double()
    data = episode(torch.float64, n)
    check_meta_gradient(model, "cross_entropy", data, 0.1, steps, first_order=first_order, adapt_params=adapt)


@pytest.mark.usefixtures("machine")
def test_a_rate_for_each_value_of_a_sample():
    model = conv().double()
    check_meta_gradient(model, "cross_entropy", episode(torch.float64), rates(model, 2), 2)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_float32(steps):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.InstanceNorm2d(16),
        nn.Tanh(), nn.Flatten(), nn.Linear(256, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4),
    )  # fmt: skip
    as_good_as_the_reference(model, episode(torch.float32), steps)


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(1, 3), lambda: nn.LayerNorm([3, 12, 12]), lambda: nn.InstanceNorm2d(3, affine=True)]
)
def test_a_mean_of_many_deviations_costs_no_digits(machine, norm):
    model = nn.Sequential(norm(), nn.Conv2d(3, 8, 5), nn.Tanh(), nn.Flatten(), nn.Linear(512, 4))
    data = episode(torch.float32)

    def error(mean):
        far = [d + mean if d.is_floating_point() else d for d in data]
        exact = [d.double() if d.is_floating_point() else d for d in far]
        truth = reference.meta_gradient(copy.deepcopy(model).double(), "cross_entropy", *exact, 0.1, 1)[1]
        grads = run(FusedMAML(model, 0.1, 1, backend="fused"), far)[1]
        return sum((grads[name] - g).norm() for name, g in truth.items()) / sum(g.norm() for g in truth.values())

    assert error(100) < 2 * error(0)


@pytest.mark.parametrize("ratio", [30, 100])
@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(4, 8), lambda: nn.LayerNorm([8, 8, 8]), lambda: nn.InstanceNorm2d(8)]
)
def test_a_moving_mean_of_many_deviations(machine, norm, ratio):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.GroupNorm(2, 8), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(512, 4)
    )  # fmt: skip
    nn.init.constant_(model[1].bias, ratio)
    as_good_as_the_reference(model, episode(torch.float32), 1)


def test_samples_do_not_depend_on_each_other(machine):
    """A sample alone has the same bits as in a set, so samples may be computed in tiles."""
    model = conv()
    maml = FusedMAML(model, 0.1, 1, backend="fused")
    fast = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}
    x = torch.randn(1, 7, 3, 12, 12)
    assert torch.equal(maml.predict(fast, x)[:, 4:5], maml.predict(fast, x[:, 4:5]))


@pytest.mark.filterwarnings("ignore:input's size at dim=0 does not match num_features:UserWarning")
@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (nn.LayerNorm([2, 8]), (2, 9), r"0 \(LayerNorm\): Given normalized_shape=\[2, 8\]"),
        (nn.GroupNorm(2, 4), (6, 9), r"0 \(GroupNorm\): .*number of channels"),
        (nn.GroupNorm(2, 4, affine=False), (5, 9), r"0 \(GroupNorm\): .*num_groups=2"),
        (nn.InstanceNorm1d(2), (2, 1), r"0 \(InstanceNorm1d\): Expected more than 1"),
        (nn.InstanceNorm1d(9), (9,), "whose first axis does not count samples"),
        (nn.InstanceNorm2d(2, track_running_stats=True), (2, 4, 5), "running statistics in train mode"),
        (nn.InstanceNorm3d(2), (2, 4, 5), r"\[1, 2, 40\], whose first axis does not count samples"),
    ],
)
def test_what_is_not_fused_says_so(model, shape, why):
    x = torch.randn(1, 2, *shape)
    with pytest.raises(ValueError, match=why):
        FusedMAML(nn.Sequential(model, nn.GroupNorm(1, shape[0])), 0.1, loss="mse", backend="fused").adapt(x, x)
