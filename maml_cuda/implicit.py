"""The implicit meta-gradient of one task by plain autograd, and the linear system that it solves (iMAML: Rajeswaran,
Finn, Kakade, Levine 2019).

    (I + H / lambda) x = b

H is the Hessian of the support loss at phi_K in the adapted parameters, b the gradient of the query loss there.
csrc/meta_gradient.h has the same for fused layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from maml_cuda.meta_gradients import MetaGradient

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def surrogate(
    value: Tensor, support: Tensor, phi: Mapping[str, Tensor], theta: Mapping[str, Tensor], how: MetaGradient
) -> tuple[Tensor, Tensor]:
    """A scalar whose gradient in every leaf is the implicit one, and |b - (I + H / lambda) x| / |b|.

    Args:
        value, support: the query loss and the support loss at phi.
        phi: the adapted parameters at phi_K, as leaves.
        theta: the same at phi_0, as leaves.
    """
    at = list(phi.values())
    b = torch.autograd.grad(value, at, retain_graph=True, allow_unused=True, materialize_grads=True)
    slope = torch.autograd.grad(support, at, create_graph=True)

    def hessian_times(v: Sequence[Tensor]) -> tuple[Tensor, ...]:
        along = _dot(slope, v)
        if not along.requires_grad:
            return tuple(torch.zeros_like(p) for p in at)
        return torch.autograd.grad(along, at, retain_graph=True, allow_unused=True, materialize_grads=True)

    assert how.proximal is not None
    if how.cg_steps is None:
        x, residual = _solved(hessian_times, b, how.proximal)
    else:
        x, residual = _conjugate_gradients(hessian_times, b, how.proximal, how.cg_steps, how.cg_tolerance)
    return value - _dot(slope, x) / how.proximal + _dot([theta[name] for name in phi], x), residual


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b>, of complex numbers as of pairs of real ones, in torch's convention of gradients."""
    return torch.stack([(x.conj() * y).real.sum() for x, y in zip(a, b, strict=True)]).sum()


def _conjugate_gradients(
    hessian_times: Product, b: Sequence[Tensor], proximal: float, steps: int, tolerance: float
) -> tuple[list[Tensor], Tensor]:
    """At most so many steps; they end where the residual is tolerance times b. Returns x and |r| / |b|."""
    x, r = [torch.zeros_like(t) for t in b], list(b)
    p, squares = r, _dot(r, r)
    norm = squares.sqrt()
    for _ in range(steps):
        if squares.sqrt() <= tolerance * norm:
            break
        q = [d + h / proximal for d, h in zip(p, hessian_times(p), strict=True)]
        alpha = squares / _dot(p, q)
        x = [a + alpha * d for a, d in zip(x, p, strict=True)]
        r = [a - alpha * d for a, d in zip(r, q, strict=True)]
        before, squares = squares, _dot(r, r)
        p = [a + squares / before * d for a, d in zip(r, p, strict=True)]
    return x, squares.sqrt() / norm if norm > 0 else norm


def _solved(hessian_times: Product, b: Sequence[Tensor], proximal: float) -> tuple[list[Tensor], Tensor]:
    """The exact solution, by the whole Hessian in float64, whose residual is 0."""
    sizes = [t.numel() for t in b]
    rows = []
    for e in torch.eye(sum(sizes), dtype=b[0].dtype, device=b[0].device):
        parts = [part.view_as(t) for part, t in zip(e.split(sizes), b, strict=True)]
        rows.append(torch.cat([h.reshape(-1) for h in hessian_times(parts)]).double())
    matrix = torch.eye(sum(sizes), dtype=torch.float64, device=b[0].device) + torch.stack(rows) / proximal
    x = torch.linalg.solve(matrix, torch.cat([t.reshape(-1) for t in b]).double())
    parts = [part.view_as(t).to(t.dtype) for part, t in zip(x.split(sizes), b, strict=True)]
    return parts, b[0].real.new_zeros(())
