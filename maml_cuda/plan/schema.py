"""The plan of a model: a graph of fused layers, and the role of each parameter that they read.

Python makes the plan, and the C++ core reads these objects field by field (csrc/python/plan.cpp). The ops
(maml_cuda/engine/ops.py) take the plan as JSON text, so a compiled or exported program contains it.

Fields have no defaults, so a plan states every property. None means that a property does not apply.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from maml_cuda.meta_gradients import MetaGradient

# The shape of a sample: [features], [channels, length] or [channels, height, width].
Layout = Literal["features", "signal", "image"]
# "adapted": the inner loop changes it, and it has a meta-gradient. "outer": it has a meta-gradient only. "frozen": a
# parameter without a meta-gradient. "buffer": a buffer of a module, which has none either.
Role = Literal["adapted", "outer", "frozen", "buffer"]


@dataclass(frozen=True)
class Window:
    """The window of a convolution or a pool. Each field is (height, width). A signal is an image of height 1."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pad_begin: tuple[int, ...]
    pad_end: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """The elements of an operand that loops come to: (i_0, i_1, ...) is at offset + i_0 strides[0] + i_1 strides[1] ...

    Attributes:
        size: elements of the operand, of one sample if it has samples.
        samples: whether it has a part for each sample. The axis of samples has the stride `size`, or 0.
        offset, strides: in elements. A stride of 0 is a broadcast.
    """

    size: int
    samples: bool
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Loops:
    """Nested loops of a layer on tensors of any shape (csrc/layers/loops.h).

    Attributes:
        sizes: of the axes; None: that of samples.
        inputs, output: their views.
    """

    sizes: tuple[int | None, ...]
    inputs: tuple[View, ...]
    output: View


@dataclass(frozen=True)
class Slide:
    """An axis of the first input of `windows` or `depthwise`, which the loops have as two: at position p and tap t they
    read its element p stride + t dilation - padding, or 0 outside.

    Attributes:
        position, tap: the two axes of the loops. The input's view has stride 0 along both.
        size, x_stride: of the axis in memory.
        stride, dilation, padding: of the window.
    """

    position: int
    tap: int
    size: int
    x_stride: int
    stride: int
    dilation: int
    padding: int


@dataclass(frozen=True)
class IndexedAxis:
    """The axis of the first input of `gather`, or of the output of `scatter`, along which the second input has places.
    The view of that operand does not have it.

    Attributes:
        size, stride: of the axis in memory.
    """

    size: int
    stride: int


@dataclass(frozen=True)
class Mask:
    """A random mask (maml_cuda/masks.py).

    Attributes:
        number: of the masks of one forward pass.
        keep: an element is one if its random number of 32 bits is less.
        strides: of the loops. They come to element i_0 strides[0] + i_1 strides[1] + ..., in torch's order of the
            elements of all samples.
        times_samples: of an axis outside of that of the samples: its stride is times their number.
    """

    number: int
    keep: int
    strides: tuple[int, ...]
    times_samples: tuple[bool, ...]


@dataclass(frozen=True)
class Instruction:
    """One operation of the expression of a map.

    Attributes:
        name: of a function in csrc/layers/functions.h, map_functions.h or combinations.h.
        arguments: numbers of the node's inputs, or their count + i for the result of instruction i.
        constants: numbers of the function.
    """

    name: str
    arguments: tuple[int, ...]
    constants: tuple[float, ...]


