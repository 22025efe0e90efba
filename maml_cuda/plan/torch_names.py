"""Tables of the modules, functions and methods of torch that are fused, each with the method of Layers that reads it.

The functions of this file are for modules: they pass a module's parameters and options to the method.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from maml_cuda.batch_norm import PerStepBatchNorm, PerStepBatchNorm1d, PerStepBatchNorm2d
from maml_cuda.plan.graph import Value
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.schema import Layout
from maml_cuda.plan.side_effects import Unfusable


def _convolution(layers: Layers, m: Any, input: Any, *, axes: int) -> Value:
    if m.padding_mode != "zeros":
        raise Unfusable(f"padding_mode={m.padding_mode!r} is not fused")
    return layers.conv(input, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, axes=axes)


def _batch_norm(*layouts: Layout) -> Callable[[Layers, Any, Any], Value]:
    def layer(layers: Layers, m: Any, input: Any) -> Value:
        batch_statistics = m.training or (m.running_mean is None and m.running_var is None)
        slots = m.steps if isinstance(m, PerStepBatchNorm) else None
        return layers.batch_norm(
            input, m.running_mean, m.running_var, m.weight, m.bias, batch_statistics, eps=m.eps, layouts=layouts,
            slots=slots, num_features=m.num_features,
        )  # fmt: skip

    return layer


def _group_norm(layers: Layers, m: Any, input: Any) -> Value:
    return layers.group_norm(input, m.num_groups, m.weight, m.bias, m.eps)


def _layer_norm(layers: Layers, m: Any, input: Any) -> Value:
    return layers.layer_norm(input, m.normalized_shape, m.weight, m.bias, m.eps)


def _instance_norm(layout: Layout) -> Callable[[Layers, Any, Any], Value]:
    def layer(layers: Layers, m: Any, input: Any) -> Value:
        use_input_stats = m.training or not m.track_running_stats
        return layers.instance_norm(
            input, m.running_mean, m.running_var, m.weight, m.bias, use_input_stats, eps=m.eps, layouts=(layout,)
        )

    return layer


def _flatten(layers: Layers, m: Any, input: Any) -> Value:
    return layers.flatten(input, m.start_dim, m.end_dim)


def _dropout(layers: Layers, m: Any, input: Any) -> Value:
    return layers.dropout(input, m.p, m.training)


def _max_pool(layers: Layers, m: Any, input: Any, *, axes: int) -> Value:
    return layers.max_pool(
        input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices, axes=axes
    )


def _avg_pool(layers: Layers, m: Any, input: Any, *, axes: int) -> Value:
    divisor = getattr(m, "divisor_override", None)  # AvgPool1d has no such option
    return layers.avg_pool(
        input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor, axes=axes
    )


def _adaptive_avg_pool(layers: Layers, m: Any, input: Any, *, axes: int) -> Value:
    return layers.adaptive_avg_pool(input, m.output_size, axes=axes)


MODULES: dict[type, Callable[..., Value]] = {
    nn.Linear: lambda layers, m, input: layers.linear(input, m.weight, m.bias),
    nn.Conv1d: partial(_convolution, axes=1),
    nn.Conv2d: partial(_convolution, axes=2),
    nn.BatchNorm1d: _batch_norm("features", "signal"),
    nn.BatchNorm2d: _batch_norm("image"),
    PerStepBatchNorm1d: _batch_norm("features", "signal"),
    PerStepBatchNorm2d: _batch_norm("image"),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.InstanceNorm1d: _instance_norm("signal"),
    nn.InstanceNorm2d: _instance_norm("image"),
    nn.ReLU: lambda layers, m, input: layers.relu(input, m.inplace),
    nn.ReLU6: lambda layers, m, input: layers.relu6(input, m.inplace),
    nn.LeakyReLU: lambda layers, m, input: layers.leaky_relu(input, m.negative_slope, m.inplace),
    nn.ELU: lambda layers, m, input: layers.elu(input, m.alpha, m.inplace),
    nn.SELU: lambda layers, m, input: layers.selu(input, m.inplace),
    nn.CELU: lambda layers, m, input: layers.celu(input, m.alpha, m.inplace),
    nn.SiLU: lambda layers, m, input: layers.silu(input, m.inplace),
    nn.GELU: lambda layers, m, input: layers.gelu(input, m.approximate),
    nn.Softplus: lambda layers, m, input: layers.softplus(input, m.beta, m.threshold),
    nn.Tanh: lambda layers, m, input: layers.tanh(input),
    nn.Sigmoid: lambda layers, m, input: layers.sigmoid(input),
    nn.Hardtanh: lambda layers, m, input: layers.hardtanh(input, m.min_val, m.max_val, m.inplace),
    nn.MaxPool1d: partial(_max_pool, axes=1),
    nn.MaxPool2d: partial(_max_pool, axes=2),
    nn.AvgPool1d: partial(_avg_pool, axes=1),
    nn.AvgPool2d: partial(_avg_pool, axes=2),
    nn.AdaptiveAvgPool1d: partial(_adaptive_avg_pool, axes=1),
    nn.AdaptiveAvgPool2d: partial(_adaptive_avg_pool, axes=2),
    nn.Flatten: _flatten,
    nn.Identity: lambda layers, m, input: layers.identity(input),
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.AlphaDropout: _dropout,
}

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: Layers.linear,
    F.conv1d: partial(Layers.conv, axes=1),
    F.conv2d: Layers.conv,
    torch.conv1d: partial(Layers.conv, axes=1),
    torch.conv2d: Layers.conv,
    F.batch_norm: Layers.batch_norm,
    F.group_norm: Layers.group_norm,
    torch.group_norm: Layers.group_norm,
    F.layer_norm: Layers.layer_norm,
    torch.layer_norm: Layers.layer_norm,
    F.instance_norm: Layers.instance_norm,
    F.max_pool1d: partial(Layers.max_pool, axes=1),
    F.max_pool2d: Layers.max_pool,
    torch.max_pool1d: partial(Layers.max_pool, axes=1),
    torch.max_pool2d: Layers.max_pool,
    F.avg_pool1d: partial(Layers.avg_pool, axes=1),
    F.avg_pool2d: Layers.avg_pool,
    F.adaptive_avg_pool1d: partial(Layers.adaptive_avg_pool, axes=1),
    F.adaptive_avg_pool2d: Layers.adaptive_avg_pool,
    torch.mean: Layers.mean,
    torch.flatten: Layers.flatten,
    torch.reshape: Layers.reshape,
    torch.add: Layers.add,
    torch.clamp: Layers.clamp,
    operator.add: Layers.add,
    operator.iadd: Layers.iadd,
    torch.mul: Layers.mul,
    operator.mul: Layers.mul,
    torch.neg: Layers.neg,
    operator.neg: Layers.neg,
    F.relu: Layers.relu,
    F.relu_: Layers.relu_,
    torch.relu: Layers.relu,
    torch.relu_: Layers.relu_,
    F.relu6: Layers.relu6,
    F.leaky_relu: Layers.leaky_relu,
    F.elu: Layers.elu,
    F.selu: Layers.selu,
    F.celu: Layers.celu,
    F.silu: Layers.silu,
    F.gelu: Layers.gelu,
    F.softplus: Layers.softplus,
    F.hardtanh: Layers.hardtanh,
    F.tanh: Layers.tanh,
    torch.tanh: Layers.tanh,
    F.sigmoid: Layers.sigmoid,
    torch.sigmoid: Layers.sigmoid,
    torch.sin: Layers.sin,
    F.dropout: Layers.dropout,
    F.dropout2d: Layers.dropout,
    builtins.getattr: Layers.get_attribute,
    operator.getitem: Layers.get_item,
}

METHODS: dict[str, Callable[..., Any]] = {
    "relu": Layers.relu,
    "relu_": Layers.relu_,
    "tanh": Layers.tanh,
    "sigmoid": Layers.sigmoid,
    "sin": Layers.sin,
    "mean": Layers.mean,
    "flatten": Layers.flatten,
    "view": Layers.reshape,
    "reshape": Layers.reshape,
    "add": Layers.add,
    "clamp": Layers.clamp,
    "expand": Layers.expand,
    "expand_as": Layers.expand_as,
    "add_": Layers.iadd,
    "mul": Layers.mul,
    "neg": Layers.neg,
    "size": Layers.size,
    "contiguous": Layers.identity,
}
