"""What a model's `forward` does, as torch.fx records it, or the sentence why no record can be trusted.

torch.fx shows a hooked, a parametrized or a patched module as a plain leaf, takes `x += y` for `x = x + y`, and does
not see gradients being switched off: each of these is looked for here.
"""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Callable, Container
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrize


class Unfusable(Exception):
    """Why a module cannot be fused: a sentence that names it."""


_ONE_AT_A_TIME = threading.Lock()  # torch.fx patches nn.Module itself while it traces

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

    def __init__(self, leaves: Container[type]) -> None:
        super().__init__()
        self.leaves = leaves
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.leaves or (
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


def record(model: nn.Module, leaves: Container[type]) -> torch.fx.Graph:
    """The calls of `model.forward`, modules of a type in `leaves` as one call each.

    Raises:
        Unfusable: the sentence why there is no record.
    """
    for name, module in model.named_modules():
        what = described(name, module)
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
    tracer = _Tracer(leaves)
    off = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    drawn = torch.get_rng_state(), random.getstate()
    try:
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad(), off[0], off[1]:
            graph = tracer.trace(model)
    except Exception as error:
        inside = described(tracer.path, model.get_submodule(tracer.path))
        if isinstance(error, Unfusable):
            raise Unfusable(f"{inside}: {error}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unfusable(f"{inside} cannot be traced by torch.fx (data-dependent control flow?): {reason}") from error
    finally:
        moved = not torch.equal(torch.get_rng_state(), drawn[0]) or random.getstate() != drawn[1]
        torch.set_rng_state(drawn[0])
        random.setstate(drawn[1])
    if moved:
        raise Unfusable("its forward draws random numbers outside of its layers, which a plan would freeze")
    return graph


def described(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"
