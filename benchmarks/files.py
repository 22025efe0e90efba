"""Names of result files, and writing them."""

from __future__ import annotations

import os
import re
from pathlib import Path


def slug(name: str) -> str:
    """A name for files: "NVIDIA H100 80GB HBM3" becomes nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def replace(path: Path, text: str) -> None:
    """Writes a text file atomically: the old content is there until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)
