"""The layers on features, signals and images: one method for each ATen operation that they serve, which writes its
nodes or raises Unfusable.

A method has the name and the signature of the operation, and returns what the operation returns. A new layer needs one
method here. Operations that only change how a tensor is seen are in views.py, those on tensors of any shape in
tensors.py.

The operations serve signals [n, channels, length] and images [n, channels, height, width]. For the core, a signal is
an image of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from maml_cuda.batch_norm import PerStepBatchNorm
from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Held, LogSumExp, Value, text_of
from maml_cuda.plan.schema import Window
from maml_cuda.plan.views import Views
from maml_cuda.plan.windows import of_each

_ONE = Window((1, 1), (1, 1), (0, 0), (0, 0))


class Layers(Views):
    """Writes a Graph, operation by operation."""

    # -- products -----------------------------------------------------------------------------------------------

    def addmm(self, bias: Any, input: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Value:
        """A linear layer is a convolution of features, which are an image of 1 x 1."""
        if (beta, alpha) != (1, 1):
            raise Unfusable(f"beta={beta} and alpha={alpha} are not fused")
        x = self.value(input)
        if not isinstance(weight, Held) or not weight.transposed:
            raise Unfusable(f"it multiplies by {text_of(weight)}; fused is the product with a transposed weight matrix")
        return self.linear_of_features(x, weight, bias)

    def linear_of_features(self, x: Value, weight: Held, bias: Held | None) -> Value:
        """The product of features with a matrix [in, out], which may be the transpose of a parameter."""
        if len(weight.shape) != 2 or not replace(weight, transposed=False).whole:
            raise Unfusable(f"it multiplies by {weight}")
        in_features, out_features = weight.shape
        rows = out_features if weight.transposed else 1
        parameters = (self.tensor(weight, "weight", rows), self.vector(bias, "bias", out_features))
        return self.emit(
            "conv2d", [x], (self.n, out_features), (out_features,), parameters, in_features=in_features,
            out_features=out_features, window=_ONE,
        )  # fmt: skip

    def mm(self, input: Any, weight: Any) -> Value:
        return self.addmm(None, input, weight)

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Value:
        return self.addmm(bias, input, self.t(weight))

    def convolution(
        self, input: Any, weight: Any, bias: Any, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    ) -> Value:  # fmt: skip
        axes = len(stride)
        if transposed or groups != 1 or any(d != 1 for d in dilation):
            option = f"groups={groups}" if groups != 1 else f"dilation={list(dilation)}"
            raise Unfusable(f"{'a transposed convolution' if transposed else option} is not fused")
        added = input.padding if isinstance(input, Value) else None
        x = self.channels_last(replace(input, padding=None) if added else input)
        self.spatial(x, axes)
        if not isinstance(weight, Held) or not weight.whole or len(weight.shape) != 2 + axes:
            raise Unfusable(f"its weight is {text_of(weight)}, not a parameter [out, in, ...]")
        rows, columns, *sizes = weight.shape
        kernel, pad = self._pair(sizes, 1), self._pair(of_each(padding, axes), 0)
        begin, end = (tuple(p + a[i] for p, a in zip(pad, added or ((0, 0), (0, 0)), strict=True)) for i in (0, 1))
        window = Window(kernel, self._pair(stride, 1), begin, end)
        self._check_height(x, window)
        parameters = (self.tensor(weight, "weight", rows, math.prod(kernel)), self.vector(bias, "bias", rows))
        return self._slid("conv2d", x, window, rows, parameters, in_features=columns, out_features=rows)

    # -- normalisation ------------------------------------------------------------------------------------------

    def native_batch_norm(
        self, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
        momentum: float, eps: float,
    ) -> tuple[Value, None, None]:  # fmt: skip
        """By batch statistics if `training`, by running ones otherwise. The slots of a per-step layer are its own."""
        x = self.channels_last(input)
        self._check_channels(x)
        module = self.module_at(self.module)
        slots = module.steps if isinstance(module, PerStepBatchNorm) else None
        channels = x.sample[0]
        affine = (self.vector(weight, "weight", channels, slots), self.vector(bias, "bias", channels, slots))
        if training:
            y = self.emit("batch_norm", [x], x.shape, x.sample, affine, eps=eps, in_features=channels)
        else:
            statistics = (
                self.vector(running_mean, "running mean", channels, slots),
                self.vector(running_var, "running variance", channels, slots),
            )
            parameters = (*affine, *statistics)
            y = self.emit("running_norm", [x], x.shape, x.sample, parameters, eps=eps, in_features=channels)
        return y, None, None

    def native_group_norm(
        self, input: Any, weight: Any, bias: Any, n: int, channels: int, pixels: int, groups: int, eps: float
    ) -> tuple[Value, None, None]:
        """groups=0: every channel is a group."""
        x = self.channels_last(input)
        self._check_channels(x)
        affine = (self.vector(weight, "weight", channels), self.vector(bias, "bias", channels))
        y = self.emit("group_norm", [x], x.shape, x.sample, affine, eps=eps, groups=groups, in_features=channels)
        return y, None, None

    def native_layer_norm(
        self, input: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float
    ) -> tuple[Value, None, None]:
        """A group_norm with one group, in which every element of a sample is a feature with its own gamma and beta."""
        x, shape = self.channels_last(input), tuple(shape)
        if shape != x.sample or x.shape[1:] != x.sample or len(shape) > 3:
            raise Unfusable(
                f"normalized_shape={list(shape)} is not fused; only that of a whole sample of at most 3 axes is"
            )
        affine = []
        for p, what in ((weight, "weight"), (bias, "bias")):
            if isinstance(p, Held) and (p.shape != shape or not p.whole):
                raise Unfusable(f"its {what} is {p} of shape {list(p.shape)}; only {list(shape)} is fused")
            taps = math.prod(shape[1:])  # torch has channels first in gamma and beta, the core has them last
            affine.append(self.tensor(p, what, *((shape[0], taps) if taps > 1 else ())))
        y = self.emit("group_norm", [x], x.shape, x.sample, tuple(affine), eps=eps, groups=1, normalised=shape)
        return y, None, None

    def instance_norm(
        self, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
        use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, cudnn_enabled: bool = True,
    ) -> Value:  # fmt: skip
        """A group_norm whose groups are single channels; by running statistics, a batch_norm."""
        if not use_input_stats:
            return self.native_batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)[0]
        if running_mean is not None or running_var is not None:
            raise Unfusable("it tracks running statistics in train mode, which is not fused; it is fused in eval mode")
        x = self.value(input)
        return self.native_group_norm(x, weight, bias, self.n, x.sample[0], 0, 0, eps)[0]

    # -- pools --------------------------------------------------------------------------------------------------

    def max_pool2d_with_indices(
        self, input: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1), ceil_mode: bool = False,
    ) -> tuple[Value, None]:  # fmt: skip
        if any(d != 1 for d in dilation):
            raise Unfusable("dilation is not fused")
        return self._pool("max_pool", input, kernel_size, stride, padding, ceil_mode, None), None

    def avg_pool2d(
        self, input: Any, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Value:  # fmt: skip
        if divisor_override is not None:
            raise Unfusable("divisor_override is not fused")
        return self._pool("avg_pool", input, kernel_size, stride, padding, ceil_mode, count_include_pad)

    def _pool(
        self, kind: str, input: Any, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        ceil_mode: bool, count_padding: bool | None,
    ) -> Value:  # fmt: skip
        if ceil_mode:
            raise Unfusable("ceil_mode is not fused")
        x = self.channels_last(input)
        self.spatial(x, 2)
        kernel, step, pad = (self._pair(of_each(o, 2), 1) for o in (kernel_size, stride or kernel_size, padding))
        window = Window(kernel, step, pad, pad)
        self._check_height(x, window)
        return self._slid(kind, x, window, x.sample[0], (), count_padding=count_padding)

    def mean(self, input: Any, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
        x = self.channels_last(input)
        axes = {d % len(x.shape) for d in dim or ()}
        spatial = set(range(2, len(x.shape)))
        self._check_channels(x)
        if not spatial or axes != spatial or dtype is not None or len(x.sample) == 1:
            raise Unfusable(f"the mean over {dim} is not fused; only the mean over all spatial axes is")
        sample = x.sample[:1] if not keepdim else (x.sample[0], *[1] * (len(x.sample) - 1))
        return self.emit("mean_pool", [x], self.results[0], sample, out_layout=None if keepdim else "features")

    @staticmethod
    def _pair(sizes: Sequence[int], height: int) -> tuple[int, int]:
        """(height, width) from one or two sizes; `height` for the height if there is one spatial axis, a length."""
        return (sizes[0], sizes[1]) if len(sizes) == 2 else (height, sizes[0])

    def _check_channels(self, x: Value) -> None:
        if len(x.sample) > 3:
            raise Unfusable(f"its input is of shape {list(x.shape)}; fused are inputs of at most 4 axes")
        if len(x.shape) < 2 or x.shape[1] != x.sample[0]:
            raise Unfusable(f"its input is of shape {list(x.shape)}, a view of samples of shape {list(x.sample)}")

    def _check_height(self, x: Value, window: Window) -> None:
        """The window of a signal or of features has height 1, and of features width 1."""
        axes = len(x.sample) - 1
        sizes = zip(window.kernel, window.stride, window.pad_begin, window.pad_end, strict=True)
        for size in list(sizes)[: 2 - axes]:
            if size[0] != 1 or any(size[2:]):
                raise Unfusable(f"its input is a view of samples of shape {list(x.sample)} as {list(x.shape[1:])}")

    def _slid(
        self, kind: str, x: Value, window: Window, channels: int, parameters: tuple[int | None, ...], **more: Any
    ) -> Value:
        """The node of a window over x."""
        shape = self.results[0]
        sizes = (1, 1, *shape[2:])[-2:]
        sample = (channels, *sizes[2 - (len(x.sample) - 1) :])
        return self.emit(kind, [x], shape, sample, parameters, window=window, **more)

    # -- sums and functions -------------------------------------------------------------------------------------

    def add(self, input: Any, other: Any, *, alpha: float = 1) -> Value:
        if isinstance(other, (int, float)) and other == 0:
            return self.value(input)
        a, b = self._operand_of_sum(input), self._operand_of_sum(other)
        if a.sample != b.sample or a.shape != b.shape:
            raise Unfusable(
                f"its operands are of shape {list(a.shape)} and {list(b.shape)}; sums of one shape are fused"
            )
        if alpha != 1:
            b = self._scaled(b, float(alpha))
        return self.emit("add", [a, b], a.shape, a.sample)

    def sub(self, input: Any, other: Any, *, alpha: float = 1) -> Value:
        if isinstance(other, LogSumExp) and other.of == input and alpha == 1:
            return self._log_softmax(input, -1)
        return self.add(input, other, alpha=-alpha)

    def _operand_of_sum(self, x: Any) -> Value:
        if not isinstance(x, Value):
            raise Unfusable(f"the sum with {text_of(x)} is not fused; only the sum of two values is")
        return self.channels_last(x)

    def mul(self, input: Any, other: Any) -> Value:
        x, factor = (other, input) if isinstance(other, Value) else (input, other)
        if not isinstance(factor, (int, float)) or isinstance(factor, bool):
            raise Unfusable(f"the product with {text_of(factor)} is not fused; only the product with a number is")
        return self._scaled(x, float(factor))

    def div(self, input: Any, other: Any, *, rounding_mode: str | None = None) -> Value:
        if not isinstance(other, (int, float)) or other == 0 or rounding_mode is not None:
            raise Unfusable(f"the quotient by {text_of(other)} is not fused; only the quotient by a number is")
        return self._scaled(input, 1 / other)

    def neg(self, input: Any) -> Value:
        return self._scaled(input, -1.0)

    def _scaled(self, x: Any, factor: float) -> Value:
        x = self.channels_last(x)
        return self.emit("scale", [x], x.shape, x.sample, constants=(factor,))

    def _function(self, input: Any, function: str, *constants: float) -> Value:
        x = self.channels_last(input)
        return self.emit("pointwise", [x], x.shape, x.sample, function=function, constants=constants)

    def relu(self, input: Any) -> Value:
        return self._function(input, "relu")

    def leaky_relu(self, input: Any, negative_slope: float = 0.01) -> Value:
        return self._function(input, "leaky_relu", float(negative_slope))

    # The constants of elu are (a, b, c): b x for x > 0, otherwise b a (exp(x / c) - 1).

    def elu(self, input: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
        return self._function(input, "elu", float(alpha), float(scale), 1 / input_scale)

    def celu(self, input: Any, alpha: float = 1) -> Value:
        return self._function(input, "elu", float(alpha), 1.0, float(alpha))

    def silu(self, input: Any) -> Value:
        return self._function(input, "silu")

    def gelu(self, input: Any, *, approximate: str = "none") -> Value:
        return self._function(input, "gelu" if approximate == "none" else "gelu_tanh")

    def softplus(self, input: Any, beta: float = 1, threshold: float = 20) -> Value:
        return self._function(input, "softplus", float(beta), float(threshold))

    def tanh(self, input: Any) -> Value:
        return self._function(input, "tanh")

    def sigmoid(self, input: Any) -> Value:
        return self._function(input, "sigmoid")

    def sin(self, input: Any) -> Value:
        return self._function(input, "sin")

    def hardtanh(self, input: Any, min_val: float = -1, max_val: float = 1) -> Value:
        return self._function(input, "hardtanh", float(min_val), float(max_val))

    # -- the two outputs of a Gaussian policy -------------------------------------------------------------------

    def append(self, mean: Value, log_std: Any) -> Value:
        """[mean, log_std] for each sample, as one tensor [n, 2 * action]."""
        if not isinstance(log_std, Held) or log_std.transposed or log_std.slot:
            raise Unfusable(
                "the model returns a pair; fused is (mean, log_std), where log_std is a parameter of the model, or "
                f"clamp(min=...) of one, not {text_of(log_std)}"
            )
        size = log_std.shape[-1]
        if len(log_std.shape) != (2 if log_std.rows else 1) or len(mean.sample) != 1:
            raise Unfusable(f"its log_std has shape {list(log_std.shape)}; only [action] is fused")
        return self.emit(
            "append", [mean], (self.n, 2 * size), (2 * size,), (self.tensor(log_std, "log_std"),),
            constants=(log_std.floor,), in_features=size, out_features=2 * size,
        )  # fmt: skip
