"""The Python state that a captured program depends on, besides the attributes of its model's modules.

A program is captured once and run many times. What Python computed at capture is constant in it: a global that
`forward` read, a variable that the loss closes over, an item of a list. So the program may run only while all of these
are what they were. This module finds them: it reads the code that calls of the model, its hooks and its loss can reach,
and goes through the objects that this code names. `_core.watch` compares them at every call.

The code of torch, numpy and the standard library is not read: it is taken not to change. A tensor is watched as an
object; its values are read at every call.
"""

from __future__ import annotations

import array
import builtins
import enum
import logging
import pathlib
import re
import sys
import threading
import types
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import cached_property, lru_cache, partial, partialmethod
from io import IOBase
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from maml_cuda.capture.code_names import ANY_ATTRIBUTE, ANYTHING, MAKE, UNUSED, imported, names_in

MOST_ITEMS = 3000  # watched items and places of one model, as each takes nanoseconds at every call

_LIBRARIES = frozenset(
    (
        *sys.stdlib_module_names,
        *("torch", "torchvision", "torchaudio", "functorch", "numpy", "einops", "maml_cuda", "pybind11_builtins"),
    )
)
_BUILTINS = frozenset(vars(builtins))


class Guards(NamedTuple):
    """What must stay the same; the first three are arguments of `_core.watch`.

    Attributes:
        dicts, lists: their contents.
        places: pairs (owner, key) that hold an object: a global (the dict of its module, its name), a variable that
            code closes over (its cell, ""), an attribute of a class or of another object.
        tensors: whose shape, dtype, device and requires_grad must stay the same too.
        unwatched: descriptions of what may change unseen, such as "the array `table` that Net.forward reads".
    """

    dicts: list[dict[Any, Any]]
    lists: list[list[Any]]
    places: list[tuple[Any, str]]
    tensors: list[Tensor]
    unwatched: list[str]


def guards_of(model: nn.Module, functions: Iterable[Callable[..., Any]] = ()) -> Guards:
    """The state that calls of the model and of these functions (its loss, global hooks) depend on.

    Not included: the attributes, parameters, buffers and submodules of the model's modules, and their hook registries
    that are empty. The caller watches them.
    """
    walk = Walk(model, functions)
    places = [(place.owner, place.key) for place in walk.places.values()]
    tensors = [found.value for found in walk.found.values() if isinstance(found.value, Tensor)]
    return Guards([*walk.dicts.values()], [*walk.lists.values()], places, tensors, [*walk.unwatched])


def is_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _LIBRARIES


# -- kinds of objects -----------------------------------------------------------------------------------------

