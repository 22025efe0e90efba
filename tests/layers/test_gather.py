"""gather: the elements of a value in the places of an index; the adjoint is a sum in the places."""

from dataclasses import replace

import pytest
import torch

from maml_cuda.plan.schema import Plan
from tests.layers.plans import Operand, Sketch, check, check_drawn, drawn


def moving(sketch: Sketch, *sizes: int) -> Operand:
    """A value with samples that depends on a parameter."""
    p = sketch.parameter(*sizes)
    x = sketch.x.narrowed(1, 0, 1)
    while len(x.sizes) < 1 + len(sizes):
        x = x.unsqueezed(len(x.sizes))
    wide = Operand(x.value, x.size, True, (None, *sizes), (x.strides[0], *[0] * len(sizes)), x.offset)
    return sketch.map(wide, p.unsqueezed(0, None), steps=[("mul", 0, 1), ("sin", 2)])


def finished(sketch: Sketch, h: Operand) -> None:
    """A curved function of a value, so that cotangents differ."""
    sketch.map(h, steps=[("exp", 0), ("mul", 1, 0)])


def indices(n: int, size: int, high: int) -> torch.Tensor:
    """An input of n samples of whole numbers, of which several are the same."""
    return torch.randint(high, (2, n, size), generator=torch.Generator().manual_seed(n)).double()


def check_indices(plan: Plan, x: torch.Tensor) -> None:
    _, parameters = drawn(plan, (x.shape[-1],), x.shape[1])
    check(plan, x, parameters)
    check(plan, x.float(), parameters, 3e-5)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (7, 1), (5, 70)])
def test_rows_of_a_parameter(n, rows, width):
    """An embedding: most rows are read several times, and some not at all."""
    sketch = Sketch(4)
    table = sketch.parameter(rows, width)
    index = sketch.x.unsqueezed(2, width)
    finished(sketch, sketch.gather(table.unsqueezed(0, None), index, 1))
    check_indices(sketch.plan(), indices(n, 4, min(rows, 4)))


@pytest.mark.parametrize("n", [1, 5])
def test_elements_of_each_sample(n):
    """As torch.gather: table and index have the samples and other axes in common."""
    sketch = Sketch(6)
    table, index = moving(sketch, 3, 4), sketch.x.narrowed(1, 0, 6).split(1, 3, 2)
    finished(sketch, sketch.gather(table, index, 2))
    check_indices(sketch.plan(), indices(n, 6, 4))


def test_a_view_as_a_table():
    """Reversed, with a step, and along the axis that is outside in memory."""
    sketch = Sketch(5)
    table = moving(sketch, 9, 6).flipped(2).narrowed(1, 1, 4, 2).permuted(0, 2, 1)
    finished(sketch, sketch.gather(table, sketch.x.unsqueezed(1, 6), 2))
    check_indices(sketch.plan(), indices(3, 5, 4))


def test_a_table_that_is_repeated():
    """The cotangents of a table that is the same for all samples are summed over them."""
    sketch = Sketch(5)
    table = sketch.map(sketch.parameter(4), steps=[("sin", 0)])
    finished(sketch, sketch.gather(table.unsqueezed(0, None), sketch.x, 1))
    check_indices(sketch.plan(), indices(4, 5, 4))


def test_a_table_read_twice():
    sketch = Sketch(4)
    table = sketch.parameter(5, 3)
    first, second = (
        sketch.gather(table.unsqueezed(0, None), sketch.x.narrowed(1, start, 2).unsqueezed(2, 3), 1) for start in (0, 2)
    )
    finished(sketch, sketch.map(first, second, steps=[("mul", 0, 1)]))
    check_indices(sketch.plan(), indices(4, 4, 5))


def test_places_outside_give_nan():
    sketch = Sketch(2)
    table = sketch.parameter(3)
    sketch.gather(table.unsqueezed(0, None), sketch.x, 1)
    plan = sketch.plan()
    for wrong in (-1.0, 3.0, 1e30, torch.nan):
        x = torch.tensor([[[0.0, wrong], [2.0, 1.0]]], dtype=torch.float64)
        got = torch.ops.maml_cuda.predict_forward([torch.arange(3.0, dtype=torch.float64)[None]], x, plan.text)
        torch.testing.assert_close(got, torch.tensor([[[0, torch.nan], [2, 1]]]).double(), equal_nan=True)


def test_axes_that_leave_the_table():
    sketch = Sketch(2)
    table = replace(sketch.parameter(3), sizes=(4,))
    sketch.gather(table.unsqueezed(0, None), sketch.x, 1)
    with pytest.raises(ValueError, match="Axis of 4 elements leaves its operand of 3"):
        check_drawn(sketch, 2)


def test_a_table_whose_rows_overlap():
    """Two threads would write to one element of its cotangent."""
    sketch = Sketch(2)
    table = replace(sketch.parameter(5), sizes=(3, 3), strides=(1, 1))
    sketch.gather(table.unsqueezed(0, None), sketch.x.unsqueezed(2, 3), 1)
    with pytest.raises(ValueError, match="gather 1 expects an axis for its index, and loops that come to no"):
        check_drawn(sketch, 2)
