"""The device that ``--device`` names."""

from __future__ import annotations

import os

import torch

CPU = torch.device("cpu")


def only_on_cpu(job: str, device: torch.device) -> None:
    """Raises ValueError for another device, of a reinforcement-learning job."""
    if device != CPU:
        raise ValueError(f"device must be cpu for {job}, whose episodes run there, got {device}")


def device_of(words: str) -> torch.device:
    """The device of a command.

    Args:
        words: cpu, cuda or cuda:N. Under torchrun, cuda is another GPU for each process of a machine.

    Raises:
        ValueError: the words name no device, or one that this machine or this torch does not have.
    """
    try:
        device = torch.device(words)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {words}")
    if not torch.backends.cuda.is_built():
        raise ValueError(f"device must be cpu, since this torch ({torch.__version__}) has no CUDA, got {words}")
    if not torch.cuda.is_available():
        raise ValueError(f"device must be cpu, since torch finds no GPU here, got {words}")
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > 1 and device.index is not None:
        raise ValueError(f"device must be cuda for {local} processes, each of which takes its own GPU, got {words}")
    if local > gpus:
        raise ValueError(f"processes must be at most {gpus} on this machine, one for each GPU, got {local}")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None and local > 1 else device.index or 0
    if index >= gpus:
        raise ValueError(f"device must be cuda:0 to cuda:{gpus - 1}, the GPUs of this machine, got {words}")
    torch.cuda.set_device(index)  # of NCCL, and of streams
    return torch.device("cuda", index)
