"""nn.Module -> plan: which fused layers serve it, or the sentence why not.

torch.fx records what `forward` does; `_Builder` reads that record call by call and writes one node for each fused
layer. A module and its functional spelling meet in one method with torch's own signature, so both count the same.
What is not understood is refused in words, never guessed: torch.fx shows a hooked or parametrized module as a plain
leaf, so those are looked for first.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Unfusable(Exception):
    """Why a module cannot be fused: a sentence that names it."""


@dataclass
class Plan:
    """Nodes over numbered values: value 0 is the input, node i writes value i + 1, the last one is the prediction.

    `parameters`: names of the parameters that the nodes read, in the order that their indices count.
    `rows_taps`: for each, [rows, taps] of a weight [rows, columns, *taps], or [1, 1].
    """

    nodes: list[dict[str, Any]] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    rows_taps: list[tuple[int, int]] = field(default_factory=list)
    served_by: dict[str, list[str]] = field(default_factory=dict)  # module path -> fused layers


@dataclass
class _Value:
    """A traced tensor: its number, how its memory is laid out, and whose memory it shares."""

    number: int
    channels_last: bool  # False only for the input, which stands as the user gave it
    alias: int
    overwritten: str = ""  # the in-place call that changed it


class _Dim:
    """x.size(k) of a traced tensor."""

    def __init__(self, axis: int) -> None:
        self.axis = axis


class _Shape:
    """x.shape of a traced tensor."""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Proxy(torch.fx.Proxy):
    """Records `x += y` as what it is: torch.fx itself sees `x = x + y`, and loses that whoever holds x sees it too."""


def _in_place_operator(function: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place_operator(getattr(operator, _name)))


GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)


class _Tracer(torch.fx.Tracer):
    """Keeps the path of the module that is being traced, for the sentence if tracing fails, and sees what the record
    itself would not hold: gradients switched off, or autocast switched on, inside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _MODULES or (
            m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if not torch.is_grad_enabled():
            raise Unfusable("it switches gradients off (torch.no_grad) inside forward")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Unfusable("it switches autocast on inside forward")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = before
        return result


def trace(model: nn.Module) -> Plan:
    """The plan of `model` as its training flags stand now.

    Raises:
        Unfusable: the sentence why there is none.
    """
    for name, module in model.named_modules():
        what = _described(name, module)
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            raise Unfusable(f"{what} has hooks, which a fused layer would not run")
        if parametrize.is_parametrized(module):
            raise Unfusable(f"{what} has parametrizations (torch.nn.utils.parametrize)")
        if type(module).__call__ is not nn.Module.__call__:
            raise Unfusable(f"{what} has a __call__ of its own")
        if "forward" in vars(module):
            raise Unfusable(f"{what} has a forward of its own, set on the instance")
    if any(GLOBAL_HOOKS):
        raise Unfusable("torch has global module hooks, which a fused layer would not run")
    tracer = _Tracer()
    off = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), off[0], off[1]:
            graph = tracer.trace(model)
    except Exception as error:
        inside = _described(tracer.path, model.get_submodule(tracer.path))
        if isinstance(error, Unfusable):
            raise Unfusable(f"{inside}: {error}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unfusable(f"{inside} cannot be traced by torch.fx (data-dependent control flow?): {reason}") from error
    return _Builder(model).build(graph)


def _described(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


def _two(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    if isinstance(value, (tuple, list)) and len(value) == 1 and isinstance(value[0], int):
        return value[0], value[0]
    raise Unfusable(f"a size that is not a pair of numbers ({value!r})")


class _Builder:
    """Turns a torch.fx graph into a Plan. Every layer method has the signature of torch.nn.functional's."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.plan = Plan()
        self.values: list[_Value] = [_Value(0, False, 0)]
        self.images: dict[int, _Value] = {}  # channels-last twins of values
        self.here = ""  # what is being read, for names and sentences
        self.path = ""

    def build(self, graph: torch.fx.Graph) -> Plan:
        self._without_unread(graph)
        read: dict[torch.fx.Node, Any] = {}
        seen_input = False
        for node in graph.nodes:
            self._locate(node)
            if node.op == "placeholder":
                if not seen_input:
                    read[node] = self.values[0]
                    seen_input = True
                elif node.args:
                    read[node] = node.args[0]
                else:
                    raise Unfusable(f"the model's forward takes more than one argument ({node.target})")
                continue
            if node.op == "get_attr":
                read[node] = self._attribute(str(node.target))
                continue
            args = torch.fx.node.map_arg(node.args, lambda n: read[n])
            kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: read[n])
            if node.op == "output":
                return self._finish(args[0])
            try:
                read[node] = self._call(node, args, kwargs)
            except Unfusable as reason:
                raise Unfusable(f"{self.here}: {reason}") from None
        raise Unfusable("the model returns nothing")

    # -- reading the graph ------------------------------------------------------------------------------------

    def _without_unread(self, graph: torch.fx.Graph) -> None:
        """Drops calls whose result nobody reads, unless they might change a value that others read."""
        for node in reversed(graph.nodes):
            if node.users or node.op in ("output", "placeholder"):
                continue
            if node.op == "call_module":
                module = self.model.get_submodule(str(node.target))
                pure = type(module) in _MODULES and not getattr(module, "inplace", False)
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
        if node.op == "call_module":
            self.path = str(node.target)
            self.here = _described(self.path, self.model.get_submodule(self.path))
            return
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        self.path = path if isinstance(path, str) else ""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        self.here = f"{name} in {_described(self.path, self.model.get_submodule(self.path))}"

    def _attribute(self, target: str) -> Any:
        value: Any = self.model
        for part in target.split("."):
            value = getattr(value, part)
        return value

    def _call(self, node: torch.fx.Node, args: tuple, kwargs: dict) -> Any:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if type(module) not in _MODULES:
                raise Unfusable("no fused layer serves it")
            return _MODULES[type(module)](self, module, *args, **kwargs)
        if node.op == "call_method":
            layer = _METHODS.get(str(node.target))
        else:
            layer = _FUNCTIONS.get(node.target)
        if layer is None:
            raise Unfusable("no fused layer serves it")
        try:
            inspect.signature(layer).bind(self, *args, **kwargs)
        except TypeError as error:
            raise Unfusable(f"an option that no fused layer has ({error})") from None
        return layer(self, *args, **kwargs)

    def _tensor(self, x: Any) -> _Value:
        if not isinstance(x, _Value):
            raise Unfusable(f"its input is {type(x).__name__}, not a value computed from x")
        if x.overwritten:
            raise Unfusable(f"it reads a value that {x.overwritten} has changed in place")
        return x

    def _image(self, x: _Value) -> _Value:
        """x in channels-last order."""
        if x.channels_last:
            return x
        if x.number not in self.images:
            self.images[x.number] = self._emit("channels_last", [x], alias=x.alias)
        return self.images[x.number]

    def _index(self, p: Any, what: str, rows: int = 1, taps: int = 1) -> int | None:
        """The index of a parameter; a weight has `rows` outputs and `taps` taps."""
        if p is None:
            return None
        if not isinstance(p, Tensor) or id(p) not in self.names:
            raise Unfusable(f"its {what} is not a parameter of the model")
        name = self.names[id(p)]
        if name not in self.plan.parameters:
            self.plan.parameters.append(name)
            self.plan.rows_taps.append((rows, taps))
        index = self.plan.parameters.index(name)
        if self.plan.rows_taps[index] != (rows, taps):
            raise Unfusable(f"its {what} is shared with a layer that uses it in another shape")
        return index

    def _emit(
        self,
        kind: str,
        inputs: list[_Value],
        parameters: tuple[int | None, int | None] = (None, None),
        alias: int | None = None,
        **attributes: Any,
    ) -> _Value:
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
        value = _Value(number, True, number if alias is None else alias)
        self.values.append(value)
        if self.path and kind != "channels_last":
            layer = attributes.get("function", "linear" if kind == "conv2d" and attributes["rank"] == 1 else kind)
            served = self.plan.served_by.setdefault(self.path, [])
            if layer not in served:
                served.append(layer)
        return value

    def _in_place(self, x: _Value, y: _Value) -> _Value:
        """y replaces x: whoever reads x, or a view of it, later on would read y."""
        if x.alias == 0:
            raise Unfusable("it changes the model's input in place")
        for value in self.values:
            if value.alias == x.alias and value is not y:
                value.overwritten = self.here
        return y

    def _finish(self, result: Any) -> Plan:
        if not isinstance(result, _Value):
            raise Unfusable(f"the model returns {type(result).__name__}, not one tensor computed from x")
        self.here, self.path = "the prediction", ""
        x = self._tensor(result)
        if not self.plan.parameters:
            raise Unfusable("the model's prediction depends on no parameter")
        self._emit("flatten", [x], out_rank=1)  # into the user's order of elements
        return self._without_dead(self.plan)

    def _without_dead(self, plan: Plan) -> Plan:
        """Drops nodes that do not reach the prediction, and the parameters that only they read."""
        alive = set()
        pending = [len(plan.nodes)]
        while pending:
            number = pending.pop()
            if number and number not in alive:
                alive.add(number)
                pending.extend(plan.nodes[number - 1]["inputs"])
        values = {0: 0}
        nodes = []
        for number, node in enumerate(plan.nodes, start=1):
            if number in alive:
                nodes.append({**node, "inputs": [values[i] for i in node["inputs"]]})
                values[number] = len(nodes)
        used = [i for i in range(len(plan.parameters)) if any(i in node["parameters"] for node in nodes)]
        names = [name for name, _ in self.model.named_parameters()]
        order = sorted(used, key=lambda i: names.index(plan.parameters[i]))
        place = {i: position for position, i in enumerate(order)}
        for node in nodes:
            node["parameters"] = [None if i is None else place[i] for i in node["parameters"]]
        return Plan(nodes, [plan.parameters[i] for i in order], [plan.rows_taps[i] for i in order], plan.served_by)

    # -- layers, by torch's own signatures --------------------------------------------------------------------

    def linear(self, input: Any, weight: Any, bias: Any = None) -> _Value:
        x = self._tensor(input)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise Unfusable("its weight is not a matrix")
        out_features, in_features = weight.shape
        parameters = (self._index(weight, "weight", rows=out_features), self._index(bias, "bias"))
        return self._emit(
            "conv2d", [x], parameters, in_features=in_features, out_features=out_features, rank=1,
            window=[[1, 1], [1, 1], [0, 0], [0, 0]],
        )  # fmt: skip

    def conv2d(
        self,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> _Value:
        x = self._tensor(input)
        if groups != 1:
            raise Unfusable(f"groups={groups} is not fused")
        if _two(dilation) != (1, 1):
            raise Unfusable(f"dilation={dilation} is not fused")
        if not isinstance(weight, Tensor) or weight.dim() != 4:
            raise Unfusable("its weight is not [out, in, height, width]")
        rows, columns, *kernel = weight.shape
        if padding == "same":
            before = [(k - 1) // 2 for k in kernel]
            after = [k - 1 - b for k, b in zip(kernel, before, strict=True)]
        else:
            before = after = [0, 0] if padding == "valid" else list(_two(padding))
        parameters = (self._index(weight, "weight", rows, kernel[0] * kernel[1]), self._index(bias, "bias"))
        return self._emit(
            "conv2d", [self._image(x)], parameters, in_features=columns, out_features=rows, rank=3,
            window=[kernel, list(_two(stride)), before, after],
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
        rank: int = 0,
    ) -> _Value:
        x = self._tensor(input)
        if not training:
            raise Unfusable("running statistics (eval mode) are not fused; in train mode batch statistics are")
        attributes: dict[str, Any] = {"in_features": len(weight)} if isinstance(weight, Tensor) else {}
        if isinstance(running_mean, Tensor):
            attributes = {"in_features": len(running_mean)}
        parameters = (self._index(weight, "weight"), self._index(bias, "bias"))
        x = x if rank == 1 else self._image(x)
        return self._emit("batch_norm", [x], parameters, a=eps, rank=rank, **attributes)

    def max_pool2d(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> _Value:
        if _two(dilation) != (1, 1) or return_indices:
            raise Unfusable("dilation and return_indices are not fused")
        return self._pool("max_pool", input, kernel_size, stride, padding, ceil_mode)

    def avg_pool2d(
        self,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> _Value:
        if divisor_override is not None:
            raise Unfusable("divisor_override is not fused")
        return self._pool("avg_pool", input, kernel_size, stride, padding, ceil_mode, count_padding=count_include_pad)

    def _pool(
        self,
        kind: str,
        input: Any,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        **attributes: Any,
    ) -> _Value:
        if ceil_mode:
            raise Unfusable("ceil_mode is not fused")
        kernel = _two(kernel_size)
        pad = _two(padding)
        if any(2 * p > k for p, k in zip(pad, kernel, strict=True)):
            raise Unfusable(f"padding {pad} is more than half of the kernel {kernel}")
        window = [
            list(kernel),
            list(_two(stride) if stride not in (None, [], ()) else kernel),
            list(pad),
            list(pad),
        ]
        return self._emit(kind, [self._image(self._tensor(input))], window=window, rank=3, **attributes)

    def adaptive_avg_pool2d(self, input: Any, output_size: Any) -> _Value:
        if _two(output_size) != (1, 1):
            raise Unfusable(f"output size {output_size} is not fused; 1 is")
        return self._emit("mean_pool", [self._image(self._tensor(input))], rank=3)

    def mean(self, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> _Value:
        axes = sorted(a % 4 for a in dim) if isinstance(dim, (tuple, list)) else None
        if axes != [2, 3] or dtype is not None:
            raise Unfusable(f"the mean over {dim} is not fused; over the spatial axes (2, 3) it is")
        out_rank: dict[str, Any] = {} if keepdim else {"out_rank": 1}
        return self._emit("mean_pool", [self._image(self._tensor(input))], rank=3, **out_rank)

    def flatten(self, input: Any, start_dim: int = 0, end_dim: int = -1) -> _Value:
        if (start_dim, end_dim) != (1, -1):
            raise Unfusable(f"flatten({start_dim}, {end_dim}) is not fused; flatten(1) is")
        x = self._tensor(input)
        return self._emit("flatten", [x], alias=x.alias, out_rank=1)

    def reshape(self, input: Any, *shape: Any) -> _Value:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        x = self._tensor(input)
        batch = len(shape) == 2 and isinstance(shape[0], _Dim) and shape[0].axis == 0
        if batch and shape[1] == -1:
            return self.flatten(x, 1)
        if len(shape) == 2 and (batch or shape[0] == -1) and isinstance(shape[1], int) and shape[1] > 0:
            return self._emit("flatten", [x], alias=x.alias, out_rank=1, out_features=shape[1])
        raise Unfusable("this reshape is not fused; into [n, features] it is")

    def add(self, input: Any, other: Any, *, alpha: Any = 1) -> _Value:
        if alpha != 1:
            raise Unfusable(f"alpha={alpha} is not fused")
        for operand in (input, other):
            if not isinstance(operand, _Value):
                raise Unfusable("the sum with a number or a parameter is not fused; of two values it is")
        return self._emit("add", [self._image(self._tensor(input)), self._image(self._tensor(other))])

    def iadd(self, input: Any, other: Any) -> _Value:
        return self._in_place(self._tensor(input), self.add(input, other))

    def pointwise(self, input: Any, function: str, inplace: bool = False, **constants: Any) -> _Value:
        x = self._tensor(input)
        y = self._emit("pointwise", [self._image(x)], function=function, **constants)
        return self._in_place(x, y) if inplace else y

    def relu(self, input: Any, inplace: bool = False) -> _Value:
        return self.pointwise(input, "relu", inplace)

    def relu_(self, input: Any) -> _Value:
        return self.relu(input, inplace=True)

    def leaky_relu(self, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> _Value:
        return self.pointwise(input, "leaky_relu", inplace, a=float(negative_slope))

    def elu(self, input: Any, alpha: float = 1.0, inplace: bool = False) -> _Value:
        return self.pointwise(input, "elu", inplace, a=float(alpha), b=1.0, c=1.0)

    def selu(self, input: Any, inplace: bool = False) -> _Value:
        return self.pointwise(input, "elu", inplace, a=1.6732632423543772, b=1.0507009873554805, c=1.0)

    def celu(self, input: Any, alpha: float = 1.0, inplace: bool = False) -> _Value:
        return self.pointwise(input, "elu", inplace, a=float(alpha), b=1.0, c=float(alpha))

    def silu(self, input: Any, inplace: bool = False) -> _Value:
        return self.pointwise(input, "silu", inplace)

    def gelu(self, input: Any, approximate: str = "none") -> _Value:
        return self.pointwise(input, "gelu" if approximate == "none" else "gelu_tanh")

    def softplus(self, input: Any, beta: float = 1.0, threshold: float = 20.0) -> _Value:
        return self.pointwise(input, "softplus", a=float(beta), b=float(threshold))

    def tanh(self, input: Any) -> _Value:
        return self.pointwise(input, "tanh")

    def sigmoid(self, input: Any) -> _Value:
        return self.pointwise(input, "sigmoid")

    def hardtanh(self, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> _Value:
        return self.pointwise(input, "hardtanh", inplace, a=float(min_val), b=float(max_val))

    def relu6(self, input: Any, inplace: bool = False) -> _Value:
        return self.hardtanh(input, 0.0, 6.0, inplace)

    def dropout(self, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Value:
        if training and p > 0:
            raise Unfusable(f"dropout with p={p} in train mode is random, which is not fused; in eval mode it is")
        return self._tensor(input)

    def identity(self, input: Any) -> _Value:
        return self._tensor(input)

    # -- sizes ------------------------------------------------------------------------------------------------

    def size(self, input: Any, dim: int | None = None) -> Any:
        return _Shape() if dim is None else _Dim(dim)

    def get_attribute(self, x: Any, name: str) -> Any:
        if isinstance(x, _Value) and name == "shape":
            return _Shape()
        raise Unfusable(f"the attribute {name} of a traced value is not understood")

    def get_item(self, x: Any, index: Any) -> Any:
        if isinstance(x, _Shape) and isinstance(index, int):
            return _Dim(index)
        raise Unfusable("indexing is not fused")


def _convolution(b: _Builder, m: Any, input: Any) -> _Value:
    if m.padding_mode != "zeros":
        raise Unfusable(f"padding_mode={m.padding_mode!r} is not fused")
    return b.conv2d(input, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)


def _batch_norm(rank: int) -> Callable[[_Builder, Any, Any], _Value]:
    def layer(b: _Builder, m: Any, input: Any) -> _Value:
        batch_statistics = m.training or (m.running_mean is None and m.running_var is None)
        value = b.batch_norm(input, None, None, m.weight, m.bias, batch_statistics, eps=m.eps, rank=rank)
        b.plan.nodes[-1]["in_features"] = m.num_features
        return value

    return layer


def _flatten(b: _Builder, m: Any, input: Any) -> _Value:
    return b.flatten(input, m.start_dim, m.end_dim)


def _dropout(b: _Builder, m: Any, input: Any) -> _Value:
    return b.dropout(input, m.p, m.training)


def _max_pool(b: _Builder, m: Any, input: Any) -> _Value:
    return b.max_pool2d(input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _avg_pool(b: _Builder, m: Any, input: Any) -> _Value:
    return b.avg_pool2d(input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)


_MODULES: dict[type, Callable[..., _Value]] = {
    nn.Linear: lambda b, m, x: b.linear(x, m.weight, m.bias),
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm(1),
    nn.BatchNorm2d: _batch_norm(3),
    nn.ReLU: lambda b, m, x: b.relu(x, m.inplace),
    nn.ReLU6: lambda b, m, x: b.relu6(x, m.inplace),
    nn.LeakyReLU: lambda b, m, x: b.leaky_relu(x, m.negative_slope, m.inplace),
    nn.ELU: lambda b, m, x: b.elu(x, m.alpha, m.inplace),
    nn.SELU: lambda b, m, x: b.selu(x, m.inplace),
    nn.CELU: lambda b, m, x: b.celu(x, m.alpha, m.inplace),
    nn.SiLU: lambda b, m, x: b.silu(x, m.inplace),
    nn.GELU: lambda b, m, x: b.gelu(x, m.approximate),
    nn.Softplus: lambda b, m, x: b.softplus(x, m.beta, m.threshold),
    nn.Tanh: lambda b, m, x: b.tanh(x),
    nn.Sigmoid: lambda b, m, x: b.sigmoid(x),
    nn.Hardtanh: lambda b, m, x: b.hardtanh(x, m.min_val, m.max_val, m.inplace),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: lambda b, m, x: b.adaptive_avg_pool2d(x, m.output_size),
    nn.Flatten: _flatten,
    nn.Identity: lambda b, m, x: b.identity(x),
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.AlphaDropout: _dropout,
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _Builder.linear,
    F.conv2d: _Builder.conv2d,
    torch.conv2d: _Builder.conv2d,
    F.batch_norm: _Builder.batch_norm,
    F.max_pool2d: _Builder.max_pool2d,
    torch.max_pool2d: _Builder.max_pool2d,
    F.avg_pool2d: _Builder.avg_pool2d,
    F.adaptive_avg_pool2d: _Builder.adaptive_avg_pool2d,
    torch.mean: _Builder.mean,
    torch.flatten: _Builder.flatten,
    torch.reshape: _Builder.reshape,
    torch.add: _Builder.add,
    operator.add: _Builder.add,
    operator.iadd: _Builder.iadd,
    F.relu: _Builder.relu,
    F.relu_: _Builder.relu_,
    torch.relu: _Builder.relu,
    torch.relu_: _Builder.relu_,
    F.relu6: _Builder.relu6,
    F.leaky_relu: _Builder.leaky_relu,
    F.elu: _Builder.elu,
    F.selu: _Builder.selu,
    F.celu: _Builder.celu,
    F.silu: _Builder.silu,
    F.gelu: _Builder.gelu,
    F.softplus: _Builder.softplus,
    F.hardtanh: _Builder.hardtanh,
    F.tanh: _Builder.tanh,
    torch.tanh: _Builder.tanh,
    F.sigmoid: _Builder.sigmoid,
    torch.sigmoid: _Builder.sigmoid,
    F.dropout: _Builder.dropout,
    F.dropout2d: _Builder.dropout,
    builtins.getattr: _Builder.get_attribute,
    operator.getitem: _Builder.get_item,
}

_METHODS: dict[str, Callable[..., Any]] = {
    "relu": _Builder.relu,
    "relu_": _Builder.relu_,
    "tanh": _Builder.tanh,
    "sigmoid": _Builder.sigmoid,
    "mean": _Builder.mean,
    "flatten": _Builder.flatten,
    "view": _Builder.reshape,
    "reshape": _Builder.reshape,
    "add": _Builder.add,
    "add_": _Builder.iadd,
    "size": _Builder.size,
    "contiguous": _Builder.identity,
}
