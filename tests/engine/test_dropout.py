"""Dropout in train mode: one mask for each task, inner step and set, the same on every backend."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maml_cuda import FusedMAML, gradcheck, masks, reference
from tests import given_masks, oracle
from tests.conftest import assert_close, episode, run
from tests.given_masks import Given, next_seed, passes

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, TASKS = 2, 3


class Transformer(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Linear(3, 4), batch_first
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        tokens = self.block(tokens) if self.batch_first else self.block(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(tokens.mean(1))


class Attention(nn.Module):
    """scaled_dot_product_attention with dropout of its weights, and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.cell = cell(3, 4, num_layers=3, dropout=0.4, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cell.batch_first
        return self.head(self.cell(x)[0][:, -1] if first else self.cell(x.transpose(0, 1))[0][-1])


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 7) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, width), nn.Linear(width, 4), function

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.function(torch.tanh(self.first(x))))
        return y if y.dim() == 2 else y.mean(1)


class Weights(nn.Module):
    """Dropout of a weight, which the samples share, and of learned positions, which have none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.w, 0.3)) + F.dropout(self.b.expand(len(x), 4), 0.5)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.last = nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(lambda h: self.drop(torch.sin(self.layer(h))), x, use_reentrant=False))


def drop_connect(h: Tensor) -> Tensor:
    return h / 0.7 * torch.empty([h.shape[0], 1], dtype=h.dtype).bernoulli_(0.7)


def drop_row(h: Tensor) -> Tensor:
    return F.dropout(h, 0.4)


def two(h: Tensor) -> Tensor:
    return F.dropout(torch.sin(F.dropout(h, 0.2)), 0.6, inplace=True)


def conv(*after: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *after, nn.Flatten(), nn.LazyLinear(4)
    )


# How to make a model, the shape of a sample, and the masks that a forward draws.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "dropout": (lambda: Between(nn.Dropout(0.4)), (3,), 1),
    "of x": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 4)), (3,), 1),
    "two": (lambda: Between(two), (3,), 2),
    "wide": (lambda: Between(nn.Dropout(0.5), 301), (3,), 1),
    "keeps all": (lambda: Between(lambda h: h * torch.empty_like(h).bernoulli_(1.0)), (3,), 1),
    "bernoulli": (lambda: Between(lambda h: h * torch.bernoulli(h.detach(), 0.5)), (3,), 1),
    "as a value": (lambda: Between(lambda h: torch.where(torch.empty_like(h).bernoulli_() > 0, h, h * h)), (3,), 1),
    "drop connect": (lambda: Between(drop_connect), (3,), 1),
    "alpha": (lambda: Between(nn.AlphaDropout(0.3)), (3,), 1),
    "feature alpha": (lambda: Between(nn.FeatureAlphaDropout(0.3)), (2, 3), 1),
    "1d": (lambda: Between(nn.Dropout1d(0.3)), (2, 3), 1),
    "2d": (conv(nn.Dropout2d(0.3)), (2, 5, 6), 1),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.Dropout3d(), nn.Flatten(), nn.Linear(16, 4)), (2, 3, 3, 2), 1),
    "of images": (conv(nn.Dropout(0.4), nn.MaxPool2d(2)), (2, 6, 6), 1),
    "weights": (Weights, (3,), 2),
    "over samples": (lambda: Between(torch.func.vmap(drop_row, randomness="different")), (3,), 1),
    "attention": (Attention, (5, 3), 1),
    "transformer": (Transformer, (5, 3), 4),
    "transformer, length first": (lambda: Transformer(batch_first=False), (5, 3), 4),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), (4, 3), 2),
    "gru": (lambda: Recurrent(nn.GRU, bidirectional=True), (4, 3), 2),
}  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    make, sample, _ = MODELS[name]
    model = make()
    model(torch.zeros(2, *sample))  # makes lazy layers
    return model.to(dtype)


def data_of(name: str, dtype: torch.dtype = torch.float64, n: tuple[int, int] = (5, 3)) -> list[Tensor]:
    return episode(MODELS[name][1], tasks=TASKS, n=n, dtype=dtype)


def seeded(call: Callable[[], object], seed: int = 3) -> object:
    torch.manual_seed(seed)
    return call()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_meta_gradient_with_given_masks(name, backend):
    model, data = made(name), data_of(name)
    maml = FusedMAML(model, 0.1, STEPS, backend=backend)
    maml(*data)  # the first call looks at the model
    torch.manual_seed(3)
    given = Given(next_seed(), passes(TASKS, STEPS), MODELS[name][2])
    loss, grads = run(maml, data)
    with given:
        expected_loss, expected = oracle.meta_gradient(model, "cross_entropy", *data, 0.1, STEPS)
    assert next(given.left, None) is None
    assert abs(loss - expected_loss) < 1e-9
    assert_close(grads, expected, 1e-9)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", ["dropout", "of x", "2d", "of images", "weights", "transformer", "lstm"])
def test_machines_draw_what_the_reference_draws(name):
    model, data = made(name), data_of(name)
    maml = FusedMAML(model, 0.1, STEPS, backend="fused")
    loss, grads = seeded(lambda: run(maml, data))
    expected_loss, expected = seeded(lambda: reference.meta_gradient(model, "cross_entropy", *data, 0.1, STEPS))
    assert abs(loss - expected_loss) < 1e-9
    assert_close(grads, expected, 1e-9)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("chunk", [None, 2])
def test_repeated_calls_and_chunks_of_tasks(chunk):
    """On a GPU later calls are replays of a graph, which have the seeds of their calls."""
    model, data = made("two"), data_of("two")
    maml = FusedMAML(model, 0.1, STEPS, backend="fused", task_chunk=chunk)
    losses = set()
    for seed in range(4):
        loss, grads = seeded(lambda: run(maml, data), seed)
        expected_loss, expected = seeded(
            lambda: reference.meta_gradient(model, "cross_entropy", *data, 0.1, STEPS), seed
        )
        assert abs(loss - expected_loss) < 1e-9
        assert_close(grads, expected, 1e-9)
        losses.add(loss.item())
    assert len(losses) == 4


def test_generator_gives_the_published_numbers():
    """The test vectors of Random123 (Salmon et al. 2011)."""
    for counter, key, expected in (
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        words = [int(word, 16) for word in expected.split()]
        assert [int(t) for t in masks.philox(counter, key)] == words
        assert [int(word) for word in given_masks.philox(counter, [key % 2**32, key >> 32])] == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance(p):
    """Of 250,000 elements within 4 standard deviations of a binomial distribution's, and so of each position of a
    block, and of the products of neighbours."""
    n = 250_000
    ones = masks.mask(p, (n,), 12345, 1, 4, 2).double()
    for sample, q in ((ones, p), *((ones[i::4], p) for i in range(4)), (ones[1:] * ones[:-1], p * p)):
        assert abs(sample.mean() - q) < 4 * math.sqrt(q * (1 - q) / len(sample)) * (math.sqrt(3) if q != p else 1)
    fourth = p * (1 - p) * (1 - 3 * p * (1 - p))
    assert abs(ones.var() - p * (1 - p)) < 4 * math.sqrt((fourth - (p * (1 - p)) ** 2) / n) + 1 / n


def drawn_by(maml: FusedMAML, data: list[Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    return seeded(lambda: run(maml, data), seed)


@pytest.mark.parametrize("name", ["dropout", "transformer"])
def test_same_seed_same_bits(name):
    maml, data = FusedMAML(made(name), 0.1, STEPS, backend="fused"), data_of(name)
    first, again, other = drawn_by(maml, data), drawn_by(maml, data), drawn_by(maml, data, seed=4)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(g, again[1][n]) for n, g in first[1].items())
    torch.manual_seed(3)
    assert not torch.equal(run(maml, data)[0], run(maml, data)[0])  # another seed for each call


class Ones(nn.Module):
    """Its prediction is a mask, twice the parameter where it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.w.expand(len(x), 64) + 0 * x, 0.5)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_each_task_step_and_set_has_its_own(backend):
    """The rate is small: what a query prediction shows is its mask, and gradients tell those of the support sets."""
    maml = FusedMAML(Ones().double(), 1.0, 1, loss="mse", backend=backend)
    x, y = torch.zeros(2, 3, 64, dtype=torch.float64), torch.full((2, 3, 64), 10.0, dtype=torch.float64)
    torch.manual_seed(3)
    fast = [f["w"] for f in maml.inner_loop(x, y, 3)]
    torch.manual_seed(3)
    query = maml(x, y, x, y).logits > 0
    moved = [after - before for before, after in itertools.pairwise(fast)]
    seen = [m[t] for m in moved for t in range(2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    seed = given_masks.next_seed  # the masks of the query sets, by definition
    torch.manual_seed(3)
    expected = torch.stack([given_masks.mask(seed(), t, 3, 0, 0.5, (3, 64)) for t in range(2)])
    assert torch.equal(query, expected)
    kept = torch.stack([given_masks.mask(seed(), t, 0, 0, 0.5, (3, 64)).sum(0) for t in range(2)])
    assert torch.equal(moved[0] > 0, kept > 0)


@pytest.mark.parametrize("n", [(300, 131), (5, 3)])
@pytest.mark.parametrize("name", ["dropout", "transformer, length first", "lstm"])
def test_tiles_threads_and_recomputed_states(name, n):
    model, data = made(name), data_of(name, n=n)
    loss, grads = drawn_by(FusedMAML(model, 0.1, STEPS, backend="fused"), data)
    expected_loss, expected = seeded(lambda: reference.meta_gradient(model, "cross_entropy", *data, 0.1, STEPS))
    assert abs(loss - expected_loss) < 1e-9
    assert_close(grads, expected, 1e-9)
    threads = torch.get_num_threads()
    for count, options in ((1, {}), (2, {}), (2, {"checkpoint": "recompute"})):
        torch.set_num_threads(count)
        try:
            again = drawn_by(FusedMAML(model, 0.1, STEPS, backend="fused", **options), data)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again[0], loss)
        assert all(torch.equal(g, grads[n]) for n, g in again[1].items())


@pytest.mark.parametrize("first_order", [False, True])
def test_float32_and_multi_step_losses(first_order):
    model, data = made("transformer", torch.float32), data_of("transformer", torch.float32)
    weights = [0.2, 0.3, 0.5]
    maml = FusedMAML(model, 0.1, STEPS, backend="fused", first_order=first_order, query_weights=weights)
    loss, grads = drawn_by(maml, data)
    exact = [t.double() if t.is_floating_point() else t for t in data]
    expected_loss, expected = seeded(
        lambda: reference.meta_gradient(
            copy.deepcopy(model).double(), "cross_entropy", *exact, 0.1, STEPS, first_order, query_weights=weights
        )
    )
    assert abs(loss - expected_loss) < 1e-5
    assert_close({n: g.double() for n, g in grads.items()}, expected, 1e-5)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_building_blocks_have_the_masks_of_their_seed(backend):
    """predict, loss_and_grad and hvp: the derivative of the gradient that the same seed gives."""
    model, (x, y, *_) = made("dropout"), data_of("dropout")
    maml = FusedMAML(model, 0.1, STEPS, backend=backend)
    fast = {n: t.clone() for n, t in maml.adapt(x, y).items()}
    v = {n: torch.randn_like(t) for n, t in fast.items()}
    product = seeded(lambda: maml.hvp(fast, x, y, v))
    loss, gradient = seeded(lambda: maml.loss_and_grad(fast, x, y))
    leaves = {n: t.clone().requires_grad_() for n, t in fast.items()}
    prediction = seeded(lambda: maml.predict(leaves, x))
    same = torch.stack([F.cross_entropy(p, t) for p, t in zip(prediction, y, strict=True)])
    assert_close({"loss": loss}, {"loss": same.detach()}, 1e-12)
    of_prediction = torch.autograd.grad(same.sum(), list(leaves.values()))
    assert_close(gradient, dict(zip(leaves, of_prediction, strict=True)), 1e-12)
    e = 1e-6
    moved = [{n: t + s * v[n] for n, t in fast.items()} for s in (e, -e)]
    near = [seeded(lambda at=at: maml.loss_and_grad(at, x, y))[1] for at in moved]
    assert_close(product, {n: (near[0][n] - near[1][n]) / (2 * e) for n in product}, 1e-6)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_adapt_and_its_steps(backend):
    model, (x, y, *_) = made("transformer"), data_of("transformer")
    maml = FusedMAML(model, 0.1, STEPS, backend=backend)
    maml.adapt(x, y)
    steps = seeded(lambda: list(maml.inner_loop(x, y, 3)))
    for k in (1, 3):
        adapted = seeded(lambda k=k: maml.adapt(x, y, k))
        assert all(torch.equal(t, steps[k][n]) for n, t in adapted.items())
    differentiable = seeded(lambda: maml.adapt(x, y, differentiable=True))
    assert_close({n: t.detach() for n, t in differentiable.items()}, steps[2], 1e-12)
    grads = torch.autograd.grad(sum(t.sin().sum() for t in differentiable.values()), list(model.parameters()))
    again = FusedMAML(model, 0.1, STEPS, backend="reference")
    expected = seeded(lambda: again.adapt(x, y, differentiable=True))
    expected = torch.autograd.grad(sum(t.sin().sum() for t in expected.values()), list(model.parameters()))
    names = [n for n, _ in model.named_parameters()]
    assert_close(dict(zip(names, grads, strict=True)), dict(zip(names, expected, strict=True)), 1e-9)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_without_masks_nothing_is_drawn(backend):
    maml, data = FusedMAML(made("transformer").eval(), 0.1, STEPS, backend=backend), data_of("transformer")
    before = torch.get_rng_state()
    first, again = run(maml, data), run(maml, data)
    assert torch.equal(first[0], again[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_in_forward_draws_once():
    model, data = Checkpointed().double(), data_of("dropout")
    loss, grads = seeded(lambda: run(FusedMAML(model, 0.1, STEPS, backend="fused"), data))
    expected_loss, expected = seeded(lambda: reference.meta_gradient(model, "cross_entropy", *data, 0.1, STEPS))
    assert abs(loss - expected_loss) < 1e-12
    assert_close(grads, expected, 1e-9)


def test_gradcheck_of_one_mask():
    gradcheck(FusedMAML(made("dropout"), 0.1, STEPS, backend="fused"), *data_of("dropout"))


def test_explain_names_the_layer():
    maml, (x, y, *_) = FusedMAML(made("transformer"), 0.1), data_of("transformer")
    assert "dropout" in maml.explain(x, y)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * torch.bernoulli(torch.sigmoid(h)),
        lambda h: h * torch.empty_like(h).bernoulli_(0.5, generator=torch.Generator()),
        lambda h: h + torch.randn_like(h),
        lambda h: F.rrelu(h, training=True),
    ],
)
def test_other_random_numbers_are_refused(function):
    maml = FusedMAML(Between(function).double(), 0.1, backend="fused")
    with pytest.raises(ValueError, match="draws random numbers"):
        maml(*data_of("dropout"))


def test_masks_of_a_loss_are_refused():
    maml = FusedMAML(made("dropout"), 0.1, loss=lambda p, y: F.cross_entropy(F.dropout(p, 0.5), y), backend="fused")
    with pytest.raises(ValueError, match="draws random numbers"):
        maml(*data_of("dropout"))
