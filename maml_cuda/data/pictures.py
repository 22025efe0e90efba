"""Reads picture files as a trained net takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maml_cuda.data import class_folders
from maml_cuda.data.decode import decode
from maml_cuda.data.own_images import MODES, colour
from maml_cuda.warn import warn

Where = str | PathLike[str]


class SupportSet(NamedTuple):
    """The pictures of a folder with a folder for each class."""

    x: Tensor  # float32 [pictures, channels, height, width] in [0, 1], class by class
    y: Tensor  # int64 [pictures], numbers of the classes
    classes: list[str]  # their names, sorted
    files: list[Path]


@dataclass(frozen=True)
class Pictures:
    """How a net takes pictures, as its run read its own.

    A picture is decoded as a viewer shows it: turned by its EXIF orientation, and drawn on a colour where it is
    transparent. It is then brought to the channels and the size of the net. Pixels are divided by 255.

    Attributes:
        channels: 1 (grey) or 3 (red, green, blue).
        height: pixels, reached by Lanczos resampling; a picture of another form is stretched.
        width: pixels, likewise.
        background: the colour behind transparent pictures: "white", "black" or "#rrggbb".
        light_ink: the net takes characters as light ink on a dark ground: a picture whose median pixel is above 127,
            such as a scan, is inverted.
    """

    channels: int
    height: int
    width: int
    background: str = "white"
    light_ink: bool = False

    def read(self, files: Iterable[Where]) -> Tensor:
        """Reads picture files.

        Args:
            files: paths, at least one.

        Returns:
            float32 ``[files, channels, height, width]`` in [0, 1].

        Raises:
            ModuleNotFoundError: Pillow is not installed.
            ValueError: there is no file; or one is not a picture, is incomplete, or has more than 8 bits per channel.
            OSError: a file cannot be opened.
        """
        size, background = (self.height, self.width), colour(self.background)
        pixels = []
        for path in files:
            with Path(path).open("rb") as file:
                pixels.append(decode(file, str(path), MODES[self.channels], size, background, self.light_ink))
        if not pixels:
            raise ValueError("files must be at least one picture, got none")
        return torch.from_numpy(np.stack(pixels)).float().div_(255)

    def read_classes(self, folder: Where) -> SupportSet:
        """Reads a folder with a folder of pictures for each class.

        Args:
            folder: the folder. Files that are not pictures are skipped with a warning.

        Returns:
            The pictures, class by class, their labels, and the names of the classes.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: there is no class, or a class has no pictures; and as ``read``.
            ModuleNotFoundError: Pillow is not installed.
        """
        found = class_folders.class_folders(_folder(folder))
        if empty := next((path for path in found.skipped if path.is_dir()), None):
            raise ValueError(f"{empty} must hold pictures of the class {empty.name}, got none")
        _warn_of(Path(folder), found.skipped)
        names = sorted(found.classes)
        files = [path for name in names for path in found.classes[name]]
        y = torch.arange(len(names)).repeat_interleave(torch.tensor([len(found.classes[name]) for name in names]))
        return SupportSet(self.read(files), y, names, files)


def find_queries(folder: Where, classes: Sequence[str]) -> list[tuple[Path, str]]:
    """The pictures in a folder, each with the name of its class.

    Args:
        folder: holds pictures of unknown class, and folders of pictures that are named as classes are.
        classes: the names of the classes.

    Returns:
        ``(file, class)``, sorted; the class of a picture directly in ``folder`` is empty.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no picture, or a folder of pictures is not named as a class.
    """
    folder = _folder(folder)
    queries: list[tuple[Path, str]] = []
    skipped: list[Path] = []
    for place, name in [(folder, ""), *((path, path.name) for path in class_folders.visible_folders(folder))]:
        inside = [path for path in sorted(place.iterdir()) if not path.name.startswith(".")]
        files = [path for path in inside if path.is_file() and class_folders.is_image(path)]
        everywhere = filter(class_folders.is_image, class_folders.visible_files(place)) if name else []
        if deep := next((path for path in everywhere if path.parent != place), None):
            raise ValueError(f"{place} must hold pictures directly in it, got some in folders below, such as {deep}")
        if files and name and name not in classes:
            raise ValueError(
                f"{place} must be named as a class of the support set ({', '.join(classes)}), got {name}; "
                f"pictures of unknown class belong in {folder} itself"
            )
        queries += [(path, name) for path in files]
        skipped += [path for path in inside if path.is_file() and path not in files]
    if not queries:
        endings = "png, jpg, webp, ..."
        raise ValueError(f"{folder} must hold pictures ({endings}), or folders of pictures named as classes, got none")
    _warn_of(folder, skipped)
    return queries


def _folder(folder: Where) -> Path:
    path = Path(folder)
    if not path.is_dir():
        got = "a file" if path.exists() else "no folder"
        raise FileNotFoundError(f"{path} must be a folder of pictures, got {got}")
    return path


def _warn_of(folder: Path, skipped: Sequence[Path]) -> None:
    if skipped:
        names = ", ".join(path.relative_to(folder).as_posix() for path in skipped[:3])
        warn(f"skipped in {folder}, not pictures: {names}{f' and {len(skipped) - 3} others' * (len(skipped) > 3)}")
