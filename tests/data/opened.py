"""What opened image data sets hold, and how one is refused."""

from pathlib import Path

import numpy as np
import pytest

from maml_cuda.data import images

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # and what published files call them


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
    """In these words, and nothing is left in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message):
        open_images(folder)
    assert sorted(folder.rglob("*")) == before
