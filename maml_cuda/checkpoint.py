"""Checkpoints: folders that are replaced whole, so that a crash at any moment leaves a complete one.

A folder holds tensors in safetensors files and everything else in JSON; nothing is ever unpickled:

    model.safetensors      state_dict of the FusedMAML: ``model.*`` and any learned ``inner_lr*``
    training.safetensors   ``optimizer.<parameter>.<name>``, ``generator`` and ``running``
    checkpoint.json        iteration, seconds, settings, best validation so far

A folder that is being written has the ending ``.new``, one that is being replaced ``.old``; ``locate`` finds
the complete one after a crash between the two renames.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

FORMAT = 1
MODEL, TRAINING, INFO = "model.safetensors", "training.safetensors", "checkpoint.json"


def write_file(path: Path, content: bytes) -> None:
    """Writes ``path`` whole or not at all: beside, to the disk, then renamed over the old file."""
    beside = path.with_name(path.name + ".new")
    _write_to_disk(beside, content)
    os.replace(beside, path)
    _sync_folder(path.parent)


def save_checkpoint(folder: Path, model: dict[str, Tensor], training: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Replaces ``folder`` by a checkpoint of these tensors and this JSON-able ``info``."""
    new, old = _beside(folder)
    if not folder.exists() and old.exists():  # an earlier crash fell between the two renames below
        os.replace(old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    _write_to_disk(new / MODEL, save(_plain(model)))
    _write_to_disk(new / TRAINING, save(_plain(training)))
    _write_to_disk(new / INFO, (json.dumps({"format": FORMAT} | info, indent=1) + "\n").encode())
    _sync_folder(new)
    if folder.exists():  # rename(2) does not replace a folder that holds files
        os.replace(folder, old)
    os.replace(new, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def locate(folder: Path) -> Path | None:
    """Where the complete checkpoint of ``folder`` stands at this moment, None if there is none."""
    for candidate in (folder, _beside(folder)[1]):
        if (candidate / INFO).is_file():
            return candidate
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """``(model, training, info)`` as saved. FileNotFoundError if there is none, ValueError if it is newer."""
    complete = locate(folder)
    if complete is None:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    info = json.loads((complete / INFO).read_text())
    if info.get("format") != FORMAT:
        raise ValueError(f"{complete} must be a checkpoint of format {FORMAT}, got {info.get('format')}")
    return load_file(complete / MODEL), load_file(complete / TRAINING), info


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The state as flat names, ``optimizer.<parameter's index>.<name>``; every entry must be a tensor."""
    state = optimizer.state_dict()["state"] if optimizer else {}
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer | None, tensors: dict[str, Tensor]) -> None:
    """Puts the state of ``optimizer_tensors`` back; rate and betas stay those of ``optimizer``."""
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, as tied parameters do.
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _write_to_disk(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
