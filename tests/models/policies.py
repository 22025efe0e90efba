"""Policies for reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal


class PolicyOfDictionary(nn.Module):
    """pytorch-maml-rl: linear layers by number, `forward(input, params=None)`."""

    def __init__(self, sizes: list[int], nonlinearity: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.nonlinearity, self.num_layers = nonlinearity, len(sizes) - 1
        for i, (a, b) in enumerate(pairwise(sizes), 1):
            self.add_module(f"layer{i}", nn.Linear(a, b))

    def hidden(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        for i in range(1, self.num_layers):
            x = self.nonlinearity(F.linear(x, params[f"layer{i}.weight"], params[f"layer{i}.bias"]))
        return F.linear(x, params[f"layer{self.num_layers}.weight"], params[f"layer{self.num_layers}.bias"])


class CategoricalPolicy(PolicyOfDictionary):
    def forward(self, input: Tensor, params: dict[str, Tensor] | None = None) -> Categorical:
        params = dict(self.named_parameters()) if params is None else params
        return Categorical(logits=self.hidden(input, params))


class NormalPolicy(PolicyOfDictionary):
    """The scale is a parameter, bounded from below."""

    def __init__(self, sizes: list[int], nonlinearity: Callable[[Tensor], Tensor], min_std: float = 1e-6) -> None:
        super().__init__(sizes, nonlinearity)
        self.min_log_std = math.log(min_std)
        self.sigma = nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, input: Tensor, params: dict[str, Tensor] | None = None) -> Independent:
        params = dict(self.named_parameters()) if params is None else params
        scale = torch.exp(torch.clamp(params["sigma"], min=self.min_log_std))
        return Independent(Normal(loc=self.hidden(input, params), scale=scale), 1)


class MultiHeadedMLP(nn.Module):
    """garage's MLPModule: lists of layers and of heads, with LayerNorm of the features in front of each layer."""

    def __init__(self, sizes: list[int], heads: int, norm: bool) -> None:
        super().__init__()
        self._layers = nn.ModuleList()
        for a, b in pairwise(sizes[:-1]):
            layers = nn.Sequential()
            if norm:
                layers.add_module("layer_normalization", nn.LayerNorm(a))
            layers.add_module("linear", nn.Linear(a, b))
            layers.add_module("non_linearity", nn.Tanh())
            self._layers.append(layers)
        self._output_layers = nn.ModuleList(nn.Sequential(nn.Linear(sizes[-2], sizes[-1])) for _ in range(heads))

    def forward(self, input_val: Tensor) -> list[Tensor]:
        x = input_val
        for layer in self._layers:
            x = layer(x)
        return [head(x) for head in self._output_layers]


class MLPModule(MultiHeadedMLP):
    def __init__(self, sizes: list[int], norm: bool) -> None:
        super().__init__(sizes, 1, norm)

    def forward(self, input_val: Tensor) -> Tensor:
        return super().forward(input_val)[0]


class GaussianMLPModule(nn.Module):
    """garage's Gaussian policy: the bounds of the scale are tensors, read by a branch and by `item` in forward."""

    def __init__(self, sizes: list[int], min_std: float = 1e-6) -> None:
        super().__init__()
        self._log_std = nn.Parameter(torch.zeros(sizes[-1]))
        self.register_buffer("min_std_param", torch.tensor([min_std]).log())
        self._max_std_param = None
        self._mean_module = MLPModule(sizes, norm=False)

    def forward(self, inputs: Tensor) -> Independent:
        mean = self._mean_module(inputs)
        log_std = torch.zeros_like(mean) + self._log_std
        if self.min_std_param or self._max_std_param:
            log_std = log_std.clamp(min=self.min_std_param.item(), max=None)
        return Independent(Normal(mean, log_std.exp()), 1)


class CaviaPolicy(nn.Module):
    """CAVIA's policy: a context of the task beside the observation, and a scale of its own."""

    def __init__(self, observation: int, actions: int, hidden: int, context: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(observation + context, hidden), nn.Linear(hidden, actions)
        self.context_params = nn.Parameter(torch.zeros(context))
        self.sigma = nn.Parameter(torch.zeros(actions))
        self.min_log_std = math.log(1e-6)

    def forward(self, input: Tensor) -> Normal:
        context = self.context_params.expand(input.shape[:-1] + self.context_params.shape)
        mu = self.layer2(F.relu(self.layer1(torch.cat((input, context), dim=-1))))
        return Normal(loc=mu, scale=torch.exp(torch.clamp(self.sigma, min=self.min_log_std)))
