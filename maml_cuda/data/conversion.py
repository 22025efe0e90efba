"""Converts a data set once to one memory-mapped array.

The files are written to the data set's folder, or to a cache folder that can serve many data sets:

    maml_cuda.<layout>.json              format, names and offsets of the classes, checksum of the source
    maml_cuda.<layout>.<signature>.npy   uint8 [images, channels, height, width], class by class

In a cache folder, or if options decide what the array holds, the first file is ``maml_cuda.<layout>.<key>.json``: each
data set and each choice of options has its own conversion.

Several processes may convert at the same time. A file is written under a name that ends in ``.new``, locked by its
writer, and renamed when it is complete. The JSON is written last and names the array, so a reader finds a complete
conversion or none. A ``.new`` file that no process holds was left by a process that was killed; the next conversion
removes it.
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
HEADER = 128  # bytes of the .npy header; it is written last, because it holds the number of images


class SourceClass(NamedTuple):
    """One class of a data set."""

    split: str
    name: str
    images: Iterable[tuple[str, np.ndarray]]  # (origin, for errors; uint8 [channels, height, width])


@dataclass(frozen=True)
class Source:
    """The files of a data set, and how to read them."""

    files: list[Path]  # all files that the images are read from
    read: Callable[[], Iterator[SourceClass]]  # yields the classes, split by split in the order of SPLITS
    md5: Mapping[str, str] = field(default_factory=dict)  # published checksums, by file name
    classes: tuple[int, int, int] | None = None  # published number of classes of each split
    options: Mapping[str, Any] = field(default_factory=dict)  # options that change the array; part of the checksum
    skipped: Sequence[Path] = ()  # files and folders that do not belong to the data set


def convert(layout: str, folder: Path, source: Source, cache: Path | None = None) -> dict[str, Any]:
    """Converts ``source``, unless a conversion of the same files and options exists.

    Files count as the same if their names, sizes and modification times are.

    Args:
        layout: the name of the data set's layout.
        folder: the data set's folder.
        source: the files in ``folder``.
        cache: the folder of the conversion; None: ``folder``.

    Returns:
        The record of the conversion: ``images`` (name of the array's file), ``shape``, ``names`` (class names by
            split), ``offsets`` ``[classes + 1]`` (the first image of each class) and ``sha256`` (of the options and of
            the files' names and bytes).

    Raises:
        ValueError: a checksum, an image or the number of classes is wrong. No file is left behind.
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
    """Writes the array to ``file``. Returns the entries of the record that describe it."""
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
                advice = "; set size (--image-size) to resize all images" if "size" in source.options else ""
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
    """The record in ``path``; None if there is none, it has another format, or its array is incomplete."""
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            return None
        size = (path.parent / record["images"]).stat().st_size
        return record if size == HEADER + math.prod(record["shape"]) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _stem(layout: str, folder: Path, source: Source, cache: Path | None) -> str:
    """The prefix of the names of a conversion's files, distinct for each choice of options and, in a cache, for each
    folder.
    """
    stem = f"maml_cuda.{layout}"
    if cache is None and not source.options:
        return stem
    facts = [None if cache is None else str(folder.resolve()), source.options]
    return f"{stem}.{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


def _signature(folder: Path, source: Source) -> str:
    """A hash of the options and of the files' names, sizes and times. Takes seconds; the checksum of the bytes takes
    minutes.
    """
    facts: list[Any] = list(source.options.items())
    facts += [(_name(folder, path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in source.files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _checksum(folder: Path, source: Source) -> str:
    """sha256 of the options and of the names and bytes of all files.

    Raises:
        ValueError: a file does not have its published md5.
    """
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
                f"{path} must have md5 {known}, got {md5.hexdigest()}: the download is incomplete, or this is another "
                "file; unpack it to read its files without this check"
            )
    return total.hexdigest()


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _skipped(folder: Path, paths: Sequence[Path]) -> str:
    """The warning about skipped files: one line that names the first three."""
    several = f" and {len(paths) - 3} others" if len(paths) > 3 else ""
    return (
        f"skipped in {folder}, not images of a class: {', '.join(_name(folder, path) for path in paths[:3])}{several}"
    )


@contextmanager
def _complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under ``path`` once it is complete, and not at all after an error."""
    layout = ".".join(path.name.split(".")[:2])
    while True:
        new = path.with_name(f"{layout}.{uuid.uuid4().hex}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = new.open("xb")
        except OSError as error:
            raise OSError(
                f"{path.parent} must be writable, because the converted images are stored there: {error}; "
                "set cache (--cache) to another folder"
            ) from error
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # before it was locked, another process removed it as a leftover
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
        if error.errno in FULL:  # errors of write() do not name the file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _remove_leftovers(folder: Path, layout: str) -> None:
    """Removes incomplete files of processes that were killed."""
    for leftover in folder.glob(f"maml_cuda.{layout}.*.new"):
        try:
            with leftover.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
        except OSError:  # locked by its writer, already removed, or owned by another user
            continue
