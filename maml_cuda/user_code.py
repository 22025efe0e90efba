"""Objects of the user's own Python code, named ``package.module:NAME`` or ``FILE.py:NAME``. Does not import torch."""

import importlib
import importlib.util
import sys
import traceback
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from maml_cuda.train.hints import did_you_mean


def absolute_name(name: str) -> str:
    """``name`` with the absolute path of its file, so that it is found from another working directory."""
    source, colon, attribute = name.rpartition(":")
    if not source.endswith(".py"):
        return name
    return f"{Path(source).expanduser().absolute()}{colon}{attribute}"


def load_object(name: str) -> Any:
    """Imports the module or runs the file, and returns what it defines as NAME. A file is run once in a process.

    A module is also found in the working directory, and the modules beside a file can be imported by it, as with
    ``python -m module`` and ``python FILE.py``.

    Args:
        name: ``package.module:NAME`` or ``FILE.py:NAME``. NAME may have dots.

    Raises:
        ValueError: there is no such module or NAME, or the code raises an error while it is imported.
        FileNotFoundError: there is no such file.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"the name of your own code must be package.module:NAME or FILE.py:NAME, got {name!r}")
    module = _file(Path(source).expanduser().absolute()) if source.endswith(".py") else _module(source)
    try:
        return attrgetter(attribute)(module)
    except AttributeError:
        hint = did_you_mean(attribute, (known for known in vars(module) if not known.startswith("_")))
        raise ValueError(f"{source} must define {attribute}, got a module without it{hint}") from None


def _module(name: str) -> ModuleType:
    _add_to_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        raise ValueError(
            f"{name} must be a module that is installed, on PYTHONPATH or in {Path.cwd()}, got no module {error.name}"
        ) from None
    except Exception as error:
        raise _failed(name, error) from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        beside = [str(file) for file in path.parent.glob("*.py")]
        raise FileNotFoundError(f"{path} must be a Python file, got none{did_you_mean(str(path), beside)}")
    name = f"maml_cuda_user_code_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    _add_to_path(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    return module


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that it hides no installed package


def place_of(error: Exception) -> str:
    """The file and line of the user's code at which an error was raised; empty if they are not known."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _failed(name: str, error: Exception) -> ValueError:
    """The error of code that cannot be imported, with its place in that code."""
    return ValueError(f"{name} must be importable, got {type(error).__name__}: {error} ({place_of(error) or name})")
