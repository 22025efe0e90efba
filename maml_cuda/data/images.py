"""Few-shot image data sets in the layouts in which they are published, and folders of your own images.

    images = maml_cuda.data.images.mini_imagenet("data/mini-imagenet")
    tasks = ImageTasks(images.split("train"), n_way=5, k_shot=1, n_query=15)
    episodes = Episodes(images.tensor("train"), n_way=5, k_shot=1, n_query=15).to("cuda")

Nothing is downloaded: each function says where its data set is published and which files it looks for. The first call
converts them to one array beside the original (``conversion.py``), later ones map it into memory. Every function
raises FileNotFoundError where a file is missing, ValueError where one is damaged, not the published one, or not what
its layout says, and ModuleNotFoundError where image files are to be read without Pillow; all before an array stands.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maml_cuda.data import image_files, image_pickles
from maml_cuda.data.conversion import SPLITS, Source, converted
from maml_cuda.data.image_tasks import ImageClasses
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
FOLDER_SPLIT = {"validation": 0.16, "test": 0.2}  # mini-ImageNet's; the others are trained on


class Images:
    """A converted data set: uint8 images, class by class, read from the disk as they are used.

    Attributes:
        name: of the layout.
        sha256: checksum of the files that it was converted from.
        shape: ``(channels, height, width)`` of every image.
    """

    def __init__(self, name: str, folder: str | PathLike[str], find: Callable[[Path], Source]) -> None:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} must be a folder of images ({name}), got no folder")
        record = converted(name, folder, find(folder))
        self.name = name
        self.folder = folder
        self.sha256: str = record["sha256"]
        self.shape: tuple[int, int, int] = tuple(record["shape"][1:])
        self._names: dict[str, list[str]] = record["names"]
        self._offsets: list[int] = record["offsets"]
        # Copy-on-write, so that torch takes it for writable; nobody writes.
        self._images = torch.from_numpy(np.load(folder / record["images"], mmap_mode="c"))

    def split(self, split: str) -> ImageClasses:
        """The images of train, validation or test, as they lie on the disk. ValueError for another name."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        before = sum(len(self._names[earlier]) for earlier in SPLITS[: SPLITS.index(split)])
        names = self._names[split]
        offsets = torch.tensor(self._offsets[before : before + len(names) + 1])
        images = self._images[offsets[0] : offsets[-1]]
        return ImageClasses(f"{split} classes of {self.name}", images, offsets.diff(), names)

    def tensor(self, split: str) -> Tensor:
        """The images of a split for ``Episodes``: ``[classes, samples, channels, height, width]`` uint8.

        Where classes differ in size, each gives as many images as the smallest has, its first ones, and the tensor is
        a copy in memory; otherwise it lies on the disk.
        """
        classes = self.split(split)
        images, count = classes.images, classes.count
        fewest = int(count.min())
        if len(images) != fewest * len(count):
            first = count.cumsum(0) - count
            images = images[(first.unsqueeze(1) + torch.arange(fewest)).flatten()]
        return images.view(len(count), fewest, *self.shape)


def omniglot(path: str | PathLike[str]) -> Images:
    """Omniglot (Lake et al. 2015): 1623 characters of 20 images, here ``[1, 28, 28]`` and light ink on dark.

    ``path``, or ``omniglot-py`` in it, holds ``images_background`` and ``images_evaluation``, each as .zip or unpacked,
    from https://github.com/brendenlake/omniglot/raw/master/python/. The split is the MAML paper's, 1100 characters to
    train on, 100 to validate, 423 to test, drawn from the sorted names: the authors' own followed from the order of
    their file system. Quarter turns as classes of their own are the sampler's: ``rotations=4``.

    Images are resized from 105 x 105 by Lanczos resampling. The authors' script asks for that too, but of 1-bit images,
    which Pillow resizes by nearest neighbours: theirs are rougher.
    """
    return Images("omniglot", path, _find_omniglot)


def mini_imagenet(path: str | PathLike[str]) -> Images:
    """mini-ImageNet (Vinyals et al. 2016): 100 classes of 600 images ``[3, 84, 84]``, split 64/16/20 as by Ravi and
    Larochelle.

    ``path`` holds one of, the first found being taken:
        ``mini-imagenet-cache-{train,val,test}.pkl`` (``validation`` too), https://zenodo.org/record/7978538;
        ``mini-imagenet.tar.gz`` with those, https://github.com/renmengye/few-shot-ssl-public;
        ``images/`` with ``train.csv``, ``val.csv`` and ``test.csv`` (columns filename, label);
        ``train/``, ``val/`` and ``test/`` with a folder for each class, as the MAML authors' script leaves them.
    Image files of another size are resized by Lanczos resampling.
    """
    return Images("mini-imagenet", path, _find_mini_imagenet)


