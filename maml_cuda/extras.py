"""Optional dependencies: the packages that an extra of the installation brings."""

import importlib.util


def require(*packages: str, extra: str) -> None:
    """Checks that packages are installed, without importing them.

    Raises:
        ModuleNotFoundError: one is missing; the error names it and the extra that installs it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f'{" and ".join(missing)} must be installed: pip install "maml-cuda[{extra}]"')
