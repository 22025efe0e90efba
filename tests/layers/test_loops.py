"""Loops that do not fit their layer are refused."""

from dataclasses import replace

import pytest
import torch

from tests.layers.plans import Sketch, dense


def predict(sketch: Sketch) -> None:
    torch.ops.maml_cuda.predict_forward([], torch.zeros(1, 2, 3, 4), sketch.plan().text)


@pytest.mark.parametrize(
    ("kind", "fields", "strides", "words"),
    [
        ("softmax", {}, (12, 0, 1), "softmax 0 expects loops that come to each of the 12 elements of its output once"),
        ("stop", {}, (12, 4, 0), "stop 0 expects loops that come to each of the 12 elements of its output once"),
        ("reduce", {"reduction": "sum"}, (12, 3, 1), "reduce 0 expects loops that come to each of the 12 elements"),
        ("extreme", {"reduction": "amax"}, (12, 3, 0), "extreme 0 expects loops that come to each of the 12 elements"),
        (
            "map",
            {},
            (12, 1, 3),
            "map 0 expects loops that come to each of the 12 elements of its output once, in their",
        ),
        ("map", {}, (12, 4, 1), "map 0 expects at least 1 instruction, got 0"),
    ],
)
def test_outputs(kind, fields, strides, words):
    sketch = Sketch(3, 4)
    y = dense(0, (None, 3, 4))
    loops = sketch._loops((sketch.x,), strides, y)
    sketch._add(kind, (sketch.x,), y.sizes, loops=(loops,), **fields)
    with pytest.raises(ValueError, match=words):
        predict(sketch)


def test_softmax_of_no_axis():
    sketch = Sketch(3, 4)
    element = replace(sketch.x, samples=True, sizes=(), strides=())
    sketch._add("softmax", (element,), (), loops=(sketch._loops((element,), (), dense(0, ())),))
    with pytest.raises(ValueError, match="softmax 0 expects at least 1 axis, got 0"):
        predict(sketch)
