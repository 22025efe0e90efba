"""The two small networks of the MAML paper (Finn et al. 2017, sections 5.1 and 5.2)."""

from collections import OrderedDict

from torch import nn


def conv4(n_way: int, filters: int = 32, in_channels: int = 1) -> nn.Sequential:
    """Four blocks of 3x3 convolution with stride 2, BatchNorm and ReLU, then Linear.

    ``[n, in_channels, 28, 28]`` to logits ``[n, n_way]``; the last 2x2 positions all reach the classifier.

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
    return nn.Sequential(blocks | {"flatten": nn.Flatten(), "classifier": nn.Linear(4 * filters, n_way)})


def sinusoid_mlp(hidden: int = 40) -> nn.Sequential:
    """1 - hidden - hidden - 1 with ReLU: ``[n, 1]`` to ``[n, 1]``."""
    return nn.Sequential(
        nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )
