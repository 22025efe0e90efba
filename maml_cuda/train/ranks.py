"""The processes that train a run together, as torchrun starts them: each takes a part of the tasks of a meta-batch.

All of them hold the same parameters, the same optimizer and the same generator, and draw the same meta-batches. The
gradient of a part is weighted by its share of the tasks, so that the sum over processes is the mean over tasks. A
FusedMAML has its whole gradient at once: nothing is left that a sum in pieces could overlap with, as in
DistributedDataParallel, so it is one message for each meta-step. Gloo and NCCL add up in an order that depends on the
number of processes and on the length of the message alone: the same number of processes gives the same bits.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maml_cuda.train.checkpoint import locate
from maml_cuda.train.interrupts import handled


class LostRank(ConnectionError):
    """Another process of the run has ended, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: the number of this process, from 0. Process 0 alone writes the run's folder and prints.
        count: how many there are.
        store: the key-value store that they share; None for one process.
    """

    rank: int = 0
    count: int = 1
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, tasks: int) -> slice:
        """The part of so many tasks that is this process's own; empty where there are fewer tasks than processes."""
        return slice(tasks * self.rank // self.count, tasks * (self.rank + 1) // self.count)

    def average(self, tensors: Sequence[Tensor], tasks: int) -> None:
        """Replaces means over this process's part of `tasks` tasks by means over all of them, in place.

        The tensors have one dtype and device, and the same shapes in all processes.
        """
        if self.count == 1:
            return
        part = self.part(tasks)
        flat = torch.cat([t.detach().flatten() for t in tensors]).mul_((part.stop - part.start) / tasks)
        self.add(flat)
        with torch.no_grad():
            for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(mean.view_as(t))

    def add(self, tensor: Tensor) -> None:
        """Replaces a tensor by its sum over the processes."""
        if self.count > 1:
            with _in_words():
                torch.distributed.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set."""
        if self.count == 1:
            return flag
        flags = torch.tensor([int(flag)])
        self.add(flags)
        return bool(flags)

    def from_first(self, value: Any = None) -> Any:
        """The value of process 0, in every process. Its tensors must be on the CPU."""
        if self.count == 1:
            return value
        with _in_words():
            torch.distributed.broadcast_object_list(box := [value], 0, device=torch.device("cpu"))
        return box[0]

    def leave(self) -> None:
        """Ends the group, once every process has asked for that: one that left earlier could cut others short. The
        first one is the last to leave, because it may be the one that holds the store.
        """
        if self.count == 1:
            return
        with _in_words():
            self.store.set(f"leaves {self.rank}", "")
            self.store.wait([f"leaves {rank}" for rank in range(self.count)])
            if self.first:
                self.store.wait([f"left {rank}" for rank in range(1, self.count)])
            else:
                self.store.set(f"left {self.rank}", "")
        torch.distributed.destroy_process_group()


ALONE = Ranks()


def count() -> int:
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> Ranks:
    """This process among those that torchrun has started: gloo for tensors on CPUs, NCCL for those on GPUs.

    Raises:
        LostRank: not all of them came.
        ValueError: this torch has no `torch.distributed`.
    """
    if count() == 1:
        return ALONE
    if not torch.distributed.is_available():
        raise ValueError(f"processes must be 1, since this torch has no torch.distributed, got {count()}")
    # While C++ waits for the others no handler of Python would run, and there is nothing to save.
    with handled({signal.SIGTERM: signal.SIG_DFL}), _in_words():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://"))
        # After a restart torchrun's store still has the addresses of the processes that were there before.
        store = PrefixStore(f"maml_cuda-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        gpus: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, **gpus)
        if not gpus:  # the end of NCCL's communicators could wait for a process that is no more
            atexit.register(_end_threads)
        return Ranks(rank, size, store)


def resume_after_a_restart(out: str | None, resume: str | None, resume_from: str | None) -> str | None:
    """The value of ``--resume``: where torchrun has started the command again, the run that it has begun itself.

    Args:
        out, resume, resume_from: the values of ``--out``, ``--resume`` and ``--from``.

    Raises:
        ValueError: a restart would not find the run, or would go back to an earlier state.
    """
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return resume
    if not (out or resume):
        raise ValueError("--out must name the run's folder for torchrun --max-restarts, so that a restart finds it")
    if resume_from is not None:
        raise ValueError(
            f"--from must be left out for torchrun --max-restarts, got {resume_from}: each restart would go back to it"
        )
    if resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and locate(Path(str(out)) / "last"):
        return out
    return resume


def _end_threads() -> None:
    """Ends gloo's threads, however this process came to its end. One that freed a tensor while the interpreter is
    being torn down would abort the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of every kind: connections, timeouts, the store
        words = str(error).strip().partition("\n")[0]
        raise LostRank(f"another process of this run has ended or cannot be reached: {words}") from error
