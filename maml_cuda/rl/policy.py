"""The Gaussian policy of the paper's third experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

MIN_LOG_STD = math.log(1e-6)


class GaussianPolicy(nn.Module):
    """observation - width - width - action with ReLU, and a log standard deviation that no state changes.

    ``[n, observation_size]`` to mean ``[n, action_size]`` and log_std ``[action_size]``, which is a parameter like any
    other: adapted and meta-learned. Weights start Xavier-uniform, those of the output layer times ``output_scale``,
    biases at 0, standard deviations at ``std``; they never fall below 1e-6.
    """

    def __init__(
        self, observation_size: int, action_size: int, width: int = 100, output_scale: float = 1.0, std: float = 1.0
    ) -> None:
        super().__init__()
        output = nn.Linear(width, action_size)
        self.layers = nn.Sequential(
            nn.Linear(observation_size, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            output,
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        with torch.no_grad():
            output.weight.mul_(output_scale)
        self.log_std = nn.Parameter(torch.full((action_size,), math.log(std)))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(observations), self.log_std.clamp(min=MIN_LOG_STD)


def act(fast: Mapping[str, Tensor], observations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[tasks, n, action_size]`` and log_std ``[tasks, action_size]`` of each task's own GaussianPolicy.

    What ``maml.predict`` returns, as three batched products: in a closed loop of a few thousand samples a step these
    are quicker than a call of the fused pass, which is made for many samples.
    """
    x = observations
    names = [name[:-7] for name in fast if name.startswith("layers.") and name.endswith(".weight")]
    for index, name in enumerate(names):
        x = torch.baddbmm(fast[f"{name}.bias"].unsqueeze(1), x, fast[f"{name}.weight"].mT)
        if index + 1 < len(names):
            x = x.relu_()
    return x, fast["log_std"].clamp(min=MIN_LOG_STD)
