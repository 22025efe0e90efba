"""Compares opened data sets with what was published, and checks that a data set is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from maml_cuda.data import images, layouts

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # split -> the word in the names of published files


def by_class(opened: images.Images, split: str) -> dict[str, np.ndarray]:
    """The images of each class, [images, height, width, channels]."""
    classes = opened.split(split)
    parts = classes.images.permute(0, 2, 3, 1).split(classes.count.tolist())
    return {name: part.numpy() for name, part in zip(classes.names, parts, strict=True)}


def assert_same(opened: images.Images, split: str, expected: dict[str, np.ndarray]) -> None:
    got = by_class(opened, split)
    assert list(got) == sorted(expected)
    for name, image in expected.items():
        np.testing.assert_array_equal(got[name], image)


def refused(open_images, folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    """Asserts that opening raises this message and leaves no file in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message):
        open_images(folder)
    assert sorted(folder.rglob("*")) == before


def official(monkeypatch: pytest.MonkeyPatch, table: str, *archives: Path) -> None:
    """Makes the archives of a test count as the published ones."""
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in archives}
    monkeypatch.setattr(layouts, table, md5)


def check_mini_imagenet(opened: images.Images, data) -> None:
    assert opened.shape == (3, 84, 84)
    for split, published_as in SPLITS.items():
        array, classes = data[published_as]["image_data"], data[published_as]["class_dict"]
        assert_same(opened, split, {name: array[rows] for name, rows in classes.items()})
