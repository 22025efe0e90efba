"""Faults: globals, options and code that change between two calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.capture.planted.settings import add, fault

GLOBAL = "stale globals"
SCALE, FLAG, ACTIVATION = 1.0, True, torch.tanh
SCALES: list[float] = []
OPTIONS: dict[str, float] = {}
CONFIG = SimpleNamespace()


def set_globals(**values: Any) -> Any:
    return lambda model: globals().update(values)


@fault(GLOBAL, "mlp", "SCALE|mul", plant=set_globals(SCALE=1.0), between=set_globals(SCALE=2.5))
def a_global_number(self: Any, h: Tensor) -> Tensor:
    return h * SCALE


@fault(GLOBAL, "conv4", "FLAG|mul", plant=set_globals(FLAG=True), between=set_globals(FLAG=False))
def a_global_flag(self: Any, h: Tensor) -> Tensor:
    return h if FLAG else h * 1.5


@fault(
    GLOBAL, "policy", "ACTIVATION", plant=set_globals(ACTIVATION=torch.tanh),
    between=set_globals(ACTIVATION=torch.sigmoid),
)  # fmt: skip
def a_global_function(self: Any, h: Tensor) -> Tensor:
    return ACTIVATION(h)


@fault(
    GLOBAL, "conv1d", "SCALES|mul", plant=lambda m: SCALES.__setitem__(slice(None), [1.0]),
    between=lambda m: SCALES.append(2.5),
)  # fmt: skip
def a_global_list(self: Any, h: Tensor) -> Tensor:
    return h * sum(SCALES)


@fault(
    GLOBAL, "layer norm", "OPTIONS|mul", plant=lambda m: OPTIONS.update(scale=1.0),
    between=lambda m: OPTIONS.update(scale=2.5),
)  # fmt: skip
def a_global_dict(self: Any, h: Tensor) -> Tensor:
    return h * OPTIONS["scale"]


@fault(
    GLOBAL, "resnet", "CONFIG|mul", plant=lambda m: setattr(CONFIG, "scale", 1.0),
    between=lambda m: setattr(CONFIG, "scale", 2.5),
)  # fmt: skip
def a_global_config(self: Any, h: Tensor) -> Tensor:
    return h * CONFIG.scale


def config_of_the_model(model: Any) -> None:
    model.config = SimpleNamespace(inner=SimpleNamespace(scale=1.0))


@fault(
    GLOBAL, "nested", "config|mul", plant=config_of_the_model,
    between=lambda m: setattr(m.config.inner, "scale", 2.5),
)  # fmt: skip
def a_config_of_the_model(self: Any, h: Tensor) -> Tensor:
    return h * self.config.inner.scale


@fault(
    GLOBAL, "group norm", "scales|mul", plant=lambda m: setattr(m, "scales", [1.0]),
    between=lambda m: m.scales.__setitem__(0, 2.5),
)  # fmt: skip
def a_list_of_the_model(self: Any, h: Tensor) -> Tensor:
    return h * self.scales[0]


@fault(
    GLOBAL, "regression", "scale|mul", plant=lambda m: setattr(type(m), "scale", 1.0),
    between=lambda m: setattr(type(m), "scale", 2.5),
)  # fmt: skip
def a_class_attribute(self: Any, h: Tensor) -> Tensor:
    return h * self.scale


def scaled_in_a_closure() -> tuple[Any, Any]:
    scale = 1.0

    def middle(self: Any, h: Tensor) -> Tensor:
        return h * scale

    def change(to: float) -> Any:
        def changed(model: Any) -> None:
            nonlocal scale
            scale = to

        return changed

    return middle, change


in_a_closure, change_closure = scaled_in_a_closure()
add(
    "a closure cell", GLOBAL, "shared", "scale|mul", methods={"middle": in_a_closure}, plant=change_closure(1.0),
    between=change_closure(2.5),
)  # fmt: skip


def helped(h: Tensor, scale: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return h * scale[0]


@fault(
    GLOBAL, "mlp", "helped|scale|mul", plant=lambda m: helped.__defaults__[0].__setitem__(0, 1.0),
    between=lambda m: helped.__defaults__[0].__setitem__(0, 2.5),
)  # fmt: skip
def a_default_argument_of_a_helper(self: Any, h: Tensor) -> Tensor:
    return helped(h)


@fault(GLOBAL, "nested", "forward|mul", between=lambda m: setattr(type(m), "middle", lambda self, h: h * 2.5))
def a_method_of_the_class_replaced(self: Any, h: Tensor) -> Tensor:
    return h


@fault(
    GLOBAL, "policy", "scale|mul", plant=set_globals(SCALE=1.0), between=set_globals(SCALE=2.5),
)  # fmt: skip
def a_global_read_by_a_nested_function(self: Any, h: Tensor) -> Tensor:
    def scaled(each: Tensor) -> Tensor:
        return each * SCALE

    return scaled(h)
