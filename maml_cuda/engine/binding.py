"""What a FusedMAML runs on as its model is now: the programs of the model in this state, or the reason why there are
none."""

from __future__ import annotations

from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maml_cuda import _core, pytrees
from maml_cuda.capture.capture import Like
from maml_cuda.capture.copies import Place, places
from maml_cuda.capture.guards import guards_of
from maml_cuda.engine import checks, fast_path, planning
from maml_cuda.engine.bounded import Bounded
from maml_cuda.engine.factors import is_named
from maml_cuda.engine.problem import Problem
from maml_cuda.engine.program import Program
from maml_cuda.engine.programs import Programs
from maml_cuda.engine.settings import Settings, inner_tensors, of_inner_update, watched
from maml_cuda.engine.signatures import SetLike, Signature, tree_like
from maml_cuda.pytrees import Tree

MOST_PROBLEMS = 64  # kept for the fast path, of as many signatures

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)


class Choice(NamedTuple):
    """What runs a call: a program, or the general path for a reason, which is "" if it was asked for."""

    program: Program | None
    why_not: str


class Binding:
    """The decisions for one state of the model, and how to see that this state still holds.

    Attributes:
        without_steps: the name of a rate or hyperparameter [0], of which no inner step can be taken, or "".
        refused: fused layers serve no data: they are not wanted, or for the reason `why_never`.
        why_never: the reason why they serve none, or "".
        last: what ran the last call; None: there was none.
        on: the type of the model's device.
        dtypes: of all floating-point and complex parameters of the model; of a complex one that of its parts.
        plain: whether the parameters are torch's own, not of a subclass that would see what is done with them.
        unwatched: what the code reads without its changes being seen (capture/guards.py). If there is anything, the
            model is captured and proven again after a number of checks, `checks_left`, which doubles each time.
        problems: programs and problems of meta-steps whose arguments have passed every check, by signature,
            first_order and whether gradients are on.
    """

    def __init__(self, maml: Settings) -> None:
        self.problems: Bounded[tuple[Any, ...], tuple[Program, Problem, Choice]] = Bounded(MOST_PROBLEMS)
        self.without_steps = "" if maml.inner_steps > 0 else _without_steps(maml)
        self._first = _first_trainable(maml.model)
        parameters = [p for _, p in maml.model.named_parameters()]
        checks.one_dtype_and_device(parameters)
        checks.rates(inner_tensors(maml), self.like())
        self.dtypes = {p.dtype.to_real() for p in parameters if p.is_floating_point() or p.is_complex()}
        self.on = self.like().device.type
        self.plain = all(map(fast_path.is_plain, parameters))
        snapshot = planning.snapshot_of(maml, self.like())
        why_never = planning.why_not(snapshot) or _why_not_update(maml)
        self.why_never = "" if maml._options.backend == "reference" else why_never
        self.refused = maml._options.backend == "reference" or bool(self.why_never)
        self.last: Choice | None = None
        self._programs = Programs(snapshot)
        self._checks, self.checks_left = 0, 2
        self.watch(maml)

    # -- whether it still holds -------------------------------------------------------------------------------

    def watch(self, maml: Settings) -> None:
        """Watches the state of the model as it is now."""
        modules = [*maml.model.modules(), *of_inner_update(maml)]
        dicts = [d for m in modules for d in (m.__dict__, m._modules, m._parameters, m._buffers)]
        dicts += [getattr(m, hooks) for m in modules for hooks in HOOKS] + list(GLOBAL_HOOKS)
        read = [place.tensor for place in places(maml.model).values()]
        read += [t for _, t in inner_tensors(maml)]
        of_modules = [r for m in of_inner_update(maml) for r in (m._parameters, m._buffers)]
        read += [t for registry in of_modules for t in registry.values() if t is not None]
        code = [] if isinstance(maml.loss, str) else [maml.loss]
        guards = guards_of(maml.model, [*code, *(hook for hooks in GLOBAL_HOOKS for hook in hooks.values())])
        self.unwatched = tuple(guards.unwatched)
        known = set(map(id, read))
        read += [t for t in guards.tensors if id(t) not in known]
        self._watched = _core.watch(
            watched(maml), [*dicts, *guards.dicts], read, ("requires_grad", "shape", "dtype", "device"),
            lists=guards.lists, places=guards.places,
        )  # fmt: skip

    def holds(self, maml: Settings) -> bool:
        """Whether nothing has changed that a program depends on: the modules and their attributes (flags, options, a
        forward that is set on an instance), submodules, parameters, hooks, what their code reads (capture/guards.py),
        and the shape, dtype, device and requires_grad of each parameter, buffer and rate. This runs at each call, so it
        compares objects by identity.
        """
        return not self._is_due() and _core.unchanged(self._watched, watched(maml))

    def signature(self, maml: Settings, data: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """None where the binding does not hold. Else everything of `data` that the checks of a call depend on, as a
        key; () where the fast path cannot take them: one requires grad, is a subclass of Tensor, or a lazy negation.
        """
        if self.unwatched and self._is_due():
            return None
        return _core.signature(self._watched, watched(maml), data, Tensor)

    def _is_due(self) -> bool:
        """Whether the model must be captured again, because code reads something whose changes are not seen."""
        if not self.unwatched:
            return False
        self._checks += 1
        return self._checks >= self.checks_left

    # -- what runs data ---------------------------------------------------------------------------------------

    def find(self, signature: Signature) -> Choice:
        """What runs data of this signature.

        Raises:
            DoesNotFit: the model itself raises an exception for such data.
            ValueError: an adapted parameter does not reach the support loss.
        """
        name = self._programs.name_for(signature)
        return (
            Choice(getattr(self._programs.by_name, name), "")
            if name
            else Choice(None, self._programs.reasons[signature])
        )

    def find_now(self, support: Tree | None, query: Tree | None, second_order: bool) -> Choice:
        """What runs x of these sets, with a loss of ours, while a compiler traces. Raises as `find`."""
        asked = *_sizes_and_dtypes(support), *_sizes_and_dtypes(query), second_order
        name = self._name_now(*asked)
        if not name:
            return Choice(None, self._reason_now(*asked))
        program = getattr(self._programs.by_name, name)
        if program.written:
            return Choice(None, f"forward writes {program.written[0]}, which fused layers inside torch.compile do not")
        if program.labels:
            return Choice(
                None, "the labels of samples that depend on each other are not looked at inside torch.compile"
            )
        return Choice(program, "")

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _name_now(self, *asked: Any) -> str:
        """The name of the program while a compiler traces, which has guarded the sizes."""
        return self._programs.name_for(_signature_of(*asked))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _reason_now(self, *asked: Any) -> str:
        return self._programs.reasons[_signature_of(*asked)]

    # -- the model --------------------------------------------------------------------------------------------

    def like(self) -> Tensor:
        """A trainable parameter of the model, for its dtype and device; the real part of a complex one."""
        owner, key = self._first
        like: Tensor = owner[key]
        return like.real if like.is_complex() else like

    def in_its_dtype(self, x: Tree) -> Tree:
        """x for a call inside autocast, whose dtype is ignored: unchanged in a dtype that the model has, else converted
        to that of its trainable parameters."""
        dtype = self.like().dtype
        return pytrees.mapped(lambda t: t.to(dtype) if t.is_floating_point() and t.dtype not in self.dtypes else t, x)


def _sizes_and_dtypes(x: Tree) -> tuple[Any, Any]:
    """The sizes of a task's tensors, as numbers where a compiler has made symbols; and the pytree of their dtypes."""
    sizes = tuple(tuple(map(index, t.shape[1:])) for t in pytrees.tensors(x))
    return sizes, pytrees.mapped(lambda t: t.dtype, x)


def _signature_of(*asked: Any) -> Signature:
    """The signature of what `find_now` asks for."""
    *sets, second_order = asked
    support, query = map(_set_of, sets[::2], sets[1::2])
    return Signature(support, query, second_order)


def _set_of(sizes: Any, dtypes: Any) -> SetLike | None:
    rest = iter(sizes)
    return (
        SetLike(tree_like(pytree.tree_map_only(torch.dtype, lambda d: Like(next(rest), d), dtypes))) if sizes else None
    )


def _first_trainable(model: nn.Module) -> Place:
    return next(
        Place(m._parameters, key)
        for m in model.modules()
        for key, p in m._parameters.items()
        if p is not None and p.requires_grad
    )


def _why_not_update(maml: Settings) -> str:
    """The reason why fused layers do not take such inner steps, or ""."""
    if maml.inner_transform is None or is_named(maml.inner_transform):
        return ""
    return "inner gradients pass through inner_transform"


def _without_steps(maml: Settings) -> str:
    """The name of a rate or hyperparameter for each inner step that holds no step at all, so that there is no last one
    to repeat; or ""."""
    return next((name for name, t in inner_tensors(maml) if t.dim() > 0 and len(t) == 0), "")
