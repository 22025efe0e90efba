"""The models of the workloads in JAX. Parameters have the names that they have in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from torch import nn

from .jax_layers import Array, Net, Theta, channels_last, linear, max_pool, normed
from .jax_modern_nets import MODERN_NETS
from .workloads import LastOfLSTM, MiniImageNetNet, OmniglotNet, ResNet12


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
    for modern, build in MODERN_NETS.items():
        if isinstance(model, modern):
            return build(model)
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
