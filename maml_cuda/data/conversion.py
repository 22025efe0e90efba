"""One conversion for every data set: its images, class by class, in one memory-mapped array beside the original.

In the data set's folder stand afterwards

    maml_cuda.<layout>.json              format, names and offsets of the classes, checksum of the source
    maml_cuda.<layout>.<signature>.npy   uint8 [images, channels, height, width]

The JSON is written last and names its array, and both appear by a rename: another process finds all or nothing, and
two that convert at once replace a file by its like. What is being written ends in ``.new`` and is locked by its
writer; one that nobody holds was left by a process that was killed, and the next one removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

FORMAT = 1
SPLITS = ("train", "validation", "test")
HEADER = 128  # bytes of the .npy header, which is written last, when the number of images is known


class SourceClass(NamedTuple):
    """One class as a layout reads it."""

    split: str
    name: str
    images: Iterable[tuple[str, np.ndarray]]  # where each is from, and its uint8 [channels, height, width]


@dataclass(frozen=True)
class Source:
    """A data set that was found, not yet read."""

    files: list[Path]  # all that its images are made from
    read: Callable[[], Iterator[SourceClass]]  # the classes, split by split in the order of SPLITS
    md5: Mapping[str, str] = field(default_factory=dict)  # as published, by the file's name
    classes: tuple[int, int, int] | None = None  # as published, of each split


def converted(layout: str, folder: Path, source: Source) -> dict[str, Any]:
    """The record of ``source``'s conversion in ``folder``, which is made now unless it stands there already.

    The record holds ``images`` (the array's file), ``shape``, ``names`` (by split), ``offsets`` ``[classes + 1]``
    (of each class's first image) and ``sha256`` (of the source's names and bytes). It holds for source files of the
    same names, sizes and times; other ones are converted anew.

    Raises:
        ValueError: a checksum, an image or the number of classes is not what it must be. Nothing is left behind.
        OSError: a file cannot be read, or the folder cannot be written to.
    """
    _sweep(folder, layout)
    signature = _signature(folder, source.files)
    path = folder / f"maml_cuda.{layout}.json"
    old = _record(path)
    if old is not None and old["signature"] == signature:
        return old
    sha256 = _checksum(folder, source)
    images = folder / f"maml_cuda.{layout}.{signature}.npy"
    with _whole(images) as file:
        content = _write(file, source)
    record = {"format": FORMAT, "signature": signature, "sha256": sha256, "images": images.name} | content
    with _whole(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    if old is not None and old["images"] != images.name:
        (folder / old["images"]).unlink(missing_ok=True)
    return record


def _write(file: BinaryIO, source: Source) -> dict[str, Any]:
    """Writes the array; returns what the record says of it."""
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    offsets = [0]
    first, shape = "", ()
    file.seek(HEADER)
    for split, name, images in source.read():
        count = 0
        for where, image in images:
            if not shape:
                first, shape = where, image.shape
            if image.shape != shape:
                raise ValueError(f"{where} must have {_size(shape)} like {first}, got {_size(image.shape)}")
            file.write(image.tobytes())
            count += 1
        if not count:
            raise ValueError(f"class {name} of {split} must have images, got none")
        names[split].append(name)
        offsets.append(offsets[-1] + count)
    got = tuple(len(names[split]) for split in SPLITS)
    if source.classes is not None and got != source.classes:
        raise ValueError(f"the splits {', '.join(SPLITS)} must have {source.classes} classes, got {got}")
    header = io.BytesIO()
    full = (offsets[-1], *shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": full})
    assert len(header.getvalue()) == HEADER
    file.seek(0)
    file.write(header.getvalue())
    return {"shape": full, "names": names, "offsets": offsets}


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height} x {width} pixels of {channels} channel{'s' * (channels > 1)}"


def _record(path: Path) -> dict[str, Any] | None:
    """The record in ``path``; None where there is none, or one of another format, or its array is not whole."""
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            return None
        size = (path.parent / record["images"]).stat().st_size
        return record if size == HEADER + math.prod(record["shape"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _signature(folder: Path, files: list[Path]) -> str:
    """Changes with the name, the size or the time of a file: seconds for what a checksum takes minutes to tell."""
    facts = [(_name(folder, path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _checksum(folder: Path, source: Source) -> str:
    """sha256 over the names and bytes of all files. ValueError where one has not the md5 that is published."""
    total = hashlib.sha256()
    for path in source.files:
        known = source.md5.get(path.name)
        md5 = hashlib.md5(usedforsecurity=False)
        total.update(f"{_name(folder, path)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                total.update(block)
                if known:
                    md5.update(block)
        if known and md5.hexdigest() != known:
            raise ValueError(
                f"{path} must have md5 {known}, got {md5.hexdigest()}: it was not downloaded whole, or is another "
                "file; unpacked by yourself, its files are read as they are"
            )
    return total.hexdigest()


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that stands under ``path`` when it is complete, and nowhere after an error."""
    layout = ".".join(path.name.split(".")[:2])
    while True:
        new = path.with_name(f"{layout}.{uuid.uuid4().hex}.new")
        try:
            file = new.open("xb")
        except OSError as error:
            raise OSError(f"{path.parent} must be writable, the converted images are kept there: {error}") from error
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process took it for a leftover before it was locked
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _sweep(folder: Path, layout: str) -> None:
    """Removes what processes that were killed left half-written."""
    for leftover in folder.glob(f"maml_cuda.{layout}.*.new"):
        try:
            with leftover.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except OSError:  # its writer lives, another process was faster, or it is somebody else's
            continue
