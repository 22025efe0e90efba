"""Writes small data sets in the published layouts, with all classes and few images."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MINI = {"train": 64, "val": 16, "test": 20}
TIERED = {"train": 351, "val": 97, "test": 160}


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "png") -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind)
    return content.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def python2(value: Any) -> bytes:
    """``value`` as Python 2's cPickle wrote it in protocol 2: its str are bytes, and so is an array's content."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_python2, value)) + b"t"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str | bytes):
        content = value.encode() if isinstance(value, str) else value
        return b"T" + struct.pack("<i", len(content)) + content
    assert isinstance(value, np.ndarray)
    kind = value.dtype.str[1:]
    order = value.dtype.str[0]
    dtype = b"cnumpy\ndtype\n" + _python2((kind, 0, 1)) + b"R" + b"(" + _python2(3) + _python2(order)
    dtype += b"NNN" + _python2(-1) + _python2(-1) + _python2(0) + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _python2((0,)) + _python2("b") + b"tR"
    state = b"(" + _python2(1) + _python2(value.shape) + dtype + _python2(False) + _python2(value.tobytes()) + b"tb"
    return made + state


def omniglot(folder: Path) -> dict[str, list[bytes]]:
    """The two zip archives: 1623 characters of two 1-bit drawings. Returns the PNG files by Alphabet/character."""
    characters: dict[str, list[bytes]] = {}
    for half, alphabets in (("images_background", range(30)), ("images_evaluation", range(30, 50))):
        names = []
        for alphabet in alphabets:
            count = 33 if alphabet < 23 else 32
            names += [f"Alphabet_{alphabet:02d}/character{number:02d}" for number in range(1, count + 1)]
        files = {}
        for name in names:
            number = len(characters)
            drawings = [pixels(2 * number + drawer, 105, 105) < 20 for drawer in range(2)]
            characters[name] = [encoded(~drawing) for drawing in drawings]
            for drawer, content in enumerate(characters[name], 1):
                files[f"{half}/{name}/{number + 1:04d}_{drawer:02d}.png"] = content
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / f"{half}.zip", "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    assert len(characters) == 1623
    return characters


def wnids(split: str) -> list[str]:
    before = {"train": 0, "val": 64, "test": 80}[split]
    return [f"n{7919 * number % 10**8:08d}" for number in range(before, before + MINI[split])]


def mini_imagenet_pickle(split: str, images: int = 3) -> dict[str, Any]:
    names = wnids(split)
    data = pixels(len(names), images * len(names), 84, 84, 3)
    order = np.random.default_rng(0).permutation(len(data)).reshape(len(names), images)
    return {"image_data": data, "class_dict": {name: rows.tolist() for name, rows in zip(names, order, strict=True)}}


def mini_imagenet_pickles(
    folder: Path, validation: str = "val", dump: Callable[[Any], bytes] = python2, images: int = 3
) -> dict[str, dict[str, Any]]:
    data = {split: mini_imagenet_pickle(split, images) for split in MINI}
    for split, content in data.items():
        write(folder / f"mini-imagenet-cache-{validation if split == 'val' else split}.pkl", dump(content))
    return data


def mini_imagenet_archive(folder: Path) -> dict[str, dict[str, Any]]:
    data = mini_imagenet_pickles(folder)
    with tarfile.open(folder / "mini-imagenet.tar.gz", "w:gz", compresslevel=1) as archive:
        for split in ("test", "train", "val"):
            name = f"mini-imagenet-cache-{split}.pkl"
            archive.add(folder / name, f"./{name}")
            (folder / name).unlink()
    return data


def mini_imagenet_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """images/*.jpg of several sizes, and the three CSV files."""
    listed: dict[str, dict[str, list[Path]]] = {}
    for split in MINI:
        lines, listed[split] = ["filename,label"], {}
        for name in wnids(split):
            for number in range(2):
                size = (84, 84) if number else (50, 61)
                path = folder / "images" / f"{name}{number + 1:08d}.jpg"
                write(path, encoded(pixels(number, *size, 3), "jpeg"))
                lines.append(f"{path.name},{name}")
                listed[split].setdefault(name, []).append(path)
        write(folder / f"{split}.csv", ("\n".join(lines) + "\n").encode())
    return listed


def cifar_fs(folder: Path) -> dict[str, dict[str, Any]]:
    return _cifar(folder, "CIFAR_FS", MINI)


def fc100(folder: Path) -> dict[str, dict[str, Any]]:
    return _cifar(folder, "FC100", {"train": 60, "val": 20, "test": 20})


def _cifar(folder: Path, prefix: str, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    data = {}
    for seed, (split, classes) in enumerate(sizes.items()):
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes) + 10 * seed, 3))
        data[split] = {"data": pixels(seed, 3 * classes, 32, 32, 3), "labels": labels.tolist()}
        write(folder / f"{prefix}_{split}.pickle", python2(data[split]))
    return data


