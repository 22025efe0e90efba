"""What a checkpoint says of its run beside tensors: the settings, the iteration and the best validations, checked."""

import json
from dataclasses import MISSING, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from maml_cuda.train.checkpoint import DamagedCheckpoint

S = TypeVar("S")
# What a resumed run may set anew: none touches a number before it (the iterations do, where the outer rate is
# scheduled over them). The data may have moved, not changed.
MAY_CHANGE = ("iterations", "test_tasks", "data", "cache")


def with_checksum(info: dict[str, Any]) -> dict[str, Any]:
    """``info`` with a checksum of what decides numbers in it."""
    return info | {"info_sha256": _checksum(info)}


def restore_settings(kind: type[S], info: dict[str, Any], folder: Path) -> S:
    """The settings (a ``kind``) in the ``info`` of the checkpoint in ``folder``.

    Raises:
        DamagedCheckpoint: they, the iteration or the best validations are not what was saved (a ValueError).
        ValueError: they are not those of this version.
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
        raise DamagedCheckpoint(folder, f"checkpoint.json in {folder} must say what was saved, got other values")
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; it stands in the settings of {folder}") from None


def _checksum(info: dict[str, Any]) -> str:
    settings = {name: value for name, value in info.get("settings", {}).items() if name not in MAY_CHANGE}
    counted = [settings, info.get("iteration"), info.get("bests")]
    return sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