def cifar_fs(path: str | PathLike[str]) -> Images:
    """CIFAR-FS (Bertinetto et al. 2019): 100 classes of 600 images ``[3, 32, 32]``, split 64/16/20.

    ``path`` holds ``CIFAR_FS_{train,val,test}.pickle`` of https://github.com/kjunelee/MetaOptNet.
    """
    return Images("cifar-fs", path, partial(_find_cifar, "CIFAR-FS", "CIFAR_FS", CIFAR_FS_SPLIT))


def fc100(path: str | PathLike[str]) -> Images:
    """FC100 (Oreshkin et al. 2018): 100 classes of 600 images ``[3, 32, 32]``, split 60/20/20 by their superclasses.

    ``path`` holds ``FC100_{train,val,test}.pickle`` of https://github.com/kjunelee/MetaOptNet.
    """
    return Images("fc100", path, partial(_find_cifar, "FC100", "FC100", FC100_SPLIT))


def tiered_imagenet(path: str | PathLike[str]) -> Images:
    """tiered-ImageNet (Ren et al. 2018): 608 classes of 732 to 1300 images ``[3, 84, 84]``, split 351/97/160.

    ``path``, or ``tiered-imagenet`` in it, holds ``{train,val,test}_images_png.pkl`` and
    ``{train,val,test}_labels.pkl`` of https://github.com/renmengye/few-shot-ssl-public, or ``path`` their archive
    ``tiered-imagenet.tar``. A pickle is read whole: the conversion takes as much memory as the largest has bytes.
    """
    return Images("tiered-imagenet", path, _find_tiered_imagenet)


def folder(path: str | PathLike[str]) -> Images:
    """Your own images: a folder with a folder for each class, all images of one size, grey or of colour.

    Where ``path`` has subfolders ``train``, ``val`` (or ``validation``) and ``test``, these hold the folders of the
    classes and are the split: no class is in two. Elsewhere classes are drawn from the sorted names, with a fixed
    seed: 20 % to test, 16 % to validate (both rounded, at least 1), the others to train on.
    """
    return Images("folder", path, _find_folder)


OPEN = {
    "omniglot": omniglot,
    "mini-imagenet": mini_imagenet,
    "cifar-fs": cifar_fs,
    "fc100": fc100,
    "tiered-imagenet": tiered_imagenet,
    "folder": folder,
}


# -- which files they are ------------------------------------------------------------------------------------

SPELLINGS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}  # in names of files


def _find_omniglot(path: Path) -> Source:
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
    files = [file for half in halves for file in (image_files.visible_files(half) if half.is_dir() else [half])]
    return Source(files, partial(image_files.read_omniglot, halves, OMNIGLOT_SPLIT), OMNIGLOT_MD5, OMNIGLOT_SPLIT)


def _find_mini_imagenet(path: Path) -> Source:
    pattern = "mini-imagenet-cache-{}.pkl"
    archive = path / "mini-imagenet.tar.gz"
    if pickles := _pickles(path, pattern):
        files = [pickle.path for pickle in pickles.values()]
        return Source(files, partial(image_pickles.read_by_class, pickles), classes=MINI_IMAGENET_SPLIT)
    if archive.exists():
        pickles = _in_archive(archive, pattern)
        read = partial(image_pickles.read_by_class, pickles)
        return Source([archive], read, MINI_IMAGENET_MD5, MINI_IMAGENET_SPLIT)
    if tables := _split_files(path, "{}.csv"):
        splits = {split: image_files.listed(table, path / "images") for split, table in tables.items()}
    elif folders := _split_files(path, "{}"):
        splits = _split_classes(folders)
    else:
        raise _missing(
            "mini-ImageNet", path, "mini-imagenet-cache-{train,val,test}.pkl, mini-imagenet.tar.gz, images with "
            "train.csv, val.csv and test.csv, or the folders train, val and test",
            "https://zenodo.org/record/7978538 (pickles), https://github.com/renmengye/few-shot-ssl-public (archive)",
        )  # fmt: skip
    files = [*tables.values(), *_all_files(splits)]
    return Source(files, partial(image_files.read_files, splits, "RGB", 84), classes=MINI_IMAGENET_SPLIT)


