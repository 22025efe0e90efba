"""The fused layers: one method for each, which writes its nodes or refuses it by raising Unfusable.

A method has the name and the signature of torch's function, so that one method reads both the function and the module
of the same name (torch_names.py maps them). A new layer needs one method here and its lines there.

Layers for signals [n, channels, length] and images [n, channels, height, width] share a method. Its argument `axes` is
the number of spatial axes, 1 or 2. For the core, a signal is an image of height 1.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from maml_cuda.plan.arguments import (
    SPATIAL,
    FlooredParameter,
    Shape,
    Size,
    argument_text,
    channels_of,
    check_window,
    height_width,
)
from maml_cuda.plan.graph import Value, Writer
from maml_cuda.plan.schema import Layout, Window
from maml_cuda.plan.side_effects import Unfusable


class Layers(Writer):
    """Writes a Graph, layer by layer.

    A method has the name and the signature of a function of torch, and returns the value that the call returns. It
    raises Unfusable for arguments that no fused layer has.
    """

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Value:
        """A convolution of features, which are an image of 1 x 1."""
        x = self._value(input)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise Unfusable("its weight is not a matrix")
        out_features, in_features = weight.shape
        parameters = (self._parameter(weight, "weight", rows=out_features), self._vector(bias, "bias", out_features))
        return self._emit(
            "conv2d", [x], parameters, in_features=in_features, out_features=out_features, in_layouts=("features",),
            window=Window((1, 1), (1, 1), (0, 0), (0, 0)),
        )  # fmt: skip

    def conv(
        self,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        axes: int = 2,
    ) -> Value:
        x = self._value(input)
        if groups != 1:
            raise Unfusable(f"groups={groups} is not fused")
        if height_width(axes, dilation) != (1, 1):
            raise Unfusable(f"dilation={dilation} is not fused")
        if not isinstance(weight, Tensor) or weight.dim() != 2 + axes:
            raise Unfusable(f"its weight is not of shape [out, in, {'length' if axes == 1 else 'height, width'}]")
        rows, columns, *sizes = weight.shape
        kernel = height_width(axes, sizes)
        if padding == "same":
            pad_begin = tuple((k - 1) // 2 for k in kernel)
            pad_end = tuple(k - 1 - begin for k, begin in zip(kernel, pad_begin, strict=True))
        else:
            pad_begin = pad_end = (0, 0) if padding == "valid" else height_width(axes, padding, height=0)
        strides = height_width(axes, stride)
        check_window(kernel, strides, pad_begin)
        parameters = (self._parameter(weight, "weight", rows, kernel[0] * kernel[1]), self._vector(bias, "bias", rows))
        return self._emit(
            "conv2d", [self._channels_last(x)], parameters, in_features=columns, out_features=rows,
            in_layouts=(SPATIAL[axes],), window=Window(kernel, strides, pad_begin, pad_end),
        )  # fmt: skip

    def batch_norm(
        self,
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        layouts: tuple[Layout, ...] = (),
        slots: int | None = None,
        num_features: int | None = None,
    ) -> Value:
        """Normalisation by batch statistics if `training`, by running statistics otherwise.

        layouts: of the samples that the module accepts; empty: any.
        slots: of a per-step layer, whose parameters and statistics are [slots, channels].
        num_features: channels that the module accepts; None: those of the parameters.
        """
        x = self._channels_last(self._value(input))
        channels = channels_of(weight, bias, running_mean)
        in_features = num_features or channels or None
        affine = (self._vector(weight, "weight", channels, slots), self._vector(bias, "bias", channels, slots))
        if training:
            return self._emit("batch_norm", [x], affine, eps=eps, in_layouts=layouts, in_features=in_features)
        if running_mean is None or running_var is None:
            raise Unfusable("it has neither batch statistics nor running ones")
        statistics = (
            self._vector(running_mean, "running mean", channels, slots, buffer=True),
            self._vector(running_var, "running variance", channels, slots, buffer=True),
        )
        return self._emit(
            "running_norm", [x], (*affine, *statistics), eps=eps, in_layouts=layouts, in_features=in_features
        )

    def group_norm(
        self,
        input: Any,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
        *,
        layouts: tuple[Layout, ...] = ("features", "signal", "image"),
    ) -> Value:
        """num_groups=0: every channel is a group. cudnn_enabled is an argument of torch.group_norm and is ignored."""
        x = self._channels_last(self._value(input))
        channels = channels_of(weight, bias)
        affine = (self._vector(weight, "weight", channels), self._vector(bias, "bias", channels))
        return self._emit(
            "group_norm", [x], affine, eps=eps, groups=num_groups, in_layouts=layouts, in_features=channels or None
        )

    def layer_norm(
        self,
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Value:
        """A group_norm with one group, in which every element of a sample is a feature with its own gamma and beta.

        cudnn_enable is an argument of torch.layer_norm and is ignored.
        """
        x = self._channels_last(self._value(input))
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        if not 1 <= len(shape) <= 3:
            raise Unfusable(
                f"normalized_shape={shape} is not fused; only the shape of a feature vector, signal or image is"
            )
        affine = []
        for p, what in ((weight, "weight"), (bias, "bias")):
            if isinstance(p, Tensor) and list(p.shape) != shape:
                raise Unfusable(f"its {what} has shape {list(p.shape)}; only {shape} is fused")
            taps = math.prod(shape[1:])  # torch has channels first in gamma and beta, the core has them last
            affine.append(self._parameter(p, what, *((shape[0], taps) if taps > 1 else ())))
        layout = ("features", *SPATIAL.values())[len(shape) - 1]
        return self._emit(
            "group_norm", [x], tuple(affine), eps=eps, groups=1, in_layouts=(layout,), sample=tuple(shape)
        )

    def instance_norm(
        self,
        input: Any,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        layouts: tuple[Layout, ...] = ("signal", "image"),
    ) -> Value:
        """A group_norm whose groups are single channels; by running statistics, a batch_norm."""
        if not use_input_stats:
            return self.batch_norm(input, running_mean, running_var, weight, bias, eps=eps, layouts=layouts)
        if running_mean is not None or running_var is not None:
            raise Unfusable("it tracks running statistics in train mode, which is not fused; it is fused in eval mode")
        return self.group_norm(input, 0, weight, bias, eps, layouts=layouts)

    def max_pool(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
        *,
        axes: int = 2,
    ) -> Value:
        if height_width(axes, dilation) != (1, 1) or return_indices:
            raise Unfusable("dilation and return_indices are not fused")
        return self._pool("max_pool", axes, input, kernel_size, stride, padding, ceil_mode)

    def avg_pool(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        axes: int = 2,
    ) -> Value:
        if divisor_override is not None:
            raise Unfusable("divisor_override is not fused")
        return self._pool(
            "avg_pool", axes, input, kernel_size, stride, padding, ceil_mode, count_padding=count_include_pad
        )

    def _pool(
        self,
        kind: str,
        axes: int,
        input: Any,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_padding: bool | None = None,
    ) -> Value:
        if ceil_mode:
            raise Unfusable("ceil_mode is not fused")
        kernel = height_width(axes, kernel_size)
        pad = height_width(axes, padding, height=0)
        if any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
            raise Unfusable(f"padding {pad} is more than half of the kernel {kernel}")
        strides = height_width(axes, stride) if stride not in (None, [], ()) else kernel
        check_window(kernel, strides, pad)
        return self._emit(
            kind, [self._channels_last(self._value(input))], window=Window(kernel, strides, pad, pad),
            in_layouts=(SPATIAL[axes],), count_padding=count_padding,
        )  # fmt: skip

    def adaptive_avg_pool(self, input: Any, output_size: Any, *, axes: int = 2) -> Value:
        if height_width(axes, output_size) != (1, 1):
            raise Unfusable(f"output size {output_size} is not fused; only output size 1 is")
        return self._emit("mean_pool", [self._channels_last(self._value(input))], in_layouts=(SPATIAL[axes],))

    def mean(self, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, (tuple, list)) else []
        axes = len(dims)
        # The spatial axes: 2 of a signal [n, channels, length], 2 and 3 of an image [n, channels, height, width].
        if axes not in (1, 2) or sorted(d % (2 + axes) for d in dims) != [2, 3][:axes] or dtype is not None:
            raise Unfusable(f"the mean over {dim} is not fused; only the mean over all spatial axes, (2, 3) or 2, is")
        return self._emit(
            "mean_pool", [self._channels_last(self._value(input))], in_layouts=(SPATIAL[axes],),
            out_layout=None if keepdim else "features",
        )  # fmt: skip

    def flatten(self, input: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
        if (start_dim, end_dim) != (1, -1):
            raise Unfusable(f"flatten({start_dim}, {end_dim}) is not fused; only flatten(1) is")
        x = self._value(input)
        return self._emit("flatten", [x], alias=x.alias, out_layout="features")

    def reshape(self, input: Any, *shape: Any) -> Value:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        x = self._value(input)
        batch = len(shape) == 2 and isinstance(shape[0], Size) and shape[0].axis == 0
        if batch and shape[1] == -1:
            return self.flatten(x, 1)
        if len(shape) == 2 and (batch or shape[0] == -1) and isinstance(shape[1], int) and shape[1] > 0:
            return self._emit("flatten", [x], alias=x.alias, out_layout="features", out_features=shape[1])
        raise Unfusable("this reshape is not fused; only a reshape to [n, features] is")

    def append(self, mean: Value, log_std: Any) -> Value:
        """[mean, log_std] for each sample: the two outputs of a Gaussian policy as one tensor [n, 2 * action]."""
        p = log_std if isinstance(log_std, FlooredParameter) else FlooredParameter(log_std)
        if not isinstance(p.parameter, Tensor) or id(p.parameter) not in self.names:
            raise Unfusable("its log_std is not a parameter of the model, or clamp(min=...) of one")
        if p.parameter.dim() != 1:
            raise Unfusable(f"its log_std has shape {list(p.parameter.shape)}; only [action] is fused")
        size = p.parameter.numel()
        return self._emit(
            "append", [mean], (self._parameter(p.parameter, "log_std"),), constants=(p.floor,),
            in_layouts=("features",), in_features=size, out_features=2 * size,
        )  # fmt: skip

    def clamp(self, input: Any, min: Any = None, max: Any = None) -> FlooredParameter:
        if not isinstance(input, Tensor) or max is not None or not isinstance(min, (int, float)):
            raise Unfusable("this clamp is not fused; only clamp(min=number) of a policy's log_std is")
        return FlooredParameter(input, float(min))

    def expand(self, input: Any, *shape: Any) -> FlooredParameter:
        """A parameter expanded to one row for each sample."""
        p = input if isinstance(input, FlooredParameter) else FlooredParameter(input)
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        batch = len(shape) == 2 and isinstance(shape[0], Size) and shape[0].axis == 0
        if not isinstance(p.parameter, Tensor) or not batch or shape[1] not in (-1, p.parameter.numel()):
            raise Unfusable(
                "this expand is not fused; only the expansion of a policy's log_std to one row for each sample is"
            )
        return FlooredParameter(p.parameter, p.floor, rows=True)

    def expand_as(self, input: Any, other: Any) -> FlooredParameter:
        p = input if isinstance(input, FlooredParameter) else FlooredParameter(input)
        if not isinstance(p.parameter, Tensor) or not isinstance(other, Value):
            raise Unfusable("this expand_as is not fused; only that of a policy's log_std to its mean is")
        return FlooredParameter(p.parameter, p.floor, rows=True)

    def add(self, input: Any, other: Any, *, alpha: Any = 1) -> Value:
        if alpha != 1:
            raise Unfusable(f"alpha={alpha} is not fused")
        for operand in (input, other):
            if not isinstance(operand, Value):
                raise Unfusable("the sum with a number or a parameter is not fused; only the sum of two values is")
        return self._emit("add", [self._channels_last(self._value(input)), self._channels_last(self._value(other))])

    def iadd(self, input: Any, other: Any) -> Value:
        return self._overwrite(self._value(input), self.add(input, other))

    def mul(self, input: Any, other: Any) -> Value:
        x, factor = (other, input) if isinstance(other, Value) else (input, other)
        if not isinstance(factor, (int, float)) or isinstance(factor, bool):
            raise Unfusable(f"the product with {argument_text(factor)} is not fused; only the product with a number is")
        return self._emit("scale", [self._channels_last(self._value(x))], constants=(float(factor),))

    def neg(self, input: Any) -> Value:
        return self.mul(input, -1.0)

    def pointwise(self, input: Any, function: str, inplace: bool = False, constants: tuple[float, ...] = ()) -> Value:
        x = self._value(input)
        y = self._emit("pointwise", [self._channels_last(x)], function=function, constants=constants)
        return self._overwrite(x, y) if inplace else y

    def relu(self, input: Any, inplace: bool = False) -> Value:
        return self.pointwise(input, "relu", inplace)

    def relu_(self, input: Any) -> Value:
        return self.relu(input, inplace=True)

    def leaky_relu(self, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Value:
        return self.pointwise(input, "leaky_relu", inplace, (float(negative_slope),))

    # The constants of elu are (a, b, c): b x for x > 0, otherwise b a (exp(x / c) - 1).

    def elu(self, input: Any, alpha: float = 1.0, inplace: bool = False) -> Value:
        return self.pointwise(input, "elu", inplace, (float(alpha), 1.0, 1.0))

    def selu(self, input: Any, inplace: bool = False) -> Value:
        return self.pointwise(input, "elu", inplace, (1.6732632423543772, 1.0507009873554805, 1.0))

    def celu(self, input: Any, alpha: float = 1.0, inplace: bool = False) -> Value:
        return self.pointwise(input, "elu", inplace, (float(alpha), 1.0, float(alpha)))

    def silu(self, input: Any, inplace: bool = False) -> Value:
        return self.pointwise(input, "silu", inplace)

    def gelu(self, input: Any, approximate: str = "none") -> Value:
        return self.pointwise(input, "gelu" if approximate == "none" else "gelu_tanh")

    def softplus(self, input: Any, beta: float = 1.0, threshold: float = 20.0) -> Value:
        return self.pointwise(input, "softplus", constants=(float(beta), float(threshold)))

    def tanh(self, input: Any) -> Value:
        return self.pointwise(input, "tanh")

    def sigmoid(self, input: Any) -> Value:
        return self.pointwise(input, "sigmoid")

    def sin(self, input: Any) -> Value:
        return self.pointwise(input, "sin")

    def hardtanh(self, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Value:
        if min_val > max_val:
            raise Unfusable(f"min_val={min_val} is more than max_val={max_val}")
        return self.pointwise(input, "hardtanh", inplace, (float(min_val), float(max_val)))

    def relu6(self, input: Any, inplace: bool = False) -> Value:
        return self.hardtanh(input, 0.0, 6.0, inplace)

    def dropout(self, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
        if training and p > 0:
            raise Unfusable(f"dropout with p={p} in train mode is not fused; it is fused in eval mode")
        return self._value(input)

    def identity(self, input: Any) -> Value:
        return self._value(input)

    # -- sizes ------------------------------------------------------------------------------------------------

    def size(self, input: Any, dim: int | None = None) -> Any:
        return Shape() if dim is None else Size(dim)

    def get_attribute(self, x: Any, name: str) -> Any:
        if isinstance(x, Value) and name == "shape":
            return Shape()
        raise Unfusable(f"reading the attribute {name} of a tensor is not fused; only shape is")

    def get_item(self, x: Any, index: Any) -> Any:
        if isinstance(x, Shape) and isinstance(index, int):
            return Size(index)
        raise Unfusable("indexing is not fused")
