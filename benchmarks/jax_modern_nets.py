"""The models of benchmarks/modern_nets.py in JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from .jax_layers import (
    Array,
    Net,
    Theta,
    batch_norm,
    channels_last,
    conv1x1,
    conv_transpose,
    depthwise,
    layer_norm,
    linear,
    max_pool,
    normed,
)
from .modern_nets import Burgers, MobileNet, SelfAttention, Siren, Transformer, UNet, ViT


def attention(theta: Theta, x: Array, name: str, heads: int) -> Array:
    n, tokens, width = x.shape
    parts = jnp.split(linear(theta, x, f"{name}.qkv"), 3, -1)
    q, k, v = (part.reshape(n, tokens, heads, -1).swapaxes(1, 2) for part in parts)
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * (width // heads) ** -0.5, -1)
    return linear(theta, (weights @ v).swapaxes(1, 2).reshape(n, tokens, width), f"{name}.out")


def transformer_blocks(theta: Theta, x: Array, count: int, heads: int) -> Array:
    for i in range(count):
        block = f"blocks.{i}"
        x = x + attention(theta, layer_norm(theta, x, f"{block}.attention_norm"), f"{block}.attention", heads)
        hidden = linear(theta, layer_norm(theta, x, f"{block}.feed_norm"), f"{block}.feed_in")
        x = x + linear(theta, jax.nn.gelu(hidden, approximate=False), f"{block}.feed_out")
    return x


def transformer(count: int, heads: int, theta: Theta, x: Array) -> Array:
    x = linear(theta, x, "embed") + theta["positions"]
    return linear(theta, transformer_blocks(theta, x, count, heads).mean(1), "head")


def vit(count: int, heads: int, theta: Theta, x: Array) -> Array:
    weight = theta["embed.weight"]  # [width, 3, patch, patch]
    width, channels, patch, _ = weight.shape
    n, _, *sides = x.shape
    rows, columns = (side // patch for side in sides)
    x = x.reshape(n, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
    patches = x.reshape(n, rows * columns, -1) @ weight.reshape(width, -1).T + theta["embed.bias"]
    token = jnp.broadcast_to(theta["token"], (n, 1, width))
    x = jnp.concatenate((token, patches), 1) + theta["positions"]
    x = transformer_blocks(theta, x, count, heads)
    return linear(theta, layer_norm(theta, x, "norm")[:, 0], "head")


def siren(layers: int, theta: Theta, x: Array) -> Array:
    for i in range(layers - 1):
        x = jnp.sin(30 * linear(theta, x, f"layers.{i}"))
    return linear(theta, x, f"layers.{layers - 1}")


def mbconv(theta: Theta, x: Array, name: str, stride: int, residual: bool) -> Array:
    y = jax.nn.silu(normed(theta, x, f"{name}.expand", f"{name}.expand_norm", padding=0))
    y = depthwise(y, theta[f"{name}.depthwise.weight"], stride)
    norm = f"{name}.depthwise_norm"
    y = jax.nn.silu(batch_norm(y, theta[f"{norm}.weight"], theta[f"{norm}.bias"]))
    squeezed = jax.nn.silu(conv1x1(theta, y.mean((1, 2), keepdims=True), f"{name}.excitation.squeeze"))
    y = y * jax.nn.sigmoid(conv1x1(theta, squeezed, f"{name}.excitation.excite"))
    y = normed(theta, y, f"{name}.project", f"{name}.project_norm", padding=0)
    return x + y if residual else y


def mobile_net(blocks: list[tuple[int, bool]], theta: Theta, x: Array) -> Array:
    """blocks: the stride of each, and whether it has a residual sum."""
    x = jax.nn.silu(normed(theta, channels_last(x), "stem", "stem_norm", stride=2))
    for i, (stride, residual) in enumerate(blocks):
        x = mbconv(theta, x, f"blocks.{i}", stride, residual)
    return linear(theta, x.mean((1, 2)), "head")


def double_conv(theta: Theta, x: Array, name: str) -> Array:
    for i in range(2):
        x = jax.nn.relu(normed(theta, x, f"{name}.convs.{i}", f"{name}.norms.{i}"))
    return x


def unet(levels: int, theta: Theta, x: Array) -> Array:
    x, skips = channels_last(x), []
    for i in range(levels):
        x = double_conv(theta, x, f"down.{i}")
        skips.append(x)
        x = max_pool(x)
    x = double_conv(theta, x, "bottom")
    for i in range(levels):
        x = conv_transpose(x, theta[f"grow.{i}.weight"], theta[f"grow.{i}.bias"])
        x = double_conv(theta, jnp.concatenate((skips.pop(), x), -1), f"up.{i}")
    return conv1x1(theta, x, "head").transpose(0, 3, 1, 2)


def burgers(layers: int, theta: Theta, points: Array) -> Array:
    """The derivatives by the points in forward mode, which needs no second pass."""
    x, t = points[:, :1], points[:, 1:]
    ones = jnp.ones_like(x)

    def u_of(x: Array, t: Array) -> Array:
        u = jnp.concatenate((x, t), 1)
        for i in range(layers - 1):
            u = jnp.tanh(linear(theta, u, f"layers.{i}"))
        return linear(theta, u, f"layers.{layers - 1}")

    def u_and_u_x(x: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda x: u_of(x, t), (x,), (ones,))

    (u, u_x), (_, u_xx) = jax.jvp(u_and_u_x, (x,), (ones,))
    u_t = jax.jvp(lambda t: u_of(x, t), (t,), (ones,))[1]
    return jnp.concatenate((u, u_t + u * u_x - Burgers.VISCOSITY * u_xx), 1)


def heads(model: Transformer | ViT) -> int:
    return next(module.heads for module in model.modules() if isinstance(module, SelfAttention))


def strides(model: MobileNet) -> list[tuple[int, bool]]:
    return [(block.depthwise.stride[0], block.residual) for block in model.blocks]


MODERN_NETS: dict[type, Callable[..., Net]] = {
    Transformer: lambda model: partial(transformer, len(model.blocks), heads(model)),
    ViT: lambda model: partial(vit, len(model.blocks), heads(model)),
    Siren: lambda model: partial(siren, len(model.layers)),
    MobileNet: lambda model: partial(mobile_net, strides(model)),
    UNet: lambda model: partial(unet, len(model.down)),
    Burgers: lambda model: partial(burgers, len(model.layers)),
}
