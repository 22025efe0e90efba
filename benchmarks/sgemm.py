"""A matrix product, whose rate of FLOP meta-steps are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

SGEMM_SIZE = 1024
SGEMM_FLOPS = 2 * SGEMM_SIZE**3


def sgemm() -> Callable[[], object]:
    """A large float32 matrix product (torch's BLAS, all threads): the rate that FLOP counts are compared with."""
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
