"""A module as a function of its parameters, whose graph needs nothing of the module afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from maml_cuda import pytrees
from maml_cuda.engine.torch_private import no_saved_tensor_hooks


class Functional:
    """The module called with given tensors in place of its parameters, and on copies of its buffers, but for sparse
    ones, which nobody writes to in place.

    In a call every place that holds a parameter (one layer may stand in two modules, one parameter under two names)
    holds its stand-in; afterwards, and after an error, the module's own objects are back. A backward that runs later
    finds everything in its graph: `torch.utils.checkpoint` would then call the module again, with other parameters, so
    hooks on saved tensors, by which it works, are off in here.

    Raises:
        ValueError: reentrant checkpoints, which work by other means; inside `torch.nn.utils.parametrize.cached()`,
            whose values would outlive the parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        if parametrize._cache_enabled:
            raise ValueError(
                "torch.nn.utils.parametrize.cached() must be off where maml_cuda calls the model, which has other "
                "parameters in each inner step; it may stand inside forward"
            )
        self.module = module
        names = {id(p): name for name, p in module.named_parameters()}
        modules = list(module.modules())
        self._parameters = [
            (m._parameters, key, names[id(p)], p)
            for m in modules
            for key, p in m._parameters.items()
            if p is not None and id(p) in names
        ]
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in modules)
        self._buffers = [(m, key, b) for m in modules for key, b in m._buffers.items() if b is not None]
        self._left: list[Tensor | None] | None = None

    def __call__(self, parameters: Mapping[str, Tensor], *args: Any) -> Any:
        """module(*args) at `parameters`, by name, whose tensors have a graph where gradients are on.

        For a forward that differentiates by its input, each tensor among args is a leaf or view of this call's own, so
        that it differentiates by no other call's; and gradients are always on in it.
        """
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                fixed = {name: p.detach() for name, p in parameters.items()}
                return detached(self(fixed, *map(detached, args)))
        with self._stand_ins(parameters), no_saved_tensor_hooks():
            result = self.module(*[pytrees.mapped(_own, a) for a in args])
            left = [m._buffers.get(key) for m, key, _ in self._buffers]
        if self._left is None:
            _refuse_reentrant(result, pytrees.tensors((dict(parameters), args)))
            self._left = left
        return result

    @contextmanager
    def differentiable_twice(self) -> Iterator[None]:
        """Inside, calls have second derivatives, which flash attention and cuDNN's recurrent layers have not."""
        with _plain_attention(), _plain_recurrence() if self._recurrent else nullcontext():
            yield

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Buffers of layers in train mode become what the first call has left in them; those of BatchNorm and its like
        stay."""
        for (m, key, before), after in zip(self._buffers, self._left or (), strict=False):
            if not m.training or isinstance(m, _NormBase) or after is None or after is before:
                continue
            if after.layout is not torch.strided or after.shape != before.shape or after.dtype != before.dtype:
                m._buffers[key] = after.detach()
            elif not torch.equal(after, before):
                before.copy_(after)

    @contextmanager
    def _stand_ins(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        copies = {id(b): b.clone() if b.layout is torch.strided else b for _, _, b in self._buffers}
        given = {name: _like(p, parameters[name]) for _, _, name, p in self._parameters}
        for registry, key, name, _ in self._parameters:
            registry[key] = given[name]  # type: ignore[assignment]
        for m, key, b in self._buffers:
            m._buffers[key] = copies[id(b)]
        try:
            yield
        finally:
            for registry, key, _, p in self._parameters:
                registry[key] = p
            for m, key, b in self._buffers:
                m._buffers[key] = b


def precision(parameters: Iterable[Tensor]) -> torch.dtype:
    """The dtype in which a model counts: that of its trainable parameters, of complex ones that of their parts."""
    return min(parameters, key=lambda p: not p.requires_grad).dtype.to_real()


def detached(tree: Any) -> Any:
    """Its tensors without their graph."""
    return pytrees.mapped(Tensor.detach, tree)


class _ProcessWide:
    """A context of state that all threads share: the first that comes in enters it, the last that goes out leaves."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._inside = make, Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._context = self._make()
                self._context.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._context.__exit__(None, None, None)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_plain_attention = _ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))
_plain_recurrence = _ProcessWide(_without_cudnn)


def _own(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach()


def _like(p: Tensor, t: Tensor) -> Tensor:
    """t with the attributes that a user has given to the parameter p."""
    if vars(p):
        t = t.view_as(t)
        t.__dict__.update(vars(p))
    return t


def _refuse_reentrant(result: Any, given: list[Tensor]) -> None:
    """Looks at the graph of one call, which begins at what it was given."""
    seen = {t.grad_fn for t in given}
    nodes = [t.grad_fn for t in pytrees.tensors(result)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if type(node).__name__ == "CheckpointFunctionBackward":
                raise ValueError(
                    "torch.utils.checkpoint in forward must have use_reentrant=False, got use_reentrant=True, whose "
                    "backward would call the model with other parameters"
                )
            nodes += [before for before, _ in node.next_functions]
