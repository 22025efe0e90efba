"""Winograd's method for 3 x 3 convolutions: stride 1 in tiles of 4 x 4 outputs or 2 x 2, stride 2 in tiles of 3 x 3.

Partial tiles, channel counts around the vector width and the thresholds, several chunks of tiles, and fused layers.
"""

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML
from tests.conftest import as_good_as_the_reference, check_meta_gradient, fast_parameters, relative_errors


def twice(channels: int, out: int, padding: object = 1, bias: bool = True, stride: int = 1) -> nn.Sequential:
    """A convolution whose input has a tangent."""
    second = nn.Conv2d(channels, out, 3, stride, padding, bias=bias)
    return nn.Sequential(nn.Conv2d(2, channels, 1), second)


SIDES = [  # height, width, padding
    (1, 1, 1),  # too small for the method
    (1, 1, 2),
    (2, 2, 1),
    (2, 3, 1),
    (3, 3, 1),
    (3, 4, 0),
    (4, 4, 1),
    (5, 5, 0),
    (5, 5, 1),
    (5, 8, (0, 1)),
    (4, 6, 2),
    (6, 3, (2, 0)),
    (4, 3, 3),  # more padding than the kernel reaches
    (5, 4, "same"),
    (5, 7, 1),  # tiles of 4 x 4 from here on
    (8, 8, 1),
    (8, 10, 0),
    (7, 9, 1),
    (6, 11, 2),
    (9, 8, (0, 1)),
]


@pytest.mark.parametrize(("height", "width", "padding"), SIDES)
def test_sides(check_passes, height, width, padding):
    check_passes(twice(16, 17, padding), (2, height, width), n=2, tasks=1)


