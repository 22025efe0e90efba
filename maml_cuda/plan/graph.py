"""The graph of fused layers that reading a model gives, and how a layer writes its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maml_cuda.plan.schema import Layout, Node, Window
from maml_cuda.plan.side_effects import Unfusable


@dataclass(frozen=True)
class Read:
    """A parameter, or a buffer, that nodes read.

    rows, taps: of a weight [rows, columns, *taps]; 1 and 1 of anything else.
    slots: inner steps that have a value of their own, [slots, ...]; 1: one value for all steps.
    """

    name: str
    rows: int
    taps: int
    slots: int


@dataclass
class Graph:
    """Nodes over numbered values: value 0 is the input, node i writes value i + 1, the last one is the prediction."""

    nodes: list[Node] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)  # Node.parameters counts these
    served_by: dict[str, list[str]] = field(default_factory=dict)  # module path -> fused layers
    log_std: str = ""  # of a model that returns (mean, log_std): "shared" [action] or "rows" [n, action]


class Traced:
    """The result of a call while `forward` is read. Its repr stands in error messages."""


@dataclass(repr=False)
class Value(Traced):
    """A traced tensor: its number, its order in memory, and the value whose memory it shares in torch."""

    number: int
    channels_last: bool  # False only for the input, which is in the user's order
    alias: int
    overwritten: str = ""  # the in-place call that changed it

    def __repr__(self) -> str:
        return "a value computed from x"


def in_words(x: Any) -> str:
    """What an argument is, for an error message."""
    return repr(x) if isinstance(x, Traced) else type(x).__name__


class Writer:
    """Writes a Graph, node by node."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.graph = Graph()
        self.values: list[Value] = [Value(0, False, 0)]
        self.images: dict[int, Value] = {}  # of values that are not in channels-last order, those that are
        self.here = ""  # the call that is being read, for Node.name and error messages
        self.path = ""  # of its module

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
        read = Read(names[id(p)], rows, taps, slots)
        for index, before in enumerate(self.graph.reads):
            if before.name == read.name:
                if (before.rows, before.taps) != (rows, taps):
                    raise Unfusable(f"its {what} is shared with a layer that uses it in another shape")
                return index
        self.graph.reads.append(read)
        return len(self.graph.reads) - 1

    def _vector(self, p: Any, what: str, channels: int, slots: int | None = None, buffer: bool = False) -> int | None:
        """The index of a bias, gamma, beta or statistic: [channels], or [slots, channels]. One that broadcasts is
        refused."""
        wanted = (channels,) if slots is None else (slots, channels)
        if isinstance(p, Tensor) and tuple(p.shape) != wanted:
            raise Unfusable(f"its {what} has shape {list(p.shape)}; fused is {list(wanted)}, one number a channel")
        return self._index(p, what, slots=slots or 1, buffer=buffer)

    def _emit(
        self,
        kind: str,
        inputs: list[Value],
        parameters: tuple[int | None, ...] = (),
        *,
        alias: int | None = None,
        in_layouts: tuple[Layout, ...] = (),
        out_layout: Layout | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
        sample: tuple[int, ...] | None = None,
        window: Window | None = None,
        function: str | None = None,
        constants: tuple[float, ...] = (),
        eps: float | None = None,
        groups: int | None = None,
        count_padding: bool | None = None,
    ) -> Value:
        """Writes one node (schema.Node says what its fields mean) and returns its value."""
        numbers = tuple(x.number for x in inputs)
        self.graph.nodes.append(
            Node(
                kind=kind, name=self.here, inputs=numbers, parameters=parameters, in_layouts=in_layouts,
                out_layout=out_layout, in_features=in_features, out_features=out_features, sample=sample, window=window,
                function=function, constants=constants, eps=eps, groups=groups, count_padding=count_padding,
            )
        )  # fmt: skip
        number = len(self.graph.nodes)
        value = Value(number, True, number if alias is None else alias)
        self.values.append(value)
        if self.path and kind != "channels_last":
            layer = "linear" if kind == "conv2d" and in_layouts == ("features",) else function or kind
            served = self.graph.served_by.setdefault(self.path, [])
            if layer not in served:
                served.append(layer)
        return value

    def _in_place(self, x: Value, y: Value) -> Value:
        """y replaces x: a later reader of x, or of a view of it, would read y."""
        if x.alias == 0:
            raise Unfusable("it changes the model's input in place")
        for value in self.values:
            if value.alias == x.alias and value is not y:
                value.overwritten = self.here
        return y
