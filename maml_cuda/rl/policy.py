"""The Gaussian policy of the MAML paper (section 5.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

MIN_LOG_STD = math.log(1e-6)


class GaussianPolicy(nn.Module):
    """An MLP with two hidden layers and ReLU for the mean, and a log standard deviation that does not depend on the
    state.

    The log standard deviation is a parameter: it is adapted and meta-learned like the others. Initial weights are
    Xavier-uniform, those of the output layer multiplied by ``output_scale``; biases are 0. Standard deviations are
    clamped to at least 1e-6.

    Args:
        observation_size: the number of observed values.
        action_size: the number of values of an action.
        width: hidden units per layer.
        output_scale: factor on the initial weights of the output layer.
        std: the initial standard deviation.
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
        """Observations ``[n, observation_size]`` to mean ``[n, action_size]`` and log_std ``[action_size]``."""
        return self.layers(observations), self.log_std.clamp(min=MIN_LOG_STD)


def act(fast: Mapping[str, Tensor], observations: Tensor) -> tuple[Tensor, Tensor]:
    """The output of each task's own GaussianPolicy.

    Mean ``[tasks, n, action_size]`` and log_std ``[tasks, action_size]``, from observations
    ``[tasks, n, observation_size]``.

    Equal to ``maml.predict``, computed as three batched products. While an environment is sampled there are only a few
    thousand observations per step, and the fused pass, which is made for many samples, would be slower.
    """
    x = observations
    names = [name[:-7] for name in fast if name.startswith("layers.") and name.endswith(".weight")]
    for index, name in enumerate(names):
        x = torch.baddbmm(fast[f"{name}.bias"].unsqueeze(1), x, fast[f"{name}.weight"].mT)
        if index + 1 < len(names):
            x = x.relu_()
    return x, fast["log_std"].clamp(min=MIN_LOG_STD)
