"""support_batch: each inner step sees a minibatch of the support set. The oracle takes the samples that are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maml_cuda
from maml_cuda import FusedMAML, minibatches, reference
from tests.conftest import assert_close, episode
from tests.engine import policy_models
from tests.engine.unrolled import conv_net, mlp, mse, unrolled

BACKENDS = ("fused", "reference")


def numbers(seed: int, tasks: int, samples: int, batch: int, steps: int) -> Tensor:
    return minibatches.minibatches(torch.tensor(seed), tasks, samples, batch, steps)


@pytest.mark.parametrize(("samples", "batch"), [(12, 4), (13, 4), (7, 7), (5, 3), (9, 1)])
def test_an_epoch_has_no_sample_twice(samples, batch):
    each, tasks, epochs = samples // batch, 5, 3
    chosen = numbers(1, tasks, samples, batch, each * epochs)
    assert chosen.shape == (tasks, each * epochs, batch)
    for of_task in chosen:
        for e in range(epochs):
            epoch = of_task[e * each : (e + 1) * each].flatten().tolist()
            assert len(set(epoch)) == each * batch
            assert set(epoch) <= set(range(samples))


def test_the_samples_depend_on_the_seed_the_task_and_the_epoch_alone():
    chosen = numbers(1, 5, 40, 8, 12)
    assert torch.equal(chosen[:2], numbers(1, 2, 40, 8, 12))
    assert torch.equal(chosen[:, :7], numbers(1, 5, 40, 8, 7))
    assert not torch.equal(chosen, numbers(2, 5, 40, 8, 12))
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0, :5].sort()[0], chosen[0, 5:10].sort()[0])


def test_every_sample_is_equally_likely_in_every_place():
    """Of 4000 permutations of 5: a chi-squared statistic of 16 degrees of freedom, below its 99.99 % quantile."""
    places = numbers(3, 4000, 5, 1, 5).squeeze(-1)
    counts = torch.stack([F.one_hot(places[:, k], 5).sum(0) for k in range(5)]).double()
    assert ((counts - 800) ** 2 / 800).sum() < 45


def drawn(data: list[Any], batch: int, steps: int) -> list[Any]:
    """The data of per_step_support that a call draws at this state of torch's generator."""
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    chosen = minibatches.minibatches(seed, len(data[0]), data[0].shape[1], batch, steps)
    of_tasks = [torch.stack([torch.stack([d[t][i] for i in chosen[t]]) for t in range(len(d))]) for d in data[:2]]
    return [d.transpose(0, 1) for d in of_tasks] + data[2:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tasks", [2, 9])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_a_meta_step(machine, tasks, backend, net):
    model = mlp(3, 7, 4) if net == "mlp" else conv_net()
    data = episode((3,) if net == "mlp" else (2, 6, 6), tasks=tasks if net == "mlp" else 2, n=(7, 4))
    maml = FusedMAML(model, 0.1, 4, support_batch=3, backend=backend)
    for seed in range(2):  # the second call skips the checks
        torch.manual_seed(seed)
        truth, _, _ = unrolled(model, F.cross_entropy, drawn(data, 3, 4), lambda *_: 0.1, 4)
        expected = torch.autograd.grad(truth, list(model.parameters()))
        maml.zero_grad()
        torch.manual_seed(seed)
        maml.backward(*data)
        names = [n for n, _ in model.named_parameters()]
        assert_close(
            {n: p.grad for n, p in model.named_parameters()}, dict(zip(names, expected, strict=True)), 1e-9
        )  # fmt: skip
        torch.manual_seed(seed)
        value, of_reference = reference.meta_gradient(model, "cross_entropy", *data, 0.1, 4, support_batch=3)
        assert_close({"loss": value}, {"loss": truth.detach()}, 1e-9)
        assert_close(of_reference, dict(zip(names, expected, strict=True)), 1e-9)


def test_adapt_step_by_step_and_statistics_of_other_methods(machine):
    model, data = mlp(3, 7, 2), episode(target=(2,), n=(7, 4))
    maml = FusedMAML(model, 0.1, 3, loss="mse", support_batch=2, backend="fused")
    torch.manual_seed(5)
    path = list(maml.inner_loop(*data[:2], 5))
    for k in (0, 1, 3, 5):
        torch.manual_seed(5)
        fast = maml.adapt(*data[:2], steps=k)
        for name, p in fast.items():
            assert torch.equal(p, path[k][name])
    maml_cuda.gradcheck(maml, *data)
    assert maml.memory_estimate(data[0], data[2]) > 0


def test_a_fisher_matrix_is_of_one_draw(machine):
    data = policy_models.episode("gaussian", n_support=6)
    model, loss = policy_models.policy("gaussian"), policy_models.LOSSES["gaussian"]
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    found = []
    for backend in BACKENDS:
        product = None
        maml = FusedMAML(model, 0.1, 3, loss=loss, support_batch=4, backend=backend)
        torch.manual_seed(2)
        product = maml.fisher(*data[:3])
        first = product(v)
        assert_close(product(v), first, 1e-14)
        torch.manual_seed(2)
        assert_close(maml.fisher_vector_product(*data[:3], v), first, 1e-12)
        found.append(first)
    assert_close(*found, 1e-9)


def test_learned_data_and_weights_are_drawn_with_their_samples():
    model = mlp(3, 7, 2)
    data = [d.requires_grad_() for d in episode(target=(2,), n=(7, 4))]
    torch.manual_seed(1)
    truth, _, _ = unrolled(model, mse, drawn(data, 3, 2), lambda *_: 0.1, 2)
    expected = dict(zip("abcd", torch.autograd.grad(truth, data), strict=True))
    for backend in BACKENDS:
        maml = FusedMAML(model, 0.1, 2, loss="mse", support_batch=3, backend=backend)
        torch.manual_seed(1)
        got = torch.autograd.grad(maml(*data).loss, data)
        assert_close(dict(zip("abcd", got, strict=True)), expected, 1e-9)
    whole = FusedMAML(model, 0.1, 1, loss="mse", support_batch=7, backend="reference")
    weights = torch.rand(3, 7).double()
    plain = FusedMAML(model, 0.1, 1, loss="mse", backend="reference")
    data = [d.detach() for d in data]
    assert_close(
        {"loss": whole(*data, spt_weights=weights).loss}, {"loss": plain(*data, spt_weights=weights).loss}, 1e-12
    )


def test_errors(machine):
    for value, error, message in (
        (0, ValueError, "support_batch must be at least 1, got 0"),
        (True, TypeError, "support_batch must be an int or None, got bool"),
        (2.0, TypeError, "support_batch must be an int or None, got float"),
    ):
        with pytest.raises(error, match=message):
            FusedMAML(mlp(3, 2), 0.1, 2, support_batch=value)
    with pytest.raises(ValueError, match="support_batch must be None with per_step_support=True"):
        FusedMAML(mlp(3, 2), 0.1, 2, support_batch=2, per_step_support=True)
    x_spt, y_spt, x_qry, y_qry = episode()
    maml = FusedMAML(mlp(3, 7, 4), 0.1, 2, support_batch=6, backend="fused")
    with pytest.raises(ValueError, match="support_batch must be at most the 5 samples of x_spt, got 6"):
        maml(x_spt, y_spt, x_qry, y_qry)
    maml = FusedMAML(mlp(3, 7, 4), 0.1, 2, support_batch=2, backend="fused")
    with pytest.raises(ValueError, match="y_spt must have 3 tasks of 5 samples like x_spt with support_batch"):
        maml(x_spt, y_spt[:, :4], x_qry, y_qry)
    with pytest.raises(
        ValueError, match=r"y_spt must have shape \[tasks, samples, ...\] with support_batch, got \[3\]"
    ):
        maml(x_spt, y_spt[:, 0], x_qry, y_qry)
