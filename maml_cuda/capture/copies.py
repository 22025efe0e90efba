"""Deep copies of a model and its loss in which other tensors take the place of the model's own.

Whatever runs on such a copy leaves the model alone: its parameters, buffers, attributes and containers. So other
threads may use the model meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Place(NamedTuple):
    """Where a module holds a tensor.

    Attributes:
        registry: `_parameters`, `_buffers` or the attributes of the module.
        key: in the registry.
    """

    registry: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        held: Tensor = self.registry[self.key]
        return held


def places(model: nn.Module) -> dict[str, Place]:
    """The place of each parameter, buffer and tensor attribute of the model, by its name, in this order.

    A tensor with several names has the first one, as in `named_parameters`.
    """
    found: dict[str, Place] = {}
    seen: set[int] = set()
    for registry_of in (lambda m: m._parameters, lambda m: m._buffers, vars):
        for path, module in model.named_modules():
            registry = registry_of(module)
            for key, t in registry.items():
                if isinstance(t, Tensor) and id(t) not in seen:
                    seen.add(id(t))
                    found[f"{path}.{key}".lstrip(".")] = Place(registry, key)
    return found


def in_place_of(t: Tensor, made: Tensor) -> Tensor:
    """The tensor `made` as the inner loop holds it in place of t: no Parameter, and no leaf if it has a gradient."""
    if not isinstance(t, nn.Parameter):
        return made
    if t.requires_grad:
        made = made.requires_grad_().view_as(made)
    made.__dict__.update(t.__dict__)  # attributes that the user has set on it
    return made


def copied(objects: T, replaced: Mapping[int, Tensor], copies: set[int] | None = None) -> T:
    """A deep copy of a model, or of a tuple of it and its loss.

    Functions that close over modules or tensors close over their copies. Shared with the original are objects that
    cannot be copied (locks, files, loggers), and a loss that is neither a module nor a function: it may belong to a
    program's largest objects.

    Args:
        replaced: id of a tensor -> the tensor that takes its place, wherever the objects hold it.
        copies: receives the ids of the tensors that are new copies.
    """
    shared = {id(part): part for part in _shared(objects)}
    memo: dict[int, Any] = {**replaced, **shared}
    try:
        result = _copied(objects, memo)
    except Exception:
        shared.update({id(value): value for value in _attributes(objects)})
        memo = {**replaced, **shared}
        result = _copied(objects, memo)
    if copies is not None:
        known = {id(t) for t in replaced.values()}
        copies.update(id(t) for key, t in memo.items() if isinstance(t, Tensor) and id(t) not in known | {key})
    return result


def _shared(objects: Any) -> list[Any]:
    """The losses among the objects that are not copied, and the objects whose methods they are."""
    if not isinstance(objects, tuple):
        return []
    model, loss = objects
    owner = getattr(loss, "__self__", loss)
    if isinstance(owner, (nn.Module, FunctionType, partial)) and (owner is loss or owner in set(model.modules())):
        return []
    return [loss, owner]


def _copied(objects: T, memo: dict[int, Any]) -> T:
    """memo: of copy.deepcopy, id of an object -> its copy."""
    closures: list[tuple[CellType, CellType]] = []
    for function in _attributes(objects):
        if isinstance(function, FunctionType) and function.__closure__:
            cells = tuple(CellType() for _ in function.__closure__)
            made = FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
            )
            made.__kwdefaults__ = function.__kwdefaults__
            made.__dict__.update(function.__dict__)
            memo[id(function)] = made
            closures += zip(function.__closure__, cells, strict=True)
    result = copy.deepcopy(objects, memo)
    for cell, new in closures:
        content = cell.cell_contents
        is_copied = id(content) in memo or isinstance(content, (nn.Module, MethodType))
        new.cell_contents = copy.deepcopy(content, memo) if is_copied else content
    return result


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Each tensor of `places`, then each one in a list, tuple, set or dict that is an attribute of a module, once."""
    in_containers = _attributes(model, of_interest=lambda v: isinstance(v, Tensor))
    return list({id(t): t for t in (*(place.tensor for place in places(model).values()), *in_containers)}.values())


def _attributes(
    objects: Any, of_interest: Callable[[Any], bool] = lambda v: not isinstance(v, (Tensor, nn.Module))
) -> Iterator[Any]:
    """The objects and the attributes of their modules, and the items of containers among these."""
    roots = objects if isinstance(objects, tuple) else (objects,)
    modules = [m for root in roots if isinstance(root, nn.Module) for m in root.modules()]
    pending = [*roots, *(value for module in modules for value in vars(module).values())]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, list, tuple, set)):
            if id(value) not in seen:
                seen.add(id(value))
                pending += value.values() if isinstance(value, dict) else value
        elif of_interest(value):
            yield value
