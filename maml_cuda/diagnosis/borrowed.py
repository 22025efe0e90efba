"""A model that is lent to a step: every run begins with the same state, and in the end the model is as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maml_cuda import pytrees


def in_double(t: Tensor) -> Tensor:
    return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t


class Borrowed:
    """The state of a model: parameters, their `.grad` and requires_grad, buffers, submodules, training flags.

    Args:
        model: lent; its modules and parameters stay the same objects.
        double: whether runs are in float64.
    """

    def __init__(self, model: nn.Module, double: bool) -> None:
        self.model, self.double = model, double
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        modules = list(model.modules())
        self._modules = [(m, dict(m._parameters), dict(m._buffers), dict(m._modules), m.training) for m in modules]
        self._leaves = [(p, p.data, p.data.clone(), p.grad, p.requires_grad) for p in model.parameters()]
        self._buffers = {id(b): (b, b.clone()) for m in modules for b in m._buffers.values() if b is not None}
        self.start = {name: self._cast(p.data.clone()) for name, p in self.parameters.items()}

    def _cast(self, t: Tensor) -> Tensor:
        return in_double(t) if self.double else t

    def reset(self, values: Mapping[str, Tensor] | None = None) -> None:
        """The state at the beginning, without gradients; parameters in `values` have those."""
        buffers = {key: self._cast(kept.clone()) for key, (_, kept) in self._buffers.items()}
        self._put_back(buffers)
        for p, _, kept, _, requires_grad in self._leaves:
            p.data = self._cast(kept).clone()
            p.grad = None
            p.requires_grad_(requires_grad)
        for name, value in (values or {}).items():
            self.parameters[name].data = value.clone()

    def give_back(self) -> None:
        """The state at the beginning, in the same tensors."""
        for b, kept in self._buffers.values():
            with torch.no_grad():
                b.copy_(kept)
        self._put_back({key: b for key, (b, _) in self._buffers.items()})
        for p, data, kept, grad, requires_grad in self._leaves:
            p.grad = None
            p.data = data.copy_(kept)
            p.grad = grad
            p.requires_grad_(requires_grad)

    def _put_back(self, buffers: Mapping[int, Tensor]) -> None:
        for m, own_parameters, own_buffers, own_modules, training in self._modules:
            m._parameters.clear()
            m._parameters.update(own_parameters)
            m._modules.clear()
            m._modules.update(own_modules)
            m._buffers.clear()
            m._buffers.update({key: None if b is None else buffers[id(b)] for key, b in own_buffers.items()})
            m.training = training

    def changed(self) -> list[str]:
        """Parameters that are no longer what they were: other values, or another tensor in their place."""
        names = {id(p): name for name, p in self.parameters.items()}
        moved = {
            names[id(p)]
            for m, own, _, _, _ in self._modules
            for key, p in own.items()
            if id(p) in names and m._parameters.get(key) is not p
        }
        return [
            name
            for name, p in self.parameters.items()
            if name in moved or not torch.equal(p.detach(), self.start[name])
        ]

    def flags_changed(self) -> list[str]:
        """Modules whose training flag is another than at the beginning; the root is called "model"."""
        flags = {id(m): training for m, _, _, _, training in self._modules}
        return [name or "model" for name, m in self.model.named_modules() if flags.get(id(m), m.training) != m.training]


class Randomness:
    """The states of the generators of torch, numpy and Python when it was made."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._numpy, self._python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Context in which torch makes tensors of this dtype; None: of the one that it has."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Promoting(TorchFunctionMode):
    """Where float64 and a lower precision meet in one call of torch, the lower one is raised to float64.

    So a step runs in float64 that holds its own data, of the model's precision. What is written in place is left as it
    is, and may raise.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtypes = {t.dtype for t in pytrees.tensors((args, kwargs)) if t.is_floating_point()}
        name = getattr(func, "__name__", "")
        in_place = name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))
        if torch.float64 in dtypes and len(dtypes) > 1 and not in_place and "out" not in kwargs:
            args, kwargs = pytrees.mapped(in_double, (args, kwargs))
        return func(*args, **kwargs)
