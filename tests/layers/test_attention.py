"""attention: softmax(scale q k' + bias) v, on views of every kind."""

import math

import pytest
import torch
from torch import nn

from maml_cuda.plan import schema
from tests.conftest import check_meta_gradient
from tests.layers.plans import Operand, Sketch, check, check_drawn, dense, drawn
from tests.layers.test_move import finished, moving

SCALE = 0.7


def heads_of(h: Operand, heads: int) -> Operand:
    """[n, tokens, heads * size] as [n, heads, tokens, size]."""
    width = h.sizes[2]
    assert width is not None
    return h.split(2, heads, width // heads).permuted(0, 2, 1, 3)


@pytest.mark.parametrize("sizes", [(7, 3, 5, 5), (1, 2, 4, 3), (25, 1, 3, 17), (26, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_parts_of_one_projection(sizes, n):
    """q, k and v of all heads are parts of one value."""
    tokens, heads, depth, width = sizes
    sketch = Sketch(tokens, heads * (2 * depth + width))
    h = moving(sketch)
    q, k = (heads_of(h.narrowed(2, i * heads * depth, heads * depth), heads) for i in range(2))
    v = heads_of(h.narrowed(2, 2 * heads * depth, heads * width), heads)
    finished(sketch, sketch.attention(q, k, v, scale=SCALE))
    check_drawn(sketch, n)


def crossed(sketch: Sketch, queries: int, keys: int) -> tuple[Operand, Operand, Operand]:
    """Queries and keys of different numbers, from one value [n, queries + keys, width]."""
    h = moving(sketch)
    q, k = h.narrowed(1, 0, queries), h.narrowed(1, queries, keys)
    return q, k, k.flipped(2)


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (9, 1), (5, 300), (301, 5), (65, 70)])
def test_other_numbers_of_queries_and_keys(queries, keys):
    sketch = Sketch(queries + keys, 6)
    finished(sketch, sketch.attention(*crossed(sketch, queries, keys), scale=SCALE))
    check_drawn(sketch, 2)


@pytest.mark.parametrize("which", ["each", "of keys", "of queries", "of heads", "of a task"])
def test_bias_parameter(which):
    """A parameter that is added to the scores, or as much of one as is not broadcast."""
    tokens, heads = 6, 3
    sketch = Sketch(tokens, heads * 4)
    h = heads_of(moving(sketch), heads)
    sizes = {"each": (0, 1, 2), "of keys": (2,), "of queries": (1,), "of heads": (0,), "of a task": ()}[which]
    whole = (heads, tokens, tokens)
    bias = sketch.parameter(*(whole[a] for a in sizes))
    for a in range(3):
        if a not in sizes:
            bias = bias.unsqueezed(a, whole[a])
    finished(sketch, sketch.attention(h, h.flipped(3), h.flipped(2), bias.unsqueezed(0, None), SCALE))
    check_drawn(sketch, 4)


def test_bias_of_each_sample():
    tokens = 5
    sketch = Sketch(tokens, tokens + 3)
    h = moving(sketch)
    bias, x = h.narrowed(2, 0, tokens), h.narrowed(2, tokens, 3)
    finished(sketch, sketch.attention(x, x.flipped(1), x, bias.permuted(0, 2, 1), SCALE))
    check_drawn(sketch, 3)


def masked(tokens: int, empty: int | None, safe: bool) -> tuple[schema.Plan, torch.Tensor]:
    """A plan with a mask, and the mask: causal, and with one row of nothing but -inf."""
    sketch = Sketch(tokens, 8)
    h = heads_of(moving(sketch), 2)
    mask = torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(
        torch.ones(tokens, tokens).triu(1) > 0, -math.inf
    )
    if empty is not None:
        mask[empty] = -math.inf
    bias = sketch.parameter(tokens, tokens, role="buffer").unsqueezed(0, 2).unsqueezed(0, None)
    finished(sketch, sketch.attention(h, h.flipped(2), h.flipped(3), bias, SCALE, safe))
    return sketch.plan(), mask


@pytest.mark.parametrize("tokens", [6, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_causal_mask(tokens, dtype, tolerance):
    plan, mask = masked(tokens, None, False)
    x, parameters = drawn(plan, (tokens, 8), 3)
    parameters = [mask.flatten().expand(2, -1).clone() if p.role == "buffer" else q
                  for p, q in zip(plan.parameters, parameters, strict=True)]  # fmt: skip
    check(plan, x.to(dtype), parameters, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_rows_of_nothing_but_minus_infinity(dtype, tolerance):
    """Such a row is 0, with derivatives of 0, in a safe softmax, and NaN in a plain one, as in torch."""
    plan, mask = masked(6, 2, True)
    x, parameters = drawn(plan, (6, 8), 3)
    parameters = [mask.flatten().expand(2, -1).clone() if p.role == "buffer" else q
                  for p, q in zip(plan.parameters, parameters, strict=True)]  # fmt: skip
    check(plan, x.to(dtype), parameters, tolerance)
    plain, _ = masked(6, 2, False)
    prediction = torch.ops.maml_cuda.predict_forward([p.to(dtype) for p in parameters], x.to(dtype), plain.text)
    assert torch.equal(prediction.isnan().view(2, 3, 2, 6, 4)[..., 0].nonzero()[:, 3].unique(), torch.tensor([2]))


def test_large_scores():
    """The largest score of a row is subtracted before exp."""
    sketch = Sketch(5, 4)
    h = moving(sketch)
    finished(sketch, sketch.attention(h, h.flipped(1), h, scale=60.0))
    plan = sketch.plan()
    x, parameters = drawn(plan, (5, 4), 3)
    check(plan, 8 * x, parameters)
    check(plan, 8 * x.float(), parameters, 2e-2)  # a score of some 10^4 is rounded to 10^-3


@pytest.mark.parametrize("n", [1, 3])
def test_shared_keys_and_values(n):
    """All heads have the same keys and values; several heads are rows of one matrix."""
    sketch = Sketch(6, 4 * 3 + 6)
    h = moving(sketch)
    q = heads_of(h.narrowed(2, 0, 12), 4)
    k, v = (h.narrowed(2, 12 + 3 * i, 3).unsqueezed(1, 4) for i in range(2))
    finished(sketch, sketch.attention(q, k, v, scale=SCALE))
    check_drawn(sketch, n)


def test_learned_queries():
    """Queries, and in another layer keys and values, that are the same for all samples."""
    sketch = Sketch(6, 4)
    h = moving(sketch)
    p = sketch.parameter(3, 4).unsqueezed(0, None)
    y = sketch.attention(p, h, h.flipped(1), scale=SCALE)
    finished(sketch, sketch.attention(h, y, p))
    check_drawn(sketch, 3)


@pytest.mark.parametrize(
    "view",
    {
        "columns": lambda h: h.permuted(0, 2, 1),
        "every second": lambda h: h.narrowed(2, 1, 4, 2),
        "backwards": lambda h: h.flipped(1).flipped(2),
        "of one element": lambda h: h.narrowed(2, 3, 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_views(view):
    sketch = Sketch(6, 9)
    x = view[1](moving(sketch))
    other = moving(sketch)
    z = view[1](other)
    finished(sketch, sketch.attention(x, z.flipped(1), z, scale=SCALE))
    check_drawn(sketch, 3)


def test_equal_rows_and_columns():
    """Operands that repeat their elements along their own axes."""
    sketch = Sketch(5, 4)
    h = moving(sketch)
    q = h.narrowed(1, 2, 1).permuted(0, 2, 1).narrowed(2, 0, 1)  # [n, 4, 1]
    same = dense(h.value, (None, 20)).narrowed(1, 3, 1).unsqueezed(1, 4)  # [n, 4, 1], all equal
    finished(sketch, sketch.attention(q, same, h.permuted(0, 2, 1), scale=SCALE))
    check_drawn(sketch, 3)


def test_only_the_bias_or_the_values_move():
    """Operands without a tangent: the input of the plan."""
    sketch = Sketch(5, 4)
    x = sketch.x
    w = sketch.parameter(5, 5).unsqueezed(0, None)
    y = sketch.attention(x, x.flipped(1), x, w, SCALE)
    finished(sketch, sketch.attention(x, x.flipped(2), y))
    check_drawn(sketch, 3)


@pytest.mark.parametrize("parts", ["of one value", "overlapping"])
def test_threads_do_not_change_bits(parts):
    """Heads are shared among threads where they are apart, and samples otherwise; with a bias that all share, nothing
    in a backward pass is."""
    sketch = Sketch(33, 96)
    h = moving(sketch)
    q, k, v = (heads_of(h.narrowed(2, i * (32 if parts == "of one value" else 8), 32), 4) for i in range(3))
    y = sketch.map(sketch.attention(q, k, v, scale=SCALE), steps=[("tanh", 0)])
    bias = sketch.parameter(4, 33, 33).unsqueezed(0, None)
    sketch.attention(y, y.flipped(2), y, bias, SCALE)
    plan = sketch.plan()
    x, parameters = drawn(plan, (33, 96), 60, tasks=1)
    x, parameters = x.float(), [p.float() for p in parameters]
    target = torch.randn(1, 60, 33 * 32)
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


def test_other_loops_are_refused():
    sketch = Sketch(5, 4)
    h = moving(sketch)
    sketch.attention(h, h, h)
    last = sketch.nodes[-1]
    (loops,) = last.loops
    keys_of_y = schema.Loops(loops.sizes, loops.inputs, loops.inputs[1])
    sketch.nodes[-1] = schema.Node(**{**vars(last), "loops": (keys_of_y,)})
    words = "attention 2 expects loops over a batch, queries, keys, depth and width, got others"
    with pytest.raises(ValueError, match=words):
        torch.ops.maml_cuda.predict_forward([torch.zeros(1, 4)], torch.zeros(1, 1, 5, 4), sketch.plan().text)


class Tokens(nn.Module):
    """Self-attention with a bias that is a parameter, as long as several tiles of a GPU."""

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(6, 3 * 6)
        self.bias = nn.Parameter(torch.randn(heads, tokens, tokens))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("tokens", [5, 37])
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradient(machine, tokens, first_order):
    torch.manual_seed(tokens)
    x, y = torch.randn(2, 3, tokens, 6, dtype=torch.float64), torch.randint(3, (2, 3))
    model = Tokens(tokens, 2).double()
    maml = check_meta_gradient(model, "cross_entropy", [x, y, x.flip(1), y], 0.1, 2, first_order=first_order)
    assert maml.backend == ("cpu" if machine == "cpu" else "cuda")
