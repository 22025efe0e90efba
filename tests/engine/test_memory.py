"""Memory of a call: memory_estimate, chunks of tasks that bound it, and checkpoint="recompute".

With "recompute" the memory does not grow with the inner steps, except by the parameters of each step.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.engine import cpu_workspace
from maml_cuda.train.models import conv4_max_pool
from tests import conftest
from tests.conftest import run

ROOT = Path(__file__).resolve().parents[2]


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3),
    ).double()  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 3)).double()


SAMPLES = {conv: (2, 6, 8), mlp: (2,)}


def episode(make, tasks: int) -> list[Tensor]:
    return conftest.episode(SAMPLES[make], tasks=tasks, n=(4, 6), classes=3)


@pytest.mark.parametrize("make", SAMPLES)
@pytest.mark.parametrize("learned", [False, True])
def test_recompute_takes_less_and_changes_no_bit(make, learned, machine):
    data = episode(make, tasks=3)
    model = make()
    rate = nn.Parameter(torch.tensor(0.1)) if learned else 0.1
    keeps, recomputes = (FusedMAML(model, rate, 4, checkpoint=c, backend="fused") for c in (None, "recompute"))
    for a, b in zip(run(keeps, data), run(recomputes, data), strict=True):
        for name, value in a.items() if isinstance(a, dict) else {"loss": a}.items():
            assert torch.equal(value, b[name] if isinstance(b, dict) else b)
    estimates = [maml.memory_estimate(data[0], data[2]) for maml in (keeps, recomputes)]
    if make is mlp and machine != "cpu":  # its states are in shared memory, not in the workspace
        assert estimates[1] == estimates[0]
    else:
        assert estimates[1] < estimates[0]
    if rate == 0.1:
        fast, again = (maml.adapt(*data[:2], differentiable=True) for maml in (keeps, recomputes))
        for name in fast:
            assert torch.equal(fast[name], again[name])


@pytest.mark.usefixtures("machine")
def test_a_step_more_takes_one_parameter_vector_more():
    x_spt, _, x_qry, _ = episode(conv, tasks=1)
    model = conv()

    def taken(steps: int, **options: str) -> int:
        return FusedMAML(model, 0.1, steps, backend="fused", **options).memory_estimate(x_spt, x_qry)

    vector = 8 * sum(-(-p.numel() // 16) * 16 for p in model.parameters())  # each rounded up to whole cache lines
    assert taken(9, checkpoint="recompute") - taken(8, checkpoint="recompute") == vector
    assert taken(9) - taken(8) > 2 * vector


@pytest.mark.usefixtures("machine")
def test_gradients_of_data_count():
    x_spt, _, x_qry, _ = episode(conv, tasks=3)
    learned_spt, learned_qry = (x.clone().requires_grad_() for x in (x_spt, x_qry))

    def taken(steps: int, *x: Tensor, **options: object) -> int:
        return FusedMAML(conv(), 0.1, steps, backend="fused", checkpoint="recompute", **options).memory_estimate(*x)

    plain = taken(5, x_spt, x_qry) - taken(4, x_spt, x_qry)
    learned = taken(5, learned_spt, learned_qry) - taken(4, learned_spt, learned_qry)
    assert learned - plain == 8 * x_spt.numel()  # a copy for each inner step
    assert taken(4, learned_spt, learned_qry) == taken(4, x_spt, learned_qry) + 4 * 8 * x_spt.numel()
    constant = taken(4, learned_spt, x_qry, first_order=True)  # has no gradient of the support set
    assert constant == taken(4, x_spt, x_qry, first_order=True)


def test_many_tasks_take_what_some_do():
    x_spt, _, x_qry, _ = episode(conv, tasks=1)
    maml = FusedMAML(conv(), 0.1, 3, backend="fused")
    taken = [
        maml.memory_estimate(x_spt.expand(t, *x_spt.shape[1:]), x_qry.expand(t, *x_qry.shape[1:])) for t in (32, 5000)
    ]
    assert taken[0] == taken[1]


def test_a_call_works_in_what_the_call_before_it_left():
    """A call reuses or grows the workspace of the last one; two threads have one each; an error keeps none."""
    small, large = episode(conv, tasks=1), episode(conv, tasks=4)
    maml = FusedMAML(conv(), 0.1, 2, backend="fused")
    cpu_workspace.drop()
    expected = [run(maml, data) for data in (large, small)]
    (kept,) = cpu_workspace._kept
    assert kept.numel() >= maml.memory_estimate(large[0], large[2])
    for data, bits in zip((large, small, large), (expected[0], expected[1], expected[0]), strict=True):
        kept.fill_(255)  # nan
        assert torch.equal(run(maml, data)[0], bits[0])
        assert cpu_workspace._kept[0] is kept
    first, second = cpu_workspace.take(8), cpu_workspace.take(8)
    assert first is kept
    assert second is not kept
    cpu_workspace.keep(second)
    run(maml, large)
    assert cpu_workspace._kept[0].numel() > second.numel()
    with pytest.raises(ValueError, match="label"):
        maml(large[0], large[1] + 7, *large[2:])
    assert not cpu_workspace._kept


def test_two_hundred_steps_of_the_papers_net_in_two_gigabytes():
    """132 KB of parameters a step, and more than 192 MB of states, which are recomputed by default."""
    x_spt, x_qry = torch.empty(4, 5, 3, 84, 84), torch.empty(4, 75, 3, 84, 84)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = conv4_max_pool(5, 32, 3, 84, 84)
        taken = FusedMAML(model, 0.01, 200, backend="fused").memory_estimate(x_spt, x_qry)
        asked = FusedMAML(model, 0.01, 200, checkpoint="recompute", backend="fused").memory_estimate(x_spt, x_qry)
    finally:
        torch.set_num_threads(threads)
    assert taken == asked < 500e6


MEASURE = """
import torch
from maml_cuda.benchmark.memory import peak_bytes
from maml_cuda import FusedMAML
from maml_cuda.train.models import conv4_max_pool

torch.set_num_threads(2)
data = [t for _ in range(2) for t in (torch.randn(2, 30, 3, 40, 40), torch.randint(5, (2, 30)))]
for steps, checkpoint in ((0, None), (2, "recompute"), (2, None)):
    maml = FusedMAML(conv4_max_pool(5, 16, 3, 40, 40), 0.01, steps, checkpoint=checkpoint, backend="fused")
    step = lambda: maml(*data).loss.backward()
    step()
    # The most of a few steps: on a busy machine one thread may run both tasks, and the other take no memory.
    print(max(peak_bytes(step) for _ in range(5)), maml.memory_estimate(data[0], data[2]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the resident memory from /proc")
def test_the_estimate_is_what_becomes_resident():
    """Measured in a new process; they agree within a tenth."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, cwd=ROOT)
    for line in done.stdout.splitlines():
        measured, estimate = map(int, line.split())
        assert estimate > 10e6
        assert 0.9 * measured < estimate < 1.1 * measured, done.stdout
