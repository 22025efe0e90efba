"""Reads your own images: a folder with one folder for each class, with any files, sizes and colours that Pillow
supports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maml_cuda.data import class_folders, splits
from maml_cuda.data.class_folders import Classes
from maml_cuda.data.conversion import Source, SourceClass
from maml_cuda.data.decode import Colour, is_coloured
from maml_cuda.data.image_files import read_files

COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}
MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow's mode


def find(
    path: Path,
    size: int | tuple[int, int] | None = None,
    background: str = "white",
    channels: int | None = None,
    split: Sequence[int] | None = None,
    light_ink: bool = False,
) -> Source:
    """The files of the classes in ``path``. The arguments and errors are those of ``images.folder``."""
    height_and_width = _height_and_width(size)
    ground = colour(background)
    if channels not in (None, *MODES):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    classes, skipped = _splits(path, split)
    options: dict[str, Any] = {
        "size": height_and_width,
        "background": ground,
        "channels": channels,
        "split": split and list(split),
    }
    if light_ink:
        options["light_ink"] = True
    files = [file for of_split in classes.values() for files in of_split.values() for file in files]
    read = partial(_read, classes, files, height_and_width, ground, channels, light_ink)
    return Source(files, read, options=options, skipped=skipped)


def class_names(path: Path) -> dict[str, list[str]]:
    """The names of the classes in ``path``, by split if it has folders for splits, otherwise all under "test".

    Raises:
        FileNotFoundError: ``path`` is not a folder, or the folder of a split is missing.
        ValueError: there is no class.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} must be a folder of images (folder), got no folder")
    folders = class_folders.split_folders(path) or {"test": path}
    return {split: sorted(class_folders.class_folders(folder).classes) for split, folder in folders.items()}


def _splits(path: Path, split: Sequence[int] | None) -> tuple[dict[str, Classes], list[Path]]:
    """The classes of each split, and the skipped paths."""
    if folders := class_folders.split_folders(path):
        if split is not None:
            there = ", ".join(folder.name for folder in folders.values())
            raise ValueError(
                f"split must be left out for {path}, whose folders {there} define the split, got {_words(split)}"
            )
        classes_of, skipped = class_folders.classes_of_splits(folders)
        return classes_of, skipped + sorted(set(class_folders.visible_folders(path)) - set(folders.values()))
    classes, skipped = class_folders.class_folders(path)
    if split is None:
        split = splits.default_sizes(len(classes))
        if split[0] < 1:
            raise ValueError(f"{path} must hold at least 3 classes, one for each split, got {len(classes)}")
    if len(split) != len(splits.SPLITS) or min(split) < 0 or sum(split) != len(classes):
        raise ValueError(
            f"split must be three numbers that add up to the {len(classes)} classes of {path}, got {_words(split)}"
        )
    names = splits.draw_split(classes, split)
    return {one: {name: classes[name] for name in names[one]} for one in splits.SPLITS}, skipped


def _read(
    classes: Mapping[str, Classes],
    files: Sequence[Path],
    size: tuple[int, int] | None,
    background: Colour,
    channels: int | None,
    light_ink: bool,
) -> Iterator[SourceClass]:
    """Reads with one channel if every file is grey, otherwise with three."""
    if channels is None:
        channels = 3 if any(_is_coloured(file, background) for file in files) else 1
    return read_files(classes, MODES[channels], size, background, light_ink)


def _is_coloured(path: Path, background: Colour) -> bool:
    with path.open("rb") as file:
        return is_coloured(file, str(path), background)


def _height_and_width(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size must be a number of pixels, at least 1, or (height, width), got {size!r}")
    return sides[0], sides[1]


def colour(text: str) -> Colour:
    """The colour of the words "white", "black" or "#rrggbb".

    Raises:
        ValueError: ``text`` is none of these.
    """
    if text in COLOURS:
        return COLOURS[text]
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise ValueError(f"background must be white, black or #rrggbb, got {text!r}")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _words(split: Sequence[int]) -> str:
    return "/".join(map(str, split))
