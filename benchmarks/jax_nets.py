"""The models of the workloads in JAX. Parameters have the names that they have in torch; images are channels last.

A convolution is written as the sum of one matrix product per kernel element. vmap over tasks keeps these matrix
products, but turns lax.conv_general_dilated into a grouped convolution, which XLA runs far slower on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from .workloads import LastOfLSTM, MiniImageNetNet, OmniglotNet, ResNet12

Array = Any
Theta = dict[str, Array]
Net = Callable[[Theta, Array], Array]


def conv(x: Array, weight: Array, stride: int = 1, padding: int = 1) -> Array:
    """x `[n, height, width, in]`, weight `[out, in, kernel, kernel]`."""
    kernel = weight.shape[-1]
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    total = 0.0
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            total = total + x[:, rows, columns] @ weight[:, :, i, j].T
    return total


def batch_norm(x: Array, weight: Array, bias: Array) -> Array:
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weight + bias


def max_pool(x: Array) -> Array:
    """Max-pool 2x2; an odd last row or column is dropped."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


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


def omniglot(theta: Theta, x: Array) -> Array:
    x = channels_last(x)
    for i in range(4):
        x = jax.nn.relu(normed(theta, x, f"convs.{i}", f"norms.{i}", stride=2))
    return linear(theta, x.mean((1, 2)), "head")


def mini_imagenet(theta: Theta, x: Array) -> Array:
    x = channels_last(x)
    for i in range(4):
        x = max_pool(jax.nn.relu(normed(theta, x, f"convs.{i}", f"norms.{i}")))
    return linear(theta, x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1), "head")


def resnet12(theta: Theta, x: Array) -> Array:
    x = channels_last(x)
    for i in range(4):
        block = f"blocks.{i}"
        y = jax.nn.leaky_relu(normed(theta, x, f"{block}.convs.0", f"{block}.norms.0"), 0.1)
        y = jax.nn.leaky_relu(normed(theta, y, f"{block}.convs.1", f"{block}.norms.1"), 0.1)
        y = normed(theta, y, f"{block}.convs.2", f"{block}.norms.2")
        y = y + normed(theta, x, f"{block}.shortcut", f"{block}.shortcut_norm", padding=0)
        x = max_pool(jax.nn.leaky_relu(y, 0.1))
    return linear(theta, x.mean((1, 2)), "head")


def lstm(theta: Theta, x: Array) -> Array:
    """The last output of an LSTM, then a linear layer. x `[n, length, inputs]`."""
    weight = theta["lstm.weight_hh_l0"].T
    gates = x @ theta["lstm.weight_ih_l0"].T + theta["lstm.bias_ih_l0"] + theta["lstm.bias_hh_l0"]

    def step(state: tuple[Array, Array], of_input: Array) -> tuple[tuple[Array, Array], None]:
        h, c = state
        i, f, g, o = jnp.split(of_input + h @ weight, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zeros = jnp.zeros((x.shape[0], weight.shape[0]), x.dtype)
    (h, _), _ = jax.lax.scan(step, (zeros, zeros), gates.swapaxes(0, 1))
    return linear(theta, h, "head")


def net(model: nn.Module) -> Net:
    """The JAX function of a workload's model. NotImplementedError if there is none."""
    functions = ((OmniglotNet, omniglot), (MiniImageNetNet, mini_imagenet), (ResNet12, resnet12), (LastOfLSTM, lstm))
    for kind, function in functions:
        if isinstance(model, kind):
            return function
    if isinstance(model, nn.Sequential) and all(isinstance(m, (nn.Linear, nn.ReLU)) for m in model):
        names = [name for name, m in model.named_children() if isinstance(m, nn.Linear)]

        def mlp(theta: Theta, x: Array) -> Array:
            for name in names[:-1]:
                x = jax.nn.relu(linear(theta, x, name))
            return linear(theta, x, names[-1])

        return mlp
    raise NotImplementedError(f"{type(model).__name__} has no JAX version in benchmarks/jax_nets.py")


def mse(outputs: Array, targets: Array) -> Array:
    return ((outputs - targets) ** 2).mean()


def cross_entropy(logits: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


LOSSES = {"mse": mse, "cross_entropy": cross_entropy}
