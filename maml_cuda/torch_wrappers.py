"""Models inside torch's wrappers (torch.compile, DataParallel, ...): which are unwrapped, and which are refused.

Also a context in which compiled modules run uncompiled.
"""

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
    """The module inside `torch.compile(model)` or `nn.DataParallel(model)`. Any other object is returned as it is.

    Raises:
        TypeError: the model has a submodule made by torch.jit, whose parameters cannot be replaced for a call; or a
            DistributedDataParallel, which would not average the meta-gradients over processes.
    """
    while isinstance(model, (OptimizedModule, nn.DataParallel)):
        if isinstance(model, nn.DataParallel):
            warn("maml_cuda uses the module inside nn.DataParallel: it runs on one device, with all tasks in one call")
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


_lock, _inside = threading.Lock(), 0  # _inside: the number of threads that are in `uncompiled`
_stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context in which functions compiled by `torch.compile` run uncompiled.

    torch has one setting for all threads: the first thread that enters changes it, the last one that leaves restores
    it.
    """
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
