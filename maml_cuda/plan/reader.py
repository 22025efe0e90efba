"""Reads the record of a model as a graph of fused layers, or raises Unfusable with the reason why it cannot.

Each operation is read by a method of the same name, which writes the nodes: one of Layers, on features, signals and
images, or else one of LossFunctions, on tensors of any shape. An operation that neither serves is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils import _pytree as pytree

from maml_cuda.capture.errors import Unfusable
from maml_cuda.capture.python_state import Change
from maml_cuda.capture.record import Made, Operand, Operation, Record
from maml_cuda.plan.attention import with_attention
from maml_cuda.plan.graph import Constant, Graph, Held, Known, LogSumExp, Returned, Value, text_of
from maml_cuda.plan.images import Images
from maml_cuda.plan.integers import check_conversion, check_operation, exact, is_integer
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.loss_functions import LossFunctions
from maml_cuda.plan.schema import Node
from maml_cuda.plan.simplify import simplified, without_repetitions
from maml_cuda.plan.strided import Strided

# The methods that read operations, which are named like them.
_OPERATIONS = {
    name: method
    for name, method in inspect.getmembers(Layers, inspect.isfunction)
    if not hasattr(Images, name) and name not in ("append", "module_at", "linear_of_features", "__init__")
}
_ON_ANY_SHAPE = dict(inspect.getmembers(LossFunctions, inspect.isfunction))
# Of the first, those whose input is an image; a view of a value is brought into that form.
_ON_IMAGES = frozenset((
    "convolution", "native_batch_norm", "native_group_norm", "instance_norm", "max_pool2d_with_indices", "avg_pool2d",
))  # fmt: skip


def graph_of(
    model: nn.Module, record: Record, changes: tuple[Change, ...] = (), target: Sequence[tuple[int, ...]] | None = None,
    whole_sets: bool = False,
) -> Graph:  # fmt: skip
    """The graph of the prediction in a record of the model.

    Args:
        changes: of Python state by forward, which fused layers do not make.
        target: the shapes of the leaves of one task's target; then the graph computes the loss too.
        whole_sets: a whole set is read as one sample, so that samples may be combined with each other.

    Raises:
        Unfusable: there is none; the message is the reason.
    """
    graph = _Reader(model, record, target, whole_sets).read()
    graph.ignored, graph.written = tuple(map(str, changes)), record.written
    return graph


class _Reader(Layers):
    def __init__(
        self, model: nn.Module, record: Record, target: Sequence[tuple[int, ...]] | None, whole_sets: bool
    ) -> None:
        dtype = record.dtype
        if not dtype.is_floating_point:
            dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
        super().__init__(model, 1 if whole_sets else record.n, dtype)
        if whole_sets and any(is_integer(x.dtype) for x in record.inputs):
            raise Unfusable("its input holds integers, and it combines the samples")
        self.whole_sets = self.graph.whole_sets = whole_sets
        self._tensors = LossFunctions(self)
        self._target_shapes = target
        self._record = record
        self._in_loss = False
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._known: dict[int, Known] = dict(zip(map(id, record.inputs), self.inputs(record.inputs), strict=True))
        # ids of the operands that are numbers of an integer input
        self._integers = {id(x) for x in record.inputs if is_integer(x.dtype)}
        if self._integers:
            self.graph.integers = [
                exact(dtype) if id(x) in self._integers else None
                for x in record.inputs
                for _ in range(math.prod(x.shape[1:]))
            ]

    def read(self) -> Graph:
        prediction = self._record.prediction
        of_prediction = self._record.needed_for(prediction)
        self._read_all(of_prediction)
        self.call, self.module = "the prediction", ""
        self._finish(pytree.tree_map_only(Operand, self._operand, prediction))
        self.graph.prediction = len(self.graph.nodes)
        if self._target_shapes is not None:
            self._leaves = self.targets(self._target_shapes)
            done = set(map(id, of_prediction))
            of_loss = [o for o in self._record.needed_for(self._record.loss) if id(o) not in done]
            self._in_loss = True
            for operand in (operand for operation in of_loss for operand in operation.operands()):
                if self._requires_grad.get(operand.name, False) and operand.source == "model":
                    raise Unfusable(f"the loss reads {operand.name}, which it holds as it was before the inner loop")
            self._read_all([replace(operation, module="") for operation in of_loss])
            self._finish_loss()
        return self._ordered(self.graph)

    def _read_all(self, operations: list[Operation]) -> None:
        for operation in operations:
            self.call, self.module = operation.call, operation.module
            self.results = [operand.shape for operand in operation.results]
            self.drawn = operation.drawn
            try:
                self._read(operation)
            except Unfusable as reason:
                raise Unfusable(f"{self.call}: {reason}") from None

    def _finish_loss(self) -> None:
        self.call, self.module = "the loss", ""
        loss = self.strided(self._operand(self._record.loss))
        if loss.shape != () or loss.samples or loss.size != 1:
            raise Unfusable(
                f"the loss has shape {list(loss.shape)}, or is not computed from all samples; fused is one number"
            )
        self.graph.loss_value = loss.number
        self.graph.labels = tuple(dict.fromkeys(self.labels))

    def _read(self, operation: Operation) -> None:
        args, kwargs = pytree.tree_map_only(Operand, self._operand, (operation.args, operation.kwargs))
        known = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Known)]
        if not all(isinstance(k, Constant) for k in known):
            for operand in operation.operands() if operation.name != "_to_copy" else ():
                if operand.source == "model" and operand.dtype.is_floating_point and operand.dtype != self.dtype:
                    raise Unfusable(f"{operand.name} is {operand.dtype}, unlike the model's input")
            for operand in operation.results:
                if operand.dtype.is_floating_point and operand.dtype != self.dtype:
                    raise Unfusable(f"it computes in {operand.dtype}, where the model's input is {self.dtype}")
        learned = any(_is_learned(k) for k in known)
        if all(isinstance(k, Constant) for k in known) and operation.name != "bernoulli":
            results: Any = self._made(operation, args, kwargs)
        else:
            if check_operation(operation, self._integers):
                self._integers.update(map(id, operation.results))
            if operation.name == "_to_copy":
                results = self._converted(operation, args[0])
            else:
                results = self._written(operation.name, args, kwargs)
            if operation.boundary and learned:
                results = pytree.tree_map_only(Known, lambda k: self.stop(self.strided(k)), results)
        for operand, result in zip(
            operation.results, results if isinstance(results, tuple) else (results,), strict=False
        ):
            if result is None:
                result = Constant(f"a result of {operation.name} that no fused layer computes", learned)
            if isinstance(result, Known):
                self._known[id(operand)] = result

    def _made(self, operation: Operation, args: Any, kwargs: Any) -> tuple[Constant, ...]:
        """The results of an operation on no tensors, or on such results."""
        known = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Constant)]
        if any(k.make is None for k in known):
            return (Constant(known[0].what, any(k.trained for k in known)),) * len(operation.results)

        def make(index: int) -> Tensor:
            given = pytree.tree_map_only(Constant, lambda k: k.make(), (args, kwargs))
            result = pytree.tree_leaves(getattr(torch.ops.aten, operation.name)(*given[0], **given[1]))[index]
            assert isinstance(result, Tensor)
            return result

        return tuple(
            Constant("a tensor made in forward", False, partial(make, i)) for i in range(len(operation.results))
        )

    def _written(self, name: str, args: Any, kwargs: Any) -> Any:
        """Writes an operation. The layers on features, signals and images come first, then those over loops."""
        reason = Unfusable(f"no fused layer serves it ({name})")
        on_view = name in _ON_IMAGES and isinstance(args[0], Strided)
        for methods, reader in ((_OPERATIONS, self), (_ON_ANY_SHAPE, self._tensors)):
            if name not in methods:
                continue
            mark = self.mark()
            try:
                given = (self.image(args[0]), *args[1:]) if on_view and reader is self else args
                return methods[name](reader, *given, **kwargs)
            except Unfusable as found:
                reason = found
            except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:  # options of another form
                reason = Unfusable(f"no fused layer has this option ({error})")
            self.undo(mark)
        raise reason

    def _converted(self, operation: Operation, x: Any) -> Any:
        """x in another dtype."""
        return self.map("ne", x, 0.0) if check_conversion(operation, self.dtype) else x

    def _operand(self, operand: Operand) -> Known:
        if operand.overwritten == self.call:  # inside one function of torch
            raise Unfusable("no fused layer serves it")
        if operand.overwritten:
            raise Unfusable(f"it reads a value that {operand.overwritten} has changed in place")
        if id(operand) not in self._known:
            self._known[id(operand)] = self._input(operand)
        return self._known[id(operand)]

    def _input(self, operand: Operand) -> Known:
        if operand.source == "model":
            return Held(operand.name, operand.shape, self._requires_grad.get(operand.name, False))
        if operand.source == "y" and self._target_shapes is not None:
            return self._leaves[int(operand.name)]
        if (number := operand.number) is not None:
            return Constant("a tensor made in forward", False, lambda: number)
        if operand.tensor is not None and operand.source == "other":
            return self._outside(operand.tensor)
        return Constant("the target" if operand.source == "y" else "a tensor that is not the model's", False)

    def _outside(self, t: Tensor) -> Known:
        """A tensor that is not the model's, for example the weights of classes in a loss, or a parameter of it."""
        if own := next((name for name, p in self.model.named_parameters() if p is t), ""):
            raise Unfusable(f"it reads {own}, which it holds as it was before the inner loop")
        if t.requires_grad and not (self._in_loss and t.is_leaf):
            return Constant("a tensor that requires grad and is not the model's", False)
        name = next((name for name, known in self.graph.outside.items() if known is t), "")
        if not name:
            name = f"tensor {len(self.graph.outside)} outside of the model"
            self.graph.outside[name] = t
            self.graph.identities += (id(t),)
        return Held(name, tuple(t.shape), t.requires_grad)

    def _finish(self, prediction: Any) -> None:
        """Writes the last nodes of the prediction, for what `forward` returns."""
        nones = 0
        if type(prediction) is tuple and prediction and all(part is None for part in prediction[1:]):
            prediction, nones = prediction[0], len(prediction) - 1
        mean, log_std, distribution = _parts(prediction)
        if self.whole_sets and (log_std is not None or distribution):
            raise Unfusable("a policy whose samples depend on each other is not fused")
        if isinstance(mean, Strided):
            mean = self.as_features(mean)
        if not isinstance(mean, Value):
            raise Unfusable(f"the model returns {text_of(prediction)}, not one tensor computed from x")
        x = self.value(replace(mean, log_softmax=False))
        self.graph.returned = Returned(x.shape[1:], mean.log_softmax, distribution=distribution, nones=nones)
        if log_std is not None:
            x = self.append(x, log_std)
            self.graph.returned = replace(self.graph.returned, log_std="rows" if log_std.rows else "shared")
        if not x.learned:
            raise Unfusable("the model's prediction depends on no parameter")
        self.emit("flatten", [x], x.shape, x.sample, out_layout="features")  # to torch's order of elements

    def _ordered(self, graph: Graph) -> Graph:
        """The graph without nodes that nothing depends on, with its tensors in the model's order."""
        results = [graph.prediction, *([] if graph.loss_value is None else [graph.loss_value])]
        nodes = simplified(graph.nodes, results)
        graph.nodes = without_repetitions(with_attention(nodes, results, lambda value: _number_of(value, nodes, graph)))
        alive = set()
        pending = list(results)
        while pending:
            number = pending.pop()
            if number and number not in alive:
                alive.add(number)
                pending.extend(graph.nodes[number - 1].inputs)
        nodes = [node for number, node in enumerate(graph.nodes, start=1) if number in alive]
        values = {0: 0, **{number: place for place, number in enumerate(sorted(alive), start=1)}}
        read = {i for node in nodes for i in node.parameters if i is not None}
        names = [name for name, _ in [*self.model.named_parameters(), *self.model.named_buffers()]]
        order = sorted(read, key=lambda i: ([*names, graph.reads[i].name].index(graph.reads[i].name), i))
        places: dict[int | None, int | None] = {None: None, **{i: place for place, i in enumerate(order)}}
        graph.nodes = [
            replace(
                node,
                inputs=tuple(values[i] for i in node.inputs),
                parameters=tuple(places[i] for i in node.parameters),
            )
            for node in nodes
        ]
        graph.reads = [graph.reads[i] for i in order]
        graph.prediction = values[graph.prediction]
        graph.loss_value = None if graph.loss_value is None else values[graph.loss_value]
        graph.literals = {r.name: graph.literals[r.name] for r in graph.reads if r.name in graph.literals}
        return graph


