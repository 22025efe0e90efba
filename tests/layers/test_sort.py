"""sort: the places of elements in their order, which has no derivative."""

import pytest
import torch

from tests.layers.plans import Operand, Sketch, check_drawn
from tests.layers.test_gather import check_indices, finished, indices, moving


@pytest.mark.parametrize("descending", [False, True])
def test_the_order_of_elements(descending):
    """Equal elements and NaN included: x has whole numbers and one NaN a sample."""
    sketch = Sketch(7)
    table = moving(sketch, 7)
    order = sketch.sort(sketch.x, descending)
    finished(sketch, sketch.map(sketch.gather(table, order, 1), order, steps=[("mul", 0, 1)]))
    check_indices(sketch.plan(), indices(5, 7, 4))
    shown = Sketch(4)
    p = shown.parameter(1)
    zero = Operand(p.value, 1, False, (None, 4), (0, 0))
    shown.map(shown.sort(shown.x, descending), zero, steps=[("mul", 1, 1), ("mul", 2, 0), ("add", 0, 3)])
    plan = shown.plan()
    x = torch.tensor([[[2.0, torch.nan, -torch.inf, 2.0]]], dtype=torch.float64)
    got = torch.ops.maml_cuda.predict_forward([torch.zeros(1, 1, dtype=torch.float64)], x, plan.text)
    assert got[0, 0].tolist() == torch.sort(x[0, 0], descending=descending, stable=True).indices.tolist()


def test_the_order_of_what_is_learned():
    """The order has no derivative: a value that is sorted, and read in that order."""
    sketch = Sketch(3)
    h = moving(sketch, 6)
    finished(sketch, sketch.gather(h, sketch.sort(h, True).narrowed(1, 0, 4), 1))
    check_drawn(sketch, 5)


def test_loops_that_do_not_sort_rows():
    sketch = Sketch(4)
    samples_last = sketch.sort(sketch.x.permuted(1, 0), False)
    finished(sketch, samples_last.permuted(1, 0))
    with pytest.raises(ValueError, match="sort 0 expects a last axis that is contiguous in its output"):
        check_drawn(sketch, 3)
