"""The executor for MLPs with many samples: every operation against plain autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, PolicyTarget
from maml_cuda.rl.policy import GaussianPolicy
from tests.conftest import assert_close, relative_errors, run
from tests.cuda.kernel_models import KERNELS
from tests.cuda.test_backend import runner

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

TASKS, SUPPORT, QUERY = 2, 40, 70  # with small tiles, 70 samples are two chunks


def net() -> nn.Module:
    """Too large for one block, and small enough for chunks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 100), nn.Tanh(), nn.Linear(100, 100), nn.SiLU(), nn.Linear(100, 4))


def data(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(TASKS, SUPPORT + QUERY, 3).to(dtype)
    y = torch.randint(4, (TASKS, SUPPORT + QUERY))
    return [x[:, :SUPPORT], y[:, :SUPPORT], x[:, SUPPORT:], y[:, SUPPORT:]]


def pair(model: nn.Module, *arguments: Any, **options: Any) -> tuple[FusedMAML, FusedMAML]:
    """The fused one in float32, and plain autograd in float64."""
    twin = copy.deepcopy(model).double()
    return FusedMAML(model, *arguments, backend="fused", **options), FusedMAML(
        twin, *arguments, backend="reference", **options
    )


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"adapt_params": lambda n: n.startswith("4")}])
def test_meta_gradient(options: dict[str, Any]) -> None:
    maml, oracle = pair(net(), 0.1, 2, loss="cross_entropy", **options)
    loss, grads = run(maml, data())
    assert runner(maml, data()).executor == "chunked"
    expected_loss, expected = run(oracle, data(torch.float64))
    assert abs(loss - expected_loss) < 1e-5
    assert_close({n: g.double() for n, g in grads.items()}, expected, 2e-5)


def test_learned_rates_and_the_multi_step_loss() -> None:
    model = net()
    results = []
    for fused in (True, False):
        dtype = torch.float32 if fused else torch.float64
        rates = {n: nn.Parameter(torch.full((2,), 0.1, dtype=dtype)) for n, _ in model.named_parameters()}
        backend = "fused" if fused else "reference"
        twin = copy.deepcopy(model).to(dtype)
        maml = FusedMAML(twin, rates, 2, loss="cross_entropy", query_weights=[0.2, 0.3, 0.5], backend=backend)
        maml(*data(dtype)).loss.backward()
        results.append({n: p.grad.double() for n, p in maml.named_parameters() if p.grad is not None})
    assert_close(*results, 2e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_building_blocks(loss: str) -> None:
    maml, oracle = pair(net(), 0.1, 2, loss=loss)
    x, labels, x_qry, _ = data()
    y = labels if loss == "cross_entropy" else torch.randn(TASKS, SUPPORT, 4)
    to = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    fast, exact = maml.adapt(x, y), oracle.adapt(to(x), to(y))
    assert_close({n: p.double() for n, p in fast.items()}, exact, 2e-5)
    own = {n: p.detach().double() for n, p in fast.items()}
    v = {n: torch.randn_like(p) for n, p in fast.items()}
    calls: list[Callable[[FusedMAML, dict, dict, Callable], Any]] = [
        lambda m, p, d, c: {"prediction": m.predict(p, c(x_qry))},
        lambda m, p, d, c: {"losses": m.loss_and_grad(p, c(x), c(y))[0]},
        lambda m, p, d, c: m.loss_and_grad(p, c(x), c(y))[1],
        lambda m, p, d, c: m.hvp(p, c(x), c(y), d),
    ]
    for call in calls:
        got = call(maml, fast, v, lambda t: t)
        expected = call(oracle, own, {n: t.double() for n, t in v.items()}, to)
        assert max(relative_errors({n: g.double() for n, g in got.items()}, expected).values()) < 3e-5
    grads = []
    for m, p, c in ((maml, fast, lambda t: t), (oracle, own, to)):
        leaves = {n: t.detach().clone().requires_grad_() for n, t in p.items()}
        torch.sin(m.predict(leaves, c(x_qry))).sum().backward()
        grads.append({n: t.grad.double() for n, t in leaves.items()})
    assert_close(*grads, 2e-5)


def test_policy() -> None:
    """The policy of the MAML paper: the meta-gradient and the Fisher-vector product of TRPO."""
    torch.manual_seed(0)
    maml, oracle = pair(GaussianPolicy(2, 2, width=100), 0.1, 1, loss="gaussian_policy_gradient")

    def sets(dtype: torch.dtype) -> list[Any]:
        torch.manual_seed(1)
        found: list[Any] = []
        for n in (SUPPORT, QUERY):
            found += [
                torch.randn(TASKS, n, 2).to(dtype),
                PolicyTarget(torch.randn(TASKS, n, 2).to(dtype), torch.randn(TASKS, n).to(dtype)),
            ]
        return found

    single, double = sets(torch.float32), sets(torch.float64)
    v = {n: torch.randn_like(p) for n, p in maml.model.named_parameters()}
    assert_close(
        *({n: g.double() for n, g in run(m, d)[1].items()} for m, d in ((maml, single), (oracle, double))), 2e-5
    )
    got = maml.fisher_vector_product(*single[:3], v)
    expected = oracle.fisher_vector_product(*double[:3], {n: t.double() for n, t in v.items()})
    assert_close({n: p.double() for n, p in got.items()}, expected, 2e-5)


def test_the_bits_do_not_depend_on_the_number_of_tasks() -> None:
    maml = FusedMAML(net(), 0.1, 1, loss="cross_entropy", backend="fused")
    x, y, x_qry, y_qry = data()
    both = maml(x, y, x_qry, y_qry)
    for t in range(TASKS):
        one = maml(x[t : t + 1], y[t : t + 1], x_qry[t : t + 1], y_qry[t : t + 1])
        assert torch.equal(one.task_losses[0], both.task_losses[t])
        assert torch.equal(one.logits[0], both.logits[t])


def test_a_wrong_label_is_named_by_its_place_in_the_set(capfd: pytest.CaptureFixture[str]) -> None:
    maml = FusedMAML(net(), 0.1, 1, loss="cross_entropy", backend="fused")
    tensors = data()
    tensors[3][1, 66] = 7
    with pytest.raises(RuntimeError):
        maml(*tensors)
    assert (
        "cross_entropy: the label of sample 66 of task 1 is 7, expected 0 to 3 for 4 classes" in capfd.readouterr().out
    )
