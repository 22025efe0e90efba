"""depthwise: the convolution of each channel by itself, over one to three axes."""

from dataclasses import replace

import pytest
import torch

from tests.layers.plans import Sketch, check, check_drawn, drawn
from tests.layers.test_move import finished, moving

# Sizes of x, and for each axis (kernel, stride, dilation, padding).
CASES = {
    "one axis": ((9,), (3, 1, 1, 1)),
    "a long axis": ((700,), (5, 1, 1, 2)),
    "a stride": ((11,), (3, 2, 1, 1)),
    "a stride longer than the kernel": ((11,), (2, 3, 1, 0)),
    "a stride longer than the axis": ((3,), (2, 5, 1, 1)),
    "dilated": ((11,), (4, 1, 2, 3)),
    "a stride and a dilation with a common factor": ((17,), (5, 4, 2, 3)),
    "a stride and a dilation without one": ((17,), (5, 2, 3, 4)),
    "padding larger than the reach": ((4,), (3, 2, 1, 5)),
    "a kernel larger than the axis": ((2,), (7, 1, 1, 3)),
    "cropped": ((9,), (3, 2, 1, -1)),
    "one element": ((1,), (3, 1, 1, 1)),
    "one tap": ((7,), (1, 2, 1, 0)),
    "two axes": ((5, 6), (3, 1, 1, 1), (3, 1, 1, 1)),
    "two axes with strides": ((7, 9), (3, 2, 1, 1), (5, 3, 2, 4)),
    "a row": ((1, 12), (1, 1, 1, 0), (7, 1, 1, 3)),
    "a column": ((12, 1), (4, 2, 1, 2), (1, 1, 1, 0)),
    "three axes": ((3, 4, 5), (3, 1, 1, 1), (2, 2, 1, 0), (3, 1, 2, 2)),
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("channels", [1, 8, 17, 64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_passes(case, channels, n):
    sizes, *slides = case
    if channels > 17 and sizes == (700,):
        channels = 33
    sketch = Sketch(*sizes, channels)
    w = sketch.parameter(*(kernel for kernel, *_ in slides), channels)
    finished(sketch, sketch.depthwise(moving(sketch), w, *slides))
    check_drawn(sketch, n)


def test_computed_weight():
    """Both operands have cotangents and tangents that are values."""
    sketch = Sketch(5, 6, 9)
    w = sketch.map(sketch.parameter(3, 3, 9), steps=[("tanh", 0)])
    finished(sketch, sketch.depthwise(moving(sketch), w, (3, 1, 1, 1), (3, 2, 1, 1)))
    check_drawn(sketch, 3)


def test_weight_that_does_not_move():
    sketch = Sketch(6, 9)
    finished(sketch, sketch.depthwise(moving(sketch), sketch.parameter(3, 9, role="buffer"), (3, 1, 1, 1)))
    check_drawn(sketch, 3)


def test_input_that_does_not_move():
    sketch = Sketch(6, 9)
    finished(sketch, sketch.depthwise(sketch.x, sketch.parameter(3, 9), (3, 2, 1, 1)))
    check_drawn(sketch, 3)


def test_read_twice():
    """The cotangents of x and of w are added to those of another reader."""
    sketch = Sketch(6, 9)
    h, w = moving(sketch), sketch.parameter(3, 9)
    y = sketch.depthwise(sketch.depthwise(h, w, (3, 1, 1, 1)), w, (3, 1, 2, 2))
    finished(sketch, sketch.map(y, h, steps=[("mul", 0, 1)]))
    check_drawn(sketch, 3)


@pytest.mark.parametrize(
    "view",
    {
        "axes in another order": lambda h: h.permuted(0, 2, 1, 3),
        "backwards": lambda h: h.flipped(1).flipped(2),
        "a part": lambda h: h.narrowed(1, 1, 3).narrowed(2, 0, 3, 2).narrowed(3, 4, 9),
    }.items(),
    ids=lambda item: item[0],
)
def test_views_of_x(view):
    sketch = Sketch(5, 6, 16)
    x = view[1](moving(sketch))
    finished(sketch, sketch.depthwise(x, sketch.parameter(3, 2, x.sizes[-1]), (3, 1, 1, 1), (2, 2, 1, 1)))
    check_drawn(sketch, 3)


def test_views_of_the_weight():
    sketch = Sketch(5, 6, 9)
    w = sketch.parameter(4, 3, 16).narrowed(0, 0, 2, 2).flipped(1).narrowed(2, 5, 9)
    finished(sketch, sketch.depthwise(moving(sketch), w, (2, 1, 1, 1), (3, 2, 1, 1)))
    check_drawn(sketch, 3)


def test_of_frames_of_samples():
    """Two axes of a batch."""
    sketch = Sketch(2, 6, 9)
    finished(sketch, sketch.depthwise(moving(sketch), sketch.parameter(3, 9), (3, 1, 1, 1)))
    check_drawn(sketch, 3)


def test_number_of_threads():
    """The bits do not depend on it."""
    sketch = Sketch(24, 24, 72)
    x = moving(sketch)
    finished(sketch, sketch.depthwise(x, sketch.parameter(3, 3, 72), (3, 2, 1, 1), (3, 1, 1, 1)))
    plan = sketch.plan()
    x, parameters = drawn(plan, (24, 24, 72), 2, tasks=1)
    x, own = x.float(), [p.float() for p in parameters]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            prediction = torch.ops.maml_cuda.predict_forward(own, x, plan.text)
            y = torch.ones_like(prediction)
            _, gradient = torch.ops.maml_cuda.loss_and_grad(own, x, [y], plan.text)
            results.append([prediction, *gradient, *torch.ops.maml_cuda.hvp(own, x, [y], own, plan.text)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_errors():
    sketch = Sketch(6, 9)
    sketch.depthwise(moving(sketch), sketch.parameter(3, 9), (3, 1, 1, 1))
    plan = sketch.plan()
    (node,) = (node for node in plan.nodes if node.kind == "depthwise")
    (loops,) = node.loops
    x, parameters = drawn(plan, (6, 9), 2)

    def error(**change: object) -> str:
        changed = replace(node, **change)
        nodes = tuple(changed if n is node else n for n in plan.nodes)
        with pytest.raises((RuntimeError, ValueError)) as caught:
            check(replace(plan, nodes=nodes), x, parameters)
        return str(caught.value)

    def strides(operand: int, *strides: int) -> tuple[object, ...]:
        views = [replace(v, strides=strides) if i == operand else v for i, v in enumerate(loops.inputs)]
        return (replace(loops, inputs=tuple(views)),)

    others = "expects loops over positions, taps and contiguous channels, got others"
    assert others in error(slides=())
    assert others in error(loops=strides(0, 54, 0, 0, 0))  # x has one element for all channels
    assert others in error(loops=strides(1, 0, 1, 1, 1))  # w depends on the position
    assert others in error(loops=strides(1, 0, 0, 1, 3))  # channels are not contiguous
    (slide,) = node.slides
    assert "windows of 54 elements leave their operand" in error(slides=(replace(slide, size=7),))
