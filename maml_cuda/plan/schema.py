"""The plan of a model: a graph of fused layers, and what the inner loop does to each parameter that they read.

Python writes a plan, and the C++ core reads these very objects, field by field (csrc/python/plan.cpp). As JSON text it
is an argument of the ops (maml_cuda/engine/ops.py), so that a compiled or exported program carries all that it needs.

No field has a default: whoever makes a plan says everything. None means that there is no such thing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

Layout = Literal[
    "features", "signal", "image"
]  # of a sample: [features], [channels, length], [channels, height, width]
# What changes a tensor: the inner loop (and the outer one), the outer loop alone, neither; a buffer is a constant too.
Role = Literal["adapted", "outer", "frozen", "buffer"]


@dataclass(frozen=True)
class Window:
    """A window that slides over an image, in numbers (height, width). A signal is an image of height 1."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad_begin: tuple[int, ...]
    pad_end: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One layer. Value 0 is the model's input, node i writes value i + 1, the last node writes the prediction.

    kind: of layer, by its name in csrc/layers.
    name: of the user's module, for errors.
    inputs: values that the layer reads.
    parameters: indices into Plan.parameters; None where an optional one (a bias, gamma, beta) is absent.
    in_layouts: of the first input, those that the layer takes; none: any.
    out_layout: of the output; None: the input's.
    in_features: channels that the parameters ask of the first input; None: any number.
    out_features: channels of the output; None: the input's.
    sample: the shape that a layer takes as a whole, as if it were features (LayerNorm); None: any shape.
    window: of a convolution or pool.
    function: of a pointwise layer, by its name in csrc/layers/functions.h.
    constants: numbers of the function or the layer, in the order that its declaration in csrc/layers tells.
    eps: of a normalisation.
    groups: of group_norm; 0: every channel is a group.
    count_padding: of avg_pool, whether padding counts in the divisor.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    parameters: tuple[int | None, ...]
    in_layouts: tuple[Layout, ...]
    out_layout: Layout | None
    in_features: int | None
    out_features: int | None
    sample: tuple[int, ...] | None
    window: Window | None
    function: str | None
    constants: tuple[float, ...]
    eps: float | None
    groups: int | None
    count_padding: bool | None


@dataclass(frozen=True)
class InnerRate:
    """The inner learning rate of one parameter: a constant, or an index into Plan.rate_tensors.

    per_step: the tensor's first axis counts inner steps; steps beyond it repeat the last one.
    elementwise: behind that axis it has the parameter's shape; otherwise it is one number.
    """

    constant: float | None
    tensor: int | None
    per_step: bool
    elementwise: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer that the nodes read.

    size: elements, of all slots.
    rows, taps: of a weight [rows, columns, *taps]; 1 and 1 of anything else.
    slots: inner steps that have a value of their own, [slots, ...]; 1: one value for all steps.
    rate: of an adapted parameter.
    """

    size: int
    rows: int
    taps: int
    slots: int
    role: Role
    rate: InnerRate | None

    @property
    def trainable(self) -> bool:
        """Whether it has a part in the meta-gradient."""
        return self.role in ("adapted", "outer")


@dataclass(frozen=True)
class RateTensor:
    """A tensor of inner learning rates.

    size: elements, of all steps.
    steps: inner steps that have a rate of their own; 1: one rate for all steps.
    parameter: the parameter whose shape an elementwise rate has; None: it is one number a step.
    learned: whether it has a part in the meta-gradient.
    """

    size: int
    steps: int
    parameter: int | None
    learned: bool


@dataclass(frozen=True)
class Plan:
    """Everything that the core must know of a model, but for the shapes of a call.

    loss: by its name in FusedMAML.
    backend: "cpu" or "cuda".
    precision: of products of float32 on a GPU.
    recompute: run the gradient pass again for each Hessian-vector product instead of keeping its activations.
    cuda_graphs: on a GPU, replay calls that repeat.
    task_chunk: on a GPU, at most so many tasks at once; None: all of them.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    rate_tensors: tuple[RateTensor, ...]
    loss: str
    backend: str
    precision: str
    recompute: bool
    cuda_graphs: bool
    task_chunk: int | None

    @property
    def text(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self))

    @property
    def gradient_size(self) -> int:
        """Elements of the flat meta-gradient: of the trainable parameters, then of the learned rates."""
        trainable = sum(p.size for p in self.parameters if p.trainable)
        return trainable + sum(r.size for r in self.rate_tensors if r.learned)

    @property
    def has_gradient(self) -> list[bool]:
        """Of each parameter, then of each rate tensor, whether it has a part in the meta-gradient."""
        return [p.trainable for p in self.parameters] + [r.learned for r in self.rate_tensors]

    def of_one_step(self) -> Plan:
        """The plan of one inner step, whose parameters have one slot and whose rate tensors one step."""
        return replace(
            self,
            parameters=tuple(replace(p, size=p.size // p.slots, slots=1) for p in self.parameters),
            rate_tensors=tuple(replace(r, size=r.size // r.steps, steps=1) for r in self.rate_tensors),
        )


@lru_cache(maxsize=256)
def plan_of(text: str) -> Plan:
    """The plan that Plan.text has written.

    Raises:
        TypeError: a field is missing or unknown.
    """
    plan: Plan = _built(Plan, json.loads(text))
    return plan


def _built(hint: Any, value: Any) -> Any:
    """A value of this type from its JSON, in which a dataclass is a dict and a tuple a list."""
    if value is None:
        return None
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {name: _built(hints[name], part) if name in hints else part for name, part in value.items()}
        return hint(**known)  # type: ignore[operator]
    if isinstance(value, list):
        (of_parts, *_) = get_args(next(arm for arm in (hint, *get_args(hint)) if get_origin(arm) is tuple))
        return tuple(_built(of_parts, part) for part in value)
    if isinstance(value, dict):  # of a dataclass that may be absent
        return _built(next(arm for arm in get_args(hint) if is_dataclass(arm)), value)
    return value
