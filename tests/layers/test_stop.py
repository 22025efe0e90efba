"""stop: a value whose derivative is taken to be zero."""

import pytest

from tests.layers.plans import Sketch, check_drawn
from tests.layers.test_move import finished, moving


@pytest.mark.parametrize("n", [1, 5])
def test_of_one_of_two_reads(n):
    sketch = Sketch(3, 4)
    h = moving(sketch)
    y = sketch.map(h, sketch.stop(h), steps=[("mul", 0, 1)])
    finished(sketch, y)
    check_drawn(sketch, n)


def test_of_the_only_read():
    sketch = Sketch(3, 4)
    h = sketch.stop(moving(sketch).permuted(0, 2, 1))
    p = sketch.parameter(4, 3)
    finished(sketch, sketch.map(h, p.unsqueezed(0, None), steps=[("mul", 0, 1)]))
    check_drawn(sketch, 3)
