"""Reads an nn.Module as a graph of fused layers, or raises Unfusable with the reason why it cannot.

tracing.py records the calls of `forward` with torch.fx. This module reads the record call by call, and layers.py writes
the nodes for each call. A call that none of its methods reads is refused.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.fx
from torch import nn

from maml_cuda.plan.arguments import FlooredParameter, Traced, argument_text
from maml_cuda.plan.graph import Graph, Value
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.side_effects import Unfusable, described
from maml_cuda.plan.torch_names import FUNCTIONS, METHODS, MODULES
from maml_cuda.plan.tracing import GLOBAL_HOOKS, HOOKS, record

__all__ = ["GLOBAL_HOOKS", "HOOKS", "Graph", "Unfusable", "trace"]


def trace(model: nn.Module) -> Graph:
    """The graph of fused layers for `model`, with its current training flags.

    Raises:
        Unfusable: there is none; the message is the reason.
    """
    return _Reader(model).read(record(model, MODULES))


# The arguments of a layer's method that may be values computed from x, or their shapes. All others must be numbers or
# parameters.
VALUE_ARGUMENTS = ("self", "layers", "input", "other", "x", "shape", "index")


def _traced(argument: Any) -> list[Traced]:
    """The traced objects in an argument: itself, or items of a tuple or list."""
    parts = argument if isinstance(argument, (tuple, list)) else [argument]
    return [part for part in parts if isinstance(part, Traced)]


class _Reader(Layers):
    """Reads a torch.fx graph, node by node."""

    def read(self, graph: torch.fx.Graph) -> Graph:
        """Writes the nodes for all calls of the torch.fx graph.

        Raises:
            Unfusable: a call is not fused; the message names the call.
        """
        self._remove_unused_calls(graph)
        values: dict[torch.fx.Node, Any] = {}
        seen_input = False
        for node in graph.nodes:
            self._locate(node)
            if node.op == "placeholder":
                if not seen_input:
                    values[node] = self.values[0]
                    seen_input = True
                elif not node.args and not str(node.target).startswith("*"):
                    raise Unfusable(f"the model's forward takes more than one argument ({node.target})")
                continue
            if node.op == "get_attr":
                values[node] = node.meta["value"]
                continue
            args = torch.fx.node.map_arg(node.args, lambda n: values[n])
            kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: values[n])
            if node.op == "output":
                return self._finish(args[0])
            try:
                values[node] = self._call(node, args, kwargs)
            except Unfusable as reason:
                raise Unfusable(f"{self.call}: {reason}") from None
        raise Unfusable("the model returns nothing")

    def _remove_unused_calls(self, graph: torch.fx.Graph) -> None:
        """Removes calls whose result is never read, unless they may change another value in place.

        A name such as relu_ or iadd, an argument `out`, and an argument True (`inplace`) are signs of that.
        """
        for node in reversed(graph.nodes):
            if node.users or node.op in ("output", "placeholder"):
                continue
            if node.op == "call_module":
                module = self.model.get_submodule(str(node.target))
                pure = type(module) in MODULES and not getattr(module, "inplace", False)
            else:
                name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
                in_place = name.endswith("_") or (node.target in vars(operator).values() and name.startswith("i"))
                pure = (
                    not in_place
                    and "out" not in node.kwargs
                    and not any(a is True for a in (*node.args, *node.kwargs.values()))
                )
            if pure:
                graph.erase_node(node)

    def _locate(self, node: torch.fx.Node) -> None:
        """Sets `module_path` and `call` to those of a node of the torch.fx graph."""
        if node.op == "call_module":
            self.module_path = str(node.target)
            self.call = described(self.module_path, self.model.get_submodule(self.module_path))
            return
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        self.module_path = path if isinstance(path, str) else ""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        self.call = f"{name} in {described(self.module_path, self.model.get_submodule(self.module_path))}"

    def _call(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the method of Layers for one node of the torch.fx graph."""
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if type(module) not in MODULES:
                raise Unfusable("no fused layer serves it")
            layer: Callable[..., Any] | None = MODULES[type(module)]
            args = (module, *args)
        elif node.op == "call_method":
            layer = METHODS.get(str(node.target))
        else:
            layer = FUNCTIONS.get(node.target)
        if layer is None:
            raise Unfusable("no fused layer serves it")
        try:
            given = inspect.signature(layer).bind(self, *args, **kwargs).arguments
            for name, argument in given.items():
                if name not in VALUE_ARGUMENTS and (found := _traced(argument)):
                    raise Unfusable(f"its {name} is {found[0]}; only a number or a parameter is fused")
            return layer(self, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise Unfusable(f"no fused layer has this option ({error})") from None

    def _finish(self, result: Any) -> Graph:
        """Writes the last nodes, for what `forward` returns, and returns the graph."""
        policy = isinstance(result, tuple) and len(result) == 2
        mean = result[0] if policy else result
        if not isinstance(mean, Value):
            raise Unfusable(f"the model returns {argument_text(result)}, not one tensor computed from x")
        self.call, self.module_path = "the prediction", ""
        x = self._value(mean)
        if policy:
            x = self.append(x, result[1])
            self.graph.log_std = "rows" if isinstance(result[1], FlooredParameter) and result[1].rows else "shared"
        if not any(read.name in self.names.values() for read in self.graph.reads):
            raise Unfusable("the model's prediction depends on no parameter")
        self._emit("flatten", [x], out_layout="features")  # from channels last to torch's order of elements
        return self._without_unused_nodes(self.graph)

    def _without_unused_nodes(self, graph: Graph) -> Graph:
        """The graph without nodes that the prediction does not depend on, and without parameters that only they read.

        Parameters and buffers are in the model's order.
        """
        alive = set()
        pending = [len(graph.nodes)]
        while pending:
            number = pending.pop()
            if number and number not in alive:
                alive.add(number)
                pending.extend(graph.nodes[number - 1].inputs)
        nodes = [node for number, node in enumerate(graph.nodes, start=1) if number in alive]
        values = {0: 0, **{number: place for place, number in enumerate(sorted(alive), start=1)}}
        read = {i for node in nodes for i in node.parameters if i is not None}
        names = [name for name, _ in [*self.model.named_parameters(), *self.model.named_buffers()]]
        order = sorted(read, key=lambda i: names.index(graph.reads[i].name))
        places: dict[int | None, int | None] = {None: None, **{i: place for place, i in enumerate(order)}}
        nodes = [
            replace(
                node,
                inputs=tuple(values[i] for i in node.inputs),
                parameters=tuple(places[i] for i in node.parameters),
            )
            for node in nodes
        ]
        return Graph(nodes, [graph.reads[i] for i in order], graph.served_by, graph.log_std)
