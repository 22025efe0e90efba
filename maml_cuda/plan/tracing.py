"""Records the calls of a model's `forward` with torch.fx, or raises Unfusable if the record would be incomplete.

torch.fx does not show everything. A module that has hooks, parametrizations or methods set on the instance looks like
any other. `x += y` looks like `x = x + y`. `torch.no_grad` and `torch.autocast` leave no trace. This module checks for
each of these.
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

from maml_cuda.plan.side_effects import ModuleState, SideEffectMode, Unfusable, described

_LOCK = threading.Lock()  # one thread traces at a time, because torch.fx patches nn.Module meanwhile

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module

GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)

_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict)  # have a __call__ of their own, which raises
_EMPTY: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: (), inspect.Parameter.VAR_KEYWORD: {}}


class _Proxy(torch.fx.Proxy):
    """A proxy that records `x += y` as operator.iadd.

    torch.fx's own proxy records `x = x + y`, although other references to x see the change.
    """


def _in_place_operator(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place_operator(getattr(operator, _name)))


class _Tracer(torch.fx.Tracer):
    """A tracer that refuses `torch.no_grad` and `torch.autocast` inside `forward`.

    torch.fx patches nn.Module for all threads. Calls in other threads run as usual and are not recorded.

    Attributes:
        leaves: types of modules that are recorded as one call.
        path: of the module that is being traced, for error messages.
        thread: the thread that traces.
        tensor_attrs: torch.fx's own table of tensors -> attribute names. It has those of constants that torch.fx adds.
    """

    def __init__(self, leaves: Container[type]) -> None:
        # The default, (math,), replaces functions of math in the globals of the model's Python modules while it traces.
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.leaves = leaves
        self.path = ""
        self.thread = threading.get_ident()
        self.tensor_attrs: dict[Any, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.leaves or (
            m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Makes a proxy for x only. Other arguments have their defaults, as in model(x): forward can branch on them."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, p in enumerate(inspect.signature(root_fn).parameters.values()):
            if i > 1 and p.kind in _EMPTY:
                args[i] = _EMPTY[p.kind]
            elif i > 1 and p.default is not p.empty:
                args[i] = p.default
        return function, args

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """Checks the modes in which each call is made."""
        if not torch.is_grad_enabled():
            raise Unfusable("it disables gradients (torch.no_grad) inside forward")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Unfusable("it enables autocast inside forward")
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
    """Records the calls of `model.forward` as a torch.fx graph. The model is not changed.

    Args:
        leaves: types of modules that are recorded as one call. Modules of torch.nn are too, except containers. For any
            other module, the calls of its forward are recorded.

    Returns:
        The graph. A node that reads an attribute has its value in meta["value"].

    Raises:
        Unfusable: there is no complete record; the message is the reason.
    """
    with _LOCK:
        _check_modules(model)
        tracer, effects, before = _Tracer(leaves), SideEffectMode(model), ModuleState(model)
        off = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
        try:
            with torch.inference_mode(False), torch.enable_grad(), off[0], off[1], effects, effects.python_random():
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
            changed = before.restore(ignored=set(tracer.tensor_attrs.values()))
    if effects.reason or changed:
        raise Unfusable(effects.reason or changed)
    return graph


def _check_modules(model: nn.Module) -> None:
    """Checks what torch.fx does not show of a module.

    Raises:
        Unfusable: a module has hooks, parametrizations, a __call__ of its own, or a method set on the instance; or
            there are global module hooks.
    """
    for path, module in model.named_modules():
        what = described(path, module)
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            raise Unfusable(f"{what} has hooks, which a fused layer would not run")
        if parametrize.is_parametrized(module):
            raise Unfusable(f"{what} has parametrizations (torch.nn.utils.parametrize)")
        if isinstance(module, OptimizedModule):  # has the compiled forward on the instance; the module inside is traced
            continue
        if type(module).__call__ is not nn.Module.__call__ and not isinstance(module, _NEVER_CALLED):
            raise Unfusable(f"{what} has a __call__ of its own")
        for name, value in vars(module).items():
            if callable(value) and callable(getattr(type(module), name, None)):
                raise Unfusable(f"{what} has a {name} of its own, set on the instance")
    if any(GLOBAL_HOOKS):
        raise Unfusable("torch has global module hooks, which a fused layer would not run")
