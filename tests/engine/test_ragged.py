"""Tasks of different sizes on fused layers: each number of samples, tiles, lanes, dropout, statistics, what is refused.
The oracle is that of test_sample_weights.py: each task alone, on its own samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, optim
from maml_cuda.data import collate
from tests.conftest import assert_close, episode, program_of, run
from tests.engine.test_sample_weights import Oracle, bn_mlp, check, mlp, poisoned, ragged


def conv_net(norm: bool = True) -> nn.Module:
    """Its layers are merged: a stem, and a block."""
    norms = [nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(2)]
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norms[0], nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), norms[1], nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4),
    ).double()  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head((h + self.block(h)).tanh().mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (3,), 1),
    "batch_norm": (bn_mlp, (3,), 2),
    "stem": (conv_net, (2, 8, 8), 1),
    "conv": (lambda: conv_net(norm=False), (2, 8, 8), 1),
    "residual": (lambda: Residual().double(), (2, 6, 6), 1),  # of 16 channels: Winograd
    "group_norm": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)).double(),
        (3,),
        1,
    ),
    "recurrent": (lambda: Last(), (4, 3), 1),
}


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True).double(), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@contextmanager
def on_the_general_path(reason: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=reason):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_samples(machine: str, name: str) -> None:
    """Tasks of all sizes up to n, in one call."""
    make, sample, smallest = MODELS[name]
    n = (6, 5)
    tasks = n[0] - smallest + 2
    data = episode(sample, tasks=tasks, n=n)
    spt, qry = ragged(tasks, n[0], smallest), ragged(tasks, n[1], smallest, seed=1).flip(0)
    maml = check(make(), "cross_entropy", data, spt, qry, "fused", tolerance=1e-9)
    assert maml.backend != "reference"


@pytest.mark.parametrize("tasks", [3, 9, 17])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_many_tasks_side_by_side(machine: str, tasks: int, loss: str) -> None:
    """In the lanes of vectors, in groups that are not full."""
    data = episode(tasks=tasks, n=(5, 4), target=None if loss == "cross_entropy" else (4,))
    check(mlp(), loss, data, ragged(tasks, 5), ragged(tasks, 4, seed=1), "fused")


def test_samples_in_tiles(machine: str) -> None:
    """Of more than 128 samples, with tasks that end within a tile, at its end, and before it."""
    n = 300
    data, weights = episode(tasks=5, n=(n, n)), torch.zeros(5, n, dtype=torch.float64)
    for t, count in enumerate((n, 101, 100, 99, 1)):
        weights[t, :count] = 0.5 + torch.rand(count, dtype=torch.float64)
    check(mlp(), "cross_entropy", data, weights, weights.flip(0), "fused", steps=1)


@pytest.mark.parametrize("options", [{"checkpoint": "recompute"}, {"query_weights": [0.2, 0.3, 0.5]}])
def test_with_other_arguments(machine: str, options: dict[str, object]) -> None:
    data, spt, qry = episode(tasks=4, n=(5, 4)), ragged(4, 5), ragged(4, 4, seed=1)
    model = mlp()
    expected = Oracle(model, "cross_entropy", 0.3, 2)(data, spt, qry, options.get("query_weights"))
    maml = FusedMAML(model, 0.3, 2, backend="fused", **options)
    out = maml(*poisoned(data, spt, qry), spt_weights=spt, qry_weights=qry)
    out.loss.backward()
    torch.testing.assert_close(out.task_losses, expected["task_losses"], rtol=1e-9, atol=1e-11)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected["grads"], 1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_learned_weights(machine: str, name: str, loss: str) -> None:
    make, sample, smallest = MODELS[name]
    model, data = make(), episode(sample, tasks=5, n=(5, 4), target=None if loss == "cross_entropy" else (4,))
    spt, qry = ragged(5, 5, smallest), ragged(5, 4, smallest, seed=1)
    task_weights = torch.rand(5, dtype=torch.float64)
    own, given = ([w.clone().requires_grad_() for w in (spt, qry)] for _ in range(2))
    oracle = Oracle(model, loss, 0.3, 2)
    losses = []
    for xs, ys, xq, yq, ws, wq in zip(*data, *own, strict=True):
        losses.append(oracle.value(oracle.adapted(xs, ys, ws)[0][-1], xq, yq, wq)[0])
    (torch.stack(losses) * task_weights).sum().backward()
    maml = FusedMAML(model, 0.3, 2, loss=loss, backend="fused")
    weights = {"spt_weights": given[0], "qry_weights": given[1]}
    (3 * maml(*poisoned(data, spt, qry), task_weights=task_weights, **weights).loss).backward()
    assert_close({"w": given[0].grad / 3, "v": given[1].grad / 3}, {"w": own[0].grad, "v": own[1].grad}, 1e-9)


@pytest.mark.parametrize("options", [{}, {"checkpoint": "recompute"}])
def test_learned_weights_of_adapt_and_of_many_samples(machine: str, options: dict[str, object]) -> None:
    data, spt = episode(tasks=3, n=(300, 4)), ragged(3, 300)
    spt[1] = (torch.arange(300) < 140) * 0.5
    model = mlp()
    own, given = (spt.clone().requires_grad_() for _ in range(2))
    oracle = Oracle(model, "cross_entropy", 0.3, 2)
    path = [oracle.adapted(*part)[0] for part in zip(data[0], data[1], own, strict=True)]
    cotangents = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in oracle.leaves.items()}
    sum((p[-1][n] * cotangents[n][t]).sum() for t, p in enumerate(path) for n in p[-1]).backward()
    maml = FusedMAML(model, 0.3, 2, backend="fused", **options)
    fast = maml.adapt(*poisoned(data, spt, torch.ones(3, 4))[:2], spt_weights=given, differentiable=True)
    sum((fast[n] * c).sum() for n, c in cotangents.items()).backward()
    assert_close({"w": given.grad}, {"w": own.grad}, 1e-9)
    assert_close({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in oracle.leaves.items()}, 1e-9)


@pytest.mark.parametrize("name", ["clip_norm", "clip_value", "momentum", "adam"])
def test_learned_weights_beside_an_inner_optimizer(machine: str, name: str) -> None:
    """momentum against the oracle, the others against the general path."""
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5), ragged(3, 4, seed=1)
    options = {
        "clip_norm": {"inner_clip_norm": 0.3},
        "clip_value": {"inner_clip_value": 0.1},
        "momentum": {"inner_optimizer": optim.SGD(momentum=0.9)},
        "adam": {"inner_optimizer": optim.Adam()},
    }[name]
    model, found = mlp(), []
    for backend in ("fused", "reference"):
        given = [w.clone().requires_grad_() for w in (spt, qry)]
        maml = FusedMAML(model, 0.1, 3, backend=backend, **options)
        maml.backward(*data, spt_weights=given[0], qry_weights=given[1])
        found.append({"w": given[0].grad, "v": given[1].grad})
    assert_close(*found, 1e-9)
    if name != "momentum":
        return
    own, oracle, losses = spt.clone().requires_grad_(), Oracle(model, "cross_entropy", 0.1, 3), []
    for xs, ys, xq, yq, ws, wq in zip(*data, own, qry, strict=True):
        phi, buffer = oracle.leaves, None
        for _ in range(3):
            value, _ = oracle.value(phi, xs, ys, ws)
            g = dict(zip(phi, torch.autograd.grad(value, list(phi.values()), create_graph=True), strict=True))
            buffer = g if buffer is None else {n: 0.9 * buffer[n] + g[n] for n in g}
            phi = {n: p - 0.1 * buffer[n] for n, p in phi.items()}
        losses.append(oracle.value(phi, xq, yq, wq)[0])
    torch.stack(losses).mean().backward()
    assert_close({"w": found[0]["w"]}, {"w": own.grad}, 1e-9)


@pytest.mark.parametrize("make", [mlp, bn_mlp])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_each_inner_step_has_padding_of_its_own(machine: str, make: Callable[[], nn.Module], backend: str) -> None:
    steps = [episode(tasks=4, n=(5, 4), seed=k) for k in range(3)]
    spts, qry = [ragged(4, 5, 2, seed=k).roll(k, 0) for k in range(3)], ragged(4, 4, 2, seed=9)
    model, data = make(), steps[0]
    task_weights = torch.rand(4, dtype=torch.float64)
    own, own_qry = torch.stack(spts).requires_grad_(), qry.clone().requires_grad_()
    oracle, losses = Oracle(model, "cross_entropy", 0.3, 1), []
    theta = oracle.leaves
    for t in range(4):
        oracle.leaves = theta
        for k in range(3):
            oracle.leaves = oracle.adapted(steps[k][0][t], steps[k][1][t], own[k, t])[0][-1]
        losses.append(oracle.value(oracle.leaves, data[2][t], data[3][t], own_qry[t])[0])
    (torch.stack(losses) * task_weights).sum().backward()
    given, given_qry = own.detach().clone().requires_grad_(), qry.clone().requires_grad_()
    maml = FusedMAML(model, 0.3, 3, per_step_support=True, backend=backend)
    x, y = torch.stack([s[0] for s in steps]), torch.stack([s[1] for s in steps])
    out = maml(x, y, *data[2:], task_weights=task_weights, spt_weights=given, qry_weights=given_qry)
    out.loss.backward()
    torch.testing.assert_close(out.task_losses, torch.stack(losses).detach(), rtol=1e-9, atol=1e-11)
    assert_close({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in theta.items()}, 1e-9)
    assert_close({"w": given.grad, "v": given_qry.grad}, {"w": own.grad, "v": own_qry.grad}, 1e-9)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_learned_weights_of_a_truncated_meta_gradient(machine: str, backend: str) -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5), ragged(3, 4, seed=1)
    model = mlp()
    own, given = ([w.clone().requires_grad_() for w in (spt, qry)] for _ in range(2))
    oracle, losses = Oracle(model, "cross_entropy", 0.3, 2), []
    for xs, ys, xq, yq, ws, wq in zip(*data, *own, strict=True):
        phi = {n: p.detach() for n, p in oracle.adapted(xs, ys, ws)[0][-1].items()}
        oracle.leaves, before = {n: p.requires_grad_() for n, p in phi.items()}, oracle.leaves
        oracle.steps = 1
        losses.append(oracle.value(oracle.adapted(xs, ys, ws)[0][-1], xq, yq, wq)[0])
        oracle.leaves, oracle.steps = before, 2
    torch.stack(losses).mean().backward()
    maml = FusedMAML(model, 0.3, 3, meta_gradient="truncated", truncate=1, backend=backend)
    maml.backward(*data, spt_weights=given[0], qry_weights=given[1])
    assert_close({"w": given[0].grad, "v": given[1].grad}, {"w": own[0].grad, "v": own[1].grad}, 1e-9)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_meta_gradient_without_one_of_weights_refuses_it(backend: str) -> None:
    maml = FusedMAML(mlp(), 0.3, 2, meta_gradient="reptile", backend=backend)
    weights = torch.ones(3, 5, dtype=torch.float64)
    maml.backward(*episode(), spt_weights=weights)
    with pytest.raises(ValueError, match='spt_weights must not require grad with meta_gradient="reptile", got requi'):
        maml(*episode(), spt_weights=weights.requires_grad_())


def test_learned_query_weights_beside_a_multi_step_loss() -> None:
    data, qry = episode(tasks=3, n=(5, 4)), ragged(3, 4)
    model, ones = mlp(), torch.ones(3, 5, dtype=torch.float64)
    own, given = (qry.clone().requires_grad_() for _ in range(2))
    Oracle(model, "cross_entropy", 0.3, 2)(data, ones, own, [0.2, 0.3, 0.5])
    maml = FusedMAML(model, 0.3, 2, query_weights=[0.2, 0.3, 0.5])
    with on_the_general_path(
        "weights of query samples require grad, and there are query losses of several inner steps"
    ):
        maml.backward(*data, qry_weights=given)
    assert_close({"w": given.grad}, {"w": own.grad}, 1e-9)


def test_batch_norm_over_many_tiles_of_rows(machine: str) -> None:
    """On a GPU: more rows than one tile of the sums has, with and without a max-pool, beside a sum."""
    data = episode((2, 8, 8), tasks=3, n=(9, 7))
    spt, qry = ragged(3, 9), ragged(3, 7, seed=1).flip(0)
    for make in (conv_net, lambda: Residual().double()):
        check(make(), "cross_entropy", data, spt, qry, "fused", steps=1)


def test_a_weight_that_is_next_to_nothing_still_counts_in_batch_norm(machine: str) -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5, 3), ragged(3, 4, 3, seed=1)
    spt[0, 1] = 1e-320
    check(bn_mlp(), "cross_entropy", data, spt, qry, "fused")


def test_learned_rates(machine: str) -> None:
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5), ragged(3, 4, seed=1)
    model, rate = mlp(), nn.Parameter(torch.tensor(0.3).double())
    oracle = Oracle(model, "cross_entropy", twin := torch.tensor(0.3).double().requires_grad_(), 2)
    oracle(data, spt, qry)
    FusedMAML(model, rate, 2, backend="fused").backward(*data, spt_weights=spt, qry_weights=qry)
    assert_close({"rate": rate.grad}, {"rate": twin.grad}, 1e-9)


def test_equal_weights_are_no_weights(machine: str) -> None:
    data, model = episode(tasks=3, n=(5, 4)), bn_mlp()
    maml = FusedMAML(model, 0.3, 2, backend="fused")
    value, expected = run(maml, data)
    model.zero_grad()
    out = maml.backward(*data, spt_weights=torch.full((3, 5), 7.0).double())
    torch.testing.assert_close(out.loss, value, rtol=1e-12, atol=1e-12)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, 1e-11)


def test_tasks_are_independent_of_their_neighbours_to_the_bit(machine: str) -> None:
    data, spt, _qry = episode((2, 8, 8), tasks=6, n=(5, 4)), ragged(6, 5), ragged(6, 4, seed=1)
    maml = FusedMAML(conv_net(), 0.3, 2, backend="fused")
    every = maml.adapt(*data[:2], spt_weights=spt)
    for t in range(6):
        alone = maml.adapt(data[0][t : t + 1], data[1][t : t + 1], spt_weights=spt[t : t + 1])
        assert all(torch.equal(alone[n][0], p[t]) for n, p in every.items())


def test_masks_of_dropout_are_those_of_the_smaller_batch(machine: str) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 4)).double()
    data, spt, qry = episode(tasks=3, n=(5, 4)), ragged(3, 5), ragged(3, 4, seed=1)
    fused, general = (FusedMAML(model, 0.3, 2, backend=b) for b in ("fused", "reference"))
    results = []
    for maml in (fused, general):
        torch.manual_seed(5)
        model.zero_grad()
        out = maml.backward(*data, spt_weights=spt, qry_weights=qry)
        results.append(
            {"loss": out.loss, "logits": out.logits, **{n: p.grad.clone() for n, p in model.named_parameters()}}
        )
    assert_close(*results, 1e-9)
    torch.manual_seed(5)  # the first task, alone, on its own samples
    s, q = spt[:1, :3] * 0 + 1, qry[:1, :2] * 0 + 1
    pads = torch.zeros(1, 2).double()
    padded = fused(*(t[:1] for t in data), spt_weights=torch.cat([s, pads], 1), qry_weights=torch.cat([q, pads], 1))
    torch.manual_seed(5)
    alone = fused(data[0][:1, :3], data[1][:1, :3], data[2][:1, :2], data[3][:1, :2])
    torch.testing.assert_close(padded.loss, alone.loss, rtol=1e-12, atol=1e-12)


def test_running_statistics_on_both_paths(machine: str) -> None:
    data, spt, qry = episode((2, 8, 8), tasks=3, n=(5, 4)), ragged(3, 5), ragged(3, 4, seed=1)
    found = []
    for backend in ("fused", "reference"):
        torch.manual_seed(0)
        model = conv_net()
        maml = FusedMAML(model, 0.3, 2, backend=backend)
        x_spt, y_spt, x_qry, _ = poisoned(data, spt, qry)
        maml.update_statistics(x_spt, y_spt, x_qry, spt_weights=spt, qry_weights=qry)
        found.append({n: b.double() for n, b in model.named_buffers()})
    assert_close(*found, 1e-10)


def test_buffers_move_as_on_the_samples_alone() -> None:
    torch.manual_seed(0)
    weights = torch.zeros(2, 5, dtype=torch.float64)
    weights[0, 1:3] = weights[1, :4] = 1
    data, moved = episode((4,), tasks=2, n=(5, 5)), []
    for backend in ("fused", "reference"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)).double()
        maml = FusedMAML(model, 0.3, 1, backend=backend)
        maml.backward(*poisoned(data, weights, weights), spt_weights=weights, qry_weights=weights)
        moved.append(dict(model.named_buffers()))
    assert_close(*moved, 1e-10)


def test_float32(machine: str) -> None:
    model, twin = mlp().float(), mlp()
    twin.load_state_dict(model.state_dict())
    data, spt, qry = episode(tasks=5, n=(5, 4)), ragged(5, 5), ragged(5, 4, seed=1)
    expected = Oracle(twin, "cross_entropy", 0.3, 2)(data, spt, qry)
    single = [t.float() if t.is_floating_point() else t for t in data]
    FusedMAML(model, 0.3, 2, backend="fused").backward(*single, spt_weights=spt.float(), qry_weights=qry.float())
    assert_close({n: p.grad.double() for n, p in model.named_parameters()}, expected["grads"], 1e-5)


# -- what runs on the general path --------------------------------------------------------------------------------


class Centred(nn.Module):
    """Combines the samples of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