@dataclass(frozen=True)
class Node:
    """One layer. Value 0 is the model's input, node i writes value i + 1, the last node writes the prediction.

    Attributes:
        kind: the name of the kind of layer in csrc/layers.
        name: the user's module or call, for error messages.
        inputs: numbers of the values that the layer reads.
        parameters: indices into Plan.parameters; None for an optional one (a bias, gamma, beta) that is absent.
        in_layouts: the layouts that the first input may have; empty: any.
        out_layout: of the output; None: that of the input.
        in_features: channels that the first input must have; None: any number.
        out_features: channels of the output; None: those of the input.
        sample: the shape of a sample whose elements are all treated as features (LayerNorm); None: any shape.
        window: of a convolution or a pool.
        function: the name of a pointwise function in csrc/layers/functions.h.
        constants: numbers of the function or the layer, in the order of its declaration in csrc/layers.
        eps: of a normalisation.
        groups: of group_norm; 0: every channel is a group.
        count_padding: of avg_pool, whether padding counts in the divisor.
        image: (channels, height, width) as which a `view` sees its input; of a `parameter`, (elements, 1, 1).
        rows: of `view`, the number of images in a sample; None: 1.
        loops: of a layer on tensors of any shape; of `move` and `recurrence`, one for each input.
        slides: of `windows` and `depthwise`, for each axis of its input over which a window slides.
        axis: of `gather` and `scatter`.
        instructions: the expression of a `map`; the last one gives its value.
        reduction: of `reduce` and `extreme`, a name of Reduction in csrc/layers/loops.h.
        cell: of `recurrence`, a name of Cell in csrc/layers/cells.h.
        mask: of `dropout`.
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
    image: tuple[int, int, int] | None
    rows: int | None
    loops: tuple[Loops, ...]
    slides: tuple[Slide, ...]
    axis: IndexedAxis | None
    instructions: tuple[Instruction, ...]
    reduction: str | None
    cell: str | None
    mask: Mask | None


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of the update of one parameter, or an initial state: a constant, or a tensor.

    Attributes:
        constant: the number; None if it is a tensor.
        tensor: an index into Plan.rate_tensors; None if it is a constant.
        per_step: the first axis of the tensor counts inner steps; steps beyond its end use the last value.
        elementwise: the other axes of the tensor have the parameter's shape; otherwise there are none.
    """

    constant: float | None
    tensor: int | None
    per_step: bool
    elementwise: bool


HYPERPARAMETERS = ("weight_decay", "momentum", "dampening", "beta1", "beta2", "alpha", "eps", "lr_decay")


@dataclass(frozen=True)
class Factor:
    """One factor of the linear transform of a parameter's inner gradient (csrc/plan/update.h has the formula).

    Attributes:
        tensor: an index into Plan.rate_tensors, of a number for each element, or of a matrix [size, size].
        size: of the axis that the matrix multiplies; None: it is no matrix.
        inner: elements of the axes inside of this one, in the order of the core; 1 for numbers.
        taps: of an axis of columns and taps, the taps, which the core has outside; otherwise 1.
        through: what is done with numbers, "identity", "mask" or "sign", with the derivative of the identity.
    """

    tensor: int
    size: int | None
    inner: int
    taps: int
    through: str


