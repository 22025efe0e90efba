"""The inner update: what one step of the inner loop does to each adapted parameter, as plain torch code.

The rules are those of torch.optim, step by step (`Update.step` has each formula). Unlike there nothing is written in
place and nothing is detached, so that autograd differentiates through every step, state included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from maml_cuda.gradient_transforms import Transform
from maml_cuda.rates import Rate

State = dict[str, Tensor]

# rule -> the tensors of its state, as torch.optim names them.
STATE = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer"),
    "adagrad": ("sum",),
}


@dataclass(frozen=True)
class Update:
    """The update of one adapted parameter.

    Attributes:
        rate: the inner learning rate.
        rule: "sgd", "adam", "adamw", "adamax", "rmsprop" or "adagrad".
        hyperparameters: all of torch.optim's for this rule, by name, except for flags; betas are "beta1" and "beta2".
        nesterov: of SGD.
        centered: of RMSprop.
        initial: the state before the first step, by torch's names; what it lacks starts as in torch.optim.
        taken: steps that the initial state has behind it, which count in Adam's bias correction and Adagrad's lr_decay.
    """

    rate: Rate
    rule: str = "sgd"
    hyperparameters: Mapping[str, Rate] = field(default_factory=dict)
    nesterov: bool = False
    centered: bool = False
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    taken: int = 0

    def has(self, hyperparameter: str) -> bool:
        """Whether a hyperparameter takes part. The number 0 does not; a tensor does, also where it is 0."""
        rate = self.hyperparameters.get(hyperparameter)
        return rate is not None and (isinstance(rate.value, Tensor) or rate.value != 0)

    @property
    def is_plain(self) -> bool:
        """Whether the step is phi - rate * g."""
        return self.rule == "sgd" and not self.has("momentum") and not self.has("weight_decay")

    def keys(self) -> tuple[str, ...]:
        """The names of the tensors of the state."""
        left_out = set() if self.has("momentum") else {"momentum_buffer"}
        if not self.centered:
            left_out.add("grad_avg")
        return tuple(key for key in STATE[self.rule] if key not in left_out)

    def start(self, phi: Tensor) -> State:
        """The state before the first step, tensors of the parameter's shape. SGD's momentum_buffer is zero there, and
        the first step replaces it, as in torch."""
        state = {key: torch.zeros_like(phi).detach() for key in self.keys()}
        if self.has("initial_accumulator_value"):
            value = self.hyperparameters["initial_accumulator_value"].at(0)
            start = value.to(phi.dtype.to_real()) if isinstance(value, Tensor) else torch.full_like(phi.real, value)
            start = start.expand(phi.shape)
            state["sum"] = torch.complex(start, start) if phi.is_complex() else start
        return state | {key: t.to(phi.dtype) for key, t in self.initial.items() if key in state}

    def step(self, phi: Tensor, g: Tensor, state: State, k: int) -> tuple[Tensor, State]:
        """Inner step k, from 0: the parameter and the state after it.

        Args:
            phi: the parameter.
            g: the gradient of the support loss in it. Complex numbers are pairs of real ones, as in torch.
            state: as `start` or the step before has returned it.
        """
        if phi.is_complex() and not self.is_plain:
            return self._step_of_parts(phi, g, state, k)
        h = {name: _at(rate, k, g) for name, rate in self.hyperparameters.items()}
        rate = _at(self.rate, k, g)
        t = self.taken + k + 1
        if self.rule == "adamw":
            if self.has("weight_decay"):
                phi = phi * (1 - rate * h["weight_decay"])
        elif self.has("weight_decay"):
            g = g + h["weight_decay"] * phi
        match self.rule:
            case "sgd":
                if not self.has("momentum"):
                    return phi - rate * g, {}
                first = k == 0 and "momentum_buffer" not in self.initial
                m = g if first else h["momentum"] * state["momentum_buffer"] + (1 - h["dampening"]) * g
                return phi - rate * (g + h["momentum"] * m if self.nesterov else m), {"momentum_buffer": m}
            case "adam" | "adamw":
                m = h["beta1"] * state["exp_avg"] + (1 - h["beta1"]) * g
                s = h["beta2"] * state["exp_avg_sq"] + (1 - h["beta2"]) * g * g
                denominator = root(s) / (1 - h["beta2"] ** t) ** 0.5 + h["eps"]
                return phi - rate / (1 - h["beta1"] ** t) * m / denominator, {"exp_avg": m, "exp_avg_sq": s}
            case "adamax":
                m = h["beta1"] * state["exp_avg"] + (1 - h["beta1"]) * g
                u = torch.maximum(h["beta2"] * state["exp_inf"], g.abs() + h["eps"])
                return phi - rate / (1 - h["beta1"] ** t) * m / u, {"exp_avg": m, "exp_inf": u}
            case "rmsprop":
                new = {"square_avg": h["alpha"] * state["square_avg"] + (1 - h["alpha"]) * g * g}
                variance = new["square_avg"]
                if self.centered:
                    new["grad_avg"] = h["alpha"] * state["grad_avg"] + (1 - h["alpha"]) * g
                    variance = variance - new["grad_avg"] * new["grad_avg"]
                direction = g / (root(variance) + h["eps"])
                if self.has("momentum"):
                    direction = h["momentum"] * state["momentum_buffer"] + direction
                    new["momentum_buffer"] = direction
                return phi - rate * direction, new
            case _:
                total = state["sum"] + g * g
                rate = rate / (1 + (t - 1) * h["lr_decay"])
                return phi - rate * g / (root(total) + h["eps"]), {"sum": total}

    def _step_of_parts(self, phi: Tensor, g: Tensor, state: State, k: int) -> tuple[Tensor, State]:
        """A step of a complex parameter: its real and its imaginary part are parameters of their own, as in torch."""
        parts = replace(
            self,
            rate=_of_parts(self.rate),
            hyperparameters={name: _of_parts(rate) for name, rate in self.hyperparameters.items()},
        )
        real = {key: torch.view_as_real(v.resolve_conj()) for key, v in state.items()}
        phi, real = parts.step(torch.view_as_real(phi.resolve_conj()), torch.view_as_real(g.resolve_conj()), real, k)
        return _complex(phi), {key: _complex(v) for key, v in real.items()}

    def tensors(self) -> list[Tensor]:
        """The rate, hyperparameters and initial state that are tensors."""
        values = [rate.value for rate in (self.rate, *self.hyperparameters.values())]
        return [v for v in (*values, *self.initial.values()) if isinstance(v, Tensor)]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Update:
        """The same update with `function` of each of its tensors."""

        def of(rate: Rate) -> Rate:
            return replace(rate, value=function(rate.value)) if isinstance(rate.value, Tensor) else rate

        return replace(
            self,
            rate=of(self.rate),
            hyperparameters={name: of(rate) for name, rate in self.hyperparameters.items()},
            initial={key: function(t) for key, t in self.initial.items()},
        )


@dataclass(frozen=True)
class InnerUpdate:
    """What an inner step does to all adapted parameters of a task: gradient, transform, clip, optimizer.

    Attributes:
        updates: of each adapted parameter.
        clip_norm, clip_value: of `clip`.
        transform: of all gradients.
    """

    updates: Mapping[str, Update]
    clip_norm: float | None = None
    clip_value: float | None = None
    transform: Transform | None = None

    def start(self, phi: Mapping[str, Tensor]) -> dict[str, State]:
        """The state of each adapted parameter before the first step."""
        return {name: update.start(phi[name]) for name, update in self.updates.items()}

    def step(
        self, phi: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: Mapping[str, State], k: int
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        """Inner step k, from 0.

        Args:
            phi: all parameters.
            grads: of the support loss in the adapted ones.
            state: as `start` or the step before has returned it.

        Returns:
            All parameters after the step (the same tensors of those that are not adapted), and the state.

        Raises:
            TypeError, ValueError: as the transform does.
        """
        if self.transform is not None:
            grads = self.transform(dict(grads))
        grads = clip(grads, self.clip_norm, self.clip_value)
        new, after = dict(phi), {}
        for name, update in self.updates.items():
            new[name], after[name] = update.step(phi[name], grads[name], state[name], k)
        return new, after

    def tensors(self) -> list[Tensor]:
        """The rates, hyperparameters, initial states and parameters of the transform that are tensors."""
        of_transform = {} if self.transform is None else self.transform.parameters or {}
        return [*(t for update in self.updates.values() for t in update.tensors()), *of_transform.values()]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> InnerUpdate:
        """The same with `function` of each of these tensors."""
        return replace(
            self,
            updates={name: update.mapped(function) for name, update in self.updates.items()},
            transform=None if self.transform is None else self.transform.mapped(function),
        )


def clip(grads: Mapping[str, Tensor], norm: float | None = None, value: float | None = None) -> dict[str, Tensor]:
    """The gradients of one task as torch.nn.utils.clip_grad_norm_ leaves them, then as clip_grad_value_ does.

    By norm, all are multiplied by min(1, norm / (n + 1e-6)), n the norm of all of them together, which is
    differentiated as well. By value, each element is brought into [-value, value].
    """
    if norm is not None:
        total = root(torch.stack([(g * g.conj()).real.sum() for g in grads.values()]).sum())
        scale = torch.clamp(norm / (total + 1e-6), max=1.0)
        grads = {name: g * scale for name, g in grads.items()}
    if value is not None:
        grads = {name: g.clamp(-value, value) for name, g in grads.items()}
    return dict(grads)


def root(x: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0, also in double backward.

    The root's own derivative is infinite there, and infinity times the zero derivative of the square inside is NaN. For
    the functions that are composed here, 0 gives the exact derivative: Adam's step c g / (sqrt(d g^2) + eps) has the
    derivative c / eps at g = 0, all of it from the numerator. So a gradient that is zero, such as that of a bias before
    BatchNorm, is no trouble. By a second moment given as `state` that is itself zero there is no derivative, and 0 is
    returned.
    """
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def _at(rate: Rate, k: int, like: Tensor) -> float | Tensor:
    """The value of inner step k, in the dtype of the gradient `like`."""
    value = rate.at(k)
    return value.to(like.dtype.to_real()) if isinstance(value, Tensor) else value


def _of_parts(rate: Rate) -> Rate:
    """The hyperparameter of a complex parameter for its pairs of real numbers."""
    if rate.elementwise and isinstance(rate.value, Tensor):
        return replace(rate, value=rate.value.unsqueeze(-1))
    return rate


def _complex(parts: Tensor) -> Tensor:
    return torch.view_as_complex(parts.contiguous())
