"""Names of a package that are imported where they are first used (PEP 562): what never asks for one, as the command
line's help, does not wait for torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``: its submodules, and the names of ``home``, each from the submodule that
    stands there. A name must not be its own submodule's: whoever imports that would put the module in its place."""

    def load(name: str) -> Any:
        module = f"{package}.{home.get(name, name)}"
        if find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = import_module(module)
        if name in home:
            found = getattr(found, name)
        setattr(sys.modules[package], name, found)
        return found

    return load
