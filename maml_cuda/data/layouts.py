"""Finds the files of each published data set, without reading them.

File names must be those that the authors published. If a folder holds several layouts of a data set, the first one in
the order of the docstrings in ``images.py`` is used. A ``find_*`` function raises FileNotFoundError if there is none;
the error names the files and where they are published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from maml_cuda.data import class_folders, image_files, image_pickles
from maml_cuda.data.class_folders import Classes
from maml_cuda.data.conversion import Source, SourceClass
from maml_cuda.data.unpickle import Pickle

OMNIGLOT_SPLIT = (1100, 100, 423)
OMNIGLOT_MD5 = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
MINI_IMAGENET_SPLIT = (64, 16, 20)
MINI_IMAGENET_MD5 = {"mini-imagenet.tar.gz": "b38f1eb4251fb9459ecc8e7febf9b2eb"}
CIFAR_FS_SPLIT = (64, 16, 20)
FC100_SPLIT = (60, 20, 20)
TIERED_IMAGENET_SPLIT = (351, 97, 160)
TIERED_IMAGENET_MD5 = {"tiered-imagenet.tar": "e07e811b9f29362d159a9edd0d838c62"}

FILE_WORDS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}  # as in names of files


def find_omniglot(path: Path, split: str = "authors") -> Source:
    """The files of Omniglot, to be split as ``images.omniglot`` says."""
    base = path / "omniglot-py" if (path / "omniglot-py").is_dir() else path
    halves = []
    for name in ("images_background", "images_evaluation"):
        half = next((file for file in (base / f"{name}.zip", base / name) if file.exists()), None)
        if half is None:
            raise _missing(
                "Omniglot", path, f"{name}.zip or the folder {name}",
                "https://github.com/brendenlake/omniglot/raw/master/python/",
            )  # fmt: skip
        halves.append(half)
    files = [file for half in halves for file in (_images_below(half) if half.is_dir() else [half])]
    if split == "alphabets":
        read = partial(image_files.read_omniglot, halves, OMNIGLOT_SPLIT, by_alphabets=True)
        return Source(files, read, OMNIGLOT_MD5, options={"split": split})
    return Source(files, partial(image_files.read_omniglot, halves, OMNIGLOT_SPLIT), OMNIGLOT_MD5, OMNIGLOT_SPLIT)


def find_mini_imagenet(path: Path) -> Source:
    """The files of mini-ImageNet."""
    pattern = "mini-imagenet-cache-{}.pkl"
    archive = path / "mini-imagenet.tar.gz"
    if pickles := _pickles(path, pattern):
        return _of_pickles(image_pickles.read_by_class, pickles, MINI_IMAGENET_SPLIT)
    if archive.exists():
        read = partial(image_pickles.read_by_class, _in_archive(archive, pattern))
        return Source([archive], read, MINI_IMAGENET_MD5, MINI_IMAGENET_SPLIT)
    if pickles := _pickles(path, "miniImageNet_category_split_{}.pickle", train="train_phase_train"):
        return _of_pickles(image_pickles.read_by_label, pickles, MINI_IMAGENET_SPLIT)
    if tables := _split_files(path, "{}.csv"):
        splits = {split: image_files.read_table(table, path / "images") for split, table in tables.items()}
        return _of_files(splits, 84, MINI_IMAGENET_SPLIT, list(tables.values()))
    if source := _sorted_files(path, 84, MINI_IMAGENET_SPLIT):
        return source
    raise _missing(
        "mini-ImageNet", path, "mini-imagenet-cache-{train,val,test}.pkl, mini-imagenet.tar.gz, "
        "miniImageNet_category_split_{train_phase_train,val,test}.pickle, images with train.csv, val.csv and test.csv, "
        "or the folders train, val and test",
        "https://zenodo.org/record/7978538 (pickles), https://github.com/renmengye/few-shot-ssl-public (archive)",
    )  # fmt: skip


def find_cifar_fs(path: Path) -> Source:
    """The files of CIFAR-FS."""
    if source := _metaoptnet(path, "CIFAR_FS", CIFAR_FS_SPLIT):
        return source
    places = (path / "cifar100", path / "cifarfs" / "cifar100", path / "cifar100.zip", path / "cifarfs.zip")
    if base := next((place for place in places if place.exists()), None):
        files = [*sorted(base.glob("splits/*/*.txt")), *_images_below(base)] if base.is_dir() else [base]
        return Source(files, partial(image_files.read_cifar100, base), classes=CIFAR_FS_SPLIT)
    if source := _sorted_files(path, 32, CIFAR_FS_SPLIT):
        return source
    raise _missing(
        "CIFAR-FS", path, "CIFAR_FS_{train,val,test}.pickle, CIFAR_FS.zip, cifar100.zip or the folder cifar100, or the "
        "folders train, val and test",
        "https://github.com/kjunelee/MetaOptNet (pickles), https://zenodo.org/record/7978538 (cifar100.zip)",
    )  # fmt: skip


def find_fc100(path: Path) -> Source:
    """The files of FC100."""
    if source := _metaoptnet(path, "FC100", FC100_SPLIT):
        return source
    raise _missing(
        "FC100", path, "FC100_{train,val,test}.pickle or FC100.zip",
        "https://github.com/kjunelee/MetaOptNet, https://zenodo.org/record/7978538",
    )  # fmt: skip


def _metaoptnet(path: Path, prefix: str, split: tuple[int, int, int]) -> Source | None:
    """CIFAR-FS or FC100 as MetaOptNet publishes it: pickles, or a zip archive of them."""
    pattern = prefix + "_{}.pickle"
    if pickles := _pickles(path, pattern):
        return _of_pickles(image_pickles.read_by_label, pickles, split)
    for name in (f"{prefix}.zip", f"{prefix.lower()}.zip"):
        if (archive := path / name).exists():
            return Source([archive], partial(image_pickles.read_by_label, _in_archive(archive, pattern)), classes=split)
    return None


def find_tiered_imagenet(path: Path) -> Source:
    """The files of tiered-ImageNet."""
    png, label = "{}_images_png.pkl", "{}_labels.pkl"
    base = path / "tiered-imagenet" if (path / "tiered-imagenet").is_dir() else path
    labels = _pickles(base, label)
    if labels and (images := _pickles(base, png)):
        files = [pickle.path for pickles in (images, labels) for pickle in pickles.values()]
        return Source(files, partial(image_pickles.read_pngs, images, labels), classes=TIERED_IMAGENET_SPLIT)
    if labels and (arrays := _split_files(base, "{}_images.npz")):
        files = [*arrays.values(), *(pickle.path for pickle in labels.values())]
        return Source(files, partial(image_pickles.read_arrays, arrays, labels), classes=TIERED_IMAGENET_SPLIT)
    for name in ("tiered-imagenet.tar", "tiered_imagenet.tar"):
        if (archive := path / name).exists():
            read = partial(image_pickles.read_pngs, _in_archive(archive, png), _in_archive(archive, label))
            return Source([archive], read, TIERED_IMAGENET_MD5, TIERED_IMAGENET_SPLIT)
    raise _missing(
        "tiered-ImageNet", path, "{train,val,test}_labels.pkl with {train,val,test}_images_png.pkl or "
        "{train,val,test}_images.npz, or tiered-imagenet.tar",
        "https://github.com/renmengye/few-shot-ssl-public, https://github.com/kjunelee/MetaOptNet (npz)",
    )  # fmt: skip


def _of_pickles(
    read: Callable[[Mapping[str, Pickle]], Iterator[SourceClass]],
    pickles: dict[str, Pickle],
    classes: tuple[int, int, int],
) -> Source:
    return Source([pickle.path for pickle in pickles.values()], partial(read, pickles), classes=classes)


def _of_files(
    classes: Mapping[str, Classes],
    side: int,
    sizes: tuple[int, int, int],
    tables: Sequence[Path] = (),
    skipped: Sequence[Path] = (),
) -> Source:
    """Colour image files, resized to ``side`` by ``side`` pixels."""
    files = [file for of_split in classes.values() for of_class in of_split.values() for file in of_class]
    read = partial(image_files.read_files, classes, "RGB", (side, side))
    return Source([*tables, *files], read, classes=sizes, skipped=skipped)


def _sorted_files(path: Path, side: int, sizes: tuple[int, int, int]) -> Source | None:
    """Image files in the folders train, val and test, with a folder for each class."""
    if not (folders := class_folders.split_folders(path)):
        return None
    classes, skipped = class_folders.classes_of_splits(folders)
    return _of_files(classes, side, sizes, skipped=skipped)


def _images_below(folder: Path) -> list[Path]:
    return [file for file in class_folders.visible_files(folder) if class_folders.is_image(file)]


def _split_files(folder: Path, pattern: str, train: str = "train") -> dict[str, Path]:
    """The file of each split: ``pattern`` with ``train``, val or validation, or test inserted; empty if there is none.

    Raises:
        FileNotFoundError: there are files for some splits and not for all.
    """
    words_of = FILE_WORDS | {"train": (train,)}
    candidates = {split: [folder / pattern.format(word) for word in words] for split, words in words_of.items()}
    found = {split: path for split, paths in candidates.items() for path in paths[::-1] if path.exists()}
    for split, paths in candidates.items():
        if found and split not in found:
            there = " and ".join(path.name for path in found.values())
            raise FileNotFoundError(f"{' or '.join(map(str, paths))} is missing beside {there}")
    return found


def _pickles(folder: Path, pattern: str, train: str = "train") -> dict[str, Pickle]:
    return {split: Pickle(path) for split, path in _split_files(folder, pattern, train).items()}


def _in_archive(archive: Path, pattern: str) -> dict[str, Pickle]:
    return {split: Pickle(archive, pattern.format(words[0])) for split, words in FILE_WORDS.items()}


def _missing(name: str, path: Path, files: str, published: str) -> FileNotFoundError:
    text = f"{name} is not in {path}: there must be {files}; it is published at {published}"
    if made := sorted(path.glob("*.hdf5")):
        text += f". {made[0].name} is in torchmeta's own format, which is not supported: use the files it was made from"
    return FileNotFoundError(text)
