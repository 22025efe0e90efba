"""reduce: sums and means over some axes."""

import pytest

from tests.layers.plans import Sketch, check_drawn
from tests.layers.test_move import finished, moving


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("axes", [(), (1,), (2,), (3,), (1, 3), (2, 3), (1, 2, 3)])
def test_over_axes(reduction, axes):
    sketch = Sketch(3, 5, 7)
    finished(sketch, sketch.reduce(moving(sketch), axes, reduction))
    check_drawn(sketch, 4)


@pytest.mark.parametrize("axes", [(0,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("sizes", [(3, 5), (70, 9), (2, 130)])
def test_over_samples(axes, sizes):
    sketch = Sketch(*sizes)
    h = moving(sketch)
    mean = sketch.reduce(h, axes, "mean")
    for axis in axes:
        mean = mean.unsqueezed(axis, h.sizes[axis])
    finished(sketch, sketch.map(h, mean, steps=[("sub", 0, 1)]))
    check_drawn(sketch, 11)


@pytest.mark.parametrize("axis", [1, 2])
def test_of_a_view(axis):
    sketch = Sketch(4, 6)
    h = moving(sketch).permuted(0, 2, 1).narrowed(1, 1, 5).flipped(2)
    finished(sketch, sketch.reduce(h, (axis,), "mean"))
    check_drawn(sketch, 3)


def test_of_a_broadcast():
    sketch = Sketch(4)
    h = moving(sketch).unsqueezed(2, 3)
    finished(sketch, sketch.reduce(h, (2,), "sum"))
    check_drawn(sketch, 3)


@pytest.mark.parametrize("sizes", [(3000, 3), (3, 3000)])
def test_long_sums(sizes):
    sketch = Sketch(*sizes)
    total = sketch.reduce(moving(sketch), (sizes.index(3000) + 1,), "sum")
    finished(sketch, sketch.map(total, steps=[("affine", 0, [0.01, 0.0])]))
    check_drawn(sketch, 2)
