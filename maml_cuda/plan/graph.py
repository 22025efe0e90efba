"""The graph of fused layers that stands for a model, and the class that writes it node by node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.schema import IndexedAxis, Instruction, Layout, Loops, Mask, Node, Slide, Window


@dataclass(frozen=True)
class Read:
    """A parameter, a buffer or any other tensor that nodes read.

    Attributes:
        name: its name in the model (copies.places), in Graph.literals or in Graph.outside.
        rows, taps: of a weight [rows, columns, *taps]; 1 and 1 for any other tensor.
        slots: the number of inner steps that have values of their own, in a tensor [slots, ...]; 1: all steps read the
            same values.
    """

    name: str
    rows: int
    taps: int
    slots: int


@dataclass(frozen=True)
class Returned:
    """What a model returns for the prediction [n, features] of the nodes.

    Attributes:
        sample: the shape of one sample of what the model returns, or of its mean.
        log_softmax: it is the log_softmax of the prediction over its last axis.
        log_std: of a Gaussian policy, whose mean and log_std are one prediction, the shape of log_std: "shared" for
            [action], "rows" for [n, action]. Otherwise "".
        distribution: the type of the distribution that the model returns: "Categorical", "Normal", or
            "Independent" for Independent(Normal, 1). Otherwise "".
        nones: how many None follow it in a tuple, as in (logits, None); 0: there is no tuple.
    """

    sample: tuple[int, ...]
    log_softmax: bool = False
    log_std: str = ""
    distribution: str = ""
    nones: int = 0


class Labels(NamedTuple):
    """Class labels in the target of a computed loss.

    Attributes:
        leaf: their number among the leaves of the target.
        classes: how many there are; a label from 0 on.
        ignored: a label that does not count.
    """

    leaf: int
    classes: int
    ignored: int | None


class Range(NamedTuple):
    """Whole numbers from `low` on, less than `high`."""

    low: int
    high: int


@dataclass
class Graph:
    """Nodes over numbered values: value 0 is the input, node i writes value i + 1.

    Attributes:
        nodes: in topological order.
        reads: the tensors that nodes read beside the input; `Node.parameters` has indices into this list.
        served_by: module path -> names of the fused layers that compute this module, for `FusedMAML.explain`.
        returned: what the model returns.
        whole_sets: whether a whole set is one sample of the nodes.
        written: the names of the buffers of the model that forward writes.
        ignored: what forward does besides and fused layers do not, for `FusedMAML.explain`.
        literals: tensors made in forward from numbers alone, by the names that they have in `reads`. A name tells the
            content.
        prediction: its value.
        loss_value: that of the loss, if nodes compute it.
        target: how many numbers such a loss compares for each sample.
        labels: those of them that are class labels.
        integers: of each element of a sample, its range if it is an integer; empty: the input holds none.
        outside: tensors that are not the model's, read at every call, by the names that they have in `reads`.
        identities: of these.
    """

    nodes: list[Node] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    served_by: dict[str, list[str]] = field(default_factory=dict)
    returned: Returned = field(default_factory=lambda: Returned(()))
    whole_sets: bool = False
    written: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    literals: dict[str, Tensor] = field(default_factory=dict, compare=False)
    prediction: int = 0
    loss_value: int | None = None
    target: int | None = None
    labels: tuple[Labels, ...] = ()
    integers: list[Range | None] = field(default_factory=list)
    outside: dict[str, Tensor] = field(default_factory=dict, compare=False)
    identities: tuple[int, ...] = ()

    def differentiated(self) -> set[str]:
        """The names of the tensors by which the loss has a derivative."""
        pending, seen = [self.loss_value or self.prediction], set()
        while pending:
            number = pending.pop()
            if number and number not in seen and self.nodes[number - 1].kind != "stop":
                seen.add(number)
                pending.extend(self.nodes[number - 1].inputs)
        return {self.reads[p].name for number in seen for p in self.nodes[number - 1].parameters if p is not None}


class Known:
    """Base class of what an operand of the record is to the reader. Error messages contain its repr."""


@dataclass(frozen=True, repr=False)
class Value(Known):
    """A tensor that is computed from the model's input.

    Attributes:
        number: of the value in the graph.
        shape: of the tensor in torch, [n, ...].
        sample: the shape of a sample in the graph. Apart from axes of size 1 and the split of the spatial axes, it is
            that of the tensor: `shape` may be a view of it.
        channels_last: whether channels are last in its memory; true except for the input, which is in torch's order.
        learned: whether it depends on a parameter that has a gradient.
        padding: zeros around the spatial axes that are still to be added, (begin, end) of height and width; only a
            convolution adds them.
        log_softmax: it is the log_softmax of this value over its last axis; only a prediction may be.
    """

    number: int
    shape: tuple[int, ...]
    sample: tuple[int, ...]
    channels_last: bool
    learned: bool
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    log_softmax: bool = False

    def __repr__(self) -> str:
        return "a value computed from x"

    @property
    def layout(self) -> Layout | None:
        """The layout of a sample; None for one of more than three axes."""
        layouts: tuple[Layout, ...] = ("features", "signal", "image")
        return layouts[len(self.sample) - 1] if 1 <= len(self.sample) <= 3 else None


@dataclass(frozen=True, repr=False)
class Held(Known):
    """A parameter, a buffer or a tensor attribute of the model, or a view of it.

    Attributes:
        name: in the model.
        shape: of this view.
        trained: whether it has a gradient.
        transposed: it is the transpose of the tensor.
        slot: it is one slot of a tensor [slots, ...].
        floor: it is max(tensor, floor).
        exponential: it is the exponential of that.
        rows: it has one copy of the tensor for each sample.
    """

    name: str
    shape: tuple[int, ...]
    trained: bool
    transposed: bool = False
    slot: bool = False
    floor: float = -math.inf
    exponential: bool = False
    rows: bool = False

    def __repr__(self) -> str:
        return self.name if self.whole else f"a view, a part or a function of {self.name}"

    @property
    def whole(self) -> bool:
        """Whether it is the tensor itself, but for its shape."""
        return not (self.transposed or self.slot or self.rows or self.exponential or self.floor > -math.inf)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, repr=False)
class LogSumExp(Known):
    """The logarithm of the sum of exponentials of a value [n, features], [n, 1]: a part of a log_softmax."""

    of: Value

    def __repr__(self) -> str:
        return "a logsumexp"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[:-1], 1)


@dataclass(frozen=True, repr=False)
class Constant(Known):
    """Any other tensor.

    Attributes:
        what: describes it.
        trained: whether it is computed from parameters that have a gradient.
        make: makes the tensor, if it is made from numbers alone; otherwise None.
    """

    what: str
    trained: bool
    make: Callable[[], Tensor] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return self.what


@dataclass(frozen=True)
class SampleCount(Known):
    """A number that follows from the number of samples n: factor (n + offset)^power."""

    factor: float
    offset: float
    power: float


def text_of(argument: Any) -> str:
    """What an argument is, for error messages."""
    return repr(argument) if isinstance(argument, (Known, int, float)) else type(argument).__name__


class Writer:
    """Writes a Graph, node by node. It refuses what a graph cannot hold by raising Unfusable.

    Attributes:
        graph: what is written.
        n: the number of samples.
        call: describes the call that is being read, for Node.name and error messages.
        module: the path of the module that makes the call.
        results: the shapes of the results of the call.
        drawn: how many masks forward has drawn before.
    """

    def __init__(self, n: int) -> None:
        self.graph = Graph()
        self.n = n
        self.call = self.module = ""
        self.results: list[tuple[int, ...]] = []
        self.drawn = 0
        self._trained: set[int] = set()  # indices of graph.reads that have a gradient
        self._rearranged: dict[int, Value] = {}  # number of a value that is not channels-last -> its copy that is
        self._flattened: dict[int, Value] = {}  # number of a value -> the same as features in torch's order

    def value(self, x: Any) -> Value:
        """Checks that an argument is a value computed from the input."""
        if not isinstance(x, Value):
            raise Unfusable(f"its input is {text_of(x)}, not a value computed from x")
        if x.padding is not None:
            raise Unfusable("it reads a padded value; fused is the padding of a convolution alone")
        if x.log_softmax:
            raise Unfusable("it reads a log_softmax; fused is that of the prediction alone")
        return x

    def channels_last(self, given: Any) -> Value:
        """A value with channels last in memory."""
        x = self.value(given)
        if x.channels_last:
            return x
        if x.number not in self._rearranged:
            self._rearranged[x.number] = self.emit("channels_last", [x], x.shape, x.sample)
        return replace(self._rearranged[x.number], shape=x.shape)

    def features(self, given: Any) -> Value:
        """A value as features, in torch's order of elements."""
        x = self.value(given)
        shape = self.n, math.prod(x.sample)
        if len(x.sample) == 1:
            return replace(x, shape=shape)
        if x.number not in self._flattened:
            self._flattened[x.number] = self.emit("flatten", [x], shape, shape[1:], out_layout="features")
        return self._flattened[x.number]

    def spatial(self, x: Value, axes: int) -> tuple[int, int]:
        """Height and width of x if it is torch's [n, channels, (height,) width] with this number of spatial axes."""
        if axes > 2:
            raise Unfusable(f"{axes} spatial axes are not fused; at most 2 are")
        if len(x.shape) != 2 + axes or x.shape[1] != x.sample[0] or len(x.sample) > 3:
            form = ("[n, features]", "[n, channels, length]", "[n, channels, height, width]")[axes]
            raise Unfusable(f"its input is of shape {list(x.shape)}; fused are inputs of shape {form}")
        given, known = ((1, 1, *sizes)[-2:] for sizes in (x.shape[2:], x.sample[1:]))
        if given != known:
            raise Unfusable(f"its input is a view of samples of shape {list(x.sample)} as {list(x.shape[1:])}")
        return known[0], known[1]

    def tensor(self, p: Any, what: str, rows: int = 1, taps: int = 1, slots: int = 1) -> int | None:
        """The index of a tensor of the model in Graph.reads; None for None.

        Args:
            what: its role in the layer, for error messages.
            rows, taps, slots: as in Read.
        """
        if p is None:
            return None
        if not isinstance(p, Held):
            raise Unfusable(f"its {what} is {text_of(p)}, not a parameter or a buffer of the model")
        if p.size == 0:
            raise Unfusable(f"its {what} has no elements")
        read = Read(p.name, rows, taps, slots)
        for index, before in enumerate(self.graph.reads):
            if before.name == read.name:
                if before != read:
                    raise Unfusable(f"its {what} is shared with a layer that uses it in another shape")
                return index
        self.graph.reads.append(read)
        index = len(self.graph.reads) - 1
        if p.trained:
            self._trained.add(index)
        return index

    def vector(self, p: Any, what: str, channels: int, slots: int | None = None) -> int | None:
        """The index of a bias, gamma, beta or statistic of shape [channels], or of one slot of [slots, channels]."""
        if isinstance(p, Held) and (p.shape != (channels,) or not (p.whole if slots is None else p.slot)):
            raise Unfusable(f"its {what} is {p} of shape {list(p.shape)}; only a tensor {[channels]} is fused")
        return self.tensor(p, what, slots=slots or 1)

    def emit(
        self,
        kind: str,
        inputs: list[Value],
        shape: tuple[int, ...],
        sample: tuple[int, ...],
        parameters: tuple[int | None, ...] = (),
        *,
        out_layout: Layout | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
        normalised: tuple[int, ...] | None = None,
        window: Window | None = None,
        function: str | None = None,
        constants: tuple[float, ...] = (),
        eps: float | None = None,
        groups: int | None = None,
        count_padding: bool | None = None,
    ) -> Value:
        """Adds one node and returns its value.

        Args:
            shape, sample: of the value (Value.shape, Value.sample).
            normalised: schema.Node.sample. The other arguments are the fields of schema.Node.
        """
        layout = inputs[0].layout
        self._append(
            kind, [x.number for x in inputs], parameters, in_layouts=() if layout is None else (layout,),
            out_layout=out_layout, in_features=in_features, out_features=out_features, sample=normalised,
            window=window, function=function, constants=constants, eps=eps, groups=groups,
            count_padding=count_padding,
        )  # fmt: skip
        if kind != "channels_last":
            self.serve("linear" if kind == "conv2d" and layout == "features" else function or kind)
        learned = any(x.learned for x in inputs) or not self._trained.isdisjoint(parameters)
        return Value(len(self.graph.nodes), shape, sample, True, learned)

    def emit_on_any(
        self,
        kind: str,
        inputs: Sequence[int],
        *,
        parameters: tuple[int | None, ...] = (),
        image: tuple[int, int, int] | None = None,
        rows: int | None = None,
        out_layout: Layout | None = None,
        loops: tuple[Loops, ...] = (),
        slides: tuple[Slide, ...] = (),
        axis: IndexedAxis | None = None,
        constants: tuple[float, ...] = (),
        instructions: tuple[Instruction, ...] = (),
        reduction: str | None = None,
        cell: str | None = None,
        mask: Mask | None = None,
    ) -> int:
        """Adds one node of a kind on tensors of any shape and returns the number of its value. The arguments are the
        fields of schema.Node."""
        return self._append(
            kind, inputs, parameters, image=image, rows=rows, out_layout=out_layout, loops=loops,
            slides=slides, axis=axis, constants=constants, instructions=instructions, reduction=reduction, cell=cell,
            mask=mask,
        )  # fmt: skip

    def _append(self, kind: str, inputs: Sequence[int], parameters: tuple[int | None, ...], **fields: Any) -> int:
        nothing = dict.fromkeys(
            ("out_layout", "in_features", "out_features", "sample", "window", "function", "eps", "groups",
             "count_padding", "image", "rows", "axis", "reduction", "cell", "mask")
        )  # fmt: skip
        empty: dict[str, Any] = dict.fromkeys(("in_layouts", "constants", "loops", "slides", "instructions"), ())
        fields = {**nothing, **empty, **fields}
        self.graph.nodes.append(Node(kind=kind, name=self.call, inputs=tuple(inputs), parameters=parameters, **fields))
        return len(self.graph.nodes)

    def serve(self, layer: str) -> None:
        """Notes that a fused layer serves the module that makes the call."""
        served = self.graph.served_by.setdefault(self.module, []) if self.module else []
        if layer not in served:
            served.append(layer)

    def mark(self) -> Any:
        """The state of what is written, for `undo`."""
        served = {path: list(layers) for path, layers in self.graph.served_by.items()}
        return len(self.graph.nodes), len(self.graph.reads), served

    def undo(self, mark: Any) -> None:
        """Takes back what was written since `mark`."""
        nodes, reads, served = mark
        del self.graph.nodes[nodes:], self.graph.reads[reads:]
        self.graph.served_by = served
        self._trained = {index for index in self._trained if index < reads}
        for copies in (self._rearranged, self._flattened):
            for number in [number for number, copy in copies.items() if copy.number > nodes]:
                del copies[number]
