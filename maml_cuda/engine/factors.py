"""The transforms of inner gradients that are fused, as linear maps of one parameter after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda.capture.errors import Unfusable
from maml_cuda.gradient_scale import Mask, Scale, Sign
from maml_cuda.meta_curvature import MetaCurvature
from maml_cuda.rates import InnerRates

NAMED = (Scale, Mask, Sign, MetaCurvature)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Factor:
    """A factor of the map of one parameter: `tensor`, and the others as in plan.schema.Factor."""

    tensor: Tensor
    size: int | None
    inner: int
    taps: int
    through: str


def is_named(transform: Any) -> bool:
    """Whether a transform is one of the package's, and nothing of it has been changed (hooks, parametrizations)."""
    if type(transform) not in NAMED:
        return False
    for m in transform.modules():
        if m is not transform and type(m) not in (nn.Module, InnerRates):
            return False
        if "forward" in vars(m) or any(getattr(m, hooks) for hooks in _HOOKS):
            return False
    return True


def factors_of(transform: Any, name: str, p: Tensor, rows: int, taps: int) -> list[Factor]:
    """The factors of the map of a parameter.

    Args:
        rows, taps: of the parameter in the plan.

    Raises:
        Unfusable: the reason why there are none.
        ValueError: the transform has no tensors for such a parameter.
    """
    if transform is None:
        return []
    if isinstance(transform, Scale):
        factors = [Factor(transform.of(name, p.shape), None, 1, 1, transform.through)]
    else:
        factors = _of_curvature(transform.of(name), name, p.shape, rows, taps)
    for factor in factors:
        t = factor.tensor
        if t.device != p.device or not t.is_floating_point():
            raise Unfusable(f"inner_transform's tensor of {name} is {t.dtype} on {t.device}")
        if factor.size is not None and t.shape != (factor.size, factor.size):
            raise Unfusable(f"inner_transform's matrix of {name} has the shape {list(t.shape)}")
    return factors


def _of_curvature(matrices: list[Tensor], name: str, shape: torch.Size, rows: int, taps: int) -> list[Factor]:
    """Of Meta-Curvature: a vector, or a matrix for each axis, the axes of a kernel being one.

    The plan has the parameter as [rows, columns, taps] in torch's order; the core has it as [taps, columns, rows].
    """
    if len(shape) < 2:
        if matrices[0].shape != shape:
            raise Unfusable(f"inner_transform's vector of {name} has the shape {list(matrices[0].shape)}")
        return [Factor(matrices[0], None, 1, 1, "identity")]
    outputs, inputs, kernel = shape[0], shape[1], math.prod(shape[2:])
    if rows == taps == 1:  # in torch's order
        inner, own_taps = [inputs * kernel, kernel, 1], [1, 1, 1]
    elif rows == outputs and len(shape) == 2 and inputs % taps == 0:
        inner, own_taps = [1, outputs, 1], [1, taps, 1]
    elif rows == outputs and taps == kernel:
        inner, own_taps = [1, outputs, inputs * outputs], [1, 1, 1]
    elif rows == 1 and taps == kernel:
        inner, own_taps = [inputs, 1, inputs * outputs], [1, 1, 1]
    elif rows == outputs and taps == 1:
        inner, own_taps = [1, kernel * outputs, outputs], [1, 1, 1]
    else:
        raise Unfusable(
            f"{name} is read as {rows} rows with {taps} taps, which the matrices of MetaCurvature do not fit"
        )
    sizes = [outputs, inputs, kernel]
    return [Factor(m, sizes[axis], inner[axis], own_taps[axis], "identity") for axis, m in enumerate(matrices)]
