"""Few-shot image data sets in the layouts in which they are published, and folders of your own images.

    images = maml_cuda.data.images.mini_imagenet("data/mini-imagenet")
    tasks = ImageTasks(images.split("train"), n_way=5, k_shot=1, n_query=15)
    episodes = Episodes(images.tensor("train"), n_way=5, k_shot=1, n_query=15).to("cuda")

Nothing is downloaded: each function says where its data set is published and which files it looks for. The first call
converts them to one array beside the original, or in the folder ``cache`` where that is read-only (``conversion.py``),
later ones map it into memory. The HDF5 files into which torchmeta turns its downloads are not read; the archives that
it leaves beside them are. Every function raises FileNotFoundError where a file is missing, ValueError where one is
damaged, not the published one, or not what its layout says, and ModuleNotFoundError where image files are to be read
without Pillow; all before an array stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maml_cuda.data import layouts, own_images
from maml_cuda.data.conversion import Source, convert
from maml_cuda.data.image_tasks import ImageClasses
from maml_cuda.data.splits import SPLITS, split_name

Where = str | PathLike[str]


class Images:
    """A converted data set: uint8 images, class by class, read from the disk as they are used.

    Attributes:
        name: of the layout.
        sha256: checksum of the files that it was converted from, and of the options.
        shape: ``(channels, height, width)`` of every image.
    """

    def __init__(self, name: str, folder: Where, find: Callable[[Path], Source], cache: Where | None = None) -> None:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} must be a folder of images ({name}), got no folder")
        place = None if cache is None else Path(cache).expanduser()
        record = convert(name, folder, find(folder), place)
        self.name = name
        self.folder = folder
        self.sha256: str = record["sha256"]
        self.shape: tuple[int, int, int] = tuple(record["shape"][1:])
        self._names: dict[str, list[str]] = record["names"]
        self._offsets: list[int] = record["offsets"]
        # Copy-on-write, so that torch takes it for writable; nobody writes.
        self._images = torch.from_numpy(np.load((place or folder) / record["images"], mmap_mode="c"))

    def split(self, split: str) -> ImageClasses:
        """The images of train, validation (or val, valid) or test, as they lie on the disk. ValueError for another
        name."""
        split = split_name(split)
        before = sum(len(self._names[earlier]) for earlier in SPLITS[: SPLITS.index(split)])
        names = self._names[split]
        offsets = torch.tensor(self._offsets[before : before + len(names) + 1])
        images = self._images[offsets[0] : offsets[-1]]
        # Of one's own folder, the classes of a split are one's own choice, unless all are in it.
        choice = len(self._offsets) - 1 if self.name == "folder" and len(names) < len(self._offsets) - 1 else 0
        return ImageClasses(f"{split} classes of {self.name}", images, offsets.diff(), names, choice)

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


def omniglot(path: Where, *, cache: Where | None = None) -> Images:
    """Omniglot (Lake et al. 2015): 1623 characters of 20 images, here ``[1, 28, 28]`` and light ink on dark.

    ``path``, or ``omniglot-py`` in it, holds ``images_background`` and ``images_evaluation``, each as .zip or unpacked,
    from https://github.com/brendenlake/omniglot/raw/master/python/. The split is the MAML paper's, 1100 characters to
    train on, 100 to validate, 423 to test, drawn from the sorted names: the authors' own followed from the order of
    their file system. Quarter turns as classes of their own are the sampler's: ``rotations=4``.

    Images are resized from 105 x 105 by Lanczos resampling. The authors' script asks for that too, but of 1-bit images,
    which Pillow resizes by nearest neighbours: theirs are rougher.
    """
    return Images("omniglot", path, layouts.find_omniglot, cache)


def mini_imagenet(path: Where, *, cache: Where | None = None) -> Images:
    """mini-ImageNet (Vinyals et al. 2016): 100 classes of 600 images ``[3, 84, 84]``, split 64/16/20 as by Ravi and
    Larochelle.

    ``path`` holds one of, the first found being taken:
        ``mini-imagenet-cache-{train,val,test}.pkl`` (``validation`` too), https://zenodo.org/record/7978538;
        ``mini-imagenet.tar.gz`` with those, https://github.com/renmengye/few-shot-ssl-public;
        ``miniImageNet_category_split_{train_phase_train,val,test}.pickle``, https://github.com/kjunelee/MetaOptNet;
        ``images/`` with ``train.csv``, ``val.csv`` and ``test.csv`` (columns filename, label);
        ``train/``, ``val/`` and ``test/`` with a folder for each class, as the MAML authors' script leaves them.
    Image files of another size are resized by Lanczos resampling.
    """
    return Images("mini-imagenet", path, layouts.find_mini_imagenet, cache)


def cifar_fs(path: Where, *, cache: Where | None = None) -> Images:
    """CIFAR-FS (Bertinetto et al. 2019): 100 classes of 600 images ``[3, 32, 32]``, split 64/16/20.

    ``path`` holds one of, the first found being taken:
        ``CIFAR_FS_{train,val,test}.pickle``, or ``CIFAR_FS.zip`` with those, https://github.com/kjunelee/MetaOptNet;
        ``cifar100/`` with ``data/<class>/`` and ``splits/bertinetto/{train,val,test}.txt``, as
        https://github.com/bertinetto/r2d2 and learn2learn (there in ``cifarfs/``) unpack it, or their ``cifar100.zip``;
        ``train/``, ``val/`` and ``test/`` with a folder for each class, as learn2learn sorts them.
    """
    return Images("cifar-fs", path, layouts.find_cifar_fs, cache)


def fc100(path: Where, *, cache: Where | None = None) -> Images:
    """FC100 (Oreshkin et al. 2018): 100 classes of 600 images ``[3, 32, 32]``, split 60/20/20 by their superclasses.

    ``path`` holds ``FC100_{train,val,test}.pickle``, or ``FC100.zip`` (``fc100.zip``) with those, of
    https://github.com/kjunelee/MetaOptNet or https://zenodo.org/record/7978538.
    """
    return Images("fc100", path, layouts.find_fc100, cache)


def tiered_imagenet(path: Where, *, cache: Where | None = None) -> Images:
    """tiered-ImageNet (Ren et al. 2018): 608 classes of 732 to 1300 images ``[3, 84, 84]``, split 351/97/160.

    ``path``, or ``tiered-imagenet`` in it, holds ``{train,val,test}_labels.pkl`` and beside them
        ``{train,val,test}_images_png.pkl`` of https://github.com/renmengye/few-shot-ssl-public, or
        ``{train,val,test}_images.npz`` of https://github.com/kjunelee/MetaOptNet;
    or ``path`` the former's archive, ``tiered-imagenet.tar`` (``tiered_imagenet.tar``).
    Each of these files is read whole: the conversion takes as much memory as the largest has bytes.
    """
    return Images("tiered-imagenet", path, layouts.find_tiered_imagenet, cache)


def folder(
    path: Where,
    *,
    size: int | tuple[int, int] | None = None,
    background: str = "white",
    channels: int | None = None,
    split: Sequence[int] | None = None,
    cache: Where | None = None,
) -> Images:
    """Your own images: a folder with a folder for each class, which holds image files.

    Images are read as a viewer shows them: turned as their EXIF orientation says, and transparent ones on a background.
    Where every file is grey they have one channel, otherwise three. Files that are no images, and folders without any,
    are skipped with a warning when the folder is converted. Each choice of these options is a conversion of its own.

    Where ``path`` has subfolders ``train``, ``val`` (``valid``, ``validation``) and ``test``, in upper or lower case,
    these hold the folders of the classes and are the split: no class is in two. Elsewhere classes are drawn from the
    sorted names, with a fixed seed.

    Args:
        size: height and width, or one number for both, to which images are resized by Lanczos resampling, whatever
            their proportions are. None: images must be of one size.
        background: what shows through transparent images: "white", "black" or "#rrggbb".
        channels: 1 or 3; None: 1 where every file is grey, otherwise 3.
        split: how many of the classes are to train, to validate and to test on; they add up to all. None: 20 % to test,
            16 % to validate (both rounded, at least 1), the others to train on.
        cache: the folder for the converted images, made where it is missing; None: ``path``.
    """
    find = partial(own_images.find, size=size, background=background, channels=channels, split=split)
    return Images("folder", path, find, cache)


OPEN = {
    "omniglot": omniglot,
    "mini-imagenet": mini_imagenet,
    "cifar-fs": cifar_fs,
    "fc100": fc100,
    "tiered-imagenet": tiered_imagenet,
    "folder": folder,
}
