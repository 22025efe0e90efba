"""Loads the model that ``maml-cuda benchmark`` measures: a user's own, or one of this package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from maml_cuda.train.hints import did_you_mean
from maml_cuda.train.models import conv4, conv4_max_pool, sinusoid_mlp


def shipped_model(name: str, outputs: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    """The model of this package of a name in SHIPPED, for samples of a shape."""
    torch.manual_seed(seed)
    if name == "conv4":
        return conv4(outputs, 64, shape[0])
    if name == "conv4-max-pool":
        return conv4_max_pool(outputs, 32, *shape)
    return sinusoid_mlp(inputs=shape[0])


def own_model(name: str, seed: int) -> nn.Module:
    """The model that a user's function returns.

    Args:
        name: FILE.py:FUNCTION or MODULE:FUNCTION. The function, or class, is called without arguments. FILE may import
            modules of its own folder, MODULE those of the working directory.
        seed: of torch's default generator when the function is called.

    Raises:
        ValueError: there is no such file, module or function, it raises an error, or it returns no nn.Module.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise ValueError(f"model must name a file or module and a function, like net.py:make_net, got {name}")
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    make = getattr(module, function, None)
    if make is None:
        hint = did_you_mean(function, (known for known, value in vars(module).items() if callable(value)))
        raise ValueError(f"model must name a function of {place}, got {function}, which is not there{hint}")
    if isinstance(make, nn.Module):
        return make
    if not callable(make):
        raise ValueError(f"model must name a function, got {name} of type {type(make).__name__}")
    torch.manual_seed(seed)
    try:
        made = make()
    except Exception as error:
        raise ValueError(f"{name} must return a model when called without arguments, got {_words(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} must return an nn.Module, got {type(made).__name__}")
    return made


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        hint = did_you_mean(str(path), (str(p) for p in path.absolute().parent.glob("*.py")))
        raise ValueError(f"model must be in a file that exists, got {path}{hint}")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickle look there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if before is not None:
            sys.modules[path.stem] = before
        raise ValueError(f"{path.name} must be a file that can be imported, got {_words(error)}") from error
    return module


def _module(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise ValueError(f"model must be in a module that can be found, got {name}") from error
        raise ValueError(f"{name} must be a module that can be imported, got {_words(error)}") from error
    except Exception as error:
        raise ValueError(f"{name} must be a module that can be imported, got {_words(error)}") from error


def _words(error: Exception) -> str:
    """The first line and the place of an error in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    return first_line(error) + (f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else "")


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message, of 160 characters at most."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 160 else line[:160] + ' ...'}"
