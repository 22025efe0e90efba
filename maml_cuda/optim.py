"""Optimizers of the inner loop: `FusedMAML(..., inner_optimizer=maml_cuda.optim.Adam())`.

They have torch.optim's meaning and defaults; the learning rate is `inner_lr`. Each hyperparameter is a number; a 0-d
tensor; a tensor [inner_steps], one value for each step (beyond the last one it repeats); or a dict with exactly the
adapted names -> any of these, the parameter's shape, or [inner_steps, *shape]. An nn.Parameter among them is
meta-learned: it receives its exact gradient.

`state` is the state before the first step, in the form of torch's: a dict name -> {"exp_avg": tensor of the
parameter's shape, ...}, with an nn.Parameter for what is meta-learned. What it lacks starts at torch's value, mostly
zero. "step" is the number of steps that the state has behind it. Every task starts from this state, as from the model's
parameters.

Options that change what is computed in other ways are not here: amsgrad, maximize.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maml_cuda.adapted_parameters import as_pickled
from maml_cuda.gradient_scale import Mask, Scale, Sign
from maml_cuda.gradient_transforms import GradientTransform, transform_of
from maml_cuda.meta_curvature import MetaCurvature
from maml_cuda.rates import Held, InnerRates, Rate, Value, hold, read_rates, tensors
from maml_cuda.updates import STATE, InnerUpdate, Update, clip, root

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Groups",
    "InnerUpdate",
    "Mask",
    "MetaCurvature",
    "RMSprop",
    "Scale",
    "Sign",
    "Update",
    "clip",
    "root",
]

Range = tuple[str, Callable[[Tensor], Tensor]]  # in words, and whether values are in it
ANY: Range = ("a number", lambda v: v == v)
NOT_NEGATIVE: Range = ("at least 0", lambda v: v >= 0)
BETA: Range = ("in [0, 1)", lambda v: (v >= 0) & (v < 1))
State = Mapping[str, Mapping[str, Any]]


class Optimizer(nn.Module):
    """An optimizer of the inner loop.

    As a module it holds the hyperparameters that are tensors, as parameters or buffers. Those that are numbers are
    attributes of the same names, which may be changed between calls.
    """

    rule: ClassVar[str]
    ranges: ClassVar[dict[str, Range]]  # of each hyperparameter
    nesterov = False
    centered = False

    def __init__(self, state: State | None, **hyperparameters: Value) -> None:
        super().__init__()
        for name, value in hyperparameters.items():
            setattr(self, name, value)
        flat, self._taken = _flat(state, type(self).__name__, self.rule)
        self.state = InnerRates(flat) if flat else None

    def __setattr__(self, name: str, value: Any) -> None:
        """A hyperparameter is checked, and held as a number, parameter, buffer or module."""
        if name not in self.ranges or isinstance(value, InnerRates):
            super().__setattr__(name, value)
            return
        _check(f"{type(self).__name__}'s {name}", value, *self.ranges[name])
        for registry in (self.__dict__, self._parameters, self._buffers, self._modules):
            registry.pop(name, None)
        if isinstance(value, (Tensor, Mapping)):
            hold(self, name, value)
        else:
            self.__dict__[name] = float(value)

    def read(
        self, rates: Mapping[str, Rate], adapted: Mapping[str, torch.Size], steps: int, what: str = "inner_optimizer"
    ) -> dict[str, Update]:
        """The update of each adapted parameter.

        Args:
            rates: its inner learning rate.
            adapted: name -> shape.
            steps: inner_steps.
            what: the optimizer's name in errors.

        Raises:
            ValueError, TypeError: a hyperparameter or a state that does not fit, in words.
        """
        values = {name: read_rates(getattr(self, name), adapted, steps, f"{what}.{name}") for name in self.ranges}
        states = self._states()
        if unknown := [str(name) for name in states if name not in adapted]:
            raise ValueError(
                f"{what}.state must name adapted parameters ({', '.join(adapted)}), got {', '.join(unknown)}"
            )
        updates = {}
        for name, shape in adapted.items():
            update = Update(
                rates[name],
                self.rule,
                {key: rate[name] for key, rate in values.items()},
                self.nesterov,
                self.centered,
                states.get(name, {}),
                self._taken.get(name, 0),
            )
            _check_state(f"{what}.state[{name!r}]", update, shape)
            updates[name] = update
        return updates

    def constants(self) -> list[Any]:
        """What a plan depends on, as torch.compile guards it (torch_private.guard_while_compiling)."""
        found: list[Any] = [id(self), self.nesterov, self.centered]
        for name in self.ranges:
            value = getattr(self, name)
            if isinstance(value, Tensor):  # torch.compile itself guards what else of it counts
                found.append(value.requires_grad)
            else:
                found.append(value if isinstance(value, float) else id(value))
        return found

    def held_tensors(self, what: str = "inner_optimizer") -> list[tuple[str, Tensor]]:
        """The hyperparameters and states that are tensors, each with its name for error messages."""
        held = [t for name in self.ranges for t in tensors(getattr(self, name), f"{what}.{name}")]
        return held + [
            (f"{what}.state[{name!r}][{key!r}]", t) for name, part in self._states().items() for key, t in part.items()
        ]

    def _states(self) -> dict[str, dict[str, Tensor]]:
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._taken}
        for path, t in self.state.items() if self.state is not None else []:
            name, _, key = path.rpartition(".")
            states[name][key] = t  # type: ignore[assignment]
        return states

    def described(self) -> str:
        """The optimizer and its numbers in one line."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        values: dict[str, Held] = {name: getattr(self, name) for name in self.ranges}
        numbers = [f"{name}={v}" for name, v in values.items() if isinstance(v, float)]
        return ", ".join(numbers + [f"{flag}=True" for flag in ("nesterov", "centered") if getattr(self, flag)])


