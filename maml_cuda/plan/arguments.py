"""Arguments of the calls in `forward`: how they are classified and checked.

An argument is a tensor computed from the model's input (graph.Value), the shape of one, a parameter, or a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maml_cuda.plan.schema import Layout
from maml_cuda.plan.side_effects import Unfusable


class Traced:
    """Base class of what calls in `forward` return while the graph is written. Error messages contain its repr."""


def argument_text(x: Any) -> str:
    """What an argument is, for error messages."""
    return repr(x) if isinstance(x, Traced) else type(x).__name__


@dataclass(frozen=True, repr=False)
class FlooredParameter(Traced):
    """max(parameter, floor), for the log_std of a Gaussian policy.

    Attributes:
        rows: whether it is expanded to one row for each sample.
    """

    parameter: Tensor
    floor: float = -math.inf
    rows: bool = False

    def __repr__(self) -> str:
        return "a clamped or expanded parameter"


@dataclass(frozen=True, repr=False)
class Size(Traced):
    """x.size(axis) of a value."""

    axis: int

    def __repr__(self) -> str:
        return f"the size of axis {self.axis}"


class Shape(Traced):
    """x.shape of a value."""

    def __repr__(self) -> str:
        return "a shape"


# The layout of the samples of torch's 1d and 2d layers, by the number of spatial axes.
SPATIAL: dict[int, Layout] = {1: "signal", 2: "image"}


def height_width(axes: int, value: Any, height: int = 1) -> tuple[int, int]:
    """A kernel size, stride, padding or dilation for (height, width), from one or two numbers as torch accepts them.

    height: the number for the height if there is one spatial axis.
    """
    sizes = value if isinstance(value, (tuple, list)) else [value]
    if len(sizes) not in (1, axes) or not all(isinstance(v, int) for v in sizes):
        raise Unfusable(f"the size {value!r} is not {'one int' if axes == 1 else 'one or two ints'}")
    return (sizes[0] if axes == 2 else height), sizes[-1]


def check_window(kernel: Any, stride: Any, padding: Any) -> None:
    """Refuses sizes that torch would refuse."""
    if min(*kernel, *stride) < 1 or min(padding) < 0:
        raise Unfusable(f"kernel {list(kernel)}, stride {list(stride)} and padding {list(padding)} are not valid")


def channels_of(*parameters: Any) -> int:
    """The number of channels of the first of these parameters that is not None; 0 if all are None."""
    given = next((p for p in parameters if isinstance(p, Tensor)), None)
    return 0 if given is None else given.shape[-1] if given.dim() else 1
