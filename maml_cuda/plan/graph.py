"""The graph of fused layers that stands for a model, and the class that writes it node by node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maml_cuda.plan.arguments import Traced, argument_text
from maml_cuda.plan.schema import Layout, Node, Window
from maml_cuda.plan.side_effects import Unfusable


@dataclass(frozen=True)
class Read:
    """A parameter or a buffer that nodes read.

    Attributes:
        name: in `model.named_parameters()` or `model.named_buffers()`.
        rows, taps: of a weight [rows, columns, *taps]; 1 and 1 for any other tensor.
        slots: the number of inner steps that have values of their own, in a tensor [slots, ...]; 1: all steps read the
            same values.
    """

    name: str
    rows: int
    taps: int
    slots: int


@dataclass
class Graph:
    """Nodes over numbered values: value 0 is the input, node i writes value i + 1, the last one is the prediction.

    Attributes:
        nodes: in topological order.
        reads: the parameters and buffers; `Node.parameters` has indices into this list.
        served_by: module path -> names of the fused layers that compute this module, for `FusedMAML.explain`.
        log_std: of a model that returns (mean, log_std), the shape of log_std: "shared" for [action], "rows" for
            [n, action]. Otherwise "".
    """

    nodes: list[Node] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    served_by: dict[str, list[str]] = field(default_factory=dict)
    log_std: str = ""


@dataclass(repr=False)
class Value(Traced):
    """A tensor that is computed from the model's input.

    Attributes:
        number: of the value in the graph.
        channels_last: whether channels are last in its memory; true except for the input, which is in torch's order.
        alias: the number of the value whose memory it shares in torch, its own number if there is none.
        overwritten: the call that has changed it in place, for error messages; "" if there is none.
    """

    number: int
    channels_last: bool
    alias: int
    overwritten: str = ""

    def __repr__(self) -> str:
        return "a value computed from x"


class Writer:
    """Writes a Graph, node by node. It refuses what a graph cannot hold by raising Unfusable."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.graph = Graph()
        self.values: list[Value] = [Value(0, False, 0)]
        self.rearranged: dict[int, Value] = {}  # number of a value that is not channels-last -> its channels-last copy
        self.call = ""  # describes the call that is being read, for Node.name and error messages
        self.module_path = ""  # of the module that makes the call

    def _value(self, x: Any) -> Value:
        """Checks that an argument is a value computed from the input, and that its content is still valid."""
        if not isinstance(x, Value):
            raise Unfusable(f"its input is {argument_text(x)}, not a value computed from x")
        if x.overwritten:
            raise Unfusable(f"it reads a value that {x.overwritten} has changed in place")
        return x

    def _channels_last(self, x: Value) -> Value:
        """x with channels last in memory."""
        if x.channels_last:
            return x
        if x.number not in self.rearranged:
            self.rearranged[x.number] = self._emit("channels_last", [x], alias=x.alias)
        return self.rearranged[x.number]

    def _parameter(
        self, p: Any, what: str, rows: int = 1, taps: int = 1, slots: int = 1, buffer: bool = False
    ) -> int | None:
        """The index of a parameter, or of a buffer, in Graph.reads; None for None.

        Args:
            what: its role in the layer, for error messages.
            rows, taps, slots: as in Read.
        """
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
        """The index of a bias, gamma, beta or statistic of shape [channels] or [slots, channels].

        A tensor of another shape would be broadcast by torch and is refused.
        """
        shape = (channels,) if slots is None else (slots, channels)
        if isinstance(p, Tensor) and tuple(p.shape) != shape:
            raise Unfusable(f"its {what} has shape {list(p.shape)}; only {list(shape)} is fused")
        return self._parameter(p, what, slots=slots or 1, buffer=buffer)

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
        """Adds one node and returns its value. The arguments are the fields of schema.Node, and Value.alias."""
        numbers = tuple(x.number for x in inputs)
        self.graph.nodes.append(
            Node(
                kind=kind, name=self.call, inputs=numbers, parameters=parameters, in_layouts=in_layouts,
                out_layout=out_layout, in_features=in_features, out_features=out_features, sample=sample, window=window,
                function=function, constants=constants, eps=eps, groups=groups, count_padding=count_padding,
            )
        )  # fmt: skip
        number = len(self.graph.nodes)
        value = Value(number, True, number if alias is None else alias)
        self.values.append(value)
        if self.module_path and kind != "channels_last":
            layer = "linear" if kind == "conv2d" and in_layouts == ("features",) else function or kind
            served = self.graph.served_by.setdefault(self.module_path, [])
            if layer not in served:
                served.append(layer)
        return value

    def _overwrite(self, x: Value, y: Value) -> Value:
        """Records that a call writes y into the memory of x. Later reads of x, or of a view of it, are refused."""
        if x.alias == 0:
            raise Unfusable("it changes the model's input in place")
        for value in self.values:
            if value.alias == x.alias and value is not y:
                value.overwritten = self.call
        return y
