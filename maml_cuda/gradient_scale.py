"""Transforms of the inner gradients that multiply each element by a number, learned or fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda.rates import InnerRates


class Scale(nn.Module):
    """`FusedMAML(model, ..., inner_transform=Scale(factors))`: the gradient of each parameter times a tensor of its
    shape, such as a diagonal preconditioner, or a mask of what the inner loop may change.

    Args:
        factors: name of an adapted parameter -> tensor of its shape. An nn.Parameter is meta-learned.

    Raises:
        TypeError: `factors` is not a dict of floating-point tensors.
        ValueError: a factor is not finite.
    """

    through = "identity"  # what is done with the tensors

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        what = type(self).__name__
        if not isinstance(factors, Mapping):
            raise TypeError(f"{what} must have a dict name -> tensor, got {type(factors).__name__}")
        for name, t in factors.items():
            if not isinstance(t, Tensor) or not t.is_floating_point():
                got = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{what}'s tensor of {name} must be a floating-point tensor, got {got}")
            if not bool(torch.isfinite(t.detach()).all()):
                raise ValueError(f"{what}'s tensor of {name} must be finite, got {t.detach().flatten().tolist()[:8]}")
        self.names = list(factors)
        self.factors = InnerRates(factors)

    def forward(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scaled gradients, by name.

        Raises:
            ValueError: an adapted parameter has no factor, or one of another shape.
        """
        self.check(grads)
        return {name: self._numbers(self.of(name, g.shape).to(g.dtype)) * g for name, g in grads.items()}

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError where a parameter of these names has no tensor."""
        if missing := [name for name in names if name not in self.names]:
            what = type(self).__name__
            raise ValueError(f"{what} must have a tensor of each adapted parameter, got none of {', '.join(missing)}")

    def of(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of a parameter of this name and shape.

        Raises:
            ValueError: it has another shape.
        """
        t = self.factors[name]
        assert isinstance(t, Tensor)
        if t.shape != shape:
            raise ValueError(
                f"{type(self).__name__}'s tensor of {name} must have the parameter's shape {list(shape)}, got "
                f"{list(t.shape)}"
            )
        return t

    def _numbers(self, t: Tensor) -> Tensor:
        return t


class Mask(Scale):
    """`inner_transform=Mask(scores)`: gradients where a score is at least 0, and 0 elsewhere. The derivative of the
    mask by its score is taken as 1 (straight-through), as in sparse-MAML (von Oswald et al. 2021)."""

    through = "mask"

    def _numbers(self, t: Tensor) -> Tensor:
        numbers: Tensor = _StraightThrough.apply(t, torch.ge(t, 0).to(t.dtype))  # type: ignore[no-untyped-call]
        return numbers


class Sign(Scale):
    """`inner_transform=Sign(scores)`: gradients times the sign of a score; the derivative of the sign is taken as 1
    (straight-through)."""

    through = "sign"

    def _numbers(self, t: Tensor) -> Tensor:
        numbers: Tensor = _StraightThrough.apply(t, torch.sign(t))  # type: ignore[no-untyped-call]
        return numbers


class _StraightThrough(torch.autograd.Function):
    """`numbers`, with the derivative of the identity by t."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, numbers: Tensor) -> Tensor:
        return numbers

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
