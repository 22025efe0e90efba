"""FusedMAML: arguments and delegation."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _core, checks, ops, plan, reference
from .rates import InnerRates, Rate, hold, read_rates


@dataclass
class MetaOutput:
    """What a meta-step gives back. `loss` is the only differentiable field.

    loss: 0-d, sum over tasks of weight times task loss (the mean without task_weights).
    task_losses: [tasks], query losses after the inner loop.
    logits: [tasks, n_query, ...], predictions on the query sets.
    support_losses: [tasks, inner_steps]; column k is the support loss at phi_k.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Tensor
    support_losses: Tensor


@dataclass
class _Binding:
    """What a FusedMAML runs on, as its model's flags stand: see FusedMAML._bind."""

    flags: tuple
    backend: str
    why_not: str = ""  # the sentence, where the fused path was wanted and cannot serve
    traced: plan.Plan | None = None
    text: str = ""
    parameters: list[tuple[nn.Module, str]] = field(default_factory=list)  # of the plan, in its order
    rates: list[tuple[str, ...]] = field(default_factory=list)  # rate tensors of the plan: () or (name,)
    has_gradient: list[bool] = field(default_factory=list)  # of parameters, then rates
    fits: set = field(default_factory=set)  # signatures of calls that the layers are known to fit


class FusedMAML(nn.Module):
    """MAML on a batch of tasks: the exact meta-gradient in one call (Finn, Abbeel, Levine 2017).

    Args:
        model: any module; its parameters become this module's. What cannot be fused runs on the general path.
        inner_lr: the rate of the inner loop: a float or 0-d tensor; a tensor [inner_steps]; or a dict with exactly
            the adapted names -> float, 0-d, [inner_steps], the parameter's shape, or [inner_steps, *shape]. An
            nn.Parameter among them receives its exact gradient.
        inner_steps: steps of the inner loop, from 0.
        loss: "cross_entropy" (mean over samples), "mse" (mean over all elements), or (prediction, target) -> scalar
            (general path; a module's parameters are meta-learned too).
        first_order: drop the Hessian terms (FOMAML). May be changed at any time.
        adapt_params: which parameters the inner loop changes: a callable on the name, or names. The others still
            receive their exact meta-gradient.
        backend: "auto", "fused" (a ValueError where it cannot) or "reference".
        precision: "float32"; others need a device that has them.

    Raises:
        ValueError, TypeError: an argument that does not fit, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | Tensor | Mapping[str, float | Tensor],
        inner_steps: int = 1,
        *,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        first_order: bool = False,
        adapt_params: Callable[[str], bool] | Iterable[str] | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if adapt_params is not None and not callable(adapt_params) and not isinstance(adapt_params, str):
            adapt_params = list(adapt_params) if isinstance(adapt_params, Iterable) else adapt_params
        checks.constructor(model, inner_steps, loss, first_order, adapt_params, backend, precision)
        checks.one_dtype_and_device(model.parameters())
        parameters = dict(model.named_parameters())
        names = reference.adapted_names(model, adapt_params)
        read_rates(inner_lr, {name: parameters[name].shape for name in names}, inner_steps)
        self.model = model
        self.inner_steps = inner_steps
        self.loss = loss
        self.first_order = first_order
        self.precision = precision
        self._adapt_params = adapt_params
        self._wanted_backend = backend
        self._warned = False
        hold(self, inner_lr)
        self._bound = self._bind()

    # -- what runs --------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda" or "reference"."""
        return self._binding().backend

    def explain(self) -> str:
        """A table: each module of the model, the fused layer that serves it, or the sentence why not."""
        binding = self._binding()
        served = binding.traced.served_by if binding.traced else {}
        rows = [("module", "type", "served by")]
        for name, module in self.model.named_modules():
            if any(True for _ in module.children()) and name not in served:
                continue
            by = ", ".join(served.get(name, [])) or ("no layer of its own" if binding.traced else "reference")
            rows.append((name or "(the model)", type(module).__name__, by))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = ["  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows]
        head = f"backend: {binding.backend}"
        if binding.why_not:
            head += f", because {binding.why_not}"
        return "\n".join([head, *lines])

    def _flags(self) -> tuple:
        """What the plan depends on and a user may change after construction."""
        rates = self.inner_lr.items() if isinstance(self.inner_lr, InnerRates) else [("", self.inner_lr)]
        return (
            [m.training for m in self.model.modules()],
            [(p.requires_grad, p.dtype, p.device) for p in self.model.parameters()],
            [r.requires_grad if isinstance(r, Tensor) else r for _, r in rates],
        )

    def _binding(self) -> _Binding:
        if not torch.compiler.is_compiling() and self._flags() != self._bound.flags:
            self._bound = self._bind()
        return self._bound

    def _bind(self) -> _Binding:
        """Traces the model and decides the backend. Warns, once, where the fused path was wanted and cannot serve."""
        flags = self._flags()
        if self._wanted_backend == "reference":
            return _Binding(flags, "reference")
        try:
            traced = self._trace()
        except plan.Unfusable as reason:
            return self._fall_back(_Binding(flags, "reference", why_not=str(reason)))
        owners = {name: _owner(self.model, name) for name in traced.parameters}
        text, rates, has_gradient = self._plan_text(traced)
        return _Binding(
            flags, "cpu", traced=traced, text=text, parameters=[owners[name] for name in traced.parameters],
            rates=rates, has_gradient=has_gradient,
        )  # fmt: skip

    def _trace(self) -> plan.Plan:
        p = next(self.model.parameters())
        if not isinstance(self.loss, str):
            raise plan.Unfusable(f"loss {getattr(self.loss, '__name__', type(self.loss).__name__)} is a callable of yours")
        if p.device.type != "cpu":
            raise plan.Unfusable(f"this build has no fused layers for {p.device.type}")
        if p.dtype not in (torch.float32, torch.float64):
            raise plan.Unfusable(f"the model is {p.dtype}; fused are float32 and float64")
        traced = plan.trace(self.model)
        unreached = [name for name in self._adapted() if name not in traced.parameters]
        if unreached:
            raise reference.unreached(unreached)
        return traced

    def _fall_back(self, binding: _Binding) -> _Binding:
        if self._wanted_backend == "fused":
            raise ValueError(f'backend="fused" cannot serve this model: {binding.why_not}')
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"maml_cuda runs this model on the general path (reference), because {binding.why_not}",
                UserWarning,
                stacklevel=4,
            )
        for name, m in self.model.named_modules():
            tracked = getattr(m, "num_batches_tracked", None)
            if not m.training and isinstance(tracked, Tensor) and int(tracked) == 0:
                warnings.warn(
                    f"{name} ({type(m).__name__}) is in eval mode with running statistics that no batch has updated",
                    UserWarning,
                    stacklevel=4,
                )
        return binding

    def _adapted(self) -> list[str]:
        return reference.adapted_names(self.model, self._adapt_params)

    def _rates(self) -> dict[str, Rate]:
        parameters = dict(self.model.named_parameters())
        return read_rates(self.inner_lr, {n: parameters[n].shape for n in self._adapted()}, self.inner_steps)

    def _plan_text(self, traced: plan.Plan) -> tuple[str, list[tuple[str, ...]], list[bool]]:
        """The plan as ops.py takes it, with roles and rates; the rate tensors that it counts; what has a gradient."""
        parameters = dict(self.model.named_parameters())
        rates = self._rates()
        described: list[dict[str, Any]] = []
        tensors: list[dict[str, Any]] = []
        keys: list[tuple[str, ...]] = []
        shared: dict[int, int] = {}  # id of a rate that is one number -> its index
        for index, (name, (rows, taps)) in enumerate(zip(traced.parameters, traced.rows_taps, strict=True)):
            p = parameters[name]
            role = "adapted" if name in rates else "outer" if p.requires_grad else "frozen"
            entry: dict[str, Any] = {"size": p.numel(), "rows": rows, "taps": taps, "role": role}
            if role == "adapted":
                rate = rates[name]
                if not isinstance(rate.value, Tensor):
                    entry["rate"] = rate.value
                else:
                    entry.update(per_step=rate.per_step, elementwise=rate.elementwise)
                    if rate.elementwise or id(rate.value) not in shared:
                        shared[id(rate.value)] = len(tensors)
                        tensors.append(
                            {
                                "size": rate.value.numel(),
                                "steps": len(rate.value) if rate.per_step else 1,
                                "learned": rate.value.requires_grad,
                                **({"parameter": index} if rate.elementwise else {}),
                            }
                        )
                        keys.append((name,) if isinstance(self.inner_lr, InnerRates) else ())
                    entry["rate_tensor"] = len(tensors) - 1 if rate.elementwise else shared[id(rate.value)]
            described.append(entry)
        text = json.dumps(
            {"nodes": traced.nodes, "parameters": described, "rate_tensors": tensors, "loss": self.loss}
        )
        has_gradient = [d["role"] != "frozen" for d in described] + [t["learned"] for t in tensors]
        return text, keys, has_gradient

    # -- calls ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x_spt: Tensor,
        y_spt: Tensor,
        x_qry: Tensor,
        y_qry: Tensor,
        *,
        task_weights: Tensor | None = None,
    ) -> MetaOutput:
        """The query loss after the inner loop, whose backward is the exact meta-gradient.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry, y_qry: query sets, [tasks, n_query, ...].
            task_weights: [tasks]; the loss is their sum of weight times task loss. None: the mean over tasks.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit; no parameter is touched.
        """
        binding = self._binding()
        x_spt, x_qry = self._out_of_autocast(x_spt), self._out_of_autocast(x_qry)
        like = self._like()
        fused = binding.backend != "reference"
        checks.data("x_spt", x_spt, "y_spt", y_spt, like, self.loss, fused)
        checks.data("x_qry", x_qry, "y_qry", y_qry, like, self.loss, fused)
        checks.same_tasks(x_spt, x_qry)
        if task_weights is not None:
            checks.task_weights(task_weights, x_spt)
        if not (fused and self._fits(binding, x_spt, x_spt.shape[1], x_qry.shape[1])):
            return self._reference_forward(x_spt, y_spt, x_qry, y_qry, task_weights)
        tensors = self._tensors(binding)
        parameters, rates = tensors[: len(binding.parameters)], tensors[len(binding.parameters) :]
        gradient = torch.is_grad_enabled()
        loss, task_losses, logits, support_losses, flat = torch.ops.maml_cuda.meta_gradient(
            parameters, rates, x_spt, y_spt, x_qry, y_qry, task_weights, binding.text, self.inner_steps,
            self.first_order, gradient,
        )  # fmt: skip
        if gradient:
            inputs = [t for t, yes in zip(tensors, binding.has_gradient, strict=True) if yes]
            loss = torch.ops.maml_cuda.attach(loss, flat, inputs)
        return MetaOutput(loss, task_losses, logits, support_losses)

    def adapt(
        self, x_spt: Tensor, y_spt: Tensor, steps: int | None = None, *, differentiable: bool = False
    ) -> dict[str, Tensor]:
        """The parameters after the inner loop, name -> [tasks, *shape].

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            steps: None means inner_steps; beyond the given rates the last one repeats.
            differentiable: the result has a backward, of one Hessian-vector product a step (first_order: none);
                otherwise it is detached. Parameters that are not adapted are expanded views.
        """
        steps = self.inner_steps if steps is None else steps
        checks.steps(steps, "steps")
        binding = self._binding()
        x_spt = self._out_of_autocast(x_spt)
        fused = binding.backend != "reference"
        checks.data("x_spt", x_spt, "y_spt", y_spt, self._like(), self.loss, fused)
        differentiable = differentiable and torch.is_grad_enabled()
        if not (fused and self._fits(binding, x_spt, x_spt.shape[1], 0)):
            return self._reference_adapt(x_spt, y_spt, steps, differentiable)
        tensors = self._tensors(binding)
        parameters, rates = tensors[: len(binding.parameters)], tensors[len(binding.parameters) :]
        if differentiable:
            adapted, _ = torch.ops.maml_cuda.adapt(
                parameters, rates, x_spt, y_spt, binding.text, steps, self.first_order
            )
        else:
            adapted, _ = torch.ops.maml_cuda.adapt_forward(parameters, rates, x_spt, y_spt, binding.text, steps)
        assert binding.traced is not None
        chosen = set(self._adapted())
        by_name = dict(zip([n for n in binding.traced.parameters if n in chosen], adapted, strict=True))
        fast = {}
        for name, p in self.model.named_parameters():
            p = p if differentiable else p.detach()
            fast[name] = by_name[name] if name in by_name else p.unsqueeze(0).expand(len(x_spt), *p.shape)
        return fast

    def predict(self, fast: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Predictions [tasks, n, ...] of each task's own parameters on its own x [tasks, n, ...]; differentiable in `fast`."""
        binding, x = self._block(fast, x, "x", None)
        if binding.backend == "reference" or not self._fits(binding, x, 0, x.shape[1]):
            return torch.stack(
                [reference.call(self.model, {n: p[t] for n, p in fast.items()}, x[t]) for t in range(len(x))]
            )
        own = [fast[name] for name in self._names(binding)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in own):
            return torch.ops.maml_cuda.predict(own, x, binding.text)
        return torch.ops.maml_cuda.predict_forward(own, x, binding.text)

    def loss_and_grad(self, fast: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at each task's own parameters [tasks] and its gradient, name -> [tasks, *shape], both detached."""
        binding, x = self._block(fast, x, "x", y)
        names = self._trainable()
        if binding.backend == "reference" or not self._fits(binding, x, x.shape[1], 0):
            self._check_target("y", fast, x, y)
            return reference.loss_and_grad(self.model, reference.loss_function(self.loss), fast, names, x, y)
        own = self._names(binding)
        losses, grads = torch.ops.maml_cuda.loss_and_grad([fast[n].detach() for n in own], x, y, binding.text)
        return losses, self._trainable_of(own, grads, fast)

    def hvp(
        self, fast: Mapping[str, Tensor], x: Tensor, y: Tensor, v: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The Hessian of the loss at each task's own parameters times v, name -> [tasks, *shape], detached.

        v: name -> [tasks, *shape]; a parameter that it lacks does not move (zero).
        """
        binding, x = self._block(fast, x, "x", y)
        checks.fast(dict(self.model.named_parameters()), v, x, "v", all_names=False)
        names = self._trainable()
        if binding.backend == "reference" or not self._fits(binding, x, x.shape[1], 0):
            self._check_target("y", fast, x, y)
            return reference.hvp(self.model, reference.loss_function(self.loss), fast, names, x, y, v)
        own = self._names(binding)
        at = [fast[n].detach() for n in own]
        directions = [v[n].detach() if n in v else torch.zeros_like(fast[n]) for n in own]
        products = torch.ops.maml_cuda.hvp(at, x, y, directions, binding.text)
        return self._trainable_of(own, products, fast)

    # -- helpers ----------------------------------------------------------------------------------------------

    def _like(self) -> Tensor:
        return next(self.model.parameters())

    def _trainable(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _names(self, binding: _Binding) -> list[str]:
        assert binding.traced is not None
        return binding.traced.parameters

    def _trainable_of(
        self, names: list[str], tensors: list[Tensor], fast: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """By name, for every trainable parameter: zeros for one that the prediction does not depend on."""
        found = dict(zip(names, tensors, strict=True))
        return {n: found[n] if n in found else torch.zeros_like(fast[n]) for n in self._trainable()}

    def _tensors(self, binding: _Binding) -> list[Tensor]:
        """The plan's parameters, then its rate tensors."""
        tensors: list[Tensor] = [module._parameters[key] for module, key in binding.parameters]  # type: ignore[misc]
        for key in binding.rates:
            rate = self.inner_lr[key[0]] if key else self.inner_lr
            like = tensors[0]
            tensors.append(rate if rate.dtype == like.dtype else rate.to(like.dtype))
        return tensors

    def _out_of_autocast(self, x: Tensor) -> Tensor:
        """Inside autocast x is cast to the model's dtype; outside it must have it."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or not torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self._like().dtype)

    def _fits(self, binding: _Binding, x: Tensor, n_support: int, n_query: int) -> bool:
        """Whether fused layers fit samples like x's; falls back, in words, where none does.

        Raises:
            ValueError: a sample shape that does not fit the model itself.
        """
        if torch.compiler.is_compiling():
            return True
        signature = (x.shape[2:], n_support, n_query, x.dtype)
        if signature in binding.fits:
            return True
        try:
            ops.check(binding.text, tuple(x.shape[2:]), n_support, n_query, x.dtype)
        except _core.Unsupported as reason:
            self._bound = self._fall_back(_Binding(binding.flags, "reference", why_not=str(reason)))
            return False
        binding.fits.add(signature)
        return True

    def _block(
        self, fast: Mapping[str, Tensor], x: Tensor, x_name: str, y: Tensor | None
    ) -> tuple[_Binding, Tensor]:
        """The checks that the building blocks share."""
        binding = self._binding()
        x = self._out_of_autocast(x)
        fused = binding.backend != "reference"
        checks.data(x_name, x, None if y is None else "y", y, self._like(), self.loss, fused)
        checks.fast(dict(self.model.named_parameters()), fast, x, "fast", all_names=True)
        return binding, x

    # -- the general path -------------------------------------------------------------------------------------

    def _reference_forward(
        self, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor, task_weights: Tensor | None
    ) -> MetaOutput:
        wanted = [t for t in (*self.parameters(), x_spt, y_spt, x_qry, y_qry) if t.requires_grad]
        if not torch.is_grad_enabled():
            wanted = []
        weights = [1 / len(x_spt)] * len(x_spt) if task_weights is None else list(task_weights)
        with torch.autocast(x_spt.device.type, enabled=False):
            self._check_target("y_qry", None, x_qry, y_qry)
            self._check_target("y_spt", None, x_spt, y_spt)
            loss, task_losses, logits, support_losses, grads = reference.meta_step(
                self.model, reference.loss_function(self.loss), self._rates(), wanted, x_spt, y_spt, x_qry, y_qry,
                self.inner_steps, self.first_order, weights,
            )  # fmt: skip
        reached = [(t, g) for t, g in zip(wanted, grads, strict=True) if g is not None]
        if reached:
            flat = torch.cat([g.detach().reshape(-1) for _, g in reached])
            loss = torch.ops.maml_cuda.attach(loss, flat, [t for t, _ in reached])
        return MetaOutput(loss, task_losses, logits, support_losses)

    def _reference_adapt(self, x: Tensor, y: Tensor, steps: int, differentiable: bool) -> dict[str, Tensor]:
        theta = dict(self.model.named_parameters())
        rates = self._rates()
        with torch.autocast(x.device.type, enabled=False):
            self._check_target("y_spt", None, x, y)
            tasks = [
                reference.inner_loop(
                    self.model, reference.loss_function(self.loss), theta, rates, x[t], y[t], steps,
                    self.first_order, differentiable,
                )[0]
                for t in range(len(x))
            ]  # fmt: skip
        fast = {}
        for name, p in theta.items():
            if name in rates:
                stacked = torch.stack([phi[name] for phi in tasks])
                fast[name] = stacked if differentiable else stacked.detach()
            else:
                p = p if differentiable else p.detach()
                fast[name] = p.unsqueeze(0).expand(len(x), *p.shape)
        return fast

    def _check_target(self, name: str, fast: Mapping[str, Tensor] | None, x: Tensor, y: Tensor) -> None:
        """Label range, or the target's shape, on the general path: from one forward of the first task."""
        if not isinstance(self.loss, str):
            return
        parameters = dict(self.model.named_parameters()) if fast is None else {n: p[0] for n, p in fast.items()}
        with torch.no_grad():
            prediction = reference.call(self.model, parameters, x[0])
        if self.loss == "cross_entropy":
            checks.labels(name, y, prediction.shape[1])
        else:
            checks.target(name, y, (len(x), *prediction.shape))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter `name`, and its key there."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