# What cannot change, or is no state of a computation.
_CONSTANTS: tuple[type, ...] = (
    *(type(None), type(...), type(NotImplemented), CodeType, bool, int, float, complex, str, bytes, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo),
    *(re.Pattern, enum.Enum, np.generic, np.dtype, pathlib.PurePath),
    *(logging.Logger, logging.LoggerAdapter, logging.Handler, IOBase),
)
_EXACT_CONSTANTS = frozenset(_CONSTANTS)
_OPAQUE: tuple[type, ...] = (
    *(set, deque, bytearray, memoryview, array.array, np.ndarray, ContextVar, threading.local),
    *(types.MappingProxyType, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
)
# The types of libraries whose instances hold the user's state in attributes.
_HOLDERS = (Namespace, types.SimpleNamespace, UserDict, UserList, ChainMap, Distribution)
# Objects around functions, and their parts.
_PARTS: dict[type, tuple[str, ...]] = {
    MethodType: ("__func__", "__self__"),
    BuiltinFunctionType: ("__self__",),
    partial: ("func", "args", "keywords"),
    partialmethod: ("func", "args", "keywords"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    cached_property: ("func",),
    type(lru_cache(len)): ("__wrapped__",),
}
_METHODS = (FunctionType, staticmethod, classmethod, property)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = frozenset(name for name in _OF_EVERY_MODULE if "hooks" in name and "state_dict" not in name)


class Found(NamedTuple):
    """An object, with its name and where it was found, for descriptions: "table", " that Net.forward reads"."""

    value: Any
    name: str
    where: str


class FoundPlace(NamedTuple):
    """A place of Guards, with the name of what it holds."""

    owner: Any
    key: str
    name: str
    where: str


class Walk:
    """Goes through the objects that calls of a model and of functions can reach, each once, from a queue, so that there
    may be cycles and long chains.

    Attributes:
        found: each object that can change, by its id; the objects are kept, as an id may be given again. Not the
            model's own modules.
        functions, classes, python_modules, instances: those of the user's code, with where they were found.
        dicts, lists, places, unwatched: for Guards.
        attributes: the names of attributes that some code reads.
    """

    def __init__(self, model: nn.Module, functions: Iterable[Callable[..., Any]]) -> None:
        self.dicts: dict[int, dict[Any, Any]] = {}
        self.lists: dict[int, list[Any]] = {}
        self.places: dict[tuple[int, str], FoundPlace] = {}
        self.unwatched: dict[str, None] = {}
        self.found: dict[int, Found] = {}
        self.functions: list[FunctionType] = []
        # Of these, the attributes count that some code names, or all where code reads attributes that it does not name.
        self.classes: dict[type, bool] = {}  # and whether code may make instances
        self.python_modules: list[ModuleType] = []
        self.instances: list[Found] = []
        self.attributes = {"forward"}
        self._items = 0
        self._own = {id(module) for module in model.modules()}
        self._queue: deque[Found] = deque()
        for path, module in model.named_modules():
            self._module(module, "", f" of {path or 'the model'} ({type(module).__name__})", is_own=True)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._add(tensor, name, "")
        for function in functions:
            self._add(function, getattr(function, "__name__", type(function).__name__), "")
        self._run()

    def _add(self, value: Any, name: str, where: str) -> None:
        if type(value) not in _EXACT_CONSTANTS and id(value) not in self.found and id(value) not in self._own:
            self.found[id(value)] = Found(value, name, where)
            self._queue.append(self.found[id(value)])

    def _run(self) -> None:
        while True:
            while self._queue:
                self._visit(*self._queue.popleft())
            names = None if self.attributes & ANY_ATTRIBUTE else self.attributes
            for cls, made in self.classes.items():
                self._class(cls, made, names)
            for module in self.python_modules:
                self._variables(module, self.attributes)
            for instance in self.instances:
                self._attributes_of(*instance, names)
            if not self._queue:
                return

    # -- what is watched --------------------------------------------------------------------------------------

    def _report(self, kind: str, name: str, where: str) -> None:
        self.unwatched[f"the {kind} `{name}`{where}"] = None

    def _fits(self, items: int, kind: str, name: str, where: str) -> bool:
        fits = self._items + items <= MOST_ITEMS
        if fits:
            self._items += items
        else:
            self._report(kind, name, where)
        return fits

    def _place(self, owner: Any, key: str, value: Any, name: str, where: str) -> None:
        """A place, and what is there."""
        if (id(owner), key) not in self.places and self._fits(1, "variable", name, where):
            self.places[id(owner), key] = FoundPlace(owner, key, name, where)
            self._add(value, name, where)

    def _dict(self, content: dict[Any, Any], name: str, where: str, are_attributes: bool = False) -> None:
        """A dict, and what is in it."""
        if id(content) not in self.dicts and self._fits(len(content), "dict", name, where):
            self.dicts[id(content)] = content
            for key, value in list(content.items()):
                if type(value) not in _EXACT_CONSTANTS:
                    key = key if isinstance(key, (int, str)) else ...
                    self._add(value, f"{name}.{key}" if are_attributes else f"{name}[{key!r}]", where)

    def _sequence(self, content: Any, name: str, where: str) -> None:
        """A list, tuple or frozenset, and what is in it."""
        if isinstance(content, list):
            if not self._fits(len(content), "list", name, where):
                return
            self.lists[id(content)] = content
        for i, value in enumerate(content):
            if type(value) not in _EXACT_CONSTANTS:
                self._add(value, f"{name}[{i}]", where)

    # -- objects ----------------------------------------------------------------------------------------------

    def _visit(self, value: Any, name: str, where: str) -> None:
        if isinstance(value, Tensor):
            if vars(value):  # set by the user, as weight.fast is in some published models
                self._dict(vars(value), name, where, are_attributes=True)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._use(value, is_made=True)
        elif isinstance(value, ModuleType):
            if not is_library(value.__name__):
                self.python_modules.append(value)
        elif isinstance(value, nn.Module):
            self._module(value, name, where)
        elif isinstance(value, _OPAQUE):
            self._report("array" if isinstance(value, np.ndarray) else type(value).__name__, name, where)
        elif parts := next((parts for kind, parts in _PARTS.items() if isinstance(value, kind)), ()):
            for part in parts:
                self._add(getattr(value, part), name, where)
        elif isinstance(value, weakref.ref):
            self._add(value(), name, where)
        elif isinstance(value, dict):
            self._dict(value, name, where)
            self._instance(value, name, where)
        elif isinstance(value, (list, tuple, frozenset)):
            self._sequence(value, name, where)
            self._instance(value, name, where)
        elif not isinstance(value, _CONSTANTS) and not self._instance(value, name, where):
            self._report(type(value).__name__, name, where)

    def _module(self, module: nn.Module, name: str, where: str, is_own: bool = False) -> None:
        """What a module holds; is_own: it is of the model, so that the caller watches the dicts that hold it."""
        self._use(type(module))
        content = vars(module)
        if not is_own:
            if not self._fits(len(content), "module", name, where):
                return
            self.dicts[id(content)] = content
            for registry in _REGISTRIES:
                self._dict(content[registry], name, where, are_attributes=True)
        for key, value in content.items():
            if key in _HOOKS:
                if value or not is_own:
                    self._dict(value, f"{name}.{key}".lstrip("."), where)
            elif key not in _OF_EVERY_MODULE and type(value) not in _EXACT_CONSTANTS:
                self._add(value, f"{name}.{key}".lstrip("."), where)

    def _instance(self, value: Any, name: str, where: str) -> bool:
        """An object of another class. Whether nothing but its attributes and its class can change."""
        cls = type(value)
        if is_library(cls.__module__) and not isinstance(value, _HOLDERS):
            return not isinstance(value, Iterator)
        self._use(cls)
        self.instances.append(Found(value, name, where))
        return attributes_of(value) is not None or bool(slots_of(cls))

    def _attributes_of(self, value: Any, name: str, where: str, names: set[str] | None) -> None:
        """The attributes of an object: those of these names that it has or its class, so that it may get them. All if
        None, and where a base is of a library, whose code is not read.
        """
        content, bases = attributes_of(value), type(value).__mro__[:-1]
        if content is not None:
            if names is None or any(is_library(base.__module__) for base in bases):
                self._dict(content, name, where, are_attributes=True)
            else:
                for key in names.intersection([*content, *(key for base in bases for key in vars(base))]):
                    self._place(content, key, content.get(key), f"{name}.{key}", where)
        for key in slots_of(type(value)):
            if names is None or key in names:
                self._place(value, key, getattr(value, key, None), f"{name}.{key}", where)

    def _use(self, cls: type, is_made: bool = False) -> None:
        """A class that has instances; is_made: code names it, and so may make one."""
        if not isinstance(cls, enum.EnumMeta) and not all(is_library(c.__module__) for c in cls.__mro__):
            self.classes[cls] = is_made or self.classes.get(cls, False)

    def _class(self, cls: type, is_made: bool, names: set[str] | None) -> None:
        """What a class and its bases define: special methods, what overrides a library's, and what has one of these
        names, or all if None."""
        libraries = [base for base in cls.__mro__ if is_library(base.__module__)]
        found = set()
        for base in cls.__mro__:
            if base in libraries:
                continue
            where = f" of {_short(base.__qualname__)}"
            for name, value in list(vars(base).items()):
                if name.startswith("__") and name.endswith("__"):
                    counts = isinstance(value, _METHODS) and (is_made if name in MAKE else name not in UNUSED)
                else:
                    counts = names is None or name in names or any(name in vars(library) for library in libraries)
                if counts:
                    self._place(cls, name, value, name, where)
                    if name in found:  # the class has another one, and super() reads this one
                        self._place(base, name, value, name, where)
                    found.add(name)

    # -- code -------------------------------------------------------------------------------------------------

    def _function(self, function: FunctionType) -> None:
        reader = _short(function.__qualname__)
        reads = f" that {reader} reads"
        code, variables = function.__code__, function.__globals__
        of_library = is_library(variables.get("__name__"))  # __module__ is the user's where torch decorates a function
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if of_library:
                self._add(_content(cell), name, reads)
            elif name != "__class__":
                self._place(cell, "", _content(cell), name, reads)
        for key, value in vars(function).items():
            if key not in _OF_EVERY_MODULE:  # which torch.compile copies to its wrapper of a module
                self._place(vars(function), key, value, f"{reader}.{key}", "")
        if of_library:
            return
        self.functions.append(function)
        for key in ("__code__", "__defaults__", "__kwdefaults__"):  # in notebooks, reloading sets them
            if getattr(function, key):
                self._place(function, key, getattr(function, key), f"{reader}.{key}", "")
        names = names_in(code)
        self.attributes |= names.attributes | ANY_ATTRIBUTE.intersection(names.globals)
        for name in names.globals:
            if name in variables:
                value = variables[name]
                self._place(variables, name, value, name, reads)
                is_own = isinstance(value, ModuleType) and not is_library(value.__name__)
                if is_own and ANY_ATTRIBUTE.intersection(names.globals):
                    self._report("module", name, reads)
            elif name not in _BUILTINS:
                self._place(variables, name, None, name, reads)
            elif name in ANYTHING:
                self._report("result of", name, f" in {reader}")
        for name in names.imports:
            for module in imported(name, variables.get("__package__") or ""):
                self._add(module, module.__name__, reads)

    def _variables(self, module: ModuleType, names: set[str]) -> None:
        variables = vars(module)
        for name in names.intersection(variables):
            if not name.startswith("__"):
                self._place(variables, name, variables[name], f"{module.__name__}.{name}", "")


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def attributes_of(value: Any) -> dict[str, Any] | None:
    try:
        attributes: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes


def slots_of(cls: type) -> list[str]:
    users = [c for c in cls.__mro__ if not is_library(c.__module__)]
    return [key for c in users for key, slot in vars(c).items() if isinstance(slot, types.MemberDescriptorType)]


def _short(name: str) -> str:
    return name.rpartition("<locals>.")[2]
