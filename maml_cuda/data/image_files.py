"""Reads data sets that are published as image files: folders of classes, zip archives, and lists in CSV files."""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from maml_cuda.data.class_folders import Classes, is_image, visible_files
from maml_cuda.data.conversion import SourceClass
from maml_cuda.data.decode import Colour, decode
from maml_cuda.data.splits import SPLITS, draw_split, split_alphabets


def read_table(table: Path, images: Path) -> Classes:
    """The classes in a CSV file with the columns filename and label. The files are in the folder ``images``.

    Raises:
        ValueError: a line does not have this form.
        FileNotFoundError: a file that it names does not exist.
    """
    classes: dict[str, list[Path]] = {}
    with table.open(newline="") as file:
        rows = csv.reader(file)
        if (header := next(rows, [])) != ["filename", "label"]:
            raise ValueError(f"{table} must begin with the line filename,label, got {','.join(header)!r}")
        for row in rows:
            if len(row) != 2:
                raise ValueError(f"line {rows.line_num} of {table} must be filename,label, got {','.join(row)!r}")
            path = images / row[0]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, which line {rows.line_num} of {table} names")
            classes.setdefault(row[1], []).append(path)
    return classes


def read_files(
    splits: Mapping[str, Classes],
    mode: str,
    size: tuple[int, int] | None = None,
    background: Colour | None = None,
    light_ink: bool = False,
) -> Iterator[SourceClass]:
    """Yields the classes of each split in the order of their names. The other arguments are those of ``decode``."""
    for split, classes in splits.items():
        for name in sorted(classes):
            yield SourceClass(split, name, _decoded(classes[name], mode, size, background, light_ink))


def _decoded(
    files: Sequence[Path], mode: str, size: tuple[int, int] | None, background: Colour | None, light_ink: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for path in files:
        with path.open("rb") as file:
            yield str(path), decode(file, str(path), mode, size, background, light_ink)


def read_omniglot(halves: Sequence[Path], sizes: Sequence[int], by_alphabets: bool = False) -> Iterator[SourceClass]:
    """Reads the characters of both halves of Omniglot, and splits them.

    Pixels are inverted to light ink on a dark background and resized to 28 x 28, as in the MAML authors' data.

    Args:
        halves: two folders or zip archives of ``<Alphabet>/characterNN/*.png``, background and evaluation.
        sizes: the number of characters of each split at random.
        by_alphabets: split by alphabets (``split_alphabets``) instead.

    Raises:
        ValueError: an archive is damaged, or the number of characters is wrong.
    """
    characters: dict[str, list[tuple[str, Callable[[], IO[bytes]]]]] = {}
    names_of: list[list[str]] = []  # of each half
    with ExitStack() as opened:
        for half in halves:
            before = len(characters)
            for name, open_file in _contents(half, opened):
                if part := re.search(r"([^/]+/character\d+)/[^/]+\.png$", name):
                    characters.setdefault(part[1], []).append((name, open_file))
            names_of.append(list(characters)[before:])
        if len(characters) != sum(sizes):
            where = " and ".join(map(str, halves))
            raise ValueError(f"{where} must have {sum(sizes)} characters together, got {len(characters)}")
        drawn = split_alphabets(*names_of) if by_alphabets else draw_split(list(characters), sizes)
        for split, names in drawn.items():
            for name in names:
                yield SourceClass(split, name, _inverted(characters[name]))


def read_cifar100(source: Path) -> Iterator[SourceClass]:
    """Reads CIFAR-FS in the layout of its authors.

    Args:
        source: a folder or zip archive of ``data/<class>/*`` with ``splits/bertinetto/{train,val,test}.txt``, one class
            per line.

    Raises:
        ValueError: a list, a class or an image is missing or damaged, or a class is in two splits.
    """
    with ExitStack() as opened:
        tables: dict[str, Callable[[], IO[bytes]]] = {}
        classes: dict[str, list[tuple[str, Callable[[], IO[bytes]]]]] = {}
        for name, open_file in _contents(source, opened):
            if part := re.search(r"/splits/bertinetto/(\w+)\.txt$", f"/{name}"):
                tables[part[1]] = open_file
            elif (part := re.search(r"/data/([^/]+)/[^/]+$", f"/{name}")) and is_image(Path(name)):
                classes.setdefault(part[1], []).append((name, open_file))
        taken: dict[str, str] = {}
        for split, word in zip(SPLITS, ("train", "val", "test"), strict=True):
            table = f"splits/bertinetto/{word}.txt"
            if word not in tables:
                raise ValueError(f"{source} must hold {table}, a class a line")
            for name in _lines(tables[word], f"{table} in {source}"):
                if name not in classes:
                    raise ValueError(f"{source} must hold images in data/{name}, which {table} names, got none")
                if taken.setdefault(name, table) != table:
                    raise ValueError(f"the splits must have different classes, got {name} in {taken[name]} and {table}")
                yield SourceClass(split, name, _colours(classes[name]))


def _contents(half: Path, opened: ExitStack) -> list[tuple[str, Callable[[], IO[bytes]]]]:
    """The name of each file in a folder or zip archive, and a function that opens it."""
    if half.is_dir():
        return [(str(path), partial(_open, path)) for path in visible_files(half)]
    try:
        archive = opened.enter_context(zipfile.ZipFile(half))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{half} must be a complete zip archive, got: {error}") from error
    return [(name, partial(archive.open, name)) for name in sorted(archive.namelist())]


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _lines(open_file: Callable[[], IO[bytes]], what: str) -> list[str]:
    try:
        with open_file() as file:
            return sorted(set(file.read().decode().split()))
    except (UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{what} must be a complete text file, got: {error}") from error


def _colours(files: Sequence[tuple[str, Callable[[], IO[bytes]]]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, open_file in files:
        with open_file() as file:
            yield name, decode(file, name, "RGB")


def _inverted(files: Sequence[tuple[str, Callable[[], IO[bytes]]]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, open_file in files:
        with open_file() as file:
            yield name, 255 - decode(file, name, "L", (28, 28))
