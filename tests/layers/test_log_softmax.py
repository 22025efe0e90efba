"""log_softmax beside the others of its kind (test_softmax.py has the cases of both): what only a logarithm can show."""

import pytest
import torch
from torch import Tensor, nn


class LogOfTokens(nn.Module):
    """Tokens [n, length, features] whose logarithms of probabilities are weighed by a parameter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim = dim
        self.first, self.weights = nn.Linear(3, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x).log_softmax(self.dim) * self.weights).sum(1)


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("n", [1, 5, 17])
def test_passes(check_passes, dim, n):
    check_passes(LogOfTokens(dim), (5, 3), n)


class Far(LogOfTokens):
    """Differences of a thousand between logits, where the logarithm of a softmax would be -inf."""

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.arange(4, dtype=x.dtype) * 1000
        return ((self.first(x) + shift).log_softmax(self.dim) * self.weights).sum(1)


def test_far_logits(check_passes):
    check_passes(Far(-1), (5, 3), 4)
