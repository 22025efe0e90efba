"""Binds a model to what runs it: fused layers, or the general path with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import batch_norm
from maml_cuda.engine import checks, data_checks, fallback
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.problem import prediction_shape, why_not
from maml_cuda.engine.settings import Settings, adapted_names
from maml_cuda.pytrees import Tree
from maml_cuda.targets import Target
from maml_cuda.warn import warn

KEPT_BINDINGS = 4  # train and eval mode, each with and without batch statistics


class Binder:
    """Makes a Binding when it is first asked, and again whenever something changes that the plan depends on. Where no
    fused layer serves, it says why in one warning, or raises where the user asked for fused layers by name.

    Attributes:
        collects_statistics: BatchNorm layers are in train mode, though batch_norm="running" holds them in eval mode.
    """

    def __init__(self) -> None:
        self.bound: Binding | None = None
        self.collects_statistics = False
        self._kept: list[Binding] = []  # the newest first
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None, "_kept": []}  # a copy binds itself

    def bind(self, maml: Settings) -> Binding:
        """The binding that holds now."""
        if self.bound is None or not self.bound.holds(maml):
            self.hold_statistics(maml)  # model.train() may have ended it
            self.bound = next((b for b in self._kept if b.holds(maml)), None) or self._new(maml)
        return self.bound

    def hold_statistics(self, maml: Settings) -> None:
        """Puts BatchNorm layers in eval mode where batch_norm="running"."""
        if maml.batch_norm == "running" and not self.collects_statistics:
            batch_norm.hold_statistics(maml.model)

    def _new(self, maml: Settings) -> Binding:
        model = maml.model
        checks.steps(maml.inner_steps, "inner_steps")
        checks.loss(maml.loss)
        names = adapted_names(maml)
        checks.adapted(names, dict(model.named_parameters()))
        checks.not_adapted(names, batch_norm.stepwise_names(model))
        binding = Binding(maml)
        self._kept = [binding, *self._kept[: KEPT_BINDINGS - 1]]
        if binding.why_not:
            self.fall_back(maml, binding.why_not)
        self._warn_of_empty_statistics(model)
        return binding

    def fall_back(self, maml: Settings, why_not: str) -> None:
        """Says once why the fused path cannot serve.

        Raises:
            ValueError: the user asked for it by name.
        """
        if maml._options.backend == "fused":
            raise ValueError(f'backend="fused" cannot serve this model: {why_not}')
        self._warn_once(
            "fallback",
            "maml_cuda runs this model on the general path (reference), which takes one task at a time by plain "
            f"autograd, because {why_not}",
        )

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn(text)

    def _warn_of_empty_statistics(self, model: nn.Module) -> None:
        for name, m in model.named_modules():
            if isinstance(m, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
                continue  # which never counts its batches
            tracked = getattr(m, "num_batches_tracked", None)
            if not m.training and isinstance(tracked, Tensor) and bool((tracked == 0).any()):
                self._warn_once(
                    "statistics",
                    f"{name} ({type(m).__name__}) is in eval mode with running statistics that no batch has updated",
                )

    def warn_of_single_queries(self, model: nn.Module) -> None:
        """For predict, given one query a task, where BatchNorm takes it for the whole set."""
        layers = batch_norm.with_batch_statistics(model)
        if layers:
            self._warn_once(
                "single queries",
                f"predict is given one query sample a task, which {layers[0]} normalises by its own statistics: the "
                "predictions may be no better than chance. Give all queries of a task at once, or choose "
                'batch_norm="running"',
            )

    def serves(
        self,
        maml: Settings,
        binding: Binding,
        x_spt: Tree | None,
        x_qry: Tree | None,
        second_order: bool | None = None,
    ) -> bool:
        """Whether fused layers serve samples like those of the sets (None: there is no such set), and are proven on
        them; falls back where not.

        second_order: whether Hessian-vector products on the support set are asked for; None: as first_order says.

        Raises:
            ValueError: a sample shape that does not fit the model itself.
        """
        if binding.plan is None:
            return False
        why_not = self.why_unfit(maml, binding, x_spt, x_qry, second_order)
        if why_not:
            self.fall_back(maml, why_not)
        if not torch.compiler.is_compiling():
            binding.why_not = why_not
        return not why_not

    def why_unfit(
        self,
        maml: Settings,
        binding: Binding,
        x_spt: Tree | None,
        x_qry: Tree | None,
        second_order: bool | None = None,
    ) -> str:
        """The reason why fused layers do not serve such sets, or nothing."""
        x, *others = sets = [x for x in (x_spt, x_qry) if x is not None]
        for each in sets:
            if not isinstance(each, Tensor):
                return f"x is a {type(each).__name__}; fused layers take one tensor"
        if x.dim() == 2:
            return "samples are numbers without axes; fused layers take samples of at least one axis"
        if others and others[0].shape[2:] != x.shape[2:]:
            _fit_alone(binding, x, others[0])
            got = f"{list(x.shape[2:])} and {list(others[0].shape[2:])}"
            return f"support and query samples are of shape {got}; fused layers take one for both"
        n_support = 0 if x_spt is None else x_spt.shape[1]
        n_query = 0 if x_qry is None else x_qry.shape[1]
        second_order = not maml.first_order if second_order is None else second_order
        return binding.why_unfit(x.shape[2:], n_support, n_query, x.dtype, second_order)


def read(
    maml: Settings, binding: Binding, x_name: str, x: Tree, y_name: str | None = None, y: Target | None = None
) -> Tree:
    """x with its target y, checked, and inside autocast in the model's own dtype.

    Raises:
        ValueError, TypeError: they do not fit each other, the model or the loss.
    """
    if torch.is_autocast_enabled(binding.on):
        x = binding.in_its_dtype(x)
    fused = binding.plan is not None
    data_checks.data(x_name, x, y_name, y, binding.like(), binding.dtypes, maml.loss, fused)
    if isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point():
        fallback.check_numbers(maml.model, x_name, x)
    return x


def look_at_labels(maml: Settings, binding: Binding, x: Tensor, **given: Target) -> None:
    """Where check_labels asks for it on a GPU; the ops of the CPU look by themselves.

    Raises:
        ValueError: a label or an action out of range.
    """
    if maml._options.check_labels and binding.backend == "cuda":
        classes = prediction_shape(binding.text, x)[0] if maml.loss in data_checks.OF_CLASSES else None
        for name, y in given.items():
            data_checks.target_values(name, y, classes)


def _fit_alone(binding: Binding, x_spt: Tensor, x_qry: Tensor) -> None:
    """Raises ValueError where samples of one of the shapes do not fit the model itself."""
    for x in (x_spt, x_qry):
        try:
            why_not(binding.text, tuple(x.shape[2:]), 0, x.shape[1], x.dtype)
        except ValueError as error:
            raise data_checks.other_samples(x_spt, x_qry, str(error)) from None
