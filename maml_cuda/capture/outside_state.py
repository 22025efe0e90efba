"""State outside of a model's modules: globals, variables that code closes over, attributes of classes and of other
objects, what these hold, and random generators.

Capture and proof run a copy of a model, which shares this state with the model. It is recorded before such a run and
put back after it, with the very same objects. A call that changes it is not fused, because a program would not change
it. Attributes of the model's modules are not recorded here (python_state.py does), but objects in them are.

What the code can reach is found as for guards.
"""

from __future__ import annotations

import array
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from io import IOBase
from types import CellType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from maml_cuda.capture import generators
from maml_cuda.capture.code_names import names_in
from maml_cuda.capture.errors import Unfusable, described
from maml_cuda.capture.guards import Walk, attributes_of, is_library, slots_of
from maml_cuda.capture.python_state import REGISTRIES, content_of, put_back, same
from maml_cuda.capture.recorder import RANDOM

_CONTAINERS = (dict, list, set, deque, bytearray, WeakKeyDictionary, WeakValueDictionary, WeakSet)
_CACHES = type(lru_cache(len))
_ABSENT = object()

Restore = Callable[[], Any]  # puts a state back; returns the keys of attributes that had changed, or whether it had


class _State(NamedTuple):
    """Some recorded state.

    Attributes:
        restore: puts it back.
        sentence: says what has changed, given the first key.
    """

    restore: Restore
    sentence: Callable[[str], str]


class OutsideState:
    """A record of the state that calls of a model and of functions can reach outside of the model's modules.

    Raises:
        Unfusable: some of it cannot be put back.
    """

    def __init__(self, model: nn.Module, functions: Iterable[Callable[..., Any]] = ()) -> None:
        hooks = nn.modules.module
        of_all = *hooks._global_forward_hooks.values(), *hooks._global_forward_pre_hooks.values()
        self._who = described("", model)
        try:
            self._states = [*_states(Walk(model, [*functions, *of_all]))]
        except Unfusable as reason:
            raise Unfusable(f"{self._who}: {reason}") from None

    def restore(self) -> str:
        """Undoes all changes. Returns a sentence that says what had changed first, or ""."""
        sentence = ""
        for state in self._states:
            if (changed := state.restore()) and not sentence:
                key = "" if changed is True else f".{changed[0]}"
                sentence = f"{self._who}: {state.sentence(key)}"
        return sentence


@contextmanager
def restored(model: nn.Module, functions: Iterable[Callable[..., Any]] = ()) -> Iterator[None]:
    """A context that undoes at its end what calls of a model and of functions change outside of its modules."""
    state = OutsideState(model, functions)
    try:
        yield
    finally:
        state.restore()


def _states(walk: Walk) -> Iterator[_State]:
    """Variables first, as their names say most."""

    def state(restore: Restore, name: str, where: str) -> _State:
        return _State(restore, lambda key: f"a call changes `{name}{key}`{where}, which a fused layer would not do")

    for owner, key, name, where in walk.places.values():
        if not isinstance(owner, type):
            yield state(_variable(owner, key), name, where)
    names = set(walk.attributes)
    for function in walk.functions:
        set_names = names_in(function.__code__).set
        names |= set_names
        for name in set_names:
            yield state(_variable(function.__globals__, name), name, f" that {function.__qualname__} sets")
        yield state(_attributes(vars(function)), function.__qualname__, "")
    for module in walk.python_modules:
        for name in names:
            yield state(_variable(vars(module), name), f"{module.__name__}.{name}", "")
    bases = {base: None for cls in walk.classes for base in cls.__mro__}
    for cls in (base for base in bases if not is_library(base.__module__)):
        yield state(_class(cls), cls.__qualname__, "")
    for value, name, where in walk.instances:
        if (attributes := attributes_of(value)) is not None:
            yield state(_attributes(attributes), name, where)
        for key in slots_of(type(value)):
            yield state(_variable(value, key), f"{name}.{key}", where)
    for value, name, where in walk.found.values():
        if access := generators.access_to(value):
            yield _State(_bytes(access.read, access.put), lambda key: RANDOM)
        elif isinstance(value, Tensor):
            yield state(_attributes(vars(value)) if type(value) is not FakeTensor else _of_fake(value), name, where)
        elif isinstance(value, nn.Module):
            for content in (vars(value), *(vars(value)[registry] for registry in REGISTRIES)):
                yield state(_attributes(content), name, where)
        elif isinstance(value, _CONTAINERS):
            yield state(_content(value), name, where)
        elif isinstance(value, (np.ndarray, array.array)):
            yield state(_array(value), name, where)
        elif isinstance(value, _CACHES) and not is_library(value.__module__):
            yield state(_cache(value), f"{name}.cache", where)
        elif _cannot_be_put_back(value):
            raise Unfusable(
                f"its code can reach `{name}`{where}, a {type(value).__name__}, which cannot be put back after a run "
                "of a copy"
            )


