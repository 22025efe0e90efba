"""Networks that mix tokens by linear layers, and gated linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.attention import Patches


class PreNormResidual(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x)) + x


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp_mixer(image: int, patch: int, dim: int, depth: int, classes: int) -> nn.Sequential:
    """mlp-mixer-pytorch: tokens are mixed by convolutions of kernel 1 whose channels are the tokens."""
    tokens = (image // patch) ** 2
    layers: list[nn.Module] = [Patches(patch), nn.Linear(3 * patch**2, dim)]
    for _ in range(depth):
        over_tokens = nn.Sequential(nn.Conv1d(tokens, 2 * tokens, 1), nn.GELU(), nn.Conv1d(2 * tokens, tokens, 1))
        over_channels = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        layers.append(nn.Sequential(PreNormResidual(dim, over_tokens), PreNormResidual(dim, over_channels)))
    return nn.Sequential(*layers, nn.LayerNorm(dim), Mean(), nn.Linear(dim, classes))


class RMSNorm(nn.Module):
    """In float32 at least: a float16 or bfloat16 input is cast before its square."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(dim)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class SwiGluBlock(nn.Module):
    """ttt-lm-pytorch: RMSNorm, then a linear layer gated by another, and the residual around both."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.ffn_norm = RMSNorm(dim)
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        x = self.ffn_norm(hidden_states)
        return residual + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
