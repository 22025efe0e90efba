"""Reads data sets that are published as arrays: pickles, or pickles and .npz files.

Every ``read_*`` function raises ValueError if a file is damaged or does not have the expected entries.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maml_cuda.data.conversion import SourceClass
from maml_cuda.data.decode import decode
from maml_cuda.data.unpickle import Pickle


def read_by_class(sources: Mapping[str, Pickle]) -> Iterator[SourceClass]:
    """mini-ImageNet's pickles: ``image_data`` uint8 [images, height, width, 3], ``class_dict`` from a class name to its
    rows.
    """
    for split, pickle in sources.items():
        data = _entries(pickle, "image_data", "class_dict")
        images, classes = _images(data["image_data"], pickle), data["class_dict"]
        if not isinstance(classes, dict):
            raise ValueError(f"class_dict of {pickle} must be a dict, got {type(classes).__name__}")
        for name in sorted(classes):
            yield SourceClass(split, name, _chosen(images, classes[name], pickle))


def read_by_label(sources: Mapping[str, Pickle]) -> Iterator[SourceClass]:
    """MetaOptNet's pickles of CIFAR-FS, FC100 and mini-ImageNet: ``data`` uint8 [images, height, width, 3], and
    ``labels``, one integer per image.
    """
    for split, pickle in sources.items():
        data = _entries(pickle, "data", "labels")
        images = _images(data["data"], pickle)
        for label, rows in _rows(data["labels"], len(images), pickle):
            yield SourceClass(split, str(label), _chosen(images, rows, pickle))


def read_pngs(images_of: Mapping[str, Pickle], labels_of: Mapping[str, Pickle]) -> Iterator[SourceClass]:
    """tiered-ImageNet's pickles: a list of PNG files as uint8 arrays, and ``label_specific``, an index into
    ``label_specific_str`` for each image.
    """
    for split, pickle in labels_of.items():
        data = _entries(pickle, "label_specific", "label_specific_str")
        images, names = images_of[split].load(), data["label_specific_str"]
        if not isinstance(images, list) or not all(isinstance(x, np.ndarray) and x.dtype == np.uint8 for x in images):
            raise ValueError(f"{images_of[split]} must hold a list of uint8 arrays, each a PNG file")
        for label, rows in _rows(data["label_specific"], len(images), pickle):
            if not 0 <= label < len(names):
                raise ValueError(f"label_specific of {pickle} must be 0 to {len(names) - 1}, got {label}")
            yield SourceClass(split, str(names[label]), _decoded(images, rows, images_of[split]))


def read_arrays(arrays_of: Mapping[str, Path], labels_of: Mapping[str, Pickle]) -> Iterator[SourceClass]:
    """tiered-ImageNet in MetaOptNet's layout: ``images`` uint8 [images, height, width, 3] of an .npz file, and pickled
    ``labels``, one integer per image.
    """
    for split, pickle in labels_of.items():
        labels, path = _entries(pickle, "labels")["labels"], arrays_of[split]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                loaded = arrays["images"]
        except MemoryError:
            raise
        except Exception as error:  # NumPy raises many types for damaged files
            raise ValueError(f"{path} must be a complete .npz file with the array images, got: {error}") from error
        images = _images(loaded, path)
        for label, rows in _rows(labels, len(images), pickle):
            yield SourceClass(split, str(label), _chosen(images, rows, path))


def _entries(pickle: Pickle, *keys: str) -> dict[str, Any]:
    data = pickle.load()
    if not isinstance(data, dict) or not set(keys) <= set(data):
        got = f"a dict of {', '.join(map(str, data))}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{pickle} must hold a dict of {' and '.join(keys)}, got {got}")
    return data


def _images(value: Any, source: Pickle | Path) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"the images of {source} must be uint8 [images, height, width, 3], got {got}")
    return value


def _rows(labels: Any, count: int, pickle: Pickle) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each label in ascending order with the rows that have it."""
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{pickle} must have {count} integer labels, one per image, got {labels.dtype} {labels.shape}")
    for label in np.unique(labels):
        yield int(label), np.flatnonzero(labels == label)


def _chosen(images: np.ndarray, rows: Iterable[int], source: Pickle | Path) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        if not 0 <= row < len(images):
            raise ValueError(f"{source} must name images 0 to {len(images) - 1}, got {row}")
        yield f"image {row} of {source}", images[row].transpose(2, 0, 1)


def _decoded(images: list[np.ndarray], rows: Iterable[int], pickle: Pickle) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        where = f"image {row} of {pickle}"
        yield where, decode(io.BytesIO(images[row].tobytes()), where, "RGB")
