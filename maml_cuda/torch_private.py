"""What is used of torch beyond its documented interface, and what happens where a version of torch lacks it.

Everything here was seen in torch 2.6, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda.process_wide import ProcessWide


def _missing() -> bool:
    """Stands in for a probe that this version of torch does not have: the fast path is then never taken."""
    return True


def _probe(owner: Any, name: str) -> Callable[[], Any]:
    return getattr(owner, name, _missing)


_torch_function_mode = _probe(torch._C, "_is_torch_function_mode_enabled")
_dispatch_modes = _probe(torch._C, "_len_torch_dispatch_stack")
_transforms = _probe(torch._C, "_are_functorch_transforms_active")
_tracing_state = _probe(torch._C, "_get_tracing_state")
_run_backward: Callable[..., Any] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)
_profiler = _probe(torch._C._autograd, "_profiler_enabled")


def unobserved() -> bool:
    """Whether nothing would see an op pass through torch's dispatcher: no compiler or trace, no mode, no transform, no
    profiler."""
    return not (
        torch.compiler.is_compiling()
        or _torch_function_mode()
        or _dispatch_modes()
        or _transforms()
        or _tracing_state() is not None
        or _profiler()
    )


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without the search for tensors that an ended functorch transform has left behind.

    Only for calls while no transform is active. Such a tensor has no memory, so that the core refuses it before.
    Without the method of the C++ base class, function.apply itself.
    """
    base = super(torch.autograd.Function, function)
    return getattr(base, "apply", function.apply)


def add_each(to: list[Tensor], added: list[Tensor]) -> None:
    """Adds each tensor to the one at its place, in place and in one call. Without torch._foreach_add_, one by one."""
    if hasattr(torch, "_foreach_add_"):
        torch._foreach_add_(to, added)
        return
    for t, part in zip(to, added, strict=True):
        t.add_(part)


def guard_while_compiling(model: nn.Module, *constants: Any) -> None:
    """Reads, under torch.compile, what a plan depends on, so that a change of it compiles anew.

    torch.compile guards an attribute, that is compiles anew when it changes, where a branch of the code depends on it.
    So each is read here in a branch. Should a version of torch drop reads whose result is not used, compiled programs
    would not follow changes of the model; tests/engine/test_compile.py holds that they do.
    """
    read = id(model)  # another model has another plan
    for m in model.modules():
        read += 1 if m.training else 2
    for _, p in model.named_parameters():
        read += 1 if p.requires_grad else 2
    for constant in constants:
        read += len({constant})  # what is hashed becomes a constant of the program


@contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """Inside, autograd saves tensors as if no hooks on saved tensors were set, by which torch.utils.checkpoint works.

    Raises:
        AttributeError: torch has no such switch any more.
    """
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad(outputs, inputs, cotangents, retain_graph=retain_graph, allow_unused=True) without its checks
    of the cotangents one by one in Python. Without torch's engine by its name, that function itself.

    Args:
        cotangents: of the outputs' shapes and dtypes.
    """
    if _run_backward is None:
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=retain_graph, allow_unused=True)
    found: tuple[Tensor | None, ...] = _run_backward(
        tuple(outputs), tuple(cotangents), retain_graph, False, tuple(inputs), True, accumulate_grad=False
    )
    return found


def memory_of(t: Tensor) -> int:
    """A number for the memory that a tensor shares with its views. Sparse tensors have none: a number of their own."""
    return t.untyped_storage()._cdata if t.layout is torch.strided else id(t)


@contextmanager
def _not_compiling() -> Iterator[None]:
    before = getattr(torch.compiler, "_is_compiling_flag", False)
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


# A context in which torch.compiler.is_compiling() is False: a compiler that traces a call of ours sets it.
not_compiling = ProcessWide(_not_compiling)
