"""What a model's `forward` does, as torch.fx records it, or the sentence why no record can be trusted.

torch.fx shows a hooked, a parametrized or a patched module as a plain leaf, takes `x += y` for `x = x + y`, and does
not see gradients being switched off: each of these is looked for here.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.fx
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrize

from maml_cuda.plan.side_effects import Held, Unfusable, Watch, described

_ONE_AT_A_TIME = threading.Lock()  # torch.fx patches nn.Module itself while it traces

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict)  # whose __call__ raises
_ABSENT: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: (), inspect.Parameter.VAR_KEYWORD: {}}


class _Proxy(torch.fx.Proxy):
    """Records `x += y` as what it is: torch.fx itself sees `x = x + y`, and loses that whoever holds x sees it too."""


def _in_place_operator(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
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
    itself would not hold: gradients switched off, or autocast switched on, inside `forward`.

    torch.fx patches nn.Module for all threads; what other threads do with modules meanwhile is none of ours.
    """

    def __init__(self, leaves: Container[type]) -> None:
        # By default it would patch the globals of whatever module is called.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.leaves = leaves
        self.path = ""
        self.thread = threading.get_ident()
        self.tensor_attrs: dict[Any, str] = {}  # fx's own: tensors -> names, among them of constants that it adds

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.leaves or (
            m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """A proxy for x alone: the other arguments are what they are in model(x), so that their branches are too."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, p in enumerate(inspect.signature(root_fn).parameters.values()):
            if i > 1 and p.kind in _ABSENT:
                args[i] = _ABSENT[p.kind]
            elif i > 1 and p.default is not p.empty:
                args[i] = p.default
        return function, args

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if not torch.is_grad_enabled():
            raise Unfusable("it switches gradients off (torch.no_grad) inside forward")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Unfusable("it switches autocast on inside forward")
        return super().create_node(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if isinstance(m, OptimizedModule):
            m = m._orig_mod
            forward = m.forward
        before, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = before
        return result


def record(model: nn.Module, leaves: Container[type]) -> torch.fx.Graph:
    """The calls of `model.forward`, modules of a type in `leaves` as one call each. A node that reads an attribute has
    its value as meta["value"]. The model is left as it was.

    Raises:
        Unfusable: the sentence why there is no record.
    """
    with _ONE_AT_A_TIME:
        _check_modules(model)
        tracer, watch, held = _Tracer(leaves), Watch(model), Held(model)
        off = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
        try:
            with torch.inference_mode(False), torch.enable_grad(), off[0], off[1], watch, watch.of_python():
                graph = tracer.trace(model)
            for node in graph.nodes:
                if node.op == "get_attr":
                    node.meta["value"] = operator.attrgetter(str(node.target))(model)
        except Exception as error:
            inside = described(tracer.path, model.get_submodule(tracer.path))
            if isinstance(error, Unfusable):
                raise Unfusable(f"{inside}: {error}") from None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unfusable(
                f"{inside} cannot be traced by torch.fx (data-dependent control flow?): {reason}"
            ) from error
        finally:
            changed = held.put_back(own=set(tracer.tensor_attrs.values()))
    if watch.why or changed:
        raise Unfusable(watch.why or changed)
    return graph


def _check_modules(model: nn.Module) -> None:
    """Raises Unfusable for what torch.fx would show as a plain leaf, and is none."""
    for path, module in model.named_modules():
        what = described(path, module)
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            raise Unfusable(f"{what} has hooks, which a fused layer would not run")
        if parametrize.is_parametrized(module):
            raise Unfusable(f"{what} has parametrizations (torch.nn.utils.parametrize)")
        if isinstance(module, OptimizedModule):  # whose own forward is the compiled one of the module inside
            continue
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, _NEVER_CALLED):
            raise Unfusable(f"{what} has a __call__ of its own")
        for name, value in vars(module).items():
            if callable(value) and callable(getattr(type(module), name, None)):
                raise Unfusable(f"{what} has a {name} of its own, set on the instance")
    if any(GLOBAL_HOOKS):
        raise Unfusable("torch has global module hooks, which a fused layer would not run")
