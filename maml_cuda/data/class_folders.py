"""Finds class folders: a class is a folder with its image files directly in it.

A file is an image if the suffix of its name says so. A damaged image is therefore an error, and is not skipped. Hidden
files are ignored; other files and folders (``Thumbs.db``, ``desktop.ini``, ``__MACOSX``, a list of labels) are reported
as skipped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from maml_cuda.data.splits import FOLDER_NAMES, SPLITS

# The formats that Pillow reads, and .heic and .heif, which it does not: such photographs are an error, not skipped.
ENDINGS = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip

Classes = Mapping[str, Sequence[Path]]  # class name -> its image files


class FoundClasses(NamedTuple):
    """The classes in a folder, and what was skipped there."""

    classes: Classes
    skipped: list[Path]  # files and folders that are not images of a class


def is_image(path: Path) -> bool:
    """Whether a file counts as an image: its suffix is in ENDINGS, and it is not hidden."""
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def visible_files(folder: Path) -> list[Path]:
    """All files below ``folder``, sorted, without hidden files and hidden folders."""
    files = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def class_folders(folder: Path) -> FoundClasses:
    """The classes in ``folder``. A folder without images is not a class.

    Raises:
        ValueError: there is no class, or a folder has images in its subfolders only.
    """
    classes: dict[str, list[Path]] = {}
    skipped = sorted(filter(is_image, folder.iterdir()))
    for path in visible_folders(folder):
        inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        images = [entry for entry in inside if is_image(entry) and entry.is_file()]
        if images:
            classes[path.name] = images
            skipped += sorted(set(inside) - set(images))
        elif below := next(filter(is_image, visible_files(path)), None):
            raise ValueError(
                f"the class folder {path} must hold images directly in it, got images in folders below, such as {below}"
            )
        else:
            skipped.append(path)
    if not classes:
        raise ValueError(f"{folder} must hold folders, one for each class, got none with images directly in it")
    return FoundClasses(classes, skipped)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits in ``folder``, by split; empty if there are none.

    A folder without subfolders is a class, even if its name is that of a split.

    Raises:
        ValueError: two folders are for the same split.
        FileNotFoundError: there are folders for some splits and not for all.
    """
    found: dict[str, Path] = {}
    for path in visible_folders(folder):
        split = next((split for split, words in FOLDER_NAMES.items() if path.name.lower() in words), None)
        if split is None or not visible_folders(path):
            continue
        if split in found:
            raise ValueError(f"{folder} must have one folder for {split}, got {found[split].name} and {path.name}")
        found[split] = path
    for split in SPLITS:
        if found and split not in found:
            there = " and ".join(found[other].name for other in SPLITS if other in found)
            wanted = " or ".join(str(folder / word) for word in FOLDER_NAMES[split])
            raise FileNotFoundError(f"{wanted} is missing beside {there}")
    return {split: found[split] for split in SPLITS if found}


def classes_of_splits(folders: Mapping[str, Path]) -> tuple[dict[str, Classes], list[Path]]:
    """The classes of each split, and all skipped paths.

    Raises:
        ValueError: a class is in two splits, so that it would be both trained and tested on.
    """
    found = {split: class_folders(folder) for split, folder in folders.items()}
    for one, other in combinations(SPLITS, 2):
        if twice := sorted(found[one].classes.keys() & found[other].classes.keys()):
            raise ValueError(
                f"the splits must have different classes, got {twice[0]} in {folders[one]} and in {folders[other]}: "
                "validation and test use classes that are not trained on; put all images of a class in one folder"
            )
    skipped = [path for each in found.values() for path in each.skipped]
    return {split: each.classes for split, each in found.items()}, skipped


def visible_folders(folder: Path) -> list[Path]:
    """The folders directly in ``folder``, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
