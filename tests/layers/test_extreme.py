"""extreme: the largest and the smallest elements over some axes."""

import pytest
import torch

from tests.layers.plans import Sketch, check, check_drawn, drawn
from tests.layers.test_move import finished, moving

REDUCTIONS = ["amax", "amin", "max", "min"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (1, 3), (1, 2, 3)])
@pytest.mark.parametrize("n", [1, 4])
def test_over_axes(reduction, axes, n):
    sketch = Sketch(3, 5, 7)
    finished(sketch, sketch.reduce(moving(sketch), axes, reduction))
    check_drawn(sketch, n)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_over_samples(reduction):
    sketch = Sketch(4, 3)
    h = moving(sketch)
    largest = sketch.reduce(h, (0, 2), reduction).unsqueezed(0, None).unsqueezed(2, 3)
    finished(sketch, sketch.map(h, largest, steps=[("sub", 0, 1)]))
    check_drawn(sketch, 7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties(reduction, dtype):
    """amax and amin share the derivative, max and min give it to the first one."""
    sketch = Sketch(6)
    p = sketch.parameter(6)
    h = sketch.map(sketch.x, p.unsqueezed(0, None), steps=[("mul", 0, 1)])
    y = sketch.reduce(h.permuted(0, 1).unsqueezed(1), (2,), reduction)
    finished(sketch, y)
    plan = sketch.plan()
    x, parameters = drawn(plan, (6,), 9)
    x, parameters = x.sign(), [q.sign() for q in parameters]
    check(plan, x.to(dtype), parameters, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_wins(reduction):
    sketch = Sketch(6)
    p = sketch.parameter(6)
    h = sketch.map(sketch.x, p.unsqueezed(0, None), steps=[("mul", 0, 1)])
    y = sketch.reduce(h, (1,), reduction)
    plan = sketch.plan()
    assert y.sizes == (None,)
    x, parameters = drawn(plan, (6,), 4)
    for place in (0, 3, 5):
        x[0, place // 2, place] = torch.nan
    prediction = torch.ops.maml_cuda.predict_forward(parameters, x, plan.text)
    assert torch.equal(prediction[0].isnan().flatten(), torch.tensor([True, True, True, False]))
