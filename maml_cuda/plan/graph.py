"""A plan, and how a layer writes its nodes: values, parameters, and whose memory a value shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maml_cuda.plan.tracing import Unfusable


@dataclass
class Plan:
    """Nodes over numbered values: value 0 is the input, node i writes value i + 1, the last one is the prediction.

    `parameters`: names of the parameters that the nodes read, and of buffers, which are constants, in the order that
        their indices count.
    `rows_taps`: for each, [rows, taps] of a weight [rows, columns, *taps], or [1, 1].
    `slots`: for each, how many inner steps have a value of their own: [slots, ...].
    """

    nodes: list[dict[str, Any]] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    rows_taps: list[tuple[int, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    served_by: dict[str, list[str]] = field(default_factory=dict)  # module path -> fused layers
    log_std: str = ""  # of a model that returns (mean, log_std): "shared" [action] or "rows" [n, action]


class Traced:
    """What a call gives while `forward` is read; its repr is its words in a sentence."""


@dataclass(repr=False)
class Value(Traced):
    """A traced tensor: its number, how its memory is laid out, and whose memory it shares."""

    number: int
    channels_last: bool  # False only for the input, which stands as the user gave it
    alias: int
    overwritten: str = ""  # the in-place call that changed it

    def __repr__(self) -> str:
        return "a value computed from x"


def in_words(x: Any) -> str:
    """What an argument is."""
    return repr(x) if isinstance(x, Traced) else type(x).__name__


class Writer:
    """Writes a Plan, node by node."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.plan = Plan()
        self.values: list[Value] = [Value(0, False, 0)]
        self.images: dict[int, Value] = {}  # channels-last twins of values
        self.here = ""  # what is being read, for names and sentences
        self.path = ""

    def _tensor(self, x: Any) -> Value:
        if not isinstance(x, Value):
            raise Unfusable(f"its input is {in_words(x)}, not a value computed from x")
        if x.overwritten:
            raise Unfusable(f"it reads a value that {x.overwritten} has changed in place")
        return x

    def _image(self, x: Value) -> Value:
        """x in channels-last order."""
        if x.channels_last:
            return x
        if x.number not in self.images:
            self.images[x.number] = self._emit("channels_last", [x], alias=x.alias)
        return self.images[x.number]

    def _index(
        self, p: Any, what: str, rows: int = 1, taps: int = 1, slots: int = 1, buffer: bool = False
    ) -> int | None:
        """The index of a parameter, or a buffer; a weight has `rows` outputs and `taps` taps."""
        if p is None:
            return None
        names = self.buffers if buffer else self.names
        if not isinstance(p, Tensor) or id(p) not in names:
            raise Unfusable(f"its {what} is not a {'buffer' if buffer else 'parameter'} of the model")
        if p.numel() == 0:
            raise Unfusable(f"its {what} has no elements")
        name = names[id(p)]
        if name not in self.plan.parameters:
            self.plan.parameters.append(name)
            self.plan.rows_taps.append((rows, taps))
            self.plan.slots.append(slots)
        index = self.plan.parameters.index(name)
        if self.plan.rows_taps[index] != (rows, taps):
            raise Unfusable(f"its {what} is shared with a layer that uses it in another shape")
        return index

    def _vector(self, p: Any, what: str, channels: int, slots: int | None = None, buffer: bool = False) -> int | None:
        """The index of a bias, gamma, beta or statistic: one number a channel, not one that broadcasts; or as many
        for each of its slots."""
        wanted = (channels,) if slots is None else (slots, channels)
        if isinstance(p, Tensor) and tuple(p.shape) != wanted:
            raise Unfusable(f"its {what} has shape {list(p.shape)}; fused is {list(wanted)}, one number a channel")
        return self._index(p, what, slots=slots or 1, buffer=buffer)

    def _emit(
        self,
        kind: str,
        inputs: list[Value],
        parameters: tuple[int | None, ...] = (None, None),
        alias: int | None = None,
        **attributes: Any,
    ) -> Value:
        self.plan.nodes.append(
            {
                "kind": kind,
                "name": self.here,
                "inputs": [x.number for x in inputs],
                "parameters": list(parameters),
                **attributes,
            }
        )
        number = len(self.plan.nodes)
        value = Value(number, True, number if alias is None else alias)
        self.values.append(value)
        if self.path and kind != "channels_last":
            layer = attributes.get("function", "linear" if kind == "conv2d" and attributes["ranks"] == [1] else kind)
            served = self.plan.served_by.setdefault(self.path, [])
            if layer not in served:
                served.append(layer)
        return value

    def _in_place(self, x: Value, y: Value) -> Value:
        """y replaces x: whoever reads x, or a view of it, later on would read y."""
        if x.alias == 0:
            raise Unfusable("it changes the model's input in place")
        for value in self.values:
            if value.alias == x.alias and value is not y:
                value.overwritten = self.here
        return y
