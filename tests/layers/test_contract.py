"""contract: products of matrices and of batches of them, in every order of the axes."""

import itertools

import pytest
import torch

from maml_cuda._core import Unsupported
from tests.layers.plans import Operand, Sketch, check_drawn, drawn
from tests.layers.test_move import finished, moving


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 5), (17, 33, 18), (1, 300, 2), (20, 1, 19)], ids=str)
def test_value_by_parameter(order, sizes):
    """y[s, t, o] = sum_i x[s, t, i] w[i, o], with the axes of both in any order."""
    tokens, width, out = sizes
    sketch = Sketch(*[(tokens, width)[a] for a in order if a < 2])
    h = moving(sketch)
    if order.index(0) > order.index(1):
        h = h.permuted(0, 2, 1)
    w = sketch.parameter(width, out) if order[0] < 2 else sketch.parameter(out, width).permuted(1, 0)
    a, b = h.unsqueezed(3, out), w.unsqueezed(0, None).unsqueezed(1, tokens)
    if order[1] == 2:
        a, b = b, a
    finished(sketch, sketch.contract(a, b, (2,)))
    check_drawn(sketch, 3)


def attention(sketch: Sketch, heads: int, swapped: bool) -> None:
    """softmax(Q K') V of one value, which is read as all three."""
    _, tokens, width = sketch.x.sizes
    size = width // heads
    h = moving(sketch).split(2, heads, size).permuted(0, 2, 1, 3)  # [n, heads, tokens, size]
    q, k = h.unsqueezed(3, tokens), h.unsqueezed(2, tokens)
    scores = sketch.contract(k, q, (4,)) if swapped else sketch.contract(q, k, (4,))
    weights = sketch.softmax(scores)
    v = h.unsqueezed(2, tokens)
    y = sketch.contract(weights.unsqueezed(4, size), v, (3,))
    finished(sketch, y)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_attention(heads, swapped, n):
    sketch = Sketch(7, 12)
    attention(sketch, heads, swapped)
    check_drawn(sketch, n)


def test_square_of_a_value():
    """Both factors are one value, with its own cotangent twice."""
    sketch = Sketch(5, 5)
    h = moving(sketch)
    finished(sketch, sketch.contract(h.unsqueezed(3, 5), h.unsqueezed(1, 5), (2,)))
    check_drawn(sketch, 3)


def test_parameter_by_parameter():
    """A computed weight, as of LoRA, that belongs to the task."""
    sketch = Sketch(6)
    a, b = sketch.parameter(6, 2), sketch.parameter(2, 5)
    w = sketch.contract(a.unsqueezed(2, 5), b.unsqueezed(0, 6), (1,))
    y = sketch.contract(moving(sketch).unsqueezed(2, 5), w.unsqueezed(0, None), (1,))
    finished(sketch, y)
    check_drawn(sketch, 4)


def test_over_samples():
    sketch = Sketch(3, 4)
    h = moving(sketch)
    moment = sketch.contract(h.unsqueezed(3, 4), h.unsqueezed(2, 4), (0, 1))  # [4, 4]
    y = sketch.contract(h.unsqueezed(3, 4), moment.unsqueezed(0, None).unsqueezed(1, 3), (2,))
    finished(sketch, y)
    check_drawn(sketch, 6)


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2), ()], ids=str)
def test_elementwise_and_inner_products(axes):
    sketch = Sketch(4, 5)
    h = moving(sketch)
    finished(sketch, sketch.contract(h, h.flipped(2), axes))
    check_drawn(sketch, 3)


def test_parts_of_values():
    """Views that do not cover their operands, in all three places."""
    sketch = Sketch(6, 9)
    h = moving(sketch)
    a, b = h.narrowed(1, 1, 4).narrowed(2, 1, 3), h.narrowed(1, 2, 3, 1).narrowed(2, 0, 5, 2)
    finished(sketch, sketch.contract(a.unsqueezed(3, 5), b.unsqueezed(1, 4), (2,)))
    check_drawn(sketch, 3)


def test_several_summed_axes():
    sketch = Sketch(4, 3, 5)
    h = moving(sketch).permuted(0, 3, 1, 2)
    w = sketch.parameter(3, 6, 4).permuted(2, 0, 1)
    y = sketch.contract(h.unsqueezed(4, 6), w.unsqueezed(0, 5).unsqueezed(0, None), (2, 3))
    finished(sketch, y)
    check_drawn(sketch, 3)


def test_axes_of_one_operand():
    """An axis that only one factor has is summed over, one that only y has is a broadcast."""
    sketch = Sketch(4, 3, 5)
    h = moving(sketch)  # its second axis is summed over, and so is the third one of w
    w = sketch.parameter(5, 6, 2)
    a = h.unsqueezed(4, 6).unsqueezed(5, 2)
    b = w.unsqueezed(0, 3).unsqueezed(0, 4).unsqueezed(0, None)
    finished(sketch, sketch.contract(a, b, (2, 3, 5)))
    check_drawn(sketch, 3)


def test_long_sums():
    sketch = Sketch(700)
    w = sketch.parameter(3, 700).permuted(1, 0)
    finished(sketch, sketch.contract(moving(sketch).unsqueezed(2, 3), w.unsqueezed(0, None), (1,)))
    check_drawn(sketch, 2)


def test_threads_do_not_change_bits():
    sketch = Sketch(48, 65)
    h = moving(sketch)
    w = sketch.parameter(65, 70)
    y = sketch.contract(h.unsqueezed(3, 70), w.unsqueezed(0, 48).unsqueezed(0, None), (2,))
    p = sketch.parameter(70).unsqueezed(0, 48).unsqueezed(0, None)
    sketch.softmax(sketch.map(y, p, steps=[("mul", 0, 1), ("tanh", 2)]).permuted(0, 2, 1))
    plan = sketch.plan()
    x, parameters = drawn(plan, (48, 65), 60, tasks=1)
    x, parameters = x.float(), [q.float() for q in parameters]
    target = torch.randn(1, 60, 48 * 70)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, gradient = torch.ops.maml_cuda.loss_and_grad(parameters, x, [target], plan.text)
            product = torch.ops.maml_cuda.hvp(parameters, x, [target], gradient, plan.text)
            results.append([loss, *gradient, *product])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_what_has_no_32_bit_offset_is_refused():
    """Overlapping windows of a small value, of more elements than have 32-bit offsets."""
    sketch = Sketch(100_000)
    windows = Operand(0, 100_000, True, (None, 50_000, 50_000), (100_000, 1, 1))
    w = sketch.parameter(50_000).unsqueezed(0, 50_000).unsqueezed(0, None)
    sketch.contract(windows, w, (2,))
    words = "fused contractions are of at most 2147483647 elements of one task, got 2500000000"
    with pytest.raises(Unsupported, match=words):
        torch.ops.maml_cuda.predict_forward([torch.zeros(1, 50_000)], torch.zeros(1, 1, 100_000), sketch.plan().text)
