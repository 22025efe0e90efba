"""The names that code of Python reads or sets: of globals, of attributes, of modules that it imports."""

from __future__ import annotations

import dis
import sys
from functools import lru_cache
from types import CodeType, ModuleType
from typing import NamedTuple

_READS = {
    **dict.fromkeys(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"), 0),
    **dict.fromkeys(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"), 1),
    "IMPORT_NAME": 2,
}
_SETS = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR"))
# Names with which code reads attributes that it does not name.
ANY_ATTRIBUTE = frozenset(
    ("getattr", "hasattr", "vars", "__dict__", "__getattribute__", "attrgetter", "methodcaller", "asdict", "astuple")
)
ANYTHING = ("eval", "exec", "globals", "locals", "__import__")  # builtins with which it reads anything
MAKE = ("__init__", "__new__")  # methods that run where an instance is made
UNUSED = frozenset(  # special methods that a computation does not call
    (
        *("__repr__", "__str__", "__format__", "__dir__", "__sizeof__", "__del__", "__copy__", "__deepcopy__"),
        *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"),
        *("__init_subclass__", "__class_getitem__", "__annotate__", "__annotate_func__"),
    )
)


class Names(NamedTuple):
    """The names that a function reads, with those of the functions that are defined in it.

    Attributes:
        globals, attributes, imports: the names that it reads.
        set: the names of globals and attributes that it sets.
    """

    globals: tuple[str, ...]
    attributes: frozenset[str]
    imports: tuple[str, ...]
    set: frozenset[str]


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    found: tuple[dict[str, None], ...] = {}, {}, {}
    set_names = set()
    codes = [code]
    for each in codes:
        codes += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
        for instruction in dis.get_instructions(each):
            if instruction.opname in _READS:
                found[_READS[instruction.opname]][instruction.argval] = None
            elif instruction.opname in _SETS:
                set_names.add(instruction.argval)
    return Names(tuple(found[0]), frozenset(found[1]), tuple(found[2]), frozenset(set_names))


def imported(name: str, package: str) -> list[ModuleType]:
    """The modules that `import name` in a module of this package may mean, absolute or relative, and their parents."""
    parents = package.split(".") if package else []
    paths = [[*parents[:depth], *filter(None, name.split("."))] for depth in range(len(parents) + 1)]
    names = {".".join(path[: i + 1]): None for path in paths for i in range(len(path))}
    return [sys.modules[each] for each in names if each in sys.modules]
