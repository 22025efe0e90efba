"""map: expressions of functions, element by element, with broadcast operands."""

import pytest
import torch

from tests.layers.plans import FUNCTIONS, Operand, Sketch, check, check_drawn, drawn
from tests.layers.test_move import moving

CONSTANTS = {
    "leaky_relu": [0.1],
    "elu": [1.3, 0.9, 0.7],
    "softplus": [2.0, 20.0],
    "hardtanh": [-0.4, 0.6],
    "power": [2.5],
    "clamp": [-0.4, 0.6],
    "affine": [1.5, -0.3],
}
POSITIVE = {"log", "log1p", "sqrt", "root", "rsqrt", "power", "pow", "reciprocal"}
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]
COMBINATIONS = ["add", "sub", "mul", "div", "pow", "atan2", "maximum", "minimum", *COMPARISONS]
UNARY = [name for name in FUNCTIONS if name not in [*COMBINATIONS, "where"]]


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("n", [3, 200])
def test_functions(name, n):
    """f(x p) and its derivatives, in one expression with what comes before and after."""
    sketch = Sketch(7)
    p = sketch.parameter(7).unsqueezed(0, None)
    argument = [("mul", 0, 1), ("affine", 2, [0.5, 0.0])]
    if name in POSITIVE:
        argument = [("mul", 0, 1), ("sin", 2), ("affine", 3, [1.0, 1.5])]
    last = 1 + len(argument)
    call = (name, last, CONSTANTS[name]) if name in CONSTANTS else (name, last)
    sketch.map(sketch.x, p, steps=[*argument, call, ("sin", last + 1), ("mul", last + 2, 1)])
    check_drawn(sketch, n)


def two_operands(sketch: Sketch, p: Operand, moves: str) -> list[Operand]:
    """Two values between 0.1 and 1.1, of which the given ones depend on the parameter."""
    steps = [("mul", 0, 1), ("sigmoid", 2), ("affine", 3, [1.0, 0.1])]
    mine = [moves in ("both", name) for name in ("first", "second")]
    return [
        sketch.map(sketch.x, p, steps=steps)
        if moving
        else sketch.map(sketch.x, steps=[("cos", 0), ("affine", 1, [0.5, 0.6])])
        for moving in mine
    ]


@pytest.mark.parametrize(
    "name", ["exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid", "erf", "sqrt", "rsqrt", "reciprocal"]
)
def test_accuracy_in_float32(name):
    """Within 2 units in the last place at floats of every size, with NaN and infinities where torch has them."""
    sketch = Sketch(1)
    sketch.map(sketch.x, steps=[(name, 0)])
    bits = torch.arange(-(2**31), 2**31, 10007)
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 88.7, -103.5])])
    y = torch.ops.maml_cuda.predict_forward([], x.reshape(1, -1, 1), sketch.plan().text).flatten().double()
    exact = FUNCTIONS[name](x.double())
    expected = exact.float()
    assert torch.equal(y.isnan(), expected.isnan())
    infinite = expected.isinf() | y.isinf()
    assert torch.equal(y[infinite], expected[infinite].double())
    known = ~(infinite | expected.isnan())
    unit = torch.exp2((expected[known].double().abs().clamp(min=2**-126)).log2().floor() - 23)
    assert ((y[known] - exact[known]).abs() / unit).max() <= 2


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("moves", ["both", "first", "second"])
def test_combinations(name, moves):
    sketch = Sketch(7)
    p = sketch.parameter(7).unsqueezed(0, None)
    first, second = two_operands(sketch, p, moves)
    if moves == "both":
        second = sketch.map(second, sketch.x, steps=[("mul", 0, 1), ("sigmoid", 2)])
    sketch.map(first, second, p, steps=[(name, 0, 1), ("sin", 3), ("mul", 4, 2)])
    check_drawn(sketch, 40)


@pytest.mark.parametrize("moves", ["both", "first", "second"])
def test_where(moves):
    sketch = Sketch(7)
    p = sketch.parameter(7).unsqueezed(0, None)
    first, second = two_operands(sketch, p, moves)
    steps = [("affine", 0, [0.0, 0.2]), ("lt", 0, 4), ("where", 5, 1, 2), ("sin", 6), ("mul", 7, 3)]
    sketch.map(sketch.x, first, second, p, steps=steps)
    check_drawn(sketch, 40)


