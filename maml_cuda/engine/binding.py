"""What a FusedMAML runs on, as its model's flags stand: the plan and its tensors, or the sentence why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import _core, pytrees, reference, targets
from maml_cuda.adapted_parameters import AdaptParams
from maml_cuda.batch_norm import PerStepBatchNorm
from maml_cuda.engine import checks, cuda_runner, data_checks, fast_path
from maml_cuda.engine.problem import why_not
from maml_cuda.plan import proof, reader
from maml_cuda.plan.schema import InnerRate, Parameter, Plan, RateTensor, Role
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates, read_rates, tensors

_WATCHED = ("requires_grad", "shape", "dtype", "device")  # of a parameter


class Binding:
    """The decision of one moment, and how to see that it still holds.

    Attributes:
        why_not: the sentence, where there is no plan, or where its layers do not fit the last call's samples.
        plan, text: the plan, where there is one, and as the ops take it.
        names: the plan's parameters, and the buffers that it reads.
        adapted: those of them that the inner loop changes.
        log_std: of a model that returns (mean, log_std), in the plan beside each other: "shared" or "rows" (Graph).
        on: the type of the model's device.
        dtypes: of the model's floating-point parameters, frozen ones included; of complex ones those of their parts.
        places: of the parameters and learned rates in the flat gradient (fast_path.places).
        plain: whether its parameters are torch's own, no subclass that would want to see what is done with them.
        problems: of meta-steps whose arguments have passed every check, by their signature (fast_path.signature).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Callable,
        inner_lr: float | Tensor | InnerRates,
        inner_steps: int,
        adapt_params: AdaptParams,
        fused: bool,
        on_device: dict[str, Any],
        recompute: bool,
    ) -> None:
        self.why_not = ""
        self.plan: Plan | None = None
        self.text = ""
        self._step_text = ""
        self.names: list[str] = []
        self.adapted: list[str] = []
        self.slots: list[int | None] = []  # of each of them, where it has a slot for each step
        self.served_by: dict[str, list[str]] = {}
        self.log_std = ""
        self._unfit: dict[tuple, str] = {}  # by the arguments of why_unfit
        self._proven: set[tuple[tuple[int, ...], int, bool]] = set()  # sample, samples, second_order
        self.places: list[fast_path.Place] = []
        self._slots: list[tuple[dict[str, Any], str]] = []  # the plan's parameters and rate tensors
        self._has_gradient: list[bool] = []
        self._all_have_gradient = False
        self.can_step = inner_steps > 0 or not _has_no_rate(inner_lr)
        parameters = [p for _, p in model.named_parameters()]
        checks.one_dtype_and_device(parameters)
        self._model = model
        self._inner_lr = inner_lr
        self._loss = loss
        self._inner_steps = inner_steps
        self._first: tuple[dict[str, Any], str] = next(
            (m._parameters, key)
            for m in model.modules()
            for key, p in m._parameters.items()
            if p is not None and p.requires_grad
        )
        self.dtypes = {p.dtype.to_real() for p in parameters if p.is_floating_point() or p.is_complex()}
        checks.rates(tensors(inner_lr), self.like())
        if fused:
            try:
                self._trace(model, loss, adapt_params, inner_steps, on_device, recompute)
            except reader.Unfusable as reason:
                self.why_not = str(reason)
        # Taken last, as tracing has left them.
        modules = list(model.modules())
        self._dicts = [d for m in modules for d in (m.__dict__, m._modules, m._parameters, m._buffers)]
        self._hooks = [getattr(m, hooks) for m in modules for hooks in reader.HOOKS] + list(reader.GLOBAL_HOOKS)
        self._hooked = any(self._hooks)
        if not self._hooked:  # they must stay empty; where they are not, what is in them may change
            self._dicts += self._hooks
        self._items = [part for d in self._dicts for item in d.items() for part in item]
        self._tensors = [*parameters, *model.buffers(), *(rate for _, rate in tensors(inner_lr))]
        self._attributes = [getattr(t, name) for t in self._tensors for name in _WATCHED]
        self.on = self.like().device.type
        self.plain = all(map(fast_path.is_plain, parameters))
        self.problems: dict[tuple, Any] = {}

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda" or "reference"."""
        return cuda_runner.backend_of(self.like().device) if self.text and not self.why_not else "reference"

    def holds(
        self, model: nn.Module, loss: str | Callable, inner_lr: float | Tensor | InnerRates, inner_steps: int
    ) -> bool:
        """Whether nothing has changed that the plan depends on: the modules and their attributes (flags, options, an
        instance's own forward), submodules, parameters, hooks, and what each parameter, buffer and rate is. Every value
        must be the very object that it was: this runs at each call, and comparing identities is quick."""
        if model is not self._model or inner_lr is not self._inner_lr or loss is not self._loss:
            return False
        if inner_steps != self._inner_steps:
            return False
        if self._hooked and not any(self._hooks):
            return False
        if not _core.same_items(self._dicts, self._items):
            return False
        return _core.same_attributes(self._tensors, _WATCHED, self._attributes)

    def like(self) -> Tensor:
        """A trainable parameter of the model, for its dtype and device; the real part of a complex one."""
        owner, key = self._first
        like: Tensor = owner[key]
        return like.real if like.is_complex() else like

    def in_its_dtype(self, x: Tree) -> Tree:
        """x as it is read inside autocast, whose own dtype does not count: in the model's, or in another one that it
        has."""
        dtype = self.like().dtype
        return pytrees.mapped(lambda t: t.to(dtype) if t.is_floating_point() and t.dtype not in self.dtypes else t, x)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The plan's parameters, and its rate tensors in the model's dtype."""
        tensors = [owner[key] for owner, key in self._slots]
        count = len(self.names)
        if len(tensors) == count:
            return tensors, []
        dtype = tensors[0].dtype
        return tensors[:count], [r if r.dtype == dtype else r.to(dtype) for r in tensors[count:]]

    def as_returned(self, prediction: Tensor) -> Any:
        """A prediction [tasks, n, ...] of the plan as the model returns it."""
        if not self.log_std:
            return prediction
        mean, log_std = prediction.chunk(2, -1)
        return mean, log_std if self.log_std == "rows" else log_std[:, 0]

    def why_unfit(
        self, sample: tuple[int, ...], n_support: int, n_query: int, dtype: torch.dtype, second_order: bool
    ) -> str:
        """The sentence why the plan does not serve such sets of samples, or nothing: no layer fits them, or the proof
        on them has failed (proof.py; a set of no samples needs none).

        Raises:
            ValueError: they do not fit a layer of the model.
        """
        signature = sample, n_support, n_query, dtype, second_order
        if signature not in self._unfit:
            self._unfit[signature] = (
                why_not(self.text, tuple(sample), n_support, n_query, dtype)
                or self._disproof(tuple(sample), n_support, second_order)
                or self._disproof(tuple(sample), n_query, second_order=False)
            )
        return self._unfit[signature]

    def _disproof(self, sample: tuple[int, ...], samples: int, second_order: bool) -> str:
        if samples == 0 or not self._proven.isdisjoint({(sample, samples, True), (sample, samples, second_order)}):
            return ""
        why_not = proof.why_not(self._model, str(self._loss), _Results(self), sample, samples, second_order)
        if not why_not:
            self._proven.add((sample, samples, second_order))
        return why_not

    def step_text(self) -> str:
        """The plan of one inner step at parameters that are each task's own, which `own` and `rates_at` cut for it."""
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
        for name, slots, (owner, key) in zip(self.names, self.slots, self._slots, strict=False):
            t = given[name] if name in given else owner[key].unsqueeze(0).expand(tasks, *owner[key].shape)
            tensors.append(t if slots is None else t[:, min(slot, slots - 1)])
        return tensors

    def whole(self, parts: list[Tensor], like: Mapping[str, Tensor], slot: int) -> dict[str, Tensor]:
        """What `own` has cut, put back by name: zeros in the other slots."""
        whole = dict(zip(self.names, parts, strict=True))
        for name, slots in zip(self.names, self.slots, strict=True):
            if slots is not None and name in like:
                part = whole[name]
                whole[name] = part.new_zeros(like[name].shape)
                whole[name][:, min(slot, slots - 1)] = part
        return whole

    def with_gradient(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those of parameters + rate tensors that have a place in the flat gradient."""
        if self._all_have_gradient:
            return tensors
        return [t for t, yes in zip(tensors, self._has_gradient, strict=True) if yes]

    def _trace(
        self,
        model: nn.Module,
        loss: str | Callable,
        adapt_params: AdaptParams,
        inner_steps: int,
        on_device: dict[str, Any],
        recompute: bool,
    ) -> None:
        p = self.like()
        if not isinstance(loss, str):
            raise reader.Unfusable(f"the loss {getattr(loss, '__name__', type(loss).__name__)} is a callable of yours")
        if why_not := cuda_runner.why_not(p.device):
            raise reader.Unfusable(why_not)
        if p.dtype not in (torch.float32, torch.float64):
            raise reader.Unfusable(f"the model is {p.dtype}; fused are float32 and float64")
        graph = reader.trace(model)
        data_checks.returns_policy(loss, bool(graph.log_std))
        self.log_std = graph.log_std
        adapted = reference.adapted_names(model, adapt_params)
        self.names, self.served_by = [read.name for read in graph.reads], graph.served_by
        unreached = [name for name in adapted if name not in self.names]
        if unreached:
            raise reference.unreached(unreached)
        self.adapted = sorted(adapted, key=self.names.index)
        layers = dict(model.named_modules())
        owners = [layers[name.rpartition(".")[0]] for name in self.names]
        self.slots = [m.steps if isinstance(m, PerStepBatchNorm) else None for m in owners]
        parameters, rate_tensors = self._describe(model, graph, adapted, inner_steps)
        backend = cuda_runner.backend_of(p.device)
        if backend == "cpu":
            on_device = {**on_device, "precision": "float32"}  # the only one there is
        self.plan = Plan(
            nodes=tuple(graph.nodes), parameters=tuple(parameters), rate_tensors=tuple(rate_tensors), loss=loss,
            backend=backend, recompute=recompute, **on_device,
        )  # fmt: skip
        self.text = self.plan.text
        self._has_gradient = self.plan.has_gradient
        self._all_have_gradient = all(self._has_gradient)
        self.places = fast_path.places(self.with_gradient([owner[key] for owner, key in self._slots]))

    def _describe(
        self, model: nn.Module, graph: reader.Graph, adapted: list[str], inner_steps: int
    ) -> tuple[list[Parameter], list[RateTensor]]:
        """The plan's parameters and rate tensors; and in _slots where each is read from at a call."""
        parameters = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        like = self.like()
        rates = read_rates(self._inner_lr, {name: parameters[name].shape for name in adapted}, inner_steps)
        described: list[Parameter] = []
        tensors: list[RateTensor] = []
        owners: list[tuple[dict[str, Any], str]] = []
        shared: dict[int, int] = {}  # a rate tensor that is one number for several parameters -> its index
        for index, read in enumerate(graph.reads):
            name = read.name
            p = parameters[name] if name in parameters else buffers[name]
            if p.dtype != like.dtype or p.device != like.device:
                raise reader.Unfusable(f"{name} is {p.dtype} on {p.device}, unlike the model's parameters")
            trained: Role = "adapted" if name in rates else "outer" if p.requires_grad else "frozen"
            rate = None
            if name in rates:
                value, per_step, elementwise = rates[name].value, rates[name].per_step, rates[name].elementwise
                if not isinstance(value, Tensor):
                    rate = InnerRate(value, None, per_step, elementwise)
                else:
                    at = None if elementwise else shared.get(id(value))
                    if at is None:
                        at = shared[id(value)] = len(tensors)
                        steps, of = len(value) if per_step else 1, index if elementwise else None
                        tensors.append(RateTensor(value.numel(), steps, of, value.requires_grad))
                        owners.append(self._owner_of_rate(name, value))
                    rate = InnerRate(None, at, per_step, elementwise)
            role = trained if name in parameters else "buffer"
            described.append(Parameter(p.numel(), read.rows, read.taps, read.slots, role, rate))
            path, _, key = name.rpartition(".")
            owner = model.get_submodule(path)
            self._slots.append((owner._parameters if name in parameters else owner._buffers, key))
        self._slots += owners
        return described, tensors

    def _owner_of_rate(self, name: str, rate: Tensor) -> tuple[dict[str, Any], str]:
        """Where the rate of the parameter `name` is read from at each call."""
        if isinstance(self._inner_lr, InnerRates):
            path, _, key = name.rpartition(".")
            owner = self._inner_lr.get_submodule(path)
            return (owner._parameters if isinstance(rate, nn.Parameter) else owner._buffers), key
        return {"inner_lr": rate}, "inner_lr"


class _Results:
    """What the plan computes, for its proof: on the CPU, whatever runs it later."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._trainable = [name for name, p in binding._model.named_parameters() if p.requires_grad]
        assert binding.plan is not None
        self._text = replace(binding.plan, backend="cpu", precision="float32").text

    def predict(self, fast: Mapping[str, Tensor], x: Tensor) -> Any:
        prediction = torch.ops.maml_cuda.predict_forward(self._own(fast), x, self._text)
        return self._binding.as_returned(prediction)

    def loss_and_grad(
        self, fast: Mapping[str, Tensor], x: Tensor, y: targets.Target
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, grads = torch.ops.maml_cuda.loss_and_grad(self._own(fast), x, targets.tensors(y), self._text)
        return losses, self._whole(grads, fast)

    def hvp(
        self, fast: Mapping[str, Tensor], x: Tensor, y: targets.Target, v: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        at_rest = {name: torch.zeros_like(t) for name, t in fast.items()}
        directions = self._own({**at_rest, **v})
        products = torch.ops.maml_cuda.hvp(self._own(fast), x, targets.tensors(y), directions, self._text)
        return self._whole(products, fast)

    def _own(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        return self._binding.own(given, 1, 0)

    def _whole(self, parts: list[Tensor], fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = {name: fast[name] for name in self._trainable}
        found = self._binding.whole(parts, like, 0)
        return {name: found.get(name, torch.zeros_like(t)) for name, t in like.items()}


def _has_no_rate(inner_lr: float | Tensor | InnerRates) -> bool:
    """Whether a rate per inner step holds no step at all, so that there is no last one to repeat."""
    rates = [r for _, r in inner_lr.items()] if isinstance(inner_lr, InnerRates) else [inner_lr]
    return any(isinstance(r, Tensor) and r.dim() > 0 and len(r) == 0 for r in rates)
