"""Plans of layers on tensors of any shape, written by hand, and what torch computes for them.

`Sketch` builds a plan node by node, on operands that are strided views. `check` runs the plan in the core and compares
the prediction, the gradient and a Hessian-vector product with autograd on `evaluated`, which reads the loops of the
plan by their definition: it gathers all elements of an operand by index and calls torch's function on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import maml_cuda  # noqa: F401  (registers the ops)
from maml_cuda.meta_gradients import UNROLLED
from maml_cuda.plan import schema
from maml_cuda.plan.schema import IndexedAxis, Instruction, Loops, Slide, View
from tests import given_masks

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda x, a: F.leaky_relu(x, a),
    "elu": lambda x, a, b, c: b * torch.where(x > 0, x, a * torch.expm1(torch.where(x > 0, 0 * x, x) / c)),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": lambda x, a, b: F.softplus(x, a, b),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardtanh": lambda x, a, b: F.hardtanh(x, a, b),
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "log_sigmoid": F.logsigmoid,
    "erf": torch.erf,
    "sqrt": torch.sqrt,
    "root": lambda x: torch.where(x == 0, 0 * x, torch.sqrt(torch.where(x == 0, 1, x))),
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "power": lambda x, a: x**a,
    "abs": torch.abs,
    "sign": torch.sign,
    "clamp": lambda x, a, b: torch.clamp(x, a, b),
    "affine": lambda x, a, b: a * x + b,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "eq": lambda x, y: (x == y).to(x.dtype),
    "ne": lambda x, y: (x != y).to(x.dtype),
    "lt": lambda x, y: (x < y).to(x.dtype),
    "le": lambda x, y: (x <= y).to(x.dtype),
    "gt": lambda x, y: (x > y).to(x.dtype),
    "ge": lambda x, y: (x >= y).to(x.dtype),
    "where": lambda condition, x, y: torch.where(condition != 0, x, y),
}


# The fields of a node to which none of them applies.
NO_FIELDS = {field.name: () if str(field.type).endswith("...]") else None for field in fields(schema.Node)}


@dataclass(frozen=True)
class Operand:
    """A strided view of a value. A size of None is the axis of samples."""

    value: int
    size: int
    samples: bool
    sizes: tuple[int | None, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def permuted(self, *axes: int) -> Operand:
        return replace(self, sizes=tuple(self.sizes[a] for a in axes), strides=tuple(self.strides[a] for a in axes))

    def narrowed(self, axis: int, start: int, size: int, step: int = 1) -> Operand:
        sizes, strides = list(self.sizes), list(self.strides)
        offset = self.offset + start * strides[axis]
        sizes[axis], strides[axis] = size, strides[axis] * step
        return replace(self, sizes=tuple(sizes), strides=tuple(strides), offset=offset)

    def flipped(self, axis: int) -> Operand:
        size = self.sizes[axis]
        assert size is not None
        return self.narrowed(axis, size - 1, size, -1)

    def unsqueezed(self, axis: int, size: int | None = 1) -> Operand:
        """With another axis, along which it is the same."""
        sizes, strides = list(self.sizes), list(self.strides)
        sizes.insert(axis, size)
        strides.insert(axis, 0)
        return replace(self, sizes=tuple(sizes), strides=tuple(strides))

    def split(self, axis: int, *parts: int) -> Operand:
        """With one axis as several."""
        strides = [self.strides[axis] * math.prod(parts[i + 1 :]) for i in range(len(parts))]
        sizes = (*self.sizes[:axis], *parts, *self.sizes[axis + 1 :])
        return replace(self, sizes=sizes, strides=(*self.strides[:axis], *strides, *self.strides[axis + 1 :]))

    def view(self) -> View:
        return View(self.size, self.samples, self.offset, self.strides)


def dense(value: int, sizes: Sequence[int | None]) -> Operand:
    """A value in row-major order, of which each sample is contiguous."""
    size = math.prod(s for s in sizes if s is not None)
    strides = (size if s is None else math.prod(t or 1 for t in sizes[a + 1 :]) for a, s in enumerate(sizes))
    return Operand(value, size, None in sizes, tuple(sizes), tuple(strides))


class Sketch:
    """A plan under construction. The input of the plan is `x` [samples, *sample]."""

    def __init__(self, *sample: int) -> None:
        self.x = dense(0, (None, *sample))
        self.nodes: list[schema.Node] = []
        self.parameters: list[schema.Parameter] = []

    def _add(self, kind: str, inputs: Sequence[Operand], sizes: Sequence[int | None], **given: object) -> Operand:
        named = {"kind": kind, "name": f"{kind} {len(self.nodes)}", "inputs": tuple(i.value for i in inputs)}
        self.nodes.append(schema.Node(**{**NO_FIELDS, **named, **given}))
        return dense(len(self.nodes), sizes)

    def parameter(self, *shape: int, role: schema.Role = "adapted") -> Operand:
        size = math.prod(shape)
        rate = schema.Hyperparameter(0.1, None, False, False)
        update = schema.descent(rate) if role == "adapted" else None
        self.parameters.append(schema.Parameter(size, 1, 1, 1, role, update))
        return self._add("parameter", (), shape, parameters=(len(self.parameters) - 1,), image=(size, 1, 1))

    def _loops(self, inputs: Sequence[Operand], strides: Sequence[int], of: Operand, offset: int = 0) -> Loops:
        assert all(i.sizes == inputs[0].sizes for i in inputs)
        output = View(of.size, of.samples, offset, tuple(strides))
        return Loops(inputs[0].sizes, tuple(i.view() for i in inputs), output)

    def map(self, *inputs: Operand, steps: Sequence[tuple[object, ...]]) -> Operand:
        """steps: (name, argument, ..., [constants])."""
        instructions = []
        for name, *arguments in steps:
            constants = arguments.pop() if isinstance(arguments[-1], list) else []
            instructions.append(Instruction(str(name), tuple(arguments), tuple(map(float, constants))))
        y = dense(0, inputs[0].sizes)
        loops = (self._loops(inputs, y.strides, y),)
        return self._add("map", inputs, y.sizes, loops=loops, instructions=tuple(instructions))

    def _over(self, kind: str, inputs: Sequence[Operand], axes: Sequence[int], **fields: object) -> Operand:
        """A layer whose output has stride 0 along some axes."""
        sizes = inputs[0].sizes
        y = dense(0, [s for a, s in enumerate(sizes) if a not in axes])
        strides = iter(y.strides)
        own = [0 if a in axes else next(strides) for a in range(len(sizes))]
        return self._add(kind, inputs, y.sizes, loops=(self._loops(inputs, own, y),), **fields)

    def reduce(self, x: Operand, axes: Sequence[int], reduction: str) -> Operand:
        kind = "reduce" if reduction in ("sum", "mean") else "extreme"
        return self._over(kind, (x,), axes, reduction=reduction)

    def contract(self, a: Operand, b: Operand, axes: Sequence[int]) -> Operand:
        return self._over("contract", (a, b), axes)

    def softmax(self, x: Operand, kind: str = "softmax") -> Operand:
        return self._over(kind, (x,), ())

    def attention(
        self, q: Operand, k: Operand, v: Operand, bias: Operand | None = None, scale: float = 1.0, safe: bool = False
    ) -> Operand:
        """q [*batch, queries, depth], k [*batch, keys, depth], v [*batch, keys, width], bias [*batch, queries, keys]"""
        batch = len(q.sizes) - 2
        (queries, depth), (keys, width) = q.sizes[batch:], v.sizes[batch:]
        inputs = [
            q.unsqueezed(batch + 1, keys).unsqueezed(batch + 3, width),
            k.unsqueezed(batch, queries).unsqueezed(batch + 3, width),
            v.unsqueezed(batch, queries).unsqueezed(batch + 2, depth),
        ]
        if bias is not None:
            inputs.append(bias.unsqueezed(batch + 2, depth).unsqueezed(batch + 3, width))
        return self._over("attention", inputs, (batch + 1, batch + 2), constants=(scale, float(safe)))

    def dropout(self, x: Operand, mask: schema.Mask, scale: float) -> Operand:
        return self._over("dropout", (x,), (), constants=(scale,), mask=mask)

    def stop(self, x: Operand) -> Operand:
        return self._over("stop", (x,), ())

    def move(self, sizes: Sequence[int | None], *parts: tuple[Operand, Callable[[Operand], Operand]]) -> Operand:
        """parts: an operand, and its place as a view of the output."""
        y = dense(0, sizes)
        loops = []
        for part, place in parts:
            at = place(y)
            assert at.sizes == part.sizes
            loops.append(self._loops((part,), at.strides, y, at.offset))
        return self._add("move", [part for part, _ in parts], y.sizes, loops=tuple(loops))

    def windows(self, x: Operand, *slides: tuple[int, int, int, int, int]) -> Operand:
        """slides: (axis, kernel, stride, dilation, padding). The axes are those of x, then the taps of each slide."""
        given, y_sizes = x, list(x.sizes)
        fields = []
        for tap, (axis, kernel, stride, dilation, padding) in enumerate(slides, start=len(x.sizes)):
            size = x.sizes[axis]
            assert size is not None
            y_sizes[axis] = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            y_sizes.append(kernel)
            fields.append(Slide(axis, tap, size, x.strides[axis], stride, dilation, padding))
            given = replace(given, strides=tuple(0 if a == axis else s for a, s in enumerate(given.strides)))
        given = replace(given, sizes=tuple(y_sizes), strides=(*given.strides, *[0] * len(slides)))
        y = dense(0, y_sizes)
        loops = (self._loops((given,), y.strides, y),)
        return self._add("windows", (x,), y.sizes, loops=loops, slides=tuple(fields))

    def gather(self, table: Operand, index: Operand, axis: int) -> Operand:
        """The elements of a table in the places of an index, which has the axes of the result."""
        size = table.sizes[axis]
        assert size is not None
        own = tuple(0 if a == axis else s for a, s in enumerate(table.strides))
        y = dense(0, index.sizes)
        loops = (self._loops((replace(table, sizes=index.sizes, strides=own), index), y.strides, y),)
        along = IndexedAxis(size, table.strides[axis])
        return self._add("gather", (table, index), y.sizes, loops=loops, axis=along)

    def scatter(self, source: Operand, index: Operand, axis: int, size: int) -> Operand:
        """The sums of a source in the places of an index with the same axes."""
        y = dense(0, (*source.sizes[:axis], size, *source.sizes[axis + 1 :]))
        own = tuple(0 if a == axis else s for a, s in enumerate(y.strides))
        loops, along = (self._loops((source, index), own, y),), IndexedAxis(size, y.strides[axis])
        return self._add("scatter", (source, index), y.sizes, loops=loops, axis=along)

    def sort(self, x: Operand, descending: bool) -> Operand:
        return self._over("sort", (x,), (), constants=(float(descending),))

    def depthwise(self, x: Operand, w: Operand, *slides: tuple[int, int, int, int]) -> Operand:
        """x [*batch, *sizes, channels], w [*kernel, channels]; slides: (kernel, stride, dilation, padding)."""
        axes = len(slides)
        batch = len(x.sizes) - axes - 1
        x_strides, nothing = list(x.strides), [0] * axes
        positions, fields = [], []
        for d, (kernel, stride, dilation, padding) in enumerate(slides):
            size = x.sizes[batch + d]
            assert size is not None
            positions.append((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
            fields.append(Slide(batch + d, batch + axes + d, size, x.strides[batch + d], stride, dilation, padding))
        sizes = (*x.sizes[:batch], *positions, *w.sizes)
        given_x = replace(x, sizes=sizes, strides=(*x_strides[:batch], *nothing, *nothing, x_strides[-1]))
        given_w = replace(w, sizes=sizes, strides=(*[0] * batch, *nothing, *w.strides))
        taps = range(batch + axes, batch + 2 * axes)
        return self._over("depthwise", (given_x, given_w), taps, slides=tuple(fields))

    def plan(self) -> schema.Plan:
        """The plan, whose prediction is the last value as features."""
        (loops, *_) = self.nodes[-1].loops
        features = loops.output.size
        y = dense(len(self.nodes), (None, features))
        y = self._add("view", (y,), (None, features), image=(features, 1, 1), rows=1, out_layout="features")
        self._add("flatten", (y,), (None, features))
        nodes, parameters = tuple(self.nodes), tuple(self.parameters)
        prediction = len(nodes)
        return schema.Plan(
            nodes=nodes,
            parameters=parameters,
            rate_tensors=(),
            prediction=prediction,
            loss="mse",
            loss_value=None,
            target=None,
            backend="cpu",
            precision="float32",
            clip_norm=None,
            clip_value=None,
            meta_gradient=UNROLLED,
            recompute=False,
            segments=False,
            per_step_support=False,
            data_gradient=(),
            cuda_graphs=False,
            task_chunk=None,
        )


def elements(view: View, sizes: Sequence[int | None], value: Tensor, n: int) -> Tensor:
    """The elements of a value that loops come to, with their axes."""
    return value.flatten()[places(view, sizes, n)]


def places(view: View, sizes: Sequence[int | None], n: int) -> Tensor:
    at = torch.tensor(view.offset)
    for size, stride in zip(sizes, view.strides, strict=True):
        at = at.unsqueeze(-1) + stride * torch.arange(n if size is None else size)
    return at


def evaluated(plan: schema.Plan, x: Tensor, parameters: Sequence[Tensor], task: int = 0) -> Tensor:
    """The prediction [n, features] of one task, by torch; its masks are those of seed 0 and pass 0."""
    n = x.shape[0]
    values = [x]
    for node in plan.nodes:
        values.append(_evaluated(node, [values[i] for i in node.inputs], parameters, n, task))
    return values[-1].reshape(n, -1)


def _evaluated(node: schema.Node, inputs: Sequence[Tensor], parameters: Sequence[Tensor], n: int, task: int) -> Tensor:
    if node.kind in ("view", "flatten"):
        return inputs[0]
    if node.kind == "parameter":
        (index,) = node.parameters
        assert index is not None
        return parameters[index]
    output = node.loops[0].output
    y = inputs[0].new_zeros(output.size * (n if output.samples else 1))
    if node.kind == "move":
        for loops, x in zip(node.loops, inputs, strict=True):
            at = places(loops.output, loops.sizes, n)
            y = y.index_put((at,), elements(loops.inputs[0], loops.sizes, x, n))
        return y
    (loops,) = node.loops
    if node.kind in ("gather", "scatter"):
        return looked_up(node, inputs, y, n)
    if node.kind == "windows":
        return y.index_put((places(output, loops.sizes, n),), windows(node, inputs[0], n))
    if node.kind == "depthwise":
        x = [windows(node, inputs[0], n), elements(loops.inputs[1], loops.sizes, inputs[1], n)]
    else:
        x = [elements(view, loops.sizes, value, n) for view, value in zip(loops.inputs, inputs, strict=True)]
    extents = [n if size is None else size for size in loops.sizes]
    over = [a for a, stride in enumerate(output.strides) if stride == 0 and extents[a] != 1]
    if node.kind == "map":
        for step in node.instructions:
            x.append(FUNCTIONS[step.name](*(x[a] for a in step.arguments), *step.constants))
        result = x[-1]
    elif node.kind in ("contract", "depthwise"):
        result = (x[0] * x[1]).sum(over, keepdim=True) if over else x[0] * x[1]
    elif node.kind == "attention":
        result = attention(x, *node.constants)
    elif node.kind in ("softmax", "log_softmax"):
        result = getattr(torch, node.kind)(x[0], -1)
    elif node.kind == "dropout":
        result = x[0] * node.constants[0] * random_mask(node, n, task)
    elif node.kind == "stop":
        result = x[0].detach()
    elif node.kind == "sort":
        result = torch.sort(x[0], dim=-1, descending=bool(node.constants[0]), stable=True).indices.to(x[0].dtype)
    else:
        result = reduced(x[0], over, str(node.reduction))
    at = places(output, loops.sizes, n)
    for a in over:
        at = at.narrow(a, 0, 1)
    return y.index_put((at,), result)


def attention(x: Sequence[Tensor], scale: float, safe: float) -> Tensor:
    """x: [*batch, queries, keys, depth, width] each."""
    q, k, v = x[0][..., :, 0, :, 0], x[1][..., 0, :, :, 0], x[2][..., 0, :, 0, :]
    scores = scale * q @ k.transpose(-1, -2)
    if len(x) > 3:
        scores = scores + x[3][..., 0, 0]
    weights = scores.softmax(-1)
    if safe:
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.where(empty, 0, scores.masked_fill(empty, 0).softmax(-1))
    return (weights @ v).unsqueeze(-2).unsqueeze(-2)


def looked_up(node: schema.Node, inputs: Sequence[Tensor], y: Tensor, n: int) -> Tensor:
    """gather, and scatter into y."""
    (loops,) = node.loops
    own, axis = places(loops.output, loops.sizes, n), node.axis
    assert axis is not None
    index = elements(loops.inputs[1], loops.sizes, inputs[1].detach(), n)
    inside = (index >= 0) & (index < axis.size)
    along = torch.where(inside, index, 0).long() * axis.stride
    if node.kind == "gather":
        values = inputs[0].flatten()[places(loops.inputs[0], loops.sizes, n) + along]
        return y.index_put((own,), torch.where(inside, values, torch.nan))
    source = elements(loops.inputs[0], loops.sizes, inputs[0], n)
    return y.index_put((own + along,), torch.where(inside, source, torch.nan), accumulate=True)


def random_mask(node: schema.Node, n: int, task: int) -> Tensor:
    """The elements of the mask of a dropout that loops come to."""
    mask, sizes = node.mask, node.loops[0].sizes
    assert mask is not None
    strides = tuple(s * n if times else s for s, times in zip(mask.strides, mask.times_samples, strict=True))
    at = places(View(0, False, 0, strides), sizes, n)
    count = int(at.max()) + 1
    return given_masks.mask(0, task, 0, mask.number, mask.keep / 2**32, (count,))[at]


def windows(node: schema.Node, x: Tensor, n: int) -> Tensor:
    (loops,) = node.loops
    at = places(loops.inputs[0], loops.sizes, n)
    inside = torch.ones_like(at, dtype=torch.bool)
    axes = torch.meshgrid(*(torch.arange(n if size is None else size) for size in loops.sizes), indexing="ij")
    for s in node.slides:
        place = axes[s.position] * s.stride + axes[s.tap] * s.dilation - s.padding
        inside &= (place >= 0) & (place < s.size)
        at = at + place * s.x_stride
    return torch.where(inside, x.flatten()[torch.where(inside, at, 0)], 0)


def reduced(x: Tensor, over: Sequence[int], reduction: str) -> Tensor:
    if reduction in ("max", "min"):  # over one axis, as which all of them are seen
        kept = [a for a in range(x.ndim) if a not in over]
        shape = [1 if a in over else x.shape[a] for a in range(x.ndim)]
        flat = x.permute(*kept, *over).flatten(len(kept)) if over else x.unsqueeze(-1)
        return getattr(torch, reduction)(flat, -1).values.reshape(shape)
    return getattr(torch, reduction)(x, over, keepdim=True) if over else x


def check(plan: schema.Plan, x: Tensor, parameters: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Compares prediction, gradient and Hessian-vector product with autograd in float64.

    Args:
        x: [tasks, n, *sample] in the dtype to be checked, float32 or float64.
        parameters: [tasks, size] each.
        tolerance: of the largest difference, relative to the largest element of the expected result.
    """
    text, dtype = plan.text, x.dtype
    own = [p.to(dtype) for p in parameters]
    prediction = torch.ops.maml_cuda.predict_forward(own, x, text)
    y = torch.randn(prediction.shape, dtype=torch.float64).to(dtype)
    directions = [torch.randn(p.shape, dtype=torch.float64).to(dtype) for p in own]
    losses, gradient = torch.ops.maml_cuda.loss_and_grad(own, x, [y], text)
    product = torch.ops.maml_cuda.hvp(own, x, [y], directions, text)
    for t in range(x.shape[0]):
        exact = [p[t].double().requires_grad_() for p in own]
        expected = evaluated(plan, x[t].double(), exact, t)
        _same(prediction[t], expected.detach(), tolerance, "prediction")
        loss = F.mse_loss(expected, y[t].double())
        _same(losses[t], loss.detach(), tolerance, "loss")
        first = torch.autograd.grad(loss, exact, create_graph=True, materialize_grads=True)
        moved = [i for i, p in enumerate(plan.parameters) if p.role != "buffer"]
        along = sum((first[i] * directions[i][t].double()).sum() for i in moved)
        second = torch.autograd.grad(along, exact, materialize_grads=True) if along.requires_grad else first
        for i, p in enumerate(plan.parameters):
            if p.role == "buffer":
                continue
            _same(gradient[i][t], first[i].detach(), tolerance, f"gradient of parameter {i}")
            wanted = second[i] if along.requires_grad else torch.zeros_like(first[i])
            _same(product[i][t], wanted.detach(), tolerance, f"product of parameter {i}")


def _same(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    got = got.double().reshape(expected.shape)
    assert torch.equal(got.isnan(), expected.isnan()), f"{what}: NaN in other places: {got} instead of {expected}"
    got, expected = got.nan_to_num(0, 1e300, -1e300), expected.nan_to_num(0, 1e300, -1e300)
    error = (got - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-3)
    assert error <= tolerance * scale, f"{what}: {error / scale:.2e} > {tolerance:.0e}"


def drawn(plan: schema.Plan, sample: Sequence[int], n: int, tasks: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Random data and parameters in float64."""
    x = torch.randn(tasks, n, *sample, dtype=torch.float64)
    return x, [torch.randn(tasks, p.size, dtype=torch.float64) for p in plan.parameters]


def check_drawn(sketch: Sketch, n: int, tolerance: float = 1e-10) -> None:
    plan = sketch.plan()
    sample = [s for s in sketch.x.sizes if s is not None]
    x, parameters = drawn(plan, sample, n)
    check(plan, x, parameters, tolerance)
    check(plan, x.float(), parameters, 3e-5)  # more digits are lost where terms of a derivative cancel
