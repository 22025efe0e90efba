"""A folder for each class, with its image files directly in it; what else a computer leaves there is skipped.

``Thumbs.db``, ``desktop.ini``, a list of labels or a folder ``__MACOSX`` are no part of a data set, and neither are
hidden files. What is an image is told by the ending of its name, so that a damaged image is an error, not skipped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from maml_cuda.data.splits import FOLDER_NAMES, SPLITS

# What Pillow reads, and .heic, which it does not: such photographs are refused by name, not skipped.
ENDINGS = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip

Classes = Mapping[str, Sequence[Path]]  # the image files of each class, by its name


class FoundClasses(NamedTuple):
    classes: Classes
    skipped: list[Path]  # files and folders that are no images of a class


def is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def visible_files(folder: Path) -> list[Path]:
    """Every file below, sorted; hidden ones (``.DS_Store``) are no part of a data set."""
    files = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def class_folders(folder: Path) -> FoundClasses:
    """The classes in ``folder``. A folder without images is none.

    Raises:
        ValueError: there is no class, or a folder holds its images in folders of its own.
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
            raise ValueError(f"the class folder {path} must hold images, got none directly in it, but {below}")
        else:
            skipped.append(path)
    if not classes:
        raise ValueError(f"{folder} must hold folders, one for each class, got none with images directly in it")
    return FoundClasses(classes, skipped)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits in ``folder``, {} without any. One that holds no folder is a class, whatever its name.

    Raises:
        ValueError: two are of one split.
        FileNotFoundError: one is missing beside another.
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
    """The classes of each split, and what was skipped in all. ValueError where a class is in two: it would be tested
    on what was learned."""
    found = {split: class_folders(folder) for split, folder in folders.items()}
    for one, other in combinations(SPLITS, 2):
        if twice := sorted(found[one].classes.keys() & found[other].classes.keys()):
            raise ValueError(
                f"the splits must have different classes, got {twice[0]} in {folders[one]} and in {folders[other]}: "
                "tasks of validation and test are of classes never trained on; put all images of a class in one folder"
            )
    skipped = [path for each in found.values() for path in each.skipped]
    return {split: each.classes for split, each in found.items()}, skipped


def visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
