"""The small networks of the MAML paper (Finn et al. 2017, sections 5.1 and 5.2)."""

from collections import OrderedDict

from torch import nn


def conv4(n_way: int, filters: int = 32, in_channels: int = 1) -> nn.Sequential:
    """Four blocks of 3x3 convolution with stride 2, BatchNorm and ReLU, mean over space, Linear.

    ``[n, in_channels, height, width]`` to logits ``[n, n_way]``. Without the mean, with 2x2 positions of 28x28 images
    left, the glyphs were learned better (92 % of the training scripts) and read worse (81 % of the test scripts).

    BatchNorm keeps no running statistics: MAML normalizes with those of the batch, in training and in test.
    """
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, 5):
        blocks[f"block{index}"] = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, filters, kernel_size=3, stride=2, padding=1),
                norm=nn.BatchNorm2d(filters, track_running_stats=False),
                relu=nn.ReLU(),
            )
        )
        in_channels = filters
    head = {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(filters, n_way)}
    return nn.Sequential(blocks | head)


def conv4_max_pool(n_way: int, filters: int, in_channels: int, height: int, width: int) -> nn.Sequential:
    """Four blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max-pool, Linear: the paper's for mini-ImageNet, with 32
    filters. ``[n, in_channels, height, width]`` to logits ``[n, n_way]``.

    ValueError where a side is shorter than 16, of which four pools leave nothing.
    """
    if min(height, width) < 16:
        raise ValueError(f"images must have at least 16 x 16 pixels for four max-pools, got {height} x {width}")
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, 5):
        blocks[f"block{index}"] = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, filters, kernel_size=3, padding=1),
                norm=nn.BatchNorm2d(filters, track_running_stats=False),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(2),
            )
        )
        in_channels = filters
    features = filters * (height // 16) * (width // 16)
    return nn.Sequential(blocks | {"flatten": nn.Flatten(), "classifier": nn.Linear(features, n_way)})


def sinusoid_mlp(hidden: int = 40, inputs: int = 1) -> nn.Sequential:
    """inputs - hidden - hidden - 1 with ReLU: ``[n, inputs]`` to ``[n, 1]``."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )
