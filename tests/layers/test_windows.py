"""windows: what a window reads as it slides over axes of a value, with zeros outside."""

from dataclasses import replace

import pytest

from tests.layers.plans import Sketch, check, check_drawn, drawn
from tests.layers.test_move import finished, moving

SLIDES = {
    "overlapping": (5, (3, 1, 1, 0)),
    "padded": (5, (3, 1, 1, 1)),
    "strided": (9, (3, 2, 1, 1)),
    "dilated": (9, (3, 1, 2, 2)),
    "dilated and strided": (11, (3, 2, 3, 2)),
    "apart": (9, (2, 3, 1, 0)),
    "larger than the axis": (3, (5, 1, 1, 2)),
    "wholly outside at some positions": (2, (2, 3, 1, 4)),
    "one element": (1, (3, 1, 1, 1)),
    "one tap": (5, (1, 2, 1, 1)),
    "cropped": (7, (2, 1, 1, -1)),
}


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("case", SLIDES.values(), ids=SLIDES)
def test_over_one_axis(case, n):
    size, slide = case
    sketch = Sketch(size, 3)
    y = sketch.windows(moving(sketch), (1, *slide))
    finished(sketch, y)
    check_drawn(sketch, n)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "view",
    {
        "as it is": lambda h: h,
        "channels first": lambda h: h.permuted(0, 3, 1, 2),
        "flipped": lambda h: h.flipped(1).flipped(2),
        "a slice": lambda h: h.narrowed(1, 1, 3).narrowed(2, 0, 3, 2).narrowed(3, 1, 2),
    }.items(),
    ids=lambda item: item[0],
)
def test_over_two_axes(view, n):
    sketch = Sketch(5, 6, 3)
    x = view[1](moving(sketch))
    y = sketch.windows(x, (1, 3, 2, 1, 1), (2, 2, 1, 2, 1))
    finished(sketch, y)
    check_drawn(sketch, n)


def test_over_three_axes():
    sketch = Sketch(4, 5, 3, 2)
    y = sketch.windows(moving(sketch), (1, 3, 1, 1, 1), (2, 2, 2, 1, 0), (3, 3, 1, 1, 1))
    finished(sketch, y)
    check_drawn(sketch, 3)


def test_of_a_value_without_samples():
    sketch = Sketch(7, 3)
    p = sketch.windows(sketch.parameter(7, 3), (0, 3, 1, 1, 1))  # [7, 3, 3]
    h = moving(sketch)
    finished(sketch, sketch.map(h.unsqueezed(3, 3), p.unsqueezed(0, None), steps=[("mul", 0, 1)]))
    check_drawn(sketch, 3)


def test_read_twice():
    """The cotangent is added to that of another reader."""
    sketch = Sketch(6, 3)
    h = moving(sketch)
    y = sketch.windows(h, (1, 3, 1, 1, 1))
    finished(sketch, sketch.map(y, h.unsqueezed(3, 3), steps=[("mul", 0, 1)]))
    check_drawn(sketch, 3)


def test_as_a_convolution_in_float32():
    sketch = Sketch(9, 9, 17)
    y = sketch.windows(moving(sketch), (1, 3, 1, 1, 1), (2, 3, 1, 1, 1))  # [n, 9, 9, 17, 3, 3]
    w = sketch.parameter(5, 17, 3, 3)
    for _ in range(3):
        w = w.unsqueezed(0, None if len(w.sizes) == 6 else 9)
    y = sketch.contract(y.unsqueezed(3, 5), w, (4, 5, 6))
    finished(sketch, y)
    check_drawn(sketch, 3)


def test_errors():
    sketch = Sketch(6, 3)
    sketch.windows(moving(sketch), (1, 3, 1, 1, 1))
    plan = sketch.plan()
    (node,) = (node for node in plan.nodes if node.kind == "windows")
    x, parameters = drawn(plan, (6, 3), 2)

    def error(**change: int) -> str:
        slides = (replace(node.slides[0], **change),)
        changed = replace(plan, nodes=tuple(replace(n, slides=slides) if n is node else n for n in plan.nodes))
        with pytest.raises((RuntimeError, ValueError)) as caught:
            check(changed, x, parameters)
        return str(caught.value)

    assert "windows of 18 elements leave their operand" in error(size=7)
    assert "Slide must name two axes of the loops along which x has stride 0" in error(tap=2)
    assert "Slide must name two axes of the loops" in error(position=0)
    assert "and have a positive size, stride and dilation" in error(stride=0)
    assert "and x_stride for more than one element" in error(x_stride=0)
