"""A module as a function of its parameters.

torch.func.functional_call does nearly the same. `Functional` also copies buffers, keeps parameters' own attributes, and
turns off what would call the module again during a later backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations, parametrize

from maml_cuda import pytrees
from maml_cuda.formulas import DIFFERENTIABLE, THEIR_NODES, Formulas
from maml_cuda.masks import Masks, Seed
from maml_cuda.process_wide import ProcessWide
from maml_cuda.torch_private import no_saved_tensor_hooks

_LISTS = ("_flat_weights", "_flat_weight_refs")  # of a recurrent layer


class Functional:
    """Calls a module with given tensors in place of its parameters, on copies of its buffers.

    During a call, every place that holds a parameter holds the given tensor, also if a layer belongs to two modules or
    a parameter has two names. Afterwards, and after an error, the module has its own parameters and buffers again.
    Sparse buffers are not copied, because they are not written in place.

    A backward may run after the call, when the module has its own parameters again. So it must not call the module.
    `torch.utils.checkpoint` would do that, by hooks on saved tensors; these hooks are off during a call.

    Args:
        seed: of the masks of dropout (masks.py), if the first call draws any; None: they are torch's random numbers.

    Raises:
        ValueError: forward uses `torch.utils.checkpoint` with use_reentrant=True, which works without these hooks; or
            this is inside `torch.nn.utils.parametrize.cached()`, which would reuse values of other parameters.
    """

    def __init__(self, module: nn.Module, seed: Seed | None = None) -> None:
        if parametrize._cache_enabled:
            raise ValueError(
                "torch.nn.utils.parametrize.cached() must be off where maml_cuda calls the model, because it would "
                "return values of other inner steps; it may be used inside forward"
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
        self._recurrent = [m for m in modules if isinstance(m, nn.RNNBase)]
        self._buffers = [(m, key, b) for m in modules for key, b in m._buffers.items() if b is not None]
        self._after_first_call: list[Tensor | None] | None = None  # the buffers
        self._masks = None if seed is None else Masks(seed)
        self._twice = False
        self._formulas: Formulas | None = Formulas(DIFFERENTIABLE)
        kinds = (_NormBase, nn.Hardsigmoid, nn.MultiMarginLoss, parametrizations._WeightNorm)
        # Old-style weight_norm is a hook.
        self._may_need_formulas = any(isinstance(m, kinds) or m._forward_pre_hooks for m in modules)

    def __call__(self, parameters: Mapping[str, Tensor], *args: Any) -> Any:
        """Returns module(*args) at `parameters`, name -> tensor. The result has a graph if gradients are on.

        forward may itself use autograd, for example the gradient of its output in its input. So gradients are always on
        inside forward, and each tensor among args is a new view or a detached tensor, in no other call's graph.
        """
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                fixed = {name: p.detach() for name, p in parameters.items()}
                return detached(self(fixed, *map(detached, args)))
        masks = self._masks or nullcontext()
        formulas = nullcontext() if self._twice or self._formulas is None else self._formulas
        with self._replaced(parameters), no_saved_tensor_hooks(), formulas, masks:
            result = self.module(*[pytrees.mapped(_new_view, a) for a in args])
            buffers = [m._buffers.get(key) for m, key, _ in self._buffers]
        if self._after_first_call is None:
            _refuse_reentrant_checkpoints(result, pytrees.tensors((dict(parameters), args)))
            self._after_first_call = buffers
            if self._masks is not None and not self._masks.drawn:
                self._masks = None  # calls are faster without
        return result

    def of_pass(self, task: int, step: int) -> AbstractContextManager[None]:
        """A context in which forward draws the masks of this task and pass (masks.py)."""
        return nullcontext() if self._masks is None else self._masks.of_pass(task, step)

    @contextmanager
    def differentiable_twice(self) -> Iterator[None]:
        """Context in which calls can be differentiated twice.

        cuDNN's recurrent layers have no second derivative, so torch's other implementation is used.
        """
        before, self._twice = self._twice, True
        try:
            recurrence = _recurrence_without_cudnn() if self._recurrent else nullcontext()
            with _math_attention(), self._formulas or nullcontext(), recurrence:
                yield
        finally:
            self._twice = before

    def needs_formulas(self, nodes: Iterable[Any]) -> bool:
        """Whether a call has used functions that have a formula, or a layer might, or the graph of one has nodes of
        theirs."""
        met = self._formulas is not None and self._formulas.met
        return met or self._may_need_formulas or not THEIR_NODES.isdisjoint(map(type, nodes))

    @contextmanager
    def without_formulas(self) -> Iterator[None]:
        """Context in which calls do without formulas, which is faster. Their graphs must be looked at afterwards, by
        needs_formulas."""
        formulas, self._formulas = self._formulas, None
        try:
            yield
        finally:
            self._formulas = formulas

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Sets buffers of layers in train mode to their values after the first call, as one plain training step would.

        The running statistics of BatchNorm and InstanceNorm are not changed.
        """
        for (m, key, before), after in zip(self._buffers, self._after_first_call or (), strict=False):
            if not m.training or isinstance(m, _NormBase) or after is None or after is before:
                continue
            if after.layout is not torch.strided or after.shape != before.shape or after.dtype != before.dtype:
                m._buffers[key] = after.detach()
            elif not torch.equal(after, before):
                before.copy_(after)

    @contextmanager
    def _replaced(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which the module has the given parameters, and copies of its buffers."""
        copies = {id(b): b.clone() if b.layout is torch.strided else b for _, _, b in self._buffers}
        given = {name: _with_attributes_of(p, parameters[name]) for _, _, name, p in self._parameters}
        for registry, key, name, _ in self._parameters:
            registry[key] = given[name]  # type: ignore[assignment]
        for m, key, b in self._buffers:
            m._buffers[key] = copies[id(b)]
        # Lists of the parameters, which forward makes anew; they would keep the graph of the call.
        lists = [(m, name, vars(m)[name]) for m in self._recurrent for name in _LISTS if name in vars(m)]
        try:
            yield
        finally:
            for registry, key, _, p in self._parameters:
                registry[key] = p
            for m, key, b in self._buffers:
                m._buffers[key] = b
            for recurrent, name, own in lists:
                vars(recurrent)[name] = own


def precision(parameters: Iterable[Tensor]) -> torch.dtype:
    """The model's real dtype: that of its first trainable parameter; for a complex one, that of its real part."""
    return min(parameters, key=lambda p: not p.requires_grad).dtype.to_real()


def detached(tree: Any) -> Any:
    """The pytree with its tensors detached."""
    return pytrees.mapped(Tensor.detach, tree)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_math_attention = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))
_recurrence_without_cudnn = ProcessWide(_without_cudnn)


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Context in which attention, whose fast kernels have none, and the functions of DIFFERENTIABLE have second
    derivatives."""
    with _math_attention(), Formulas(DIFFERENTIABLE):
        yield


def leaves_between(given: Iterable[Tensor], value: Tensor) -> list[Tensor]:
    """The leaves of a graph that require grad, without those of the graphs of the given tensors."""
    seen = {t.grad_fn for t in given}
    pending, leaves = [value.grad_fn], []
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)  # type: ignore[attr-defined]
            pending += [before for before, _ in node.next_functions]
    return leaves


def _new_view(t: Tensor) -> Tensor:
    """A view of t, attached to its graph if it has one."""
    return t.view_as(t) if t.requires_grad else t.detach()


def _with_attributes_of(p: Tensor, t: Tensor) -> Tensor:
    """t with the Python attributes that the user has set on the parameter p."""
    if vars(p):
        t = t.view_as(t)
        t.__dict__.update(vars(p))
    return t


def _refuse_reentrant_checkpoints(result: Any, given: list[Tensor]) -> None:
    """Searches the graph of one call, from its result back to the given tensors."""
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