STRIDE_2 = [  # height, width, padding, whether 65 channels to 70 go in tiles
    (4, 4, 0, False),  # too small for the method
    (7, 7, 1, False),
    (5, 5, 0, True),
    (5, 8, 0, True),
    (7, 5, 0, True),
    (6, 6, 1, True),
    (7, 6, 1, True),
    (7, 8, 1, True),
    (8, 11, 1, True),
    (9, 9, 0, True),
    (10, 13, (0, 1), True),
    (12, 9, (1, 0), True),
    (13, 12, 0, True),
    (14, 14, 1, True),
    (15, 7, 0, True),
    (15, 14, 1, True),
    (14, 15, 2, True),
    (16, 14, 2, True),
]


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize(("height", "width", "padding", "tiles"), STRIDE_2)
@pytest.mark.parametrize("n", [1, 3])
def test_stride_2(check_passes, height, width, padding, tiles, n):
    check_passes(twice(65, 70, padding, stride=2), (2, height, width), n=n, tasks=1)


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize(("height", "width", "padding", "tiles"), STRIDE_2)
def test_which_go_in_tiles_of_stride_2(machine, height, width, padding, tiles):
    """In a tile an infinite pixel reaches outputs that do not read it. Each sample has one such pixel."""
    model = twice(65, 70, padding, stride=2)
    pixels = height * width
    x = torch.zeros(1, pixels, 2, pixels)
    x[0, range(pixels), :, range(pixels)] = torch.inf
    x = x.reshape(1, pixels, 2, height, width)
    finite = []
    for backend in ("fused", "reference"):
        maml = FusedMAML(model, 0.1, 1, loss="mse", backend=backend)
        fast = {name: p.detach().expand(1, *p.shape).contiguous() for name, p in model.named_parameters()}
        finite.append(maml.predict(fast, x).isfinite().all(2))
    assert not (finite[0] & ~finite[1]).any()
    assert bool((~finite[0] & finite[1]).any()) == tiles


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize(("channels", "out"), [(26, 26), (31, 33), (48, 40), (64, 64), (80, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_channels_of_stride_2(check_passes, channels, out, bias):
    check_passes(twice(channels, out, bias=bias, stride=2), (2, 14, 8), n=2)


@pytest.mark.parametrize(("channels", "out"), [(15, 16), (16, 15), (16, 16), (17, 31), (33, 24), (64, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_channels(check_passes, channels, out, bias):
    check_passes(twice(channels, out, bias=bias), (2, 4, 5), n=3)


@pytest.mark.parametrize("n", [1, 24, 60])
def test_chunks(check_passes, n):
    """4 tiles a sample: less than one chunk, one chunk, and more."""
    check_passes(twice(16, 16), (2, 4, 4), n=n, tasks=1)
    check_passes(twice(16, 17), (2, 8, 7), n=n, tasks=1)


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("n", [2, 3, 20])
def test_chunks_of_stride_2(check_passes, n):
    """9 tiles a sample in chunks of 24, and an image with more tiles than a chunk."""
    check_passes(twice(64, 64, stride=2), (2, 14, 14), n=n, tasks=1)
    check_passes(twice(33, 40, stride=2), (2, 14, 62), n=1, tasks=1)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("side", [5, 8])
def test_blocks(check_passes, pool, side):
    """Fused with BatchNorm and max-pool, in several groups of samples."""
    layers = [nn.Conv2d(2, 20, 1), nn.Conv2d(20, 18, 3, padding=1), nn.BatchNorm2d(18)]
    check_passes(nn.Sequential(*layers, *[nn.MaxPool2d(2)] * pool), (2, side, side), n=60 if side == 8 else 4, tasks=1)


def test_shared_weights_and_inputs(check_passes):
    """A shared convolution, on a value that two layers read: gradients are summed."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Conv2d(2, 16, 1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            y = torch.tanh(self.first(x))
            return self.shared(self.shared(y) + y)

    check_passes(Twice(), (2, 5, 4), n=2)


@pytest.mark.parametrize(("stride", "side", "out"), [(1, 8, 8), (2, 14, 7)])
def test_float32(machine, stride, side, out):
    """Outputs, gradients and Hessian-vector products err by at most twice torch's own float32 error, plus 2e-6."""
    generator = torch.Generator().manual_seed(0)
    model = twice(64, 64, stride=stride)
    x = torch.randn(1, 5, 2, side, side, generator=generator)
    y = torch.randn(1, 5, 64, out, out, generator=generator)
    fast, v = fast_parameters(model, 1, generator), fast_parameters(model, 1, generator)

    def passes(backend, dtype):
        maml = FusedMAML(model.to(dtype), 0.1, 1, loss="mse", backend=backend)
        at, along = ({n: p.to(dtype) for n, p in w.items()} for w in (fast, v))
        data = (x.to(dtype), y.to(dtype))
        gradient, product = maml.loss_and_grad(at, *data)[1], maml.hvp(at, *data, along)
        return {"y": maml.predict(at, data[0])} | gradient | {f"H {name}": p for name, p in product.items()}

    truth = passes("reference", torch.float64)
    theirs = relative_errors(passes("reference", torch.float32), truth)
    for name, error in relative_errors(passes("fused", torch.float32), truth).items():
        assert error <= 2 * theirs[name] + 2e-6, f"{name}: {error:.1e}, torch {theirs[name]:.1e}"


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_float32_of_the_meta_gradient(machine, steps):
    """Three such convolutions in tiles of 4 x 4; the measured error is a quarter of the limit."""
    layers: list[nn.Module] = []
    for channels in (3, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))
    data = [torch.rand(2, 6, 3, 12, 12) if x else torch.randint(3, (2, 6)) for x in (1, 0, 1, 0)]
    as_good_as_the_reference(model, data, steps)


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_float32_of_the_meta_gradient_of_stride_2(machine, steps):
    """Two such convolutions, as in the second and third layer of the Omniglot net."""
    layers: list[nn.Module] = []
    for channels in (3, 48, 48):
        layers += [nn.Conv2d(channels, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.Tanh()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3))
    data = [torch.rand(2, 6, 3, 28, 28) if x else torch.randint(3, (2, 6)) for x in (1, 0, 1, 0)]
    as_good_as_the_reference(model, data, steps)


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)  # a GPU chooses tiles by the number of samples
@pytest.mark.parametrize(("side", "channels", "stride"), [(5, 16, 1), (9, 16, 1), (14, 40, 2)])
def test_a_sample_does_not_know_its_neighbours(machine, side, channels, stride):
    """A sample's output has the same bits in any set, whatever other tiles are in its chunk."""
    model = twice(channels, channels, stride=stride)
    maml = FusedMAML(model, 0.1, 1, loss="mse", backend="fused")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 60, 2, side, side, generator=generator)
    fast = fast_parameters(model, 1, generator)
    whole = maml.predict(fast, x)
    assert torch.equal(whole[:, 37:40], maml.predict(fast, x[:, 37:40]))


def smooth(norm: bool, pool: bool, padding: object = 1) -> nn.Module:
    """A net whose second and third convolutions use Winograd's method; the third is fused with BatchNorm and pool."""
    between = [nn.BatchNorm2d(17)] * norm + [nn.AvgPool2d(2) if not norm else nn.MaxPool2d(2)] * pool
    layers = [nn.Conv2d(2, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 18, 3, padding=padding), nn.Tanh()]
    layers += [nn.Conv2d(18, 17, 3, padding=1), *between, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(17, 3)).double()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(("norm", "pool"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient(machine, norm, pool, steps, first_order):
    """Odd image sizes, several inner steps."""
    if machine == "cuda_emulated" and (first_order or not (norm and pool)):
        pytest.skip("the GPU's kernels do not go this way; one net takes the emulation long enough")
    generator = torch.Generator().manual_seed(0)
    tasks = 2 if machine == "cuda_emulated" else 3
    data = [torch.randn(tasks, 3, 2, 5, 7, dtype=torch.float64, generator=generator) for _ in range(2)]
    labels = [torch.randint(3, (tasks, 3), generator=generator) for _ in range(2)]
    episode = [data[0], labels[0], data[1], labels[1]]
    check_meta_gradient(smooth(norm, pool), "cross_entropy", episode, 0.1, steps, first_order=first_order)
