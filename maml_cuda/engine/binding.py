"""What a FusedMAML runs on as its model is now: a plan with its tensors, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import _core, pytrees
from maml_cuda.engine import checks, fast_path
from maml_cuda.engine.bounded import Bounded
from maml_cuda.engine.planning import Holder, planned
from maml_cuda.engine.problem import Problem
from maml_cuda.engine.settings import Settings, watched
from maml_cuda.engine.suitability import Suitability
from maml_cuda.plan import reader
from maml_cuda.plan.schema import Plan
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates, tensors

MOST_PROBLEMS = 64  # kept for the fast path, of as many signatures


class Binding:
    """The decision for one state of the model, and how to see that this state still holds.

    Attributes:
        why_not: the reason why there is no plan, or why it did not serve the samples of the last call.
        plan, text: the plan, and as the ops take it; None and "" where there is none.
        names, adapted, slots, served_by, log_std: as of planning.Planned.
        on: the type of the model's device.
        dtypes: of all floating-point and complex parameters of the model; of a complex one that of its parts.
        places: of the parameters and learned rates in the flat gradient (fast_path.places).
        plain: whether the parameters are torch's own, not of a subclass that would see what is done with them.
        problems: of meta-steps whose arguments have passed every check, by signature, first_order and whether gradients
            are on.
    """

    def __init__(self, maml: Settings) -> None:
        self.why_not = ""
        self.plan: Plan | None = None
        self.text = ""
        self.names: list[str] = []
        self.adapted: list[str] = []
        self.slots: list[int | None] = []
        self.served_by: dict[str, list[str]] = {}
        self.log_std = ""
        self.places: list[fast_path.Place] = []
        self.problems: Bounded[tuple[Any, ...], Problem] = Bounded(MOST_PROBLEMS)
        self._holders: list[Holder] = []
        self._has_gradient: list[bool] = []
        self._all_have_gradient = False
        self._step_text = ""
        self._suitability = Suitability(maml.model)
        self.can_step = maml.inner_steps > 0 or not _has_no_rate(maml.inner_lr)
        self._first = _first_trainable(maml.model)
        parameters = [p for _, p in maml.model.named_parameters()]
        checks.one_dtype_and_device(parameters)
        checks.rates(tensors(maml.inner_lr), self.like())
        self.dtypes = {p.dtype.to_real() for p in parameters if p.is_floating_point() or p.is_complex()}
        self.on = self.like().device.type
        self.plain = all(map(fast_path.is_plain, parameters))
        if maml._options.backend != "reference":
            try:
                self._plan(maml)
            except reader.Unfusable as reason:
                self.why_not = str(reason)
        self._watch(maml)  # last, as reading the model has left it

    def _plan(self, maml: Settings) -> None:
        found = planned(maml, self.like())
        self.plan, self.text = found.plan, found.plan.text
        self.names, self.adapted, self.slots = found.names, found.adapted, found.slots
        self.served_by, self.log_std = found.served_by, found.log_std
        self._holders = found.holders
        self._has_gradient = found.plan.has_gradient
        self._all_have_gradient = all(self._has_gradient)
        self.places = fast_path.places(self.with_gradient([owner[key] for owner, key in self._holders]))

    # -- whether it still holds -------------------------------------------------------------------------------

    def _watch(self, maml: Settings) -> None:
        modules = list(maml.model.modules())
        dicts = [d for m in modules for d in (m.__dict__, m._modules, m._parameters, m._buffers)]
        self._hooks = [getattr(m, hooks) for m in modules for hooks in reader.HOOKS] + list(reader.GLOBAL_HOOKS)
        self._hooked = any(self._hooks)
        if not self._hooked:  # hooks must stay absent; where there are some, they may change
            dicts += self._hooks
        read = [*maml.model.parameters(), *maml.model.buffers(), *(rate for _, rate in tensors(maml.inner_lr))]
        self._watched = _core.watch(watched(maml), dicts, read, ("requires_grad", "shape", "dtype", "device"))

    def holds(self, maml: Settings) -> bool:
        """Whether nothing has changed that the plan depends on: the modules and their attributes (flags, options, a
        forward that is set on an instance), submodules, parameters, hooks, and the shape, dtype, device and
        requires_grad of each parameter, buffer and rate. This runs at each call, so it compares objects by identity.
        """
        return not (self._hooked and not any(self._hooks)) and _core.unchanged(self._watched, watched(maml))

    def signature(self, maml: Settings, data: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """None where the binding does not hold. Else everything of `data` that the checks of a call depend on, as a
        key; () where the fast path cannot take them: one requires grad, is a subclass of Tensor, or a lazy negation.
        """
        if self._hooked and not any(self._hooks):
            return None
        return _core.signature(self._watched, watched(maml), data, Tensor)

    # -- what it says -----------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda" or "reference"."""
        return self.plan.backend if self.plan is not None and not self.why_not else "reference"

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

    def why_unfit(
        self, sample: tuple[int, ...], n_support: int, n_query: int, dtype: torch.dtype, second_order: bool
    ) -> str:
        """The reason why the plan does not serve such sets of samples, or nothing (suitability.py)."""
        if torch.compiler.is_compiling():  # where a size may be a symbol
            sizes = tuple(map(index, sample)), index(n_support), index(n_query)
            answer: str = self._why_unfit_now(*sizes, dtype, second_order)
            return answer
        return self._suitability.why_unfit(self, sample, n_support, n_query, dtype, second_order)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _why_unfit_now(self, *signature: Any) -> str:
        """The same while a compiler traces, which has guarded the sizes."""
        return self._suitability.why_unfit(self, *signature)

    # -- its tensors ------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The plan's parameters, and its rate tensors in the model's dtype."""
        tensors = [owner[key] for owner, key in self._holders]
        count = len(self.names)
        if len(tensors) == count:
            return tensors, []
        dtype = tensors[0].dtype
        return tensors[:count], [r if r.dtype == dtype else r.to(dtype) for r in tensors[count:]]

    def with_gradient(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those of parameters + rate tensors that have a place in the flat gradient."""
        if self._all_have_gradient:
            return tensors
        return [t for t, yes in zip(tensors, self._has_gradient, strict=True) if yes]

    def as_returned(self, prediction: Tensor) -> Any:
        """A prediction [tasks, n, ...] of the plan as the model returns it."""
        if not self.log_std:
            return prediction
        mean, log_std = prediction.chunk(2, -1)
        return mean, log_std if self.log_std == "rows" else log_std[:, 0]

    # -- at parameters that are each task's own ---------------------------------------------------------------

    def step_text(self) -> str:
        """The plan of one inner step from parameters that are each task's own, as `own` and `rates_at` give them."""
        if not self._step_text:
            assert self.plan is not None
            self._step_text = self.plan.of_one_step().text
        return self._step_text

    def rates_at(self, step: int) -> list[Tensor]:
        """The rate tensors of one inner step; beyond the given ones the last repeats."""
        assert self.plan is not None
        rates = zip(self.tensors()[1], self.plan.rate_tensors, strict=True)
        return [r if d.steps == 1 else r[min(step, d.steps - 1)].contiguous() for r, d in rates]

    def own(self, given: Mapping[str, Tensor], tasks: int, slot: int) -> list[Tensor]:
        """The plan's tensors for each task, at one inner step: of `given` [tasks, *shape] by name, the slot's part
        where there are slots; buffers are the same for all tasks."""
        tensors = []
        for name, slots, (owner, key) in zip(self.names, self.slots, self._holders, strict=False):
            t = given[name] if name in given else owner[key].unsqueeze(0).expand(tasks, *owner[key].shape)
            tensors.append(t if slots is None else t[:, min(slot, slots - 1)])
        return tensors

    def whole(self, parts: list[Tensor], like: Mapping[str, Tensor], slot: int) -> dict[str, Tensor]:
        """The inverse of `own`, by name: zeros in the other slots."""
        whole = dict(zip(self.names, parts, strict=True))
        for name, slots in zip(self.names, self.slots, strict=True):
            if slots is not None and name in like:
                part = whole[name]
                whole[name] = part.new_zeros(like[name].shape)
                whole[name][:, min(slot, slots - 1)] = part
        return whole


def _first_trainable(model: nn.Module) -> Holder:
    return next(
        (m._parameters, key)
        for m in model.modules()
        for key, p in m._parameters.items()
        if p is not None and p.requires_grad
    )


def _has_no_rate(inner_lr: float | Tensor | InnerRates) -> bool:
    """Whether a rate per inner step holds no step at all, so that there is no last one to repeat."""
    rates = [r for _, r in inner_lr.items()] if isinstance(inner_lr, InnerRates) else [inner_lr]
    return any(isinstance(r, Tensor) and r.dim() > 0 and len(r) == 0 for r in rates)
