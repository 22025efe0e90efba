"""The policies: the Gaussian one of the MAML paper (section 5.3), and a categorical one for discrete actions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from maml_cuda.policies import Policy

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
        self.layers = _mlp(observation_size, action_size, width, output_scale)
        self.log_std = nn.Parameter(torch.full((action_size,), math.log(std)))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Observations ``[n, observation_size]`` to mean ``[n, action_size]`` and log_std ``[action_size]``."""
        return self.layers(observations), self.log_std.clamp(min=MIN_LOG_STD)


class CategoricalPolicy(nn.Module):
    """An MLP like that of ``GaussianPolicy`` for the logits of discrete actions.

    Args:
        observation_size: the number of observed values.
        actions: the number of actions.
        width: hidden units per layer.
        output_scale: factor on the initial weights of the output layer.
    """

    def __init__(self, observation_size: int, actions: int, width: int = 100, output_scale: float = 1.0) -> None:
        super().__init__()
        self.layers = _mlp(observation_size, actions, width, output_scale)

    def forward(self, observations: Tensor) -> Tensor:
        """Observations ``[n, observation_size]`` to logits ``[n, actions]``."""
        found: Tensor = self.layers(observations)
        return found


def _mlp(inputs: int, outputs: int, width: int, output_scale: float) -> nn.Sequential:
    output = nn.Linear(width, outputs)
    layers = nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        output,
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        output.weight.mul_(output_scale)
    return layers


def act(fast: Mapping[str, Tensor], observations: Tensor) -> Policy:
    """The output of each task's own policy.

    Of a GaussianPolicy: mean ``[tasks, n, action_size]`` and log_std ``[tasks, action_size]``. Of a CategoricalPolicy:
    logits ``[tasks, n, actions]``. From observations ``[tasks, n, observation_size]``.

    Equal to ``maml.predict``, computed as three batched products. While an environment is sampled there are only a few
    thousand observations per step, and the fused pass, which is made for many samples, would be slower.
    """
    x = observations
    names = [name[:-7] for name in fast if name.startswith("layers.") and name.endswith(".weight")]
    for index, name in enumerate(names):
        x = torch.baddbmm(fast[f"{name}.bias"].unsqueeze(1), x, fast[f"{name}.weight"].mT)
        if index + 1 < len(names):
            x = x.relu_()
    return (x, fast["log_std"].clamp(min=MIN_LOG_STD)) if "log_std" in fast else x


def noise_of_steps(steps: int, shape: tuple[int, ...], discrete: bool, generator: Generator) -> Tensor:
    """The random numbers of ``draw`` for ``steps`` steps, ``[steps, *shape]``: standard normal, or Gumbel."""
    if not discrete:
        return torch.randn((steps, *shape), generator=generator, device=generator.device)
    return -(-torch.rand((steps, *shape), generator=generator, device=generator.device).log()).log()


def draw(policy: Policy, noise: Tensor) -> Tensor:
    """One action in each state, from what ``act`` returns.

    Args:
        policy: mean and log_std, or logits.
        noise: ``[tasks, n, action_size]`` of ``noise_of_steps``.

    Returns:
        ``[tasks, n, action_size]``, or int64 ``[tasks, n]``: the largest of logits plus Gumbel noise.
    """
    if isinstance(policy, Tensor):
        return (policy + noise).argmax(-1)
    mean, log_std = policy
    return mean + log_std.exp().unsqueeze(1) * noise
