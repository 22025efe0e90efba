"""Layers of the workloads' models in JAX. Parameters have the names that they have in torch; images are channels last.

A convolution is written as the sum of one matrix product per kernel element. vmap over tasks keeps these matrix
products, but turns lax.conv_general_dilated into a grouped convolution, which XLA runs far slower on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Array = Any
Theta = dict[str, Array]
Net = Callable[[Theta, Array], Array]


def windows(x: Array, kernel: int, stride: int, padding: int) -> Iterator[tuple[int, int, Array]]:
    """For each kernel element `(i, j)`, what it is multiplied with: `[n, new height, new width, channels]`."""
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            yield i, j, x[:, rows, columns]


def conv(x: Array, weight: Array, stride: int = 1, padding: int = 1) -> Array:
    """x `[n, height, width, in]`, weight `[out, in, kernel, kernel]`."""
    total = 0.0
    for i, j, window in windows(x, weight.shape[-1], stride, padding):
        total = total + window @ weight[:, :, i, j].T
    return total


def depthwise(x: Array, weight: Array, stride: int = 1) -> Array:
    """A convolution of each channel by itself, with half padding. weight `[channels, 1, kernel, kernel]`."""
    kernel = weight.shape[-1]
    total = 0.0
    for i, j, window in windows(x, kernel, stride, kernel // 2):
        total = total + window * weight[:, 0, i, j]
    return total


def conv_transpose(x: Array, weight: Array, bias: Array) -> Array:
    """A transposed convolution whose stride is its kernel. weight `[in, out, kernel, kernel]`."""
    n, height, width, _ = x.shape
    _, channels, kernel, _ = weight.shape
    blocks = jnp.einsum("nhwi,iokl->nhkwlo", x, weight)
    return blocks.reshape(n, height * kernel, width * kernel, channels) + bias


def batch_norm(x: Array, weight: Array, bias: Array) -> Array:
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weight + bias


def max_pool(x: Array) -> Array:
    """Max-pool 2x2; an odd last row or column is dropped.

    As maxima of pairs: the gradient of `x.max(axes)` compares x with its maximum, and a compiled step may compute x
    again with another rounding, so that no element is equal (seen in the U-Net, jax 0.10.2: 35 % off in float64).
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def normed(theta: Theta, x: Array, conv_name: str, norm_name: str, **options: int) -> Array:
    """Convolution (with or without bias), then BatchNorm."""
    z = conv(x, theta[f"{conv_name}.weight"], **options)
    if f"{conv_name}.bias" in theta:
        z = z + theta[f"{conv_name}.bias"]
    return batch_norm(z, theta[f"{norm_name}.weight"], theta[f"{norm_name}.bias"])


def linear(theta: Theta, x: Array, name: str) -> Array:
    return x @ theta[f"{name}.weight"].T + theta[f"{name}.bias"]


def channels_last(x: Array) -> Array:
    return x.transpose(0, 2, 3, 1)


def layer_norm(theta: Theta, x: Array, name: str) -> Array:
    """Over the last axis."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * theta[f"{name}.weight"] + theta[f"{name}.bias"]


def conv1x1(theta: Theta, x: Array, name: str) -> Array:
    """A 1x1 convolution with bias."""
    return x @ theta[f"{name}.weight"][:, :, 0, 0].T + theta[f"{name}.bias"]