def _cannot_be_put_back(value: Any) -> bool:
    if isinstance(value, (ContextVar, threading.local)):
        return True
    return isinstance(value, Iterator) and is_library(type(value).__module__) and not isinstance(value, IOBase)


# -- kinds of state -------------------------------------------------------------------------------------------


def _content(container: Any) -> Restore:
    content = content_of(container)
    return lambda: bool(put_back(container, content))


def _attributes(of: dict[str, Any]) -> Restore:
    content = content_of(of)
    return lambda: put_back(of, content)


def _variable(owner: Any, key: str) -> Restore:
    """Of a dict, a closure's cell (the key is ignored) or another object."""
    before = _get(owner, key)

    def restore() -> bool:
        now = _get(owner, key)
        if now is not before:
            _set(owner, key, before)
        return not same(now, before)

    return restore


def _get(owner: Any, key: str) -> Any:
    if isinstance(owner, dict):
        return owner.get(key, _ABSENT)
    return getattr(owner, "cell_contents" if isinstance(owner, CellType) else key, _ABSENT)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        if value is _ABSENT:
            del owner[key]
        else:
            owner[key] = value
        return
    key = "cell_contents" if isinstance(owner, CellType) else key
    if value is _ABSENT:
        object.__delattr__(owner, key)
    else:
        object.__setattr__(owner, key, value)


def _class(cls: type) -> Restore:
    """The attributes of a class. Special ones are made by Python when they are first asked for."""

    def attributes() -> dict[str, Any]:
        return {key: value for key, value in vars(cls).items() if not key.startswith("__")}

    before = attributes()

    def restore() -> list[Any]:
        now = attributes()
        for key in {**before, **now}:
            if key not in before:
                type.__delattr__(cls, key)
            elif now.get(key, _ABSENT) is not before[key]:
                type.__setattr__(cls, key, before[key])
        return put_back(now, before)

    return restore


def _of_fake(t: FakeTensor) -> Restore:
    """The user's attributes of a parameter of the copy, which need not be put back."""

    def attributes() -> dict[str, Any]:
        return {key: value for key, value in vars(t).items() if key not in _own_of_fakes()}

    before = attributes()
    return lambda: put_back(attributes(), before)


@lru_cache(maxsize=1)
def _own_of_fakes() -> frozenset[str]:
    """The attributes that every fake tensor has, in which it keeps what was computed from it."""
    with FakeTensorMode():
        return frozenset(vars(torch.empty(0)))


def _bytes(read: Callable[[], bytes], put: Callable[[bytes], object]) -> Restore:
    before = read()

    def restore() -> bool:
        changed = read() != before
        if changed:
            put(before)
        return changed

    return restore


def _array(value: Any) -> Restore:
    kept = value[...].copy() if isinstance(value, np.ndarray) else value[:]

    def put(_: bytes) -> None:
        value[... if isinstance(value, np.ndarray) else slice(None)] = kept

    return _bytes(value.tobytes, put)


def _cache(function: Any) -> Restore:
    """A cache of functools. It cannot be given items, so that it is emptied instead."""
    before = function.cache_info().misses

    def restore() -> bool:
        changed: bool = function.cache_info().misses != before
        if changed:
            function.cache_clear()
        return changed

    return restore