def _parts(prediction: Any) -> tuple[Any, Any, str]:
    """The mean or logits, the log_std of a Gaussian policy or None, and the name of the distribution or ""."""
    if isinstance(prediction, Made):
        kind, arguments = prediction
        if kind is Independent and arguments["reinterpreted_batch_ndims"] == 1:
            mean, log_std, inside = _parts(arguments["base_distribution"])
            if inside == "Normal":
                return mean, log_std, "Independent"
        scale = arguments.get("scale")
        if kind is Normal and isinstance(scale, Held) and scale.exponential:
            return arguments["loc"], replace(scale, exponential=False), "Normal"
        if kind is Categorical and "logits" in arguments:
            return arguments["logits"], None, "Categorical"
        raise Unfusable(
            f"the model returns {kind.__name__}; fused are Categorical of logits, and Normal of exp(log_std)"
        )
    if type(prediction) is tuple and len(prediction) == 2 and prediction[1] is not None:
        return (*prediction, "")
    return prediction, None, ""


def _number_of(value: int, nodes: Sequence[Node], graph: Graph) -> float | None:
    """The number of a value that is one number, made in forward."""
    node = nodes[value - 1] if value else None
    if node is None or node.kind != "parameter" or node.parameters[0] is None:
        return None
    literal = graph.literals.get(graph.reads[node.parameters[0]].name)
    return literal.item() if literal is not None and literal.numel() == 1 else None


def _is_learned(known: Known) -> bool:
    """Whether it depends on a parameter that has a gradient."""
    if isinstance(known, LogSumExp):
        return known.of.learned
    if isinstance(known, (Value, Strided)):
        return known.learned
    return isinstance(known, (Held, Constant)) and known.trained