class SGD(Optimizer):
    """torch.optim.SGD: g' = g + weight_decay phi; m = momentum m + (1 - dampening) g', in the first step m = g';
    phi = phi - rate m, with `nesterov` phi - rate (g' + momentum m).

    A momentum that is the number 0 keeps no m. One that is a tensor always does.

    Raises:
        ValueError: nesterov without momentum, or with dampening.
    """

    rule = "sgd"
    ranges: ClassVar = {"momentum": NOT_NEGATIVE, "dampening": ANY, "weight_decay": NOT_NEGATIVE}

    def __init__(
        self,
        momentum: Value = 0,
        dampening: Value = 0,
        weight_decay: Value = 0,
        nesterov: bool = False,
        *,
        state: State | None = None,
    ) -> None:
        super().__init__(state, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        self.nesterov = _flag("nesterov", nesterov)
        zero = isinstance(momentum, (int, float)) and momentum == 0
        if nesterov and (zero or isinstance(dampening, (Tensor, Mapping)) or dampening != 0):
            raise ValueError(
                f"nesterov must have a momentum and no dampening, got momentum={momentum} and dampening={dampening}"
            )


class _Adam(Optimizer):
    ranges: ClassVar = {"beta1": BETA, "beta2": BETA, "eps": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE}

    def __init__(
        self,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 0,
        *,
        state: State | None = None,
    ) -> None:
        if isinstance(betas, (str, Tensor, Mapping)) or not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas must be a pair (beta1, beta2), got {betas!r}")
        super().__init__(state, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)


class Adam(_Adam):
    """torch.optim.Adam (Kingma, Ba 2015), in step t = 1, 2, ...: g' = g + weight_decay phi;
    m = beta1 m + (1 - beta1) g'; s = beta2 s + (1 - beta2) g'^2;
    phi = phi - rate (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps).

    Where s is 0, as of a gradient that is always 0, the root's derivative is 0, which gives the exact derivative of the
    step (updates.root).
    """

    rule = "adam"


class AdamW(_Adam):
    """torch.optim.AdamW (Loshchilov, Hutter 2019): Adam on g itself, after phi = phi - rate weight_decay phi."""

    rule = "adamw"

    def __init__(
        self,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        weight_decay: Value = 0.01,
        *,
        state: State | None = None,
    ) -> None:
        super().__init__(betas, eps, weight_decay, state=state)


class Adamax(_Adam):
    """torch.optim.Adamax (Kingma, Ba 2015, section 7): g' = g + weight_decay phi; m = beta1 m + (1 - beta1) g';
    u = max(beta2 u, |g'| + eps); phi = phi - rate (m / (1 - beta1^t)) / u."""

    rule = "adamax"


class RMSprop(Optimizer):
    """torch.optim.RMSprop: g' = g + weight_decay phi; s = alpha s + (1 - alpha) g'^2; with `centered`
    c = alpha c + (1 - alpha) g', otherwise c = 0; d = g' / (sqrt(s - c^2) + eps); m = momentum m + d;
    phi = phi - rate m."""

    rule = "rmsprop"
    ranges: ClassVar = {
        "alpha": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
    }

    def __init__(
        self,
        alpha: Value = 0.99,
        eps: Value = 1e-8,
        weight_decay: Value = 0,
        momentum: Value = 0,
        centered: bool = False,
        *,
        state: State | None = None,
    ) -> None:
        super().__init__(state, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        self.centered = _flag("centered", centered)


class Adagrad(Optimizer):
    """torch.optim.Adagrad (Duchi, Hazan, Singer 2011), in step t = 1, 2, ...: g' = g + weight_decay phi; s = s + g'^2,
    at first initial_accumulator_value; phi = phi - rate / (1 + (t - 1) lr_decay) g' / (sqrt(s) + eps)."""

    rule = "adagrad"
    ranges: ClassVar = {
        "lr_decay": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "initial_accumulator_value": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
    }

    def __init__(
        self,
        lr_decay: Value = 0,
        weight_decay: Value = 0,
        initial_accumulator_value: Value = 0,
        eps: Value = 1e-10,
        *,
        state: State | None = None,
    ) -> None:
        super().__init__(
            state,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )


Chosen = Callable[[str], bool] | Iterable[str]


class Groups(nn.Module):
    """Several optimizers, each for some of the adapted parameters, like torch's parameter groups.

        Groups([(["head.weight", "head.bias"], Adam()), (lambda name: True, SGD(momentum=0.9))])

    Args:
        groups: pairs of names, or a function on names, and the optimizer of these parameters. The first group that has
            a parameter serves it. (Rates of their own: `inner_lr` as a dict.)

    Raises:
        ValueError, TypeError: no groups, or one of another form. Of a FusedMAML also: a parameter without a group; a
            name that is not adapted; a function that chooses no adapted parameter.
    """

    def __init__(self, groups: Iterable[tuple[Chosen, Optimizer]]) -> None:
        super().__init__()
        groups = list(groups)
        if not groups:
            raise ValueError("groups must hold at least one pair (names, optimizer), got none")
        self._chosen: list[Callable[[str], bool] | list[str]] = []
        for i, group in enumerate(groups):
            if not isinstance(group, (tuple, list)) or len(group) != 2:
                raise TypeError(f"groups[{i}] must be a pair (names, optimizer), got {type(group).__name__}")
            names, optimizer = group
            if isinstance(names, str) or not (callable(names) or isinstance(names, Iterable)):
                raise TypeError(f"groups[{i}] must begin with names or a function on names, got {type(names).__name__}")
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"groups[{i}] must end with a maml_cuda.optim optimizer, got {type(optimizer).__name__}"
                )
            self._chosen.append(names if callable(names) else list(names))
            self.add_module(str(i), optimizer)
        self._seen: list[str] = []  # the names that it was last asked about

    def optimizers(self) -> Iterator[Optimizer]:
        for optimizer in self.children():
            assert isinstance(optimizer, Optimizer)
            yield optimizer

    def read(
        self, rates: Mapping[str, Rate], adapted: Mapping[str, torch.Size], steps: int, what: str = "inner_optimizer"
    ) -> dict[str, Update]:
        """As Optimizer.read."""
        self._seen[:] = adapted
        updates: dict[str, Update] = {}
        for i, (chosen, optimizer) in enumerate(zip(self._chosen, self.optimizers(), strict=True)):
            if callable(chosen):
                names = [name for name in adapted if chosen(name)]
            else:
                names = chosen
                if unknown := [str(name) for name in names if name not in adapted]:
                    raise ValueError(
                        f"{what}: groups[{i}] must name adapted parameters ({', '.join(adapted)}), "
                        f"got {', '.join(unknown)}"
                    )
            if not names:
                raise ValueError(f"{what}: groups[{i}] must choose an adapted parameter, got none")
            shapes = {name: adapted[name] for name in names if name not in updates}
            updates |= optimizer.read(rates, shapes, steps, f"{what}[{i}]")
        if missing := [name for name in adapted if name not in updates]:
            raise ValueError(f"{what} must have a group for each adapted parameter, got none for {', '.join(missing)}")
        return {name: updates[name] for name in adapted}

    def described(self) -> str:
        return ", ".join(f"group {i}: {optimizer.described()}" for i, optimizer in enumerate(self.optimizers()))

    def constants(self) -> list[Any]:
        return [c for optimizer in self.optimizers() for c in optimizer.constants()]

    def held_tensors(self, what: str = "inner_optimizer") -> list[tuple[str, Tensor]]:
        return [t for i, optimizer in enumerate(self.optimizers()) for t in optimizer.held_tensors(f"{what}[{i}]")]

    def __getstate__(self) -> dict[str, Any]:
        chosen = [
            as_pickled(c, self._seen, f"groups[{i}] must say whether it chooses") if callable(c) else c
            for i, c in enumerate(self._chosen)
        ]
        return {**self.__dict__, "_chosen": chosen}


def read(
    inner_lr: Value | Held,
    adapted: Mapping[str, torch.Size],
    steps: int,
    optimizer: Optimizer | Groups | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    transform: GradientTransform | None = None,
) -> InnerUpdate:
    """The inner update of these arguments of FusedMAML.

    Args:
        adapted: name -> shape of the parameters that the inner loop changes.

    Raises:
        ValueError, TypeError: as read_rates and Optimizer.read.
    """
    rates = read_rates(inner_lr, adapted, steps)
    if optimizer is None:
        updates = {name: Update(rate) for name, rate in rates.items()}
    else:
        updates = optimizer.read(rates, adapted, steps)
    return InnerUpdate(updates, clip_norm, clip_value, transform_of(transform))


def _check(what: str, value: Any, words: str, is_in: Callable[[Tensor], Tensor]) -> None:
    """A hyperparameter: numbers or floating-point tensors in its range."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check(f"{what}[{name!r}]", part, words, is_in)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{what} must be a number, a tensor or a dict, got {type(value).__name__}")
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(f"{what} must be a floating-point tensor, got {value.dtype}")
    values = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
    if not bool((is_in(values) & torch.isfinite(values)).all()):
        raise ValueError(f"{what} must be {words} and finite, got {values.flatten().tolist()[:8]}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def _flat(state: State | None, optimizer: str, rule: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a state by "name.key", and the steps that each parameter's has behind it."""
    if state is None:
        return {}, {}
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a dict name -> dict of tensors, got {type(state).__name__}")
    flat, taken = {}, {}
    for name, part in state.items():
        what = f"{optimizer}'s state[{name!r}]"
        if not isinstance(name, str):
            raise TypeError(f"state must have the names of parameters as keys, got {name!r}")
        if not isinstance(part, Mapping):
            raise TypeError(f"{what} must be a dict of tensors, got {type(part).__name__}")
        taken[name] = 0
        for key, t in part.items():
            if key == "step":
                taken[name] = _count(what, t)
            elif key not in STATE[rule]:
                raise ValueError(f"{what} must hold {', '.join(STATE[rule])} or step, got {key!r}")
            elif t is not None:  # as torch keeps a momentum_buffer before the first step
                if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
                    got = t.dtype if isinstance(t, Tensor) else type(t).__name__
                    raise TypeError(f"{what}[{key!r}] must be a floating-point tensor, got {got}")
                flat[f"{name}.{key}"] = t
    return flat, taken


def _count(what: str, step: Any) -> int:
    value = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}['step'] must be a number, got {type(step).__name__}")
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise ValueError(f"{what}['step'] must be a whole number from 0, got {value}")
    return int(value)


def _check_state(what: str, update: Update, shape: torch.Size) -> None:
    keys = update.keys()
    for key, t in update.initial.items():
        if key not in keys:
            raise ValueError(f"{what} must hold {', '.join(keys) or 'nothing'} with these hyperparameters, got {key}")
        if t.shape != shape:
            raise ValueError(f"{what}[{key!r}] must have the parameter's shape {list(shape)}, got {list(t.shape)}")
        if not bool(torch.isfinite(t.detach()).all()):
            raise ValueError(f"{what}[{key!r}] must be finite, got {t.detach().flatten().tolist()[:8]}")
    value = update.hyperparameters.get("initial_accumulator_value")
    if value is not None and value.per_step:
        raise ValueError("initial_accumulator_value must be one value for all steps, got one for each")
