"""Reads pickles of published data sets safely: NumPy arrays and plain containers only; no other object is created."""

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
    """Replaces numpy.dtype: a plain number type and its byte order. The state of numpy.dtype could turn numbers into
    pointers.
    """

    def __init__(self, spec: Any, *_: Any) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[biuf]\d", spec):
            raise pickle.UnpicklingError(f"its arrays must hold numbers, got {spec!r}")
        self.type = np.dtype(spec)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.type = self.type.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state is a shape, a plain dtype and bytes."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):  # bytes that Python 2 pickled
            content = content.encode("latin1")
        super().__setstate__((1, shape, dtype.type, bool(fortran), content))  # type: ignore[arg-type]


def _reconstruct(*_: Any) -> np.ndarray:
    return _Array((0,), np.uint8)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, which ignores it
    ("numpy", "dtype"): _DType,
}


class _Unpickler(pickle.Unpickler):
    """Reads arrays as pickled by Python 2, like the published files, and by Python 3 up to protocol 4."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed; nothing was executed")
        return _ALLOWED[module, name]


@dataclass(frozen=True)
class Pickle:
    """A pickle on the disk.

    Attributes:
        path: the pickle, or a tar or zip archive that holds it.
        member: the name of the file in the archive; None if ``path`` is the pickle.
    """

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.member} in {self.path}" if self.member else str(self.path)

    def load(self) -> Any:
        """Reads the pickle. Bytes of a Python 2 pickle become str (``latin1``), which NumPy's arrays need.

        Raises:
            ValueError: it is incomplete, is not a pickle, holds anything but arrays and plain containers, or is not in
                the archive.
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
            raise ValueError(f"{self.path} must be a complete {kind} archive, got: {error}") from error
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
        except Exception as error:  # damaged pickles raise many types
            raise ValueError(f"{self} must be a complete pickle of arrays, got: {error}") from error
