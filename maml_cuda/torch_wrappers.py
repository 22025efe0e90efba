"""Models inside torch's wrappers (torch.compile, DataParallel, ...): which are unwrapped, and which are refused.

Also a context in which compiled modules run uncompiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from maml_cuda.process_wide import ProcessWide
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


# A context in which functions compiled by `torch.compile` run uncompiled. torch has one setting for all threads.
uncompiled = ProcessWide(lambda: torch.compiler.set_stance("force_eager"))
