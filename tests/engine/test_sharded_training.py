"""torch's own ways to share a training among processes, around a FusedMAML: as one process computes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.processes import end, start

# Two processes have 3 and 2 of 5 tasks. Each compares itself with a FusedMAML of its own that sees all tasks.
SCRIPT = """
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maml_cuda import FusedMAML
from maml_cuda.train.ranks import join
from tests.conftest import episode

torch.set_num_threads(1)
ranks = join(torch.device("cpu"))
rank = dist.get_rank()
TASKS, mine = 5, slice(0, 3) if rank == 0 else slice(3, 5)
weights = torch.full((mine.stop - mine.start,), 2 / TASKS, dtype=torch.float64)  # processes / tasks


def data(step):
    return episode(tasks=TASKS, seed=step)


def part(step):
    return [t[mine] for t in data(step)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 4)).double()


def alone():
    maml = FusedMAML(net(), nn.Parameter(torch.tensor([0.3, 0.2], dtype=torch.float64)), 2, backend="fused")
    return maml, torch.optim.Adam(maml.parameters(), lr=0.01)


def train(maml, step_of, optimizer, whole=lambda p: p):
    expected, its_optimizer = alone()
    for step in range(3):
        optimizer.zero_grad()
        step_of(*part(step), task_weights=weights).loss.backward()
        optimizer.step()
        its_optimizer.zero_grad()
        expected(*data(step)).loss.backward()
        its_optimizer.step()
        for (name, p), q in zip(maml.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(whole(p).detach(), q.detach(), rtol=1e-9, atol=1e-9, msg=name)


def ddp():
    maml, optimizer = alone()
    train(maml, DistributedDataParallel(maml), optimizer)


def zero():
    with warnings.catch_warnings():  # of torch's own import
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    maml, _ = alone()
    optimizer = ZeroRedundancyOptimizer(maml.parameters(), torch.optim.Adam, lr=0.01)
    train(maml, DistributedDataParallel(maml), optimizer)
    assert 0 < len(optimizer.optim.state) < len(list(maml.parameters()))


def fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    maml, _ = alone()
    maml = fully_shard(maml, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
    train(maml, maml, optimizer, lambda p: p.full_tensor())
    weight = dict(maml.named_parameters())["model.0.weight"]
    assert weight.to_local().numel() < weight.numel()
    assert optimizer.state[weight]["exp_avg"].to_local().shape == weight.to_local().shape
    for method, arguments in ((maml.adapt, part(0)[:2]), (maml.backward, part(0))):
        try:  # the kernels never see a part of a parameter
            method(*arguments)
        except RuntimeError as error:
            assert "got mixed torch.Tensor and DTensor" in str(error)
        else:
            raise AssertionError(method)
    full = {name: p.full_tensor() for name, p in maml.named_parameters()}
    maml.unshard()
    fast = maml.adapt(*part(0)[:2])
    maml.reshard()
    plain = alone()[0]
    plain.load_state_dict(full, strict=False)
    torch.testing.assert_close(fast, plain.adapt(*part(0)[:2]), rtol=1e-12, atol=1e-12)


def statistics():
    maml, expected = alone()[0], alone()[0]
    for step in range(3):
        x_spt, y_spt, x_qry, _ = part(step)
        maml.update_statistics(x_spt, y_spt, x_qry)
        for buffer in maml.buffers():
            if buffer.is_floating_point():
                buffer.mul_(weights.sum() / 2)  # the share of the tasks
                dist.all_reduce(buffer)
        x_spt, y_spt, x_qry, _ = data(step)
        expected.update_statistics(x_spt, y_spt, x_qry)
    for (name, b), c in zip(maml.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-12, msg=name)


for case in (ddp, zero, fsdp2, statistics):
    case()
    print(case.__name__, flush=True)
ranks.leave()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp_zero_and_fsdp2_train_as_one_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    statuses = end(start(2, tmp_path / "script.py", log=tmp_path / "log"))
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert statuses == [0, 0], "\n".join(said)
    assert said == ["ddp\nzero\nfsdp2\nstatistics\n"] * 2
