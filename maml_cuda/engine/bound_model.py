"""A model and what it runs on: fused layers, or the general path, in words."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import batch_norm, reference
from maml_cuda.adapted_parameters import AdaptParams, as_pickled
from maml_cuda.engine import checks, cuda_runner, data_checks, fallback
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.problem import prediction_shape, why_not
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates, Rate, read_rates
from maml_cuda.targets import Target
from maml_cuda.warn import warn

KEPT_BINDINGS = 4  # train and eval mode, each with and without batch statistics


class BoundModel(nn.Module):
    """Binds its model (binding.py) when it is made and again whenever something changes that the plan depends on; falls
    back, in words and once, to the general path where no fused layer serves.

    A subclass sets what a Binding is made of before it calls `_rebind`.
    """

    model: nn.Module
    inner_lr: float | Tensor | InnerRates  # type: ignore[assignment]
    inner_steps: int
    loss: str | Callable[..., Tensor]
    _adapt_params: AdaptParams
    _wanted_backend: str
    _on_device: dict[str, Any]
    _recompute: bool
    first_order: bool
    _bound: Binding | None
    _bindings: list[Binding]  # the last ones, the newest first
    _warned: set[str]

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda" or "reference"."""
        return self._binding().backend

    @property
    def precision(self) -> str:
        """How products of float32 are computed on a GPU."""
        return self._on_device["precision"]

    def explain(self, x: Tree | None = None, y: Target | None = None) -> str:
        """A table: each module of the model, the fused layer that serves it, or the sentence why not.

        Args:
            x, y: a set as for `adapt`, or x alone; the table is then of samples like these. Without them it is of
                samples that fit the layers, or of those of the last call where they did not.

        Raises:
            ValueError, TypeError: as a call with such data.
        """
        binding = self._binding()
        why_not = binding.why_not
        if x is not None:
            x = self._read(binding, "x", x, None if y is None else "y", y)
            why_not = self._unfit(binding, x, x) if binding.text else why_not
        fused = bool(binding.text) and not why_not
        rows = [("module", "type", "served by")]
        for name, module in self.model.named_modules():
            layers = binding.served_by.get(name, []) if fused else []
            if layers or not any(True for _ in module.children()):
                by = ", ".join(layers) or ("no layer of its own" if fused else "reference")
                rows.append((name or "(the model)", type(module).__name__, by))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        head = f"backend: {cuda_runner.backend_of(binding.like().device) if fused else 'reference'}"
        head += f", because {why_not}" if why_not else ""
        table = [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows]
        foot = ["(for samples of a shape that these layers are fused on: explain(x) looks at yours)"]
        return "\n".join([head, *table, *(foot if fused and x is None else [])])

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_bound": None, "_bindings": []}  # a copy binds itself
        if callable(self._adapt_params):
            state["_adapt_params"] = as_pickled(self._adapt_params, dict(self.model.named_parameters()))
        return state

    def _binding(self) -> Binding:
        """What runs now: bound again where the model's modules, flags, options or hooks have changed."""
        if torch.compiler.is_compiling():
            _guard(self)
            self._bind_now()
            assert self._bound is not None
            return self._bound
        model: Any = self._modules["model"]  # what self.model finds after a search that ends in an exception
        if self._bound is None or not self._bound.holds(model, self.loss, self.inner_lr, self.inner_steps):
            self._bound = self._rebind()
        return self._bound

    @torch.compiler.assume_constant_result  # of a method: torch 2.6 takes no module for an argument
    def _bind_now(self) -> bool:
        """Binds while a compiler traces: what it has bound is a constant of the compiled program."""
        if self._bound is None or not self._bound.holds(self.model, self.loss, self.inner_lr, self.inner_steps):
            self._bound = self._rebind()
        return True

    def _rebind(self) -> Binding:
        """A binding for what has changed: one of before where everything is again as it was (`train()` after `eval()`),
        since a new one is proven anew."""
        for binding in self._bindings:
            if binding.holds(self.model, self.loss, self.inner_lr, self.inner_steps):
                return binding
        binding = self._bind()
        self._bindings = [binding, *self._bindings[: KEPT_BINDINGS - 1]]
        return binding

    def _bind(self) -> Binding:
        checks.steps(self.inner_steps, "inner_steps")
        checks.loss(self.loss)
        checks.adapted(self._adapted(), dict(self.model.named_parameters()))
        checks.not_adapted(self._adapted(), batch_norm.stepwise_names(self.model))
        binding = Binding(
            self.model, self.loss, self.inner_lr, self.inner_steps, self._adapt_params,
            fused=self._wanted_backend != "reference", on_device=self._on_device,
            recompute=self._recompute,
        )  # fmt: skip
        if binding.why_not:
            self._fall_back(binding.why_not)
        self._warn_of_empty_statistics()
        return binding

    def _fall_back(self, why_not: str) -> None:
        """Says, once, why the fused path cannot serve; raises where the user asked for it by name."""
        if self._wanted_backend == "fused":
            raise ValueError(f'backend="fused" cannot serve this model: {why_not}')
        self._warn_once(
            "fallback",
            "maml_cuda runs this model on the general path (reference), which takes one task at a time by plain "
            f"autograd, because {why_not}",
        )

    @torch.compiler.assume_constant_result
    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn(text)

    def _warn_of_empty_statistics(self) -> None:
        for name, m in self.model.named_modules():
            if isinstance(m, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
                continue  # which never counts its batches
            tracked = getattr(m, "num_batches_tracked", None)
            if not m.training and isinstance(tracked, Tensor) and bool((tracked == 0).any()):
                self._warn_once(
                    "statistics",
                    f"{name} ({type(m).__name__}) is in eval mode with running statistics that no batch has updated",
                )

    def _warn_of_single_queries(self) -> None:
        """Where predict is given one query a task, and BatchNorm takes it for the whole set."""
        layers = batch_norm.with_batch_statistics(self.model)
        if layers:
            self._warn_once(
                "single queries",
                f"predict is given one query sample a task, which {layers[0]} normalises by its own statistics: the "
                "predictions may be no better than chance. Give all queries of a task at once, or choose "
                'batch_norm="running"',
            )

    def _adapted(self) -> list[str]:
        return reference.adapted_names(self.model, self._adapt_params)

    def _rates(self) -> dict[str, Rate]:
        parameters = dict(self.model.named_parameters())
        return read_rates(self.inner_lr, {n: parameters[n].shape for n in self._adapted()}, self.inner_steps)

    def _serves(
        self, binding: Binding, x_spt: Tree | None, x_qry: Tree | None, second_order: bool | None = None
    ) -> bool:
        """Whether fused layers serve samples like those of the sets (None: there is no such set), and are proven on
        them; falls back, in words, where not.

        second_order: whether Hessian-vector products on the support set are asked for; None: as first_order says.

        Raises:
            ValueError: a sample shape that does not fit the model itself.
        """
        if not binding.text:
            return False
        why_not = self._unfit(binding, x_spt, x_qry, second_order)
        if why_not:
            self._fall_back(why_not)
        if not torch.compiler.is_compiling():
            binding.why_not = why_not
        return not why_not

    def _unfit(self, binding: Binding, x_spt: Tree | None, x_qry: Tree | None, second_order: bool | None = None) -> str:
        """The sentence why fused layers do not serve such sets, or nothing."""
        x, *others = sets = [x for x in (x_spt, x_qry) if x is not None]
        for each in sets:
            if not isinstance(each, Tensor):
                return f"x is a {type(each).__name__}; fused layers take one tensor"
        if x.dim() == 2:
            return "samples are numbers without axes; fused layers take samples of at least one axis"
        if others and others[0].shape[2:] != x.shape[2:]:
            self._fit_alone(binding, x, others[0])
            got = f"{list(x.shape[2:])} and {list(others[0].shape[2:])}"
            return f"support and query samples are of shape {got}; fused layers take one for both"
        n_support = 0 if x_spt is None else x_spt.shape[1]
        n_query = 0 if x_qry is None else x_qry.shape[1]
        second_order = not self.first_order if second_order is None else second_order
        if torch.compiler.is_compiling():  # where a size may be a symbol
            sample = tuple(map(index, x.shape[2:]))
            return self._unfit_now(sample, index(n_support), index(n_query), x.dtype, second_order)
        return binding.why_unfit(x.shape[2:], n_support, n_query, x.dtype, second_order)

    @torch.compiler.assume_constant_result
    def _unfit_now(self, *signature: Any) -> str:
        """Binding.why_unfit while a compiler traces, which has guarded the sizes."""
        assert self._bound is not None
        return self._bound.why_unfit(*signature)

    def _fit_alone(self, binding: Binding, x_spt: Tensor, x_qry: Tensor) -> None:
        """Raises ValueError where samples of one of the shapes do not fit the model itself."""
        for x in (x_spt, x_qry):
            try:
                why_not(binding.text, tuple(x.shape[2:]), 0, x.shape[1], x.dtype)
            except ValueError as error:
                raise data_checks.other_samples(x_spt, x_qry, str(error)) from None

    def _read(self, binding: Binding, x_name: str, x: Tree, y_name: str | None, y: Target | None) -> Tree:
        """x with its target y, checked, and inside autocast in the model's own dtype."""
        if torch.is_autocast_enabled(binding.on):
            x = binding.in_its_dtype(x)
        data_checks.data(x_name, x, y_name, y, binding.like(), binding.dtypes, self.loss, bool(binding.text))
        if isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point():
            fallback.check_numbers(self.model, x_name, x)
        return x

    def _look_at_labels(self, binding: Binding, x: Tensor, **given: Target) -> None:
        """Where check_labels asks for it on a GPU; the CPU's ops look by themselves."""
        if self._check_labels and binding.backend == "cuda":
            classes = prediction_shape(binding.text, x)[0] if self.loss in data_checks.OF_CLASSES else None
            for name, y in given.items():
                data_checks.target_values(name, y, classes)


def _guard(maml: BoundModel) -> None:
    """Asks, under torch.compile, what the plan depends on, so that a change of it compiles anew (an attribute that
    decides nothing would not be guarded)."""
    asked = id(maml)  # of another one the plan is another, though it looked the same when it was made
    for m in maml.model.modules():
        asked += 1 if m.training else 2
    for _, p in maml.model.named_parameters():
        asked += 1 if p.requires_grad else 2
    if isinstance(maml.inner_lr, float):
        asked += len({maml.inner_lr})  # what is hashed is a constant
