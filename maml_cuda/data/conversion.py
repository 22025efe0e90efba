"""One conversion for every data set: its images, class by class, in one memory-mapped array beside the original.

In the data set's folder, or in a cache folder that serves any number of data sets, stand afterwards

    maml_cuda.<layout>.json              format, names and offsets of the classes, checksum of the source
    maml_cuda.<layout>.<signature>.npy   uint8 [images, channels, height, width]

The JSON is ``maml_cuda.<layout>.<key>.json`` where options decide what the array holds, and in a cache folder: each
data set and each choice of options has a conversion of its own.

The JSON is written last and names its array, and both appear by a rename: another process finds all or nothing, and
two that convert at once replace a file by its like. What is being written ends in ``.new`` and is locked by its
writer; one that nobody holds was left by a process that was killed, and the next one removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from maml_cuda.data.splits import SPLITS
from maml_cuda.warn import warn

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    options: Mapping[str, Any] = field(default_factory=dict)  # what else decides the array: its checksum holds them too
    skipped: Sequence[Path] = ()  # what lies among the files and is no part of the data set


def convert(layout: str, folder: Path, source: Source, cache: Path | None = None) -> dict[str, Any]:
    """The record of the conversion of ``source``, which is in ``folder``. It is made now unless it stands already in
    ``cache`` (None: in ``folder``).

    The record holds ``images`` (the array's file), ``shape``, ``names`` (by split), ``offsets`` ``[classes + 1]``
    (of each class's first image) and ``sha256`` (of the source's options, names and bytes). It holds for source files
    of the same names, sizes and times; other ones are converted anew.

    Raises:
        ValueError: a checksum, an image or the number of classes is not what it must be. Nothing is left behind.
        OSError: a file cannot be read, or the conversion cannot be written.
    """
    place = folder if cache is None else cache
    _remove_leftovers(place, layout)
    signature, stem = _signature(folder, source), _stem(layout, folder, source, cache)
    path, images = place / f"{stem}.json", place / f"{stem}.{signature}.npy"
    old = _record(path)
    if old is not None and old["signature"] == signature:
        return old
    if source.skipped:
        warn(_skipped(folder, source.skipped))
    sha256 = _checksum(folder, source)
    with _complete_file(images) as file:
        content = _write(file, source)
    record = {"format": FORMAT, "signature": signature, "sha256": sha256, "images": images.name} | content
    with _complete_file(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    if old is not None and old["images"] != images.name:
        (place / old["images"]).unlink(missing_ok=True)
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
                advice = "; size (--image-size) makes all of one size" if "size" in source.options else ""
                raise ValueError(f"{where} must have {_size(shape)} like {first}, got {_size(image.shape)}{advice}")
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
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _stem(layout: str, folder: Path, source: Source, cache: Path | None) -> str:
    """How the names of its files begin: no two choices of options, and in a cache no two folders, have the same."""
    stem = f"maml_cuda.{layout}"
    if cache is None and not source.options:
        return stem
    facts = [None if cache is None else str(folder.resolve()), source.options]
    return f"{stem}.{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


def _signature(folder: Path, source: Source) -> str:
    """Changes with an option, or the name, the size or the time of a file: seconds for what a checksum takes minutes to
    tell."""
    facts: list[Any] = list(source.options.items())
    facts += [(_name(folder, path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in source.files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _checksum(folder: Path, source: Source) -> str:
    """sha256 over the options, and the names and bytes of all files. ValueError where one has not the md5 that is
    published."""
    total = hashlib.sha256()
    for name, value in source.options.items():
        total.update(f"{name} {json.dumps(value)}\n".encode())
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


def _skipped(folder: Path, paths: Sequence[Path]) -> str:
    """One line, however many they are."""
    several = f" and {len(paths) - 3} others" if len(paths) > 3 else ""
    return f"skipped in {folder}, no images of a class: {', '.join(_name(folder, path) for path in paths[:3])}{several}"


@contextmanager
def _complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file that stands under ``path`` when it is complete, and nowhere after an error."""
    layout = ".".join(path.name.split(".")[:2])
    while True:
        new = path.with_name(f"{layout}.{uuid.uuid4().hex}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = new.open("xb")
        except OSError as error:
            raise OSError(
                f"{path.parent} must be writable, the converted images are kept there: {error}; cache (--cache) names "
                "another folder for them"
            ) from error
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process took it for a leftover before it was locked
    try:
        with file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(new, path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno in FULL:  # of which Python does not say where
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _remove_leftovers(folder: Path, layout: str) -> None:
    """Removes what processes that were killed left half-written."""
    for leftover in folder.glob(f"maml_cuda.{layout}.*.new"):
        try:
            with leftover.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except OSError:  # its writer lives, another process was faster, or it is somebody else's
            continue
