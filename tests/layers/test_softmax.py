"""softmax and log_softmax over the last axis of a view."""

import pytest
import torch

from tests.layers.plans import Sketch, check, check_drawn, drawn
from tests.layers.test_move import finished, moving

KINDS = ["softmax", "log_softmax"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    "view",
    {
        "rows": lambda h: h,
        "columns": lambda h: h.permuted(0, 2, 1),
        "over samples": lambda h: h.permuted(1, 2, 0),
        "a slice": lambda h: h.narrowed(1, 1, 2).narrowed(2, 2, 15),
        "flipped": lambda h: h.flipped(2).flipped(1),
        "expanded": lambda h: h.unsqueezed(2, 3),
        "equal": lambda h: h.unsqueezed(3, 3),
    }.items(),
    ids=lambda item: item[0],
)
def test_views(kind, view, n):
    sketch = Sketch(4, 19)
    y = sketch.softmax(view[1](moving(sketch)), kind)
    if y.sizes[0] is not None:
        y = y.permuted(2, 0, 1)
    finished(sketch, y)
    check_drawn(sketch, n)


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_small_elements(kind):
    sketch = Sketch(4)
    p = sketch.parameter(4)
    h = sketch.map(sketch.x, p.unsqueezed(0, None), steps=[("add", 0, 1)])
    sketch.softmax(h, kind)
    plan = sketch.plan()
    x, parameters = drawn(plan, (4,), 5)
    x = x + torch.tensor([800.0, 0, 790, -800])
    check(plan, x, parameters)
    check(plan, x.float(), parameters, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked(dtype):
    """Entries of minus infinity are exactly 0, with finite derivatives; a row of nothing else is NaN, as in torch."""
    sketch = Sketch(4)
    p = sketch.parameter(4)
    h = sketch.map(sketch.x, p.unsqueezed(0, None), steps=[("add", 0, 1)])
    sketch.softmax(h)
    plan = sketch.plan()
    x, parameters = drawn(plan, (4,), 5)
    x[:, :, 2] = -torch.inf
    check(plan, x.to(dtype), parameters, 1e-10 if dtype == torch.float64 else 1e-5)
    text = plan.text
    own = [q.to(dtype) for q in parameters]
    x[0, 3] = -torch.inf
    prediction = torch.ops.maml_cuda.predict_forward(own, x.to(dtype), text)
    assert torch.equal(prediction.isnan().any(-1).nonzero(), torch.tensor([[0, 3]]))
    assert (prediction[1, :, 2] == 0).all()
