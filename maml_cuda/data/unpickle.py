"""Pickles of published data sets, read without running anything: NumPy arrays, plain containers, nothing else."""

from __future__ import annotations

import pickle
import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np


class _DType:
    """A plain number and its byte order, in place of numpy.dtype: that one's state could make pointers of numbers."""

    def __init__(self, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[biuf]\d", spec):
            raise pickle.UnpicklingError(f"its arrays must hold numbers, got {spec!r}")
        self.type = np.dtype(spec)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.type = self.type.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose state says a shape, a plain dtype and bytes."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):  # the bytes of Python 2
            content = content.encode("latin1")
        super().__setstate__((1, shape, dtype.type, bool(fortran), content))  # type: ignore[arg-type]


def _reconstruct(*_: Any) -> np.ndarray:
    return _Array((0,), np.uint8)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): None,  # the kind of array, which is always the one above
    ("numpy", "dtype"): _DType,
}


class _Unpickler(pickle.Unpickler):
    """Knows arrays as Python 2 and, up to protocol 4, Python 3 write them; the published files are Python 2's."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read here; nothing was run")
        return _ALLOWED[module, name]


@dataclass(frozen=True)
class Pickle:
    """A pickle on the disk: a file, or a file of this name in a tar or zip archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)

    def load(self) -> Any:
        """What it holds. The bytes of a Python 2 pickle become str (``latin1``), as NumPy's arrays in it need.

        Raises:
            ValueError: it is cut short, is no pickle, asks for anything but arrays, or is not in the archive.
        """
        if self.member is None:
            with self.path.open("rb") as file:
                return self._unpickle(file)
        kind = "zip" if self.path.suffix == ".zip" else "tar"
        try:
            with zipfile.ZipFile(self.path) if kind == "zip" else tarfile.open(self.path) as archive:
                if member := self._opened(archive):
                    with member:
                        return self._unpickle(member)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{self.path} must be a whole {kind} archive, got: {error}") from error
        raise ValueError(f"{self.path} must hold {self.member}")

    def _opened(self, archive: zipfile.ZipFile | tarfile.TarFile) -> IO[bytes] | None:
        if isinstance(archive, zipfile.ZipFile):
            names = (name for name in archive.namelist() if PurePosixPath(name).name == self.member)
            return next((archive.open(name) for name in names), None)
        infos = (info for info in archive if PurePosixPath(info.name).name == self.member)
        return next((file for info in infos if (file := archive.extractfile(info))), None)

    def _unpickle(self, file: IO[bytes]) -> Any:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except MemoryError:
            raise
        except Exception as error:  # damaged opcodes fail in any way
            raise ValueError(f"{self} must be a whole pickle of arrays, got: {error}") from error
