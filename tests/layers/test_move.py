"""move: parts of values, each at its place."""

import pytest

from tests.layers.plans import Operand, Sketch, check_drawn


def moving(sketch: Sketch) -> Operand:
    """A value with samples that depends on a parameter."""
    x = sketch.x
    p = sketch.parameter(*(s for s in x.sizes[1:] if s is not None))
    return sketch.map(x, p.unsqueezed(0, None), steps=[("mul", 0, 1), ("sin", 2)])


def finished(sketch: Sketch, h: Operand) -> None:
    """A curved function of a value, so that cotangents differ."""
    sketch.map(h, steps=[("exp", 0), ("mul", 1, 0)])


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    "view",
    {
        "permuted": lambda h: h.permuted(0, 3, 1, 2),
        "transposed": lambda h: h.permuted(0, 1, 3, 2),
        "samples inside": lambda h: h.permuted(2, 0, 1, 3),
        "a slice": lambda h: h.narrowed(2, 1, 3),
        "every second": lambda h: h.narrowed(3, 1, 3, 2),
        "flipped": lambda h: h.flipped(1).flipped(3),
        "expanded": lambda h: h.unsqueezed(2, 3),
        "expanded inside": lambda h: h.unsqueezed(4, 3).permuted(0, 4, 1, 2, 3),
    }.items(),
    ids=lambda item: item[0],
)
def test_copies(view, n):
    sketch = Sketch(2, 5, 7)
    h = view[1](moving(sketch))
    y = sketch.move(h.sizes, (h, lambda y: y))
    finished(sketch, y.permuted(*sorted(range(len(y.sizes)), key=lambda a: y.sizes[a] is not None)))
    check_drawn(sketch, n)


def test_concatenates_and_pads():
    sketch = Sketch(3, 4)
    h, p = moving(sketch), sketch.parameter(2, 4)
    y = sketch.move(
        (None, 6, 6),
        (h, lambda y: y.narrowed(1, 0, 3).narrowed(2, 1, 4)),
        (p.unsqueezed(0, None), lambda y: y.narrowed(1, 3, 2).narrowed(2, 1, 4)),
        (sketch.x.narrowed(1, 2, 1), lambda y: y.narrowed(1, 5, 1).narrowed(2, 1, 4)),
    )
    finished(sketch, y)
    check_drawn(sketch, 5)


def test_one_value_read_twice():
    sketch = Sketch(3, 4)
    h = moving(sketch)
    y = sketch.move(
        (None, 3, 8),
        (h.flipped(2), lambda y: y.narrowed(2, 0, 4)),
        (h, lambda y: y.narrowed(2, 4, 4)),
    )
    finished(sketch, y)
    check_drawn(sketch, 5)


def test_overlapping_windows():
    sketch = Sketch(9)
    h = moving(sketch)
    windows = Operand(h.value, h.size, True, (None, 7, 3), (9, 1, 1))
    y = sketch.move((None, 7, 3), (windows, lambda y: y))
    finished(sketch, y)
    check_drawn(sketch, 4)


def test_large():
    """Transposed copies, of which one adds to the cotangent of the other."""
    sketch = Sketch(65, 130)
    h = moving(sketch)
    once, twice = (sketch.move((None, 130, 65), (h.permuted(0, 2, 1), lambda y: y)) for _ in range(2))
    y = sketch.map(once, twice, steps=[("sin", 0), ("mul", 1, 2)])
    finished(sketch, y)
    check_drawn(sketch, 3)