KINKS = ["relu", "leaky_relu", "elu", "hardtanh", "abs", "sign", "clamp", "softplus", "root"]


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kinks(name, dtype):
    """The derivatives that torch takes where a function has none: elements are exactly at kinks, 0 and both ends."""
    sketch = Sketch(5)
    p = sketch.parameter(5).unsqueezed(0, None)
    constants = {"hardtanh": [-0.5, 0.5], "clamp": [-0.5, 0.5], "softplus": [1.0, 0.5]}
    call = (name, 2, constants.get(name, CONSTANTS.get(name, [])))
    sketch.map(sketch.x, p, steps=[("mul", 0, 1), call, ("affine", 3, [1.0, 0.5]), ("mul", 4, 1)])
    plan = sketch.plan()
    x, parameters = drawn(plan, (5,), 12)
    x = torch.tensor([0.0, 0.5, -0.5, 1.0]).double()[torch.randint(4, x.shape)]
    if name == "root":
        x = x.abs()
    check(plan, x.to(dtype), [torch.ones_like(q) for q in parameters], 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_ties(name):
    sketch = Sketch(5)
    p = sketch.parameter(5).unsqueezed(0, None)
    sketch.map(sketch.x, p, steps=[(name, 0, 1), ("sin", 2), ("mul", 3, 1)])
    plan = sketch.plan()
    x, parameters = drawn(plan, (5,), 12)
    check(plan, x.sign(), [q.sign() for q in parameters])


@pytest.mark.parametrize(("name", "a"), [("power", 0.0), ("power", 1.0), ("power", 2.0), ("power", 3.0)])
def test_powers_at_zero(name, a):
    sketch = Sketch(5)
    p = sketch.parameter(5).unsqueezed(0, None)
    sketch.map(sketch.x, p, steps=[("mul", 0, 1), (name, 2, [a]), ("mul", 3, 1)])
    plan = sketch.plan()
    x, parameters = drawn(plan, (5,), 12)
    x[..., :3] = 0
    check(plan, x, parameters)


def test_what_is_not_taken_is_not_read():
    """where(x > 0, sqrt(x p), 0) with an infinite derivative at 0: the cotangent there is 0, not NaN."""
    sketch = Sketch(5)
    p = sketch.parameter(5).unsqueezed(0, None)
    sketch.map(
        sketch.x,
        p,
        steps=[("mul", 0, 1), ("relu", 2), ("affine", 3, [1.0, 0.0]), ("where", 0, 4, 1), ("mul", 5, 5)],
    )
    check_drawn(sketch, 12)


@pytest.mark.parametrize("n", [1, 4, 300])
def test_broadcasts(n):
    """Operands without an axis, in every place of it, and their cotangents, which are sums."""
    sketch = Sketch(3, 5)
    h = moving(sketch)
    bias = sketch.parameter(5).unsqueezed(0, 3).unsqueezed(0, None)
    column = sketch.parameter(3).unsqueezed(1, 5).unsqueezed(0, None)
    scalar = sketch.parameter(1).narrowed(0, 0, 1)
    scalar = scalar.unsqueezed(0, 3).unsqueezed(0, None)
    scalar = type(scalar)(scalar.value, 1, False, (None, 3, 5), (0, 0, 0))
    y = sketch.map(h, bias, column, scalar, steps=[("mul", 0, 1), ("add", 4, 2), ("tanh", 5), ("mul", 6, 3)])
    mean = sketch.reduce(y, (2,), "mean").unsqueezed(2, 5)
    sketch.map(y, mean, steps=[("sub", 0, 1), ("mul", 2, 1)])
    check_drawn(sketch, n)


@pytest.mark.parametrize(("sample", "n"), [((5,), 30_000), ((3, 700), 20), ((1, 700), 20)], ids=str)
def test_long_sums_of_cotangents(sample, n):
    """Of an operand that repeats from block to block, and of one that does not."""
    sketch = Sketch(*sample)
    p = sketch.parameter(sample[0])
    for axis, size in enumerate(sample[1:], start=1):
        p = p.unsqueezed(axis, size)
    h = sketch.map(sketch.x, p.unsqueezed(0, None), steps=[("mul", 0, 1), ("tanh", 2), ("add", 3, 1)])
    sketch.map(h, p.unsqueezed(0, None), steps=[("mul", 0, 1)])
    check_drawn(sketch, n)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    "view",
    {
        "transposed": lambda h: h.permuted(0, 2, 1),
        "flipped": lambda h: h.flipped(2),
        "a slice": lambda h: h.narrowed(2, 2, 4).narrowed(1, 0, 4),
        "whole": lambda h: h,
    }.items(),
    ids=lambda item: item[0],
)
def test_one_value_read_through_two_views(view, n):
    sketch = Sketch(6, 6)
    h = moving(sketch)
    other = view[1](h)
    own = h if other.sizes == h.sizes else h.narrowed(2, 0, 4).narrowed(1, 2, 4)
    sketch.map(own, other, steps=[("mul", 0, 1), ("sin", 2)])
    check_drawn(sketch, n)
    sketch = Sketch(6, 6)
    h = moving(sketch)
    sketch.map(view[1](h), own, steps=[("sub", 1, 0), ("mul", 2, 1)])
    check_drawn(sketch, n)


def test_the_longest_expression():
    """20 instructions with cotangents, tangents and slopes of all of them: many registers, small blocks."""
    sketch = Sketch(77)
    p = sketch.parameter(77).unsqueezed(0, None)
    steps = [("mul", 0, 1)]
    for i in range(18):
        steps.append((["div", "atan2", "pow"][i % 3], 2 + i, 1) if i % 2 else ("sigmoid", 2 + i))
    sketch.map(sketch.x, p, steps=[*steps, ("mul", 20, 19)])
    plan = sketch.plan()
    x, parameters = drawn(plan, (77,), 9)
    parameters = [q.abs() + 0.5 for q in parameters]
    check(plan, x, parameters)


def test_expressions_that_need_no_values():
    """Linear ones, whose passes read no operand, with a value that has no tangent."""
    sketch = Sketch(7)
    p, q = (sketch.parameter(7, role=role).unsqueezed(0, None) for role in ("adapted", "outer"))
    sketch.map(sketch.x, p, q, steps=[("add", 0, 1), ("affine", 3, [2.0, 1.0]), ("sub", 4, 2), ("sub", 2, 5)])
    check_drawn(sketch, 6)


def test_a_value_that_no_derivative_reaches():
    sketch = Sketch(7)
    p = sketch.parameter(7).unsqueezed(0, None)
    sign = sketch.map(sketch.x, p, steps=[("mul", 0, 1), ("sign", 2)])
    below = sketch.map(sketch.x, p, steps=[("lt", 0, 1)])
    sketch.map(sign, below, p, steps=[("add", 0, 1), ("mul", 3, 2)])
    check_drawn(sketch, 6)
