"""Checkpoints: folders that are replaced as a whole, so that a crash at any moment leaves a complete one.

A folder holds tensors in safetensors files and everything else in JSON. Nothing is unpickled:

    model.safetensors      state_dict of the module: for MAML ``model.*`` and learned rates ``inner_lr*``
    training.safetensors   ``optimizer.<parameter>.<name>``, ``generator`` and ``running``
    checkpoint.json        the info of ``run_info.py`` and of the training, and sha256 of the other two files

A folder that is being written ends in ``.new``, one that is being replaced in ``.old``. ``locate`` finds the complete
one after a crash between the two renames. A checkpoint that cannot be written completely, for example because the disk
is full, is removed.
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
    """A checkpoint that cannot be used.

    Attributes:
        folder: the checkpoint's folder.
    """

    def __init__(self, folder: Path, words: str) -> None:
        super().__init__(words)
        self.folder = folder


class MissingCheckpoint(UnusableCheckpoint, FileNotFoundError):
    """There is no checkpoint in the folder."""


class DamagedCheckpoint(UnusableCheckpoint, ValueError):
    """A file of the checkpoint is missing, or does not hold what was saved."""


def write_file(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all.

    The content is written to a file beside ``path`` and synced to the disk; then it is renamed to ``path``.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    beside = path.with_name(path.name + ".new")
    try:
        _write_to_disk(beside, content)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise with_path(error, path) from None


def with_path(error: OSError, path: Path) -> OSError:
    """The same error with a path. Errors of writing, such as a full disk, do not name the file."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def save_checkpoint(folder: Path, model: dict[str, Tensor], training: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Replaces ``folder`` by a checkpoint.

    Args:
        folder: the checkpoint's folder.
        model: the tensors of ``model.safetensors``.
        training: the tensors of ``training.safetensors``.
        info: JSON-able entries of ``checkpoint.json``.

    Raises:
        OSError: the checkpoint cannot be written; the error names the folder, which holds the old checkpoint or the new
            one.
    """
    files = {MODEL: save(_plain(model)), TRAINING: save(_plain(training))}
    checksums = {name: sha256(content).hexdigest() for name, content in files.items()}
    text = json.dumps({"format": FORMAT} | info | {"sha256": checksums}, indent=1) + "\n"
    new, old = _beside(folder)
    try:
        if not folder.exists() and old.exists():  # an earlier process crashed between the two renames below
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
    """The folder that holds the complete checkpoint at this moment; None if there is none."""
    for candidate in (folder, _beside(folder)[1]):
        if (candidate / INFO).is_file():
            return candidate
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Loads a checkpoint. Warns if an earlier version wrote it without checksums.

    Returns:
        ``(model, training, info)`` as saved.

    Raises:
        MissingCheckpoint: there is none (a FileNotFoundError).
        DamagedCheckpoint: a file is missing, truncated or changed, or holds NaN or infinity (a ValueError).
        ValueError: it has another format.
    """
    model, training, info = _load(folder, (MODEL, TRAINING))
    return model, training, info


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``(model, info)`` of a checkpoint; otherwise as ``load_checkpoint``."""
    model, info = _load(folder, (MODEL,))
    return model, info


def load_info(folder: Path) -> dict[str, Any]:
    """``info`` of a checkpoint; otherwise as ``load_checkpoint``."""
    info: dict[str, Any]
    (info,) = _load(folder, ())
    return info


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of the first of ``tensors`` that holds NaN or infinity; empty if there is none."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), "")


def load_parameters(module: nn.Module, learned: dict[str, Tensor], folder: Path) -> None:
    """Loads the tensors of a checkpoint into a module.

    Raises:
        DamagedCheckpoint: their names or shapes are not those of ``module``.
    """
    try:
        module.load_state_dict(learned)
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise DamagedCheckpoint(
            folder, f"{folder / MODEL} must fit the settings in {INFO} beside it: {words}"
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The state of an optimizer, as ``optimizer.<index of the parameter>.<name>`` -> tensor. Every entry must be a
    tensor.
    """
    state = optimizer.state_dict()["state"] if optimizer else {}
    return {f"optimizer.{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer | None, tensors: dict[str, Tensor]) -> None:
    """Loads the state that ``optimizer_tensors`` returned. The hyperparameters of ``optimizer`` do not change."""
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ValueError: the file does not hold a JSON object; the error names it.
    """
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
    """The tensors of each file in ``names``, then ``info``."""
    complete, text, contents = _read(folder, names)
    try:
        info = _object(complete / INFO, text)
    except ValueError as error:
        raise DamagedCheckpoint(folder, str(error)) from None
    if info.get("format") != FORMAT:
        raise ValueError(f"{complete} must be a checkpoint of format {FORMAT}, got {info.get('format')}")
    checksums = info.pop("sha256", {})
    if not checksums and names:
        warn(f"{complete} has no checksums, because an older version wrote it: its tensors are not verified")
    return [_tensors(folder, complete / name, contents[name], checksums.get(name)) for name in names] + [info]


def _read(folder: Path, names: Sequence[str]) -> tuple[Path, bytes, dict[str, bytes]]:
    """The checkpoint's folder, the bytes of its info, and the bytes of the files in ``names``.

    All are of the same checkpoint: if a running process replaces it meanwhile, they are read again.
    """
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
    # Copies, because safetensors refuses tensors that share memory, such as tied parameters.
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
