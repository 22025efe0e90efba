"""A task's numbers do not depend on the number of threads or on other tasks; task weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from tests.engine.nets import BACKENDS, close, episode, equal, image_net, learned, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    maml = FusedMAML(image_net(dtype), nn.Parameter(torch.tensor(0.1, dtype=dtype)), 2)
    data = episode((2, 7, 6), tasks=5, n=(7, 6), dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = maml(*data)
        results.append((step(maml, data), out, maml.adapt(*data[:2])))
    for got, out, fast in results[1:]:
        equal(got, results[0][0])
        assert torch.equal(out.logits, results[0][1].logits)
        assert torch.equal(out.support_losses, results[0][1].support_losses)
        assert all(torch.equal(t, results[0][2][name]) for name, t in fast.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "sample"), [(net, (3,)), (image_net, (2, 7, 6))])
def test_a_task_does_not_feel_its_neighbours(make: Callable, sample: tuple[int, ...], dtype: torch.dtype) -> None:
    maml = FusedMAML(make(dtype), 0.1, 2)
    data = episode(sample, tasks=5, n=(6, 5), dtype=dtype)
    out, fast = maml(*data), maml.adapt(*data[:2])
    for t in range(5):
        own = [d[t : t + 1] for d in data]
        alone = maml(*own)
        assert torch.equal(alone.task_losses[0], out.task_losses[t])
        assert torch.equal(alone.logits[0], out.logits[t])
        assert torch.equal(alone.support_losses[0], out.support_losses[t])
        for name, p in maml.adapt(*own[:2]).items():
            assert torch.equal(p[0], fast[name][t]), name
        picked = torch.zeros(5, dtype=dtype)
        picked[t] = 1
        in_company = step(maml, data, task_weights=picked)[1]
        for name, g in step(maml, own)[1].items():
            assert torch.equal(in_company[name], g), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tasks", [1, 3, 33])
def test_task_weights(tasks: int, backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    data = episode(tasks=tasks)
    weights = torch.randn(tasks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = step(maml, data)
    uniform = step(maml, data, task_weights=torch.full((tasks,), 1 / tasks).double())
    loss, grads = step(maml, data, task_weights=weights)
    losses = maml(*data).task_losses
    close(loss, (weights * losses).sum())
    close(plain[0], losses.mean())
    total: dict[str, Tensor] = {}
    for t in range(tasks):
        for name, g in step(maml, [d[t : t + 1] for d in data])[1].items():
            total[name] = total.get(name, torch.zeros_like(g)) + weights[t] * g
    for name, g in grads.items():
        close(g, total[name], name)
        torch.testing.assert_close(uniform[1][name], plain[1][name], rtol=1e-5, atol=1e-7)  # 1 / tasks in float32


@pytest.mark.parametrize("tasks", [1, 3, 33])
def test_tasks_against_the_reference(tasks: int) -> None:
    model, data = net(), episode(tasks=tasks)
    loss, truth = reference.meta_gradient(model, "cross_entropy", *data, 0.3, 2)
    got = step(FusedMAML(model, 0.3, 2), data)
    close(got[0], loss)
    for name, g in truth.items():
        close(got[1][f"model.{name}"], g, name)