def _find_cifar(name: str, prefix: str, split: tuple[int, int, int], path: Path) -> Source:
    """A choice of CIFAR-100's classes, as MetaOptNet pickles it."""
    pickles = _pickles(path, prefix + "_{}.pickle")
    if not pickles:
        published = f"https://github.com/kjunelee/MetaOptNet ({prefix}.zip)"
        raise _missing(name, path, prefix + "_{train,val,test}.pickle", published)
    files = [pickle.path for pickle in pickles.values()]
    return Source(files, partial(image_pickles.read_by_label, pickles), classes=split)


def _find_tiered_imagenet(path: Path) -> Source:
    patterns = ("{}_images_png.pkl", "{}_labels.pkl")
    base = path / "tiered-imagenet" if (path / "tiered-imagenet").is_dir() else path
    archive = path / "tiered-imagenet.tar"
    images, labels = (_pickles(base, pattern) for pattern in patterns)
    if images and labels:
        files = [pickle.path for pickles in (images, labels) for pickle in pickles.values()]
    elif archive.exists():
        images, labels = (_in_archive(archive, pattern) for pattern in patterns)
        files = [archive]
    else:
        raise _missing(
            "tiered-ImageNet", path, "{train,val,test}_images_png.pkl and {train,val,test}_labels.pkl, or "
            "tiered-imagenet.tar", "https://github.com/renmengye/few-shot-ssl-public",
        )  # fmt: skip
    read = partial(image_pickles.read_pngs, images, labels)
    return Source(files, read, TIERED_IMAGENET_MD5, TIERED_IMAGENET_SPLIT)


def _find_folder(path: Path) -> Source:
    if folders := _split_files(path, "{}"):
        splits = _split_classes(folders)
    else:
        classes = image_files.class_folders(path)
        sizes = {split: max(1, round(share * len(classes))) for split, share in FOLDER_SPLIT.items()}
        if len(classes) <= sum(sizes.values()):
            raise ValueError(f"{path} must hold at least 3 classes, one for each split, got {len(classes)}")
        names = image_files.drawn(list(classes), (len(classes) - sum(sizes.values()), *sizes.values()))
        splits = {split: {name: classes[name] for name in names[split]} for split in SPLITS}
    return Source(_all_files(splits), partial(image_files.read_folder, splits))


def _split_files(folder: Path, pattern: str) -> dict[str, Path]:
    """The file or folder of each split: ``pattern`` with train, val or validation, or test in it; {} without any.

    FileNotFoundError where one is missing and another is not.
    """
    candidates = {split: [folder / pattern.format(word) for word in words] for split, words in SPELLINGS.items()}
    found = {split: path for split, paths in candidates.items() for path in paths[::-1] if path.exists()}
    for split, paths in candidates.items():
        if found and split not in found:
            there = " and ".join(path.name for path in found.values())
            raise FileNotFoundError(f"{' or '.join(map(str, paths))} is missing beside {there}")
    return found


def _split_classes(folders: dict[str, Path]) -> dict[str, image_files.Classes]:
    """The class folders of each split. ValueError where a class is in two: it would be tested on what was learned."""
    splits = {split: image_files.class_folders(below) for split, below in folders.items()}
    for one, other in combinations(SPLITS, 2):
        for name in splits[one]:
            if name in splits[other]:
                raise ValueError(
                    f"the splits must have different classes, got {name} in {folders[one]} and in {folders[other]}"
                )
    return splits


def _pickles(folder: Path, pattern: str) -> dict[str, Pickle]:
    return {split: Pickle(path) for split, path in _split_files(folder, pattern).items()}


def _in_archive(archive: Path, pattern: str) -> dict[str, Pickle]:
    return {split: Pickle(archive, pattern.format(words[0])) for split, words in SPELLINGS.items()}


def _all_files(splits: dict[str, image_files.Classes]) -> list[Path]:
    return [file for classes in splits.values() for files in classes.values() for file in files]


def _missing(name: str, path: Path, files: str, published: str) -> FileNotFoundError:
    return FileNotFoundError(f"{name} is not in {path}: there must be {files}; it is published at {published}")
