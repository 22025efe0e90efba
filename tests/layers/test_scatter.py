"""scatter: sums in the places of an index."""

import pytest
import torch

from maml_cuda.plan.schema import IndexedAxis, Loops, Node, View
from tests.layers.plans import NO_FIELDS, Operand, Sketch
from tests.layers.test_gather import check_indices, finished, indices, moving


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("width", [1, 70])
def test_rows(n, width):
    sketch = Sketch(6)
    source = moving(sketch, 6, width)
    finished(sketch, sketch.scatter(source, sketch.x.unsqueezed(2, width), 1, 5))
    check_indices(sketch.plan(), indices(n, 6, 3))


def test_samples_together():
    """A sum over all samples, in a tensor of the task."""
    sketch = Sketch(4)
    source, size = moving(sketch, 4), 3
    loops = Loops(source.sizes, (source.view(), sketch.x.view()), View(size, False, 0, (0, 0)))
    inputs = {"kind": "scatter", "name": "scatter", "inputs": (source.value, 0)}
    sketch.nodes.append(Node(**{**NO_FIELDS, **inputs, "loops": (loops,), "axis": IndexedAxis(size, 1)}))
    y = Operand(len(sketch.nodes), size, False, (None, size), (0, 1))
    finished(sketch, sketch.map(y, source.narrowed(1, 0, size), steps=[("mul", 0, 1)]))
    check_indices(sketch.plan(), indices(3, 4, 3))


def test_the_last_axis_of_a_source_that_is_read_twice():
    sketch = Sketch(6)
    source = moving(sketch, 2, 3)
    index = sketch.x.split(1, 2, 3)
    summed = sketch.scatter(source, index, 2, 4)
    again = sketch.gather(summed, index, 2)
    finished(sketch, sketch.map(again, source, steps=[("mul", 0, 1)]))
    check_indices(sketch.plan(), indices(4, 6, 4))


def test_places_outside_give_nan():
    sketch = Sketch(2)
    p = sketch.parameter(2)
    source = sketch.map(p.unsqueezed(0, None), sketch.x, steps=[("mul", 1, 1), ("mul", 2, 2), ("add", 0, 3)])
    sketch.scatter(source, sketch.x, 1, 3)
    x = torch.tensor([[[0.0, 3.0], [2.0, 1.0]]], dtype=torch.float64)
    got = torch.ops.maml_cuda.predict_forward([torch.ones(1, 2, dtype=torch.float64)], x, sketch.plan().text)
    assert bool(got[0, 0].isnan().any())
    assert not bool(got[0, 1].isnan().any())
