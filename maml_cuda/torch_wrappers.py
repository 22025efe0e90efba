"""torch's wrappers around a user's model: for which the module inside is used, and which are refused; and how compiled
parts run uncompiled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from maml_cuda.warn import warn


def unwrapped(model: Any) -> Any:
    """The module inside `torch.compile` and `nn.DataParallel`, whose parameters are the same; anything else as it is.

    Raises:
        TypeError: a module, or a part of it, that other parameters cannot be put into (torch.jit), or whose gradients
            would not be shared (DistributedDataParallel).
    """
    while isinstance(model, (OptimizedModule, nn.DataParallel)):
        if isinstance(model, nn.DataParallel):
            warn("maml_cuda takes the model out of nn.DataParallel: it runs on one device, with all tasks at once")
        model = model.module if isinstance(model, nn.DataParallel) else model._orig_mod
    for name, m in model.named_modules() if isinstance(model, nn.Module) else ():
        what = f"{type(m).__name__}{f' ({name})' if name else ''}"
        if isinstance(m, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be made of Python modules, got {what}: give the module from which torch.jit made it"
            )
        if isinstance(m, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"model must be free of DistributedDataParallel, got {what}: wrap the FusedMAML, not its model"
            )
    return model


_lock, _inside = threading.Lock(), 0
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what `torch.compile` has compiled runs uncompiled. torch has one setting for all threads: the first one
    that enters changes it, the last one that leaves restores it."""
    global _inside, _stance
    with _lock:
        if _inside == 0:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _stance.__exit__(None, None, None)
