"""A model and what it runs on: fused layers, or the general path, in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, data_checks, problems, reference
from .binding import AdaptParams, Binding
from .rates import InnerRates, Rate, read_rates
from .targets import Target
from .trees import Tree


class BoundModel(nn.Module):
    """Binds its model (binding.py) when it is made and again whenever something changes that the plan depends on; falls
    back, in words and once, to the general path where no fused layer serves.

    A subclass sets what a Binding is made of before it calls `_bind`.
    """

    model: nn.Module
    inner_lr: float | Tensor | InnerRates  # type: ignore[assignment]
    inner_steps: int
    loss: str | Callable[..., Tensor]
    _adapt_params: AdaptParams
    _wanted_backend: str
    _on_device: dict[str, Any]
    _recompute: bool
    _bound: Binding | None
    _warned: set[str]

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda" or "reference"."""
        return self._binding().backend

    @property
    def precision(self) -> str:
        """How products of float32 are computed on a GPU."""
        return self._on_device["precision"]

    def explain(self) -> str:
        """A table: each module of the model, the fused layer that serves it, or the sentence why not."""
        binding = self._binding()
        rows = [("module", "type", "served by")]
        for name, module in self.model.named_modules():
            layers = [] if binding.why_not else binding.served_by.get(name, [])
            if layers or not any(True for _ in module.children()):
                by = ", ".join(layers) or ("reference" if binding.backend == "reference" else "no layer of its own")
                rows.append((name or "(the model)", type(module).__name__, by))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        head = f"backend: {binding.backend}" + (f", because {binding.why_not}" if binding.why_not else "")
        return "\n".join([head] + [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_bound": None}  # a copy binds itself

    def _binding(self) -> Binding:
        """What runs now: bound again where the model's modules, flags, options or hooks have changed."""
        if torch.compiler.is_compiling():
            _guard(self)
            _bind_now(self)
            assert self._bound is not None
            return self._bound
        model: Any = self._modules["model"]  # what self.model finds after a search that ends in an exception
        if self._bound is None or not self._bound.holds(model, self.loss, self.inner_lr, self.inner_steps):
            self._bound = self._bind()
        return self._bound

    def _bind(self) -> Binding:
        checks.steps(self.inner_steps, "inner_steps")
        checks.loss(self.loss)
        checks.adapted(self._adapted(), dict(self.model.named_parameters()))
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
        self._warn_once("fallback", f"maml_cuda runs this model on the general path (reference), because {why_not}")

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(text, UserWarning, stacklevel=5)

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

    def _adapted(self) -> list[str]:
        return reference.adapted_names(self.model, self._adapt_params)

    def _rates(self) -> dict[str, Rate]:
        parameters = dict(self.model.named_parameters())
        return read_rates(self.inner_lr, {n: parameters[n].shape for n in self._adapted()}, self.inner_steps)

    def _serves(self, binding: Binding, x_spt: Tree | None, x_qry: Tree | None) -> bool:
        """Whether fused layers serve samples like those of the sets (None: there is no such set); falls back, in words,
        where none does.

        Raises:
            ValueError: a sample shape that does not fit the model itself.
        """
        if not binding.text:
            return False
        why_not = self._unfit(binding, x_spt, x_qry)
        if why_not:
            self._fall_back(why_not)
        if not torch.compiler.is_compiling():
            binding.why_not = why_not
        return not why_not

    def _unfit(self, binding: Binding, x_spt: Tree | None, x_qry: Tree | None) -> str:
        """The sentence why no fused layer serves such sets, or nothing."""
        sets = {name: x for name, x in (("x_spt", x_spt), ("x_qry", x_qry)) if x is not None}
        for name, x in sets.items():
            if not isinstance(x, Tensor):
                return f"{name} is a {type(x).__name__}; fused layers take one tensor"
        x, *others = sets.values()
        if others and others[0].shape[2:] != x.shape[2:]:
            self._fit_alone(binding, x, others[0])
            got = f"{list(x.shape[2:])} and {list(others[0].shape[2:])}"
            return f"support and query samples are of shape {got}; fused layers take one for both"
        if torch.compiler.is_compiling():
            return ""
        n_support, n_query = (0 if x is None else x.shape[1] for x in (x_spt, x_qry))
        signature = (x.shape[2:], n_support, n_query, x.dtype)
        why_not = binding.unfit.get(signature)
        if why_not is None:
            why_not = problems.why_not(binding.text, tuple(x.shape[2:]), n_support, n_query, x.dtype)
            binding.unfit[signature] = why_not
        return why_not

    def _fit_alone(self, binding: Binding, x_spt: Tensor, x_qry: Tensor) -> None:
        """Raises ValueError where samples of one of the shapes do not fit the model itself."""
        for x in (x_spt, x_qry):
            try:
                problems.why_not(binding.text, tuple(x.shape[2:]), 0, x.shape[1], x.dtype)
            except ValueError as error:
                raise data_checks.other_samples(x_spt, x_qry, str(error)) from None

    def _read(self, binding: Binding, x_name: str, x: Tree, y_name: str | None, y: Target | None) -> Tree:
        """x with its target y, checked, and inside autocast in the model's own dtype."""
        if torch.is_autocast_enabled(binding.on):
            x = binding.in_its_dtype(x)
        data_checks.data(x_name, x, y_name, y, binding.like(), self.loss, bool(binding.text))
        return x

    def _look_at_labels(self, binding: Binding, x: Tensor, **given: Target) -> None:
        """Where check_labels asks for it on a GPU; the CPU's ops look by themselves."""
        if self._check_labels and binding.backend == "cuda":
            classes = problems.prediction_shape(binding.text, x)[0] if self.loss in data_checks.OF_CLASSES else None
            for name, y in given.items():
                data_checks.target_values(name, y, classes)


def _guard(maml: BoundModel) -> None:
    """Asks, under torch.compile, what the plan depends on, so that a change of it compiles anew (an attribute that
    decides nothing would not be guarded)."""
    asked = 0
    for m in maml.model.modules():
        asked += 1 if m.training else 2
    for p in maml.model.parameters():
        asked += 1 if p.requires_grad else 2
    if isinstance(maml.inner_lr, float):
        asked += len({maml.inner_lr})  # what is hashed is a constant


@torch._dynamo.assume_constant_result
def _bind_now(maml: BoundModel) -> bool:
    """Binds while a compiler traces: what it has bound is a constant of the compiled program."""
    if maml._bound is None or not maml._bound.holds(maml.model, maml.loss, maml.inner_lr, maml.inner_steps):
        maml._bound = maml._bind()
    return True