@dataclass(frozen=True)
class Update:
    """What the inner optimizer does to one adapted parameter (csrc/optimizers.h has the formulas).

    Attributes:
        rule: "sgd", "adam", "adamw", "adamax", "rmsprop" or "adagrad".
        nesterov: of sgd.
        centered: of rmsprop.
        has_buffer: of sgd and rmsprop, whether there is momentum.
        has_start: of sgd, whether an initial momentum buffer is given. If not, the first step has no dampening.
        taken: the number of steps that the initial states have behind them.
        rate: the inner learning rate.
        weight_decay, momentum, dampening, beta1, beta2, alpha, eps, lr_decay: None where the rule has none.
        start: the initial states, in the order of csrc/plan/update.h.
        factors: of the transform of the gradient, at most 3; the first one is applied first.
    """

    rule: str
    nesterov: bool
    centered: bool
    has_buffer: bool
    has_start: bool
    taken: int
    rate: Hyperparameter
    weight_decay: Hyperparameter | None
    momentum: Hyperparameter | None
    dampening: Hyperparameter | None
    beta1: Hyperparameter | None
    beta2: Hyperparameter | None
    alpha: Hyperparameter | None
    eps: Hyperparameter | None
    lr_decay: Hyperparameter | None
    start: tuple[Hyperparameter, ...]
    factors: tuple[Factor, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is phi - rate * g."""
        return self.rule == "sgd" and not (self.has_buffer or self.factors) and self.weight_decay is None


def descent(rate: Hyperparameter) -> Update:
    """Plain gradient descent."""
    return Update("sgd", False, False, False, False, 0, rate, None, None, None, None, None, None, None, None, (), ())


@dataclass(frozen=True)
class Parameter:
    """A parameter or a buffer that nodes read.

    Attributes:
        size: number of elements, of all slots.
        rows, taps: of a weight [rows, columns, *taps]; 1 and 1 for any other tensor.
        slots: the number of inner steps that have values of their own, in a tensor [slots, ...]; 1: all steps read the
            same values.
        role: whether the inner loop changes it, and whether it has a meta-gradient.
        update: what an inner step does to an adapted parameter.
    """

    size: int
    rows: int
    taps: int
    slots: int
    role: Role
    update: Update | None

    @property
    def trainable(self) -> bool:
        """Whether it has a meta-gradient."""
        return self.role in ("adapted", "outer")


@dataclass(frozen=True)
class RateTensor:
    """A tensor of inner learning rates, or of other hyperparameters or initial states.

    Attributes:
        size: number of elements, of all steps.
        steps: the number of inner steps that have a value of their own; 1: all steps have the same.
        parameter: the index of the parameter whose shape an elementwise one has; None: one number for each step.
        learned: whether it has a meta-gradient.
    """

    size: int
    steps: int
    parameter: int | None
    learned: bool


@dataclass(frozen=True)
class Plan:
    """Everything that the core needs to know about a model, except the shapes of a call.

    Attributes:
        nodes: the layers, in topological order.
        parameters: the parameters and buffers that the nodes read.
        rate_tensors: the tensors of inner learning rates, other hyperparameters and initial states.
        prediction: its value, which a flatten writes.
        loss: the name of the loss in FusedMAML; "computed": nodes compute it.
        loss_value: of a computed loss.
        target: of a computed loss, how many numbers it compares for each sample.
        backend: "cpu" or "cuda".
        precision: of float32 matrix products on a GPU.
        clip_norm, clip_value: the inner gradient of a task is clipped by its norm over all adapted parameters, then
            each element; None: not.
        meta_gradient: how it is taken through the inner loop.
        segments: keep the parameters of about sqrt(inner steps) steps alone, and run the inner loop again from each.
        recompute: run the gradient pass again for each Hessian-vector product, instead of keeping its activations.
        per_step_support: each inner step has a support set of its own.
        data_gradient: which of x_spt, y_spt, x_qry, y_qry and spt_weights have a gradient.
        cuda_graphs: on a GPU, replay repeated calls as CUDA graphs.
        task_chunk: on a GPU, the largest number of tasks to compute at once; None: all.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Parameter, ...]
    rate_tensors: tuple[RateTensor, ...]
    prediction: int
    loss: str
    loss_value: int | None
    target: int | None
    backend: str
    precision: str
    clip_norm: float | None
    clip_value: float | None
    meta_gradient: MetaGradient
    recompute: bool
    segments: bool
    per_step_support: bool
    data_gradient: tuple[str, ...]
    cuda_graphs: bool
    task_chunk: int | None

    @property
    def text(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self))

    @property
    def gradient_size(self) -> int:
        """Number of elements of the flat meta-gradient: the trainable parameters, then the learned rates."""
        trainable = sum(p.size for p in self.parameters if p.trainable)
        return trainable + sum(r.size for r in self.rate_tensors if r.learned)

    @property
    def has_gradient(self) -> list[bool]:
        """For each parameter, then for each rate tensor, whether it has a meta-gradient."""
        return [p.trainable for p in self.parameters] + [r.learned for r in self.rate_tensors]

    @property
    def is_plain_descent(self) -> bool:
        """Whether each inner step is phi - rate * g."""
        updates = [p.update for p in self.parameters if p.update is not None]
        return self.clip_norm is None and self.clip_value is None and all(update.is_plain for update in updates)

    @property
    def keeps_state(self) -> bool:
        """Whether an inner step depends on the steps before it by more than the parameters."""
        return any(p.update is not None and p.update.start for p in self.parameters)

    def of_one_step(self) -> Plan:
        """The same plan for one inner step: parameters have one slot, rate tensors have one step."""
        return replace(
            self,
            parameters=tuple(replace(p, size=p.size // p.slots, slots=1) for p in self.parameters),
            rate_tensors=tuple(replace(r, size=r.size // r.steps, steps=1) for r in self.rate_tensors),
        )


@lru_cache(maxsize=256)
def plan_of(text: str) -> Plan:
    """The plan from the JSON text that Plan.text returns.

    Raises:
        TypeError: a field is missing or unknown.
    """
    plan: Plan = _built(Plan, json.loads(text))
    return plan


def _built(hint: Any, value: Any) -> Any:
    """Makes a value of type `hint` from its JSON form, in which a dataclass is a dict and a tuple is a list."""
    if value is None:
        return None
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {name: _built(hints[name], part) if name in hints else part for name, part in value.items()}
        return hint(**known)  # type: ignore[operator]
    if isinstance(value, list):
        (of_parts, *_) = get_args(next(arm for arm in (hint, *get_args(hint)) if get_origin(arm) is tuple))
        return tuple(_built(of_parts, part) for part in value)
    if isinstance(value, dict):  # the hint is `dataclass | None`
        return _built(next(arm for arm in get_args(hint) if is_dataclass(arm)), value)
    return value
