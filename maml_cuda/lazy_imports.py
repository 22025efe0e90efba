"""Imports the names of a package at their first use (PEP 562).

Code that uses none of them, such as the command line's ``--help``, does not wait for torch to be imported.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the module-level ``__getattr__`` of a package. It finds the package's submodules and the names of ``home``.

    Args:
        package: the package's name.
        home: name -> submodule that defines it. The two must differ: importing a submodule sets the package's attribute
            of that name to the module.
    """

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
