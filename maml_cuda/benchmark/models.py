"""Loads the model that ``maml-cuda benchmark`` measures: a user's own, or one of this package."""

from __future__ import annotations

import torch
from torch import nn

from maml_cuda.train.models import conv4, conv4_max_pool, sinusoid_mlp
from maml_cuda.user_code import load_object, place_of


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
        name: FILE.py:FUNCTION or MODULE:FUNCTION (user_code.py). The function, or class, is called without arguments.
        seed: of torch's default generator when the function is called.

    Raises:
        ValueError: there is no such module or function, it raises an error, or it returns no nn.Module.
        FileNotFoundError: there is no such file.
    """
    make = load_object(name)
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


def _words(error: Exception) -> str:
    """The first line and the place of an error in the user's code."""
    place = place_of(error)
    return first_line(error) + (f" ({place})" if place else "")


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message, of 160 characters at most."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 160 else line[:160] + ' ...'}"