def zipped(folder: Path, name: str, write_files: Callable[[Path], Any]) -> Any:
    """Moves what ``write_files`` writes into the zip archive ``name``."""
    data = write_files(folder)
    with zipfile.ZipFile(folder / "new", "w") as archive:
        for path in sorted(folder.iterdir()):
            if path.name != "new":
                archive.write(path, path.name)
                path.unlink()
    (folder / "new").rename(folder / name)
    return data


def cifar100(folder: Path, where: str) -> dict[str, dict[str, np.ndarray]]:
    """CIFAR-FS in the layout of its authors and learn2learn. Returns the images of each class of each split."""
    drawn: dict[str, dict[str, np.ndarray]] = {}
    files: dict[str, bytes] = {}
    numbers = iter(range(100))
    for split, classes in MINI.items():
        drawn[split] = {}
        for number in (next(numbers) for _ in range(classes)):
            drawn[split][f"thing_{7 * number % 101:03d}"] = pixels(number, 2, 32, 32, 3)
        files[f"splits/bertinetto/{split}.txt"] = "\n".join(drawn[split]).encode()
        for name, stack in drawn[split].items():
            for number, image in enumerate(stack):
                here = f"{split}/{name}" if where == "processed" else f"data/{name}"
                files[f"{here}/{name}_s_{number:06d}.png"] = encoded(image)
    files["splits/ravi-larochelle/train.txt"] = b"another"  # a split of another paper
    if where.endswith(".zip"):
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / where, "w") as archive:
            for path, content in files.items():
                archive.writestr(f"cifar100/{path}", content)
                archive.writestr(f"__MACOSX/cifar100/{path.rpartition('/')[0]}/._{path.rpartition('/')[2]}", b"\0")
    else:
        for path, content in files.items():
            if where != "processed" or not path.startswith("splits"):
                write(folder / ("" if where == "processed" else where) / path, content)
    return drawn


def mini_imagenet_metaoptnet(folder: Path) -> dict[str, dict[str, Any]]:
    names = {"train": "train_phase_train", "val": "val", "test": "test"}
    data, first = {}, 0
    for seed, (split, classes) in enumerate(MINI.items()):
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes) + first, 2))
        data[split] = {"data": pixels(seed, 2 * classes, 84, 84, 3), "labels": labels.tolist()}
        write(folder / f"miniImageNet_category_split_{names[split]}.pickle", python2(data[split]))
        first += classes
    other = {"data": pixels(9, 1, 84, 84, 3), "labels": [0]}  # other images of the training classes
    write(folder / "miniImageNet_category_split_train_phase_test.pickle", python2(other))
    return data


def tiered_imagenet_metaoptnet(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    data = {}
    for seed, (split, classes) in enumerate(TIERED.items()):
        labels = np.random.default_rng(seed).permutation(np.concatenate([np.arange(classes), np.arange(0, classes, 2)]))
        data[split] = pixels(seed, len(labels), 12, 12, 3), labels
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{split}_images.npz", images=data[split][0])
        write(folder / f"{split}_labels.pkl", pickle.dumps({"labels": labels.tolist()}, protocol=2))
    return data


def tiered_imagenet(folder: Path) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Classes of 2 and 3 images: the images as they are, and their labels."""
    data = {}
    for seed, (split, classes) in enumerate(TIERED.items()):
        labels = np.random.default_rng(seed).permutation(
            np.concatenate([np.repeat(np.arange(classes), 2), np.arange(0, classes, 2)])
        )
        images = [pixels(seed + number, 12, 12, 3) for number in range(len(labels))]
        files = [np.frombuffer(encoded(image), np.uint8)[:, None] for image in images]  # as OpenCV encodes: [bytes, 1]
        names = [f"class {number} of {split}" for number in range(classes)]
        general = {"label_general": labels // 20, "label_general_str": []}
        specific = {"label_specific": labels, "label_specific_str": names}
        write(folder / f"{split}_images_png.pkl", python2(files))
        write(folder / f"{split}_labels.pkl", python2(specific | general))
        data[split] = images, labels
    return data


def birds(
    folder: Path, classes: int = 10, images: int = 4, size: tuple[int, ...] = (20, 18, 3), name: str = "bird"
) -> dict[str, np.ndarray]:
    """A folder of class folders. Returns the images of each class by its name."""
    drawn = {f"{name} {number:02d}": pixels(number, images, *size) for number in range(classes)}
    for bird, stack in drawn.items():
        for number, image in enumerate(stack):
            write(folder / bird / f"{number}.png", encoded(image))
    return drawn