class Counts(Centred):
    """Depends on the number of samples, which no layer shows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * len(x)


class Branches(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() if len(x) > 2 else self.layer(x)


class LargestOfSet(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(x).amax(0)


@pytest.mark.parametrize("make", [Centred, Counts, Branches, LargestOfSet])
@pytest.mark.parametrize("n", [(5, 5), (5, 4)])
def test_models_that_look_at_the_other_samples(make: Callable[[], nn.Module], n: tuple[int, int]) -> None:
    data, spt, qry = episode(tasks=5, n=n), ragged(5, n[0]), ragged(5, n[1], seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maml = check(make(), "cross_entropy", data, spt, qry, "auto")
    assert maml.backend == "reference"
    assert any("general path" in str(w.message) for w in caught)


def test_what_is_not_fused_says_so() -> None:
    maml = FusedMAML(mlp(), 0.3, 1, loss=lambda z, y: (z - y).square().mean(1) + torch.rand(len(z)))
    with on_the_general_path("random numbers"):
        maml(*episode(target=(4,)), spt_weights=torch.ones(3, 5, dtype=torch.float64))
    assert maml.backend == "reference"


def test_one_sample_of_features_for_batch_norm() -> None:
    weights = torch.zeros(3, 5, dtype=torch.float64)
    weights[:, :3] = 1
    weights[1, 1:] = 0
    maml = FusedMAML(bn_mlp(), 0.3, 1)
    with pytest.raises(
        ValueError, match=r"x_spt must have samples that the model takes, got \[3\], 5 a task: of a task w"
    ):
        maml(*episode(), spt_weights=weights)


def test_the_op_refuses_padding_before_other_samples() -> None:
    maml, data = FusedMAML(mlp(), 0.3, 1, backend="fused"), episode()
    text = program_of(maml, data).text
    fast = [p.detach().unsqueeze(0).expand(3, *p.shape) for p in maml.model.parameters()]
    weights = torch.ones(3, 5, dtype=torch.float64)
    weights[2, 1] = 0
    for wrong, message in (
        (weights, "the weights of y must be positive first and then 0 in each task, got a 0 before in task 2"),
        (weights[:, :4], r"the weights of y must have shape \[3, 5\], one a sample, got \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.maml_cuda.loss_and_grad(fast, data[0], [data[1], wrong], text)


# -- collate ------------------------------------------------------------------------------------------------------


def tasks_of_sizes(*sizes: tuple[int, int]) -> list[tuple[Tensor, ...]]:
    return [tuple(t[0] for t in episode(tasks=1, n=size, seed=i)) for i, size in enumerate(sizes)]


def test_collate() -> None:
    tasks = tasks_of_sizes((2, 3), (5, 4), (1, 1), (4, 3))
    batch = collate(tasks)
    assert batch.order.tolist() == [1, 3, 0, 2]
    assert batch.x_spt.shape == (4, 5, 3)
    assert batch.y_qry.shape == (4, 4)
    assert batch.spt_weights.sum(1).tolist() == [5, 4, 2, 1]
    assert batch.qry_weights.sum(1).tolist() == [4, 3, 3, 1]
    assert batch.spt_weights.dtype == torch.float64
    for place, t in enumerate(batch.order.tolist()):
        for padded, own in zip(batch.sets, tasks[t], strict=True):
            assert torch.equal(padded[place, : len(own)], own)
            assert (padded[place, len(own) :] == 0).all()
    model = mlp()
    maml = FusedMAML(model, 0.3, 2, backend="fused")
    out = maml.backward(*batch.sets, **batch.weights)
    losses = [FusedMAML(model, 0.3, 2)(*(t.unsqueeze(0) for t in tasks[t])).loss.item() for t in batch.order.tolist()]
    torch.testing.assert_close(out.task_losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-11)


def test_collate_of_pytrees_and_integers() -> None:
    words = [torch.randint(9, (n, 4)) for n in (3, 2)]
    tasks = [({"words": w, "mask": None}, w[:, 0], {"words": w, "mask": None}, w[:, 0]) for w in words]
    batch = collate(tasks)
    assert batch.x_spt["mask"] is None
    assert batch.x_spt["words"].shape == (2, 3, 4)
    assert batch.spt_weights.dtype == torch.get_default_dtype()


X, Y = torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        ([], ValueError, "collate must have at least 1 task, got none"),
        ([(X, Y, X)], TypeError, r"task 0 must be \(x_spt, y_spt, x_qry, y_qry\), got tuple of 3"),
        ([X], TypeError, "task 0 must be .*, got Tensor"),
        ([(X, Y, X, Y), (X, Y[:1], X, Y)], ValueError, "y_spt of task 1 must have 2 samples like x_spt, got 1"),
        ([(X, Y, X[:0], Y[:0])], ValueError, "x_qry of task 0 must have at least 1 sample, got none"),
        ([(X, Y, X, 3)], TypeError, r"y_qry of task 0 must be a tensor \[samples, ...\], got int"),
        ([(X, Y, X, torch.tensor(3))], TypeError, r"y_qry of task 0 must be a tensor \[samples, ...\], got a scalar"),
        (
            [(X, Y, X, Y), (X, Y, X[:, :2], Y)],
            ValueError,
            r"x_qry must have samples of shape \[3\] and torch.float32 in",
        ),
        (
            [(X, Y, X, Y), (X, Y, X.double(), Y)],
            ValueError,
            "x_qry must have samples .*, got .* torch.float64 in task 1",
        ),
        (
            [(X, Y, X, Y), ((X,), Y, X, Y)],
            ValueError,
            "x_spt must have one structure in all tasks, got another .* task 1",
        ),
        ([((X, None), Y, X, Y), ((X, X), Y, X, Y)], ValueError, "must "),
    ],
)
def test_tasks_that_do_not_fit(tasks: list[object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        collate(tasks)
