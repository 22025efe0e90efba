"""Faults: autograd.Functions and operators with derivatives of their own, and other dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.capture.planted.settings import add, fault

# -- functions with derivatives of their own ----------------------------------------------------------------------

FUNCTION = "custom functions"


class Rounded(torch.autograd.Function):
    """The right value, the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.round(decimals=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Clipped(torch.autograd.Function):
    """The gradient is right where it is small."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.01, 0.01)


class Square(torch.autograd.Function):
    """The right value and gradient, a wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * grad


class Once(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Cubed(torch.autograd.Function):
    """With the newer form of the context; all derivatives are right."""

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Stateful(torch.autograd.Function):
    """The gradient depends on a global number."""

    strength = 1.0

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * Stateful.strength


def function(name: str, on: str, which: Any, **rest: Any) -> None:
    words = f"{which.__name__}|Function"
    add(name, FUNCTION, on, words, methods={"middle": lambda self, h: which.apply(h)}, **rest)


function("rounded", "mlp", Rounded)
function("a gradient reversed", "conv4", Reversed)
function("a gradient clipped", "layer norm", Clipped)
function("a wrong second derivative", "nested", Square)
function("differentiable once", "policy", Once)
function("all derivatives right", "group norm", Cubed)
function(
    "a gradient that depends on a global", "shared", Stateful,
    plant=lambda m: setattr(Stateful, "strength", 1.0), between=lambda m: setattr(Stateful, "strength", 2.0),
)  # fmt: skip


class Layer(nn.Module):
    """A function in an activation, one module down."""

    def forward(self, h: Tensor) -> Tensor:
        return Square.apply(h)


add("in a layer of the body", FUNCTION, "conv1d", "Square|Function|Layer", plant=lambda m: m.body.append(Layer()))


@torch.library.custom_op("planted::half_gradient", mutates_args=())
def half_gradient(h: Tensor) -> Tensor:
    return h.clone()


half_gradient.register_fake(torch.empty_like)
half_gradient.register_autograd(lambda ctx, grad: grad / 2)
add("a custom operator", FUNCTION, "resnet", "half_gradient", methods={"middle": lambda self, h: half_gradient(h)})
add(
    "a custom operator under another activation", FUNCTION, "regression", "half_gradient",
    methods={"middle": lambda self, h: torch.tanh(half_gradient(h))},
)  # fmt: skip

# -- other dtypes -------------------------------------------------------------------------------------------------

DTYPE = "other dtypes"


@fault(DTYPE, "mlp", "autocast")
def autocast_inside(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (h.float() @ h.new_ones(5, 5).float()).double() + h


@fault(DTYPE, "nested", "float|dtype")
def through_float32(self: Any, h: Tensor) -> Tensor:
    return (h.float() + 1000).double() - 1000


@fault(DTYPE, "conv1d", "bfloat16|dtype")
def through_bfloat16(self: Any, h: Tensor) -> Tensor:
    return h.to(torch.bfloat16).to(h.dtype)


@fault(DTYPE, "regression", "complex")
def through_complex_numbers(self: Any, h: Tensor) -> Tensor:
    z = torch.view_as_complex(h.reshape(len(h), 3, 2))
    return torch.view_as_real(z * z).reshape(h.shape)


@fault(DTYPE, "layer norm", "fft|complex")
def through_fourier_space(self: Any, h: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h) * 1j, n=6)


@fault(DTYPE, "policy", "int|long|dtype")
def through_integers(self: Any, h: Tensor) -> Tensor:
    return h * (h * 4).long()
