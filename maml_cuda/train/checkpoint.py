"""Checkpoints: folders that are replaced whole, so that a crash at any moment leaves a complete one.

A folder holds tensors in safetensors files and everything else in JSON; nothing is ever unpickled:

    model.safetensors      state_dict of the FusedMAML: ``model.*`` and any learned ``inner_lr*``
    training.safetensors   ``optimizer.<parameter>.<name>``, ``generator`` and ``running``
    checkpoint.json        what ``run_info.py`` and the training say of the run, and sha256 of the other two

A folder that is being written has the ending ``.new``, one that is being replaced ``.old``; ``locate`` finds
the complete one after a crash between the two renames. What cannot be written whole, as on a full disk, is removed.
"""

import json
import os
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from maml_cuda.warn import warn

FORMAT = 1
MODEL, TRAINING, INFO = "model.safetensors", "training.safetensors", "checkpoint.json"


class UnusableCheckpoint(Exception):
    """``folder`` is the checkpoint that cannot be used."""

    def __init__(self, folder: Path, words: str) -> None:
        super().__init__(words)
        self.folder = folder


class MissingCheckpoint(UnusableCheckpoint, FileNotFoundError):
    pass


class DamagedCheckpoint(UnusableCheckpoint, ValueError):
    pass


def write_file(path: Path, content: bytes) -> None:
    """Writes ``path`` whole or not at all: beside, to the disk, then renamed over the old file. OSError names it."""
    beside = path.with_name(path.name + ".new")
    try:
        _write_to_disk(beside, content)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise with_path(error, path) from None


def with_path(error: OSError, path: Path) -> OSError:
    """The error with the path that it is about: those of writing, as on a full disk, have none."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def save_checkpoint(folder: Path, model: dict[str, Tensor], training: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Replaces ``folder`` by a checkpoint of these tensors and this JSON-able ``info``. After an OSError, which names
    the folder, the old checkpoint stands, or the new one."""
    files = {MODEL: save(_plain(model)), TRAINING: save(_plain(training))}
    checksums = {name: sha256(content).hexdigest() for name, content in files.items()}
    text = json.dumps({"format": FORMAT} | info | {"sha256": checksums}, indent=1) + "\n"
    new, old = _beside(folder)
    try:
        if not folder.exists() and old.exists():  # an earlier crash fell between the two renames below
            os.replace(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        for name, content in (files | {INFO: text.encode()}).items():
            _write_to_disk(new / name, content)
        _sync_folder(new)
        if folder.exists():  # rename(2) does not replace a folder that holds files
            os.replace(folder, old)
        os.replace(new, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        if not folder.exists() and old.exists():
            os.replace(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        raise with_path(error, folder) from None
    shutil.rmtree(old, ignore_errors=True)


def locate(folder: Path) -> Path | None:
    """Where the complete checkpoint of ``folder`` stands at this moment, None if there is none."""
    for candidate in (folder, _beside(folder)[1]):
        if (candidate / INFO).is_file():
            return candidate
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """``(model, training, info)`` as saved.

    Raises:
        MissingCheckpoint: there is none (a FileNotFoundError).
        DamagedCheckpoint: a file is missing, cut short, changed, or holds numbers that are not finite (a ValueError).
        ValueError: it is of a newer format.

    Warns where an older version wrote it without checksums.
    """
    model, training, info = _load(folder, (MODEL, TRAINING))
    return model, training, info


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``(model, info)``: ``load_checkpoint`` without what only training needs."""
    model, info = _load(folder, (MODEL,))
    return model, info


def load_info(folder: Path) -> dict[str, Any]:
    """``info`` alone: ``load_checkpoint`` without its tensors."""
    (info,) = _load(folder, ())
    return info


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The first of ``tensors`` that holds NaN or infinity, or nothing."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), "")


def load_parameters(module: nn.Module, learned: dict[str, Tensor], folder: Path) -> None:
    """``module.load_state_dict``. DamagedCheckpoint where these tensors are not those of a module of its settings."""
    try:
        module.load_state_dict(learned)
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise DamagedCheckpoint(
            folder, f"{folder / MODEL} must fit the settings in {INFO} beside it: {words}"
        ) from None


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


def read_json(path: Path) -> dict[str, Any]:
    """ValueError, which names the file, where it is not JSON."""
    return _object(path, path.read_bytes())


def _object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {len(content)} bytes that are not: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {found!r:.40}")
    return found


def _load(folder: Path, names: Sequence[str]) -> list[Any]:
    """The tensors of each file of ``names``, then ``info``."""
    complete, text, contents = _read(folder, names)
    try:
        info = _object(complete / INFO, text)
    except ValueError as error:
        raise DamagedCheckpoint(folder, str(error)) from None
    if info.get("format") != FORMAT:
        raise ValueError(f"{complete} must be a checkpoint of format {FORMAT}, got {info.get('format')}")
    checksums = info.pop("sha256", {})
    if not checksums and names:
        warn(f"{complete} has no checksums, an older version wrote it: its tensors are not verified")
    return [_tensors(folder, complete / name, contents[name], checksums.get(name)) for name in names] + [info]


def _read(folder: Path, names: Sequence[str]) -> tuple[Path, bytes, dict[str, bytes]]:
    """The checkpoint's place, its info and the files of ``names``, of one moment: a run that goes on replaces it."""
    while True:
        complete = locate(folder)
        if complete is None:
            raise MissingCheckpoint(folder, f"no checkpoint in {folder}")
        text, missing, contents = b"", "", {}
        try:
            text = (complete / INFO).read_bytes()
            contents = {name: (complete / name).read_bytes() for name in names}
        except FileNotFoundError as error:
            missing = error.filename
        if (complete / INFO).is_file() and (complete / INFO).read_bytes() == text:
            if missing:
                raise DamagedCheckpoint(folder, f"{missing} is missing")
            return complete, text, contents


def _tensors(folder: Path, path: Path, content: bytes, checksum: str | None) -> dict[str, Tensor]:
    got = sha256(content).hexdigest()
    if checksum not in (None, got):
        raise DamagedCheckpoint(folder, f"{path} must have sha256 {checksum}, got {got}: its bytes have changed")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise DamagedCheckpoint(folder, f"{path} must be a safetensors file, got none: {error}") from None
    if name := not_finite(tensors):
        raise DamagedCheckpoint(folder, f"{path} must hold finite numbers, got NaN or infinity in {name}")
    return tensors


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
