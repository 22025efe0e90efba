"""The settings and other facts of a run in its checkpoints, protected by a checksum."""

import json
from dataclasses import MISSING, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from maml_cuda.train.checkpoint import DamagedCheckpoint, load_info
from maml_cuda.train.settings import Settings

S = TypeVar("S")
# The settings that may change when a run is resumed, because earlier iterations do not depend on them. Those depend on
# ``iterations`` if the outer rate has a schedule; see ``resumed_settings``. The data may move but not change.
MAY_CHANGE = ("iterations", "test_tasks", "data", "cache")


def with_checksum(info: dict[str, Any]) -> dict[str, Any]:
    """``info`` with a checksum of its settings, iteration and best validations."""
    return info | {"info_sha256": _checksum(info)}


def restore_settings(kind: type[S], info: dict[str, Any], folder: Path) -> S:
    """The settings in the info of a checkpoint.

    Args:
        kind: the class of the settings.
        info: the info of the checkpoint.
        folder: the checkpoint's folder, for errors.

    Raises:
        DamagedCheckpoint: the settings, the iteration or the best validations do not match the checksum (a ValueError).
        ValueError: the settings are not those of this version.
    """
    settings: dict[str, Any] = info.get("settings", {})
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in settings.items():
        if name not in known:
            raise ValueError(
                f"settings of {folder} must be ones that this version of maml_cuda knows, got {name}={value!r}: "
                "it was written by another version"
            )
    for name, field in known.items():
        if name not in settings and field.default is MISSING:
            raise ValueError(f"settings of {folder} must have {name}, got none: it was written by another version")
    if info.get("info_sha256", _checksum(info)) != _checksum(info):
        raise DamagedCheckpoint(folder, f"checkpoint.json in {folder} must match its checksum, got changed values")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (in the settings of {folder})") from None


def resumed_settings(run: Path, given: dict[str, Any], kind: type = Settings, checkpoint: str = "last") -> Any:
    """The settings of a checkpoint, changed by ``given``.

    Args:
        run: the run's folder.
        given: the settings to change; only those in ``MAY_CHANGE`` may differ from the stored ones.
        kind: the class of the settings.
        checkpoint: the name of the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: ``given`` changes a setting that may not change.
    """
    folder = run / checkpoint
    stored: Any = restore_settings(kind, load_info(folder), folder)
    may_change = MAY_CHANGE if getattr(stored, "meta_schedule", "constant") == "constant" else MAY_CHANGE[1:]
    for name, value in given.items():
        if name not in may_change and (old := getattr(stored, name)) != value:
            raise ValueError(f"{name} must stay {old} in the resumed run {run}, got {value}")
    return replace(stored, **given)


def _checksum(info: dict[str, Any]) -> str:
    settings = {name: value for name, value in info.get("settings", {}).items() if name not in MAY_CHANGE}
    counted = [settings, info.get("iteration"), info.get("bests")]
    return sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
