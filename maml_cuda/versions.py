"""Versions of what decides the numbers of a run."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of Python, this package and those it works with; "not installed" where one is missing."""
    found = {"python": platform.python_version()}
    for package in ("maml-cuda", "torch", "numpy", "safetensors", "tqdm", "matplotlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
