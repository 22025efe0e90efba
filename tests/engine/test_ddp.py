"""DistributedDataParallel averages the meta-gradients of the processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from maml_cuda import FusedMAML, reference
from tests.engine.nets import episode, learned, net

pytestmark = pytest.mark.usefixtures("one_thread")

# Each rank is a new interpreter, because a process that has run gloo or OpenMP threads must not be forked.
WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", processes), rank=rank, world_size=processes)
maml, data = torch.load(f"{folder}/input", weights_only=False)
if rank == 1:  # DDP sends rank 0's parameters to all
    with torch.no_grad():
        for p in maml.parameters():
            p.add_(1)
share = len(data[0]) // processes
parallel = DistributedDataParallel(maml)
parallel(*[t[share * rank : share * (rank + 1)] for t in data]).loss.backward()
torch.save([p.grad for p in maml.parameters()], f"{folder}/gradients{rank}")
print("done", flush=True)
sys.stdin.read()  # until killed: a rank that leaves first may cut the other one short
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_ddp_averages_the_tasks(processes: int, tmp_path: Path) -> None:
    model, inner_lr = net(), learned(0.3, 0.2)
    torch.save((FusedMAML(model, inner_lr, 2), episode(tasks=4)), tmp_path / "input")
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(processes), str(tmp_path)], stdin=pipe, stdout=pipe, text=True
        )
        for rank in range(processes)
    ]
    deadline = threading.Timer(120, lambda: [worker.kill() for worker in workers])
    deadline.start()
    try:
        assert [worker.stdout.readline() for worker in workers] == ["done\n"] * processes
    finally:
        deadline.cancel()
        for worker in workers:
            worker.kill()
            worker.communicate()
    _, truth = reference.meta_gradient(model, "cross_entropy", *episode(tasks=4), inner_lr, 2)
    expected = [truth["inner_lr"], *(truth[name] for name, _ in model.named_parameters())]
    for rank in range(processes):
        for got, g in zip(torch.load(tmp_path / f"gradients{rank}"), expected, strict=True):
            torch.testing.assert_close(got, g, rtol=1e-10, atol=1e-14)
