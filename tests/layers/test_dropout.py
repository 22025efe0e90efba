"""dropout: a value times a random mask and a number, the same mask in all passes."""

from dataclasses import replace

import pytest
import torch

from maml_cuda.plan.schema import Mask
from tests.layers.plans import Operand, Sketch, check, check_drawn, drawn
from tests.layers.test_move import finished, moving

KEEP = 3 * 2**30  # with probability 3 / 4


def mask(strides: tuple[int, ...], *times_samples: int, number: int = 2, keep: int = KEEP) -> Mask:
    return Mask(number, keep, strides, tuple(a in times_samples for a in range(len(strides))))


def dropped(strides: tuple[int, ...], *times_samples: int, view=lambda h: h, keep: int = KEEP) -> Sketch:
    """Of a value [samples, 3, 5], seen in some way."""
    sketch = Sketch(3, 5)
    finished(sketch, sketch.dropout(view(moving(sketch)), mask(strides, *times_samples, keep=keep), 4 / 3))
    return sketch


VIEWS: dict[str, tuple[tuple[int, ...], tuple[int, ...], object]] = {
    "in order": ((15, 5, 1), (), lambda h: h),
    "of channels": ((3, 1, 0), (), lambda h: h),
    "of samples": ((1, 0, 0), (), lambda h: h),
    "the same for all samples": ((0, 5, 1), (), lambda h: h),
    "channels last": ((15, 1, 3), (), lambda h: h),
    "samples inside": ((5, 5, 1), (1,), lambda h: h),
    "of a permuted value": ((15, 3, 1), (), lambda h: h.permuted(0, 2, 1)),
    "of a part": ((6, 3, 1), (), lambda h: h.narrowed(1, 1, 2).narrowed(2, 0, 3, 2)),
    "of a reversed value": ((15, 5, 1), (), lambda h: h.flipped(2)),
    "of an expanded value": ((60, 20, 5, 1), (), lambda h: h.unsqueezed(2, 4)),
}


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", VIEWS)
def test_passes(name, n):
    strides, times_samples, view = VIEWS[name]
    check_drawn(dropped(strides, *times_samples, view=view), n)


@pytest.mark.parametrize("keep", [0, 1, 2**32])
def test_all_and_nothing(keep):
    check_drawn(dropped((15, 5, 1), keep=keep), 3)


def test_float32():
    plan = dropped((15, 5, 1)).plan()
    x, parameters = drawn(plan, (3, 5), 4)
    check(plan, x.float(), [p.float() for p in parameters], tolerance=1e-5)


@pytest.mark.parametrize("size", [7, 255, 256, 257, 1030])
def test_lengths(size):
    """Pieces of a row begin anywhere in a block of random numbers."""
    sketch = Sketch(size)
    finished(sketch, sketch.dropout(moving(sketch), mask((size, 1)), 2.0))
    check_drawn(sketch, 2)


def test_of_a_parameter():
    sketch = Sketch(3, 5)
    p: Operand = sketch.parameter(3, 5)
    y = sketch.dropout(p, mask((5, 1)), 2.0)
    finished(sketch, sketch.map(sketch.x, y.unsqueezed(0, None), steps=[("mul", 0, 1)]))
    check_drawn(sketch, 3)


def test_tiles_number_all_samples():
    plan = dropped((5, 5, 1), 1).plan()
    x, parameters = drawn(plan, (3, 5), 300, tasks=1)
    check(plan, x, parameters)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "dropout 2 expects a mask, got none"),
        (mask((15, 1)), "Mask.strides must be a number from 0 on for each axis of the loops"),
        (mask((15, -5, 1)), "Mask.strides must be a number from 0 on for each axis of the loops"),
    ],
)
def test_what_is_no_mask(given, words):
    plan = dropped((15, 5, 1)).plan()
    nodes = tuple(replace(node, mask=given) if node.kind == "dropout" else node for node in plan.nodes)
    x, parameters = drawn(plan, (3, 5), 2)
    with pytest.raises(ValueError, match=words):
        torch.ops.maml_cuda.predict_forward(parameters, x, replace(plan, nodes=nodes).text)
