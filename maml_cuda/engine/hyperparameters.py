"""The hyperparameters of the inner loop, as a plan has them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from maml_cuda.capture.copies import Place
from maml_cuda.engine.factors import Factor
from maml_cuda.plan import schema
from maml_cuda.plan.schema import Hyperparameter, RateTensor
from maml_cuda.rates import Rate
from maml_cuda.updates import Update

ZERO = Hyperparameter(0.0, None, False, False)
# rule -> its states, in the order of the core.
STATES = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
    "rmsprop": ("square_avg", "momentum_buffer", "grad_avg"),
    "adagrad": ("sum",),
}


def places_in(*modules: nn.Module | None) -> list[Place]:
    """The places of all parameters, buffers and tensors that are attributes."""
    registries = [
        r for root in modules if root is not None for m in root.modules() for r in (m._parameters, m._buffers)
    ]
    return [Place(registry, key) for registry in registries for key in registry]


class Hyperparameters:
    """The tensors among the hyperparameters of a plan, and what holds each of them.

    Attributes:
        tensors: as the plan describes them.
        holders: their places.
    """

    def __init__(self, held: Iterable[Place]) -> None:
        """held: the places of all tensors that may be described."""
        self.tensors: list[RateTensor] = []
        self.holders: list[Place] = []
        self._held = {id(place.tensor): place for place in held}
        self._shared: dict[int, int] = {}  # a tensor that several parameters read -> its index

    def described(self, rate: Rate, parameter: int) -> Hyperparameter:
        """A hyperparameter of the plan's parameter of this index."""
        if not isinstance(rate.value, Tensor):
            return Hyperparameter(rate.value, None, rate.per_step, rate.elementwise)
        at = None if rate.elementwise else self._shared.get(id(rate.value))
        if at is None:
            at = len(self.tensors)
            if not rate.elementwise:
                self._shared[id(rate.value)] = at
            steps, of = len(rate.value) if rate.per_step else 1, parameter if rate.elementwise else None
            self.tensors.append(RateTensor(rate.value.numel(), steps, of, rate.value.requires_grad))
            self.holders.append(self._held[id(rate.value)])
        return Hyperparameter(None, at, rate.per_step, rate.elementwise)

    def factor(self, factor: Factor, parameter: int) -> schema.Factor:
        """A factor of the transform of the gradient of the plan's parameter of this index. Each has a gradient of its
        own, also where a tensor is several."""
        at, is_matrix = len(self.tensors), factor.size is not None
        t = factor.tensor
        self.tensors.append(RateTensor(t.numel(), 1, None if is_matrix else parameter, t.requires_grad))
        self.holders.append(self._held[id(t)])
        return schema.Factor(at, factor.size, factor.inner, factor.taps, factor.through)

    def update(self, update: Update, parameter: int, factors: Iterable[Factor] = ()) -> schema.Update:
        """The update of the plan's parameter of this index. A tensor that takes no part, such as dampening without
        momentum, is described all the same, so that its gradient is zero.

        factors: of the transform of its gradient.
        """
        rate = self.described(update.rate, parameter)
        values = {name: self.described(value, parameter) for name, value in update.hyperparameters.items()}
        start = {name: self.described(Rate(t, elementwise=True), parameter) for name, t in update.initial.items()}
        accumulator = values.pop("initial_accumulator_value", ZERO)
        if not update.has("weight_decay"):
            values.pop("weight_decay", None)
        # The core keeps a buffer where it keeps an average after it.
        kept = {*update.keys(), "momentum_buffer" if update.centered else ""}
        states = [name for name in STATES[update.rule] if name in kept]
        return schema.Update(
            rule=update.rule,
            nesterov=update.nesterov,
            centered=update.centered,
            has_buffer=update.has("momentum"),
            has_start="momentum_buffer" in start,
            taken=update.taken,
            rate=rate,
            **{name: values.get(name) for name in schema.HYPERPARAMETERS},
            start=tuple(start.get(name, accumulator if name == "sum" else ZERO) for name in states),
            factors=tuple(self.factor(factor, parameter) for factor in factors),
        )
