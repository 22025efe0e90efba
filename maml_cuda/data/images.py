"""Opens published few-shot image data sets, and folders of your own images.

    images = maml_cuda.data.images.mini_imagenet("data/mini-imagenet")
    tasks = ImageTasks(images.split("train"), n_way=5, k_shot=1, n_query=15)
    episodes = Episodes(images.tensor("train"), n_way=5, k_shot=1, n_query=15).to("cuda")

Nothing is downloaded: each function says where its data set is published and which files it looks for. The first call
converts the files to one array, in the same folder or in the folder ``cache``. Later calls map that array into memory.
torchmeta's HDF5 files are not supported; the archives that it keeps beside them are.

Every function raises these errors before it writes an array:

- ``FileNotFoundError``: a file is missing.
- ``ValueError``: a file is damaged, is not the published one, or does not have the expected layout.
- ``ModuleNotFoundError``: image files are to be read and Pillow is not installed.
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
    """A converted data set: uint8 images, class by class, read from the disk on demand.

    The functions of this module create it.

    Attributes:
        name: the name of the layout.
        folder: the folder that was opened.
        sha256: a checksum of the source files and of the options.
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
        # Copy-on-write, because torch warns about read-only arrays. Nothing writes to it.
        self._images = torch.from_numpy(np.load((place or folder) / record["images"], mmap_mode="c"))

    def split(self, split: str) -> ImageClasses:
        """The images of one split, on the disk.

        Args:
            split: train, validation (val, valid) or test.

        Returns:
            What ``ImageTasks`` draws from.

        Raises:
            ValueError: there is no split of this name.
        """
        split = split_name(split)
        before = sum(len(self._names[earlier]) for earlier in SPLITS[: SPLITS.index(split)])
        names = self._names[split]
        offsets = torch.tensor(self._offsets[before : before + len(names) + 1])
        images = self._images[offsets[0] : offsets[-1]]
        # The user chooses the splits of an own folder, unless one split holds all classes.
        choice = len(self._offsets) - 1 if self.name == "folder" and len(names) < len(self._offsets) - 1 else 0
        return ImageClasses(f"{split} classes of {self.name}", images, offsets.diff(), names, choice)

    def tensor(self, split: str) -> Tensor:
        """The images of one split as a tensor for ``Episodes``.

        If the classes differ in size, each contributes its first images, as many as the smallest class has, and the
        tensor is a copy in memory. Otherwise it is on the disk.

        Args:
            split: train, validation (val, valid) or test.

        Returns:
            uint8 ``[classes, samples, channels, height, width]``.

        Raises:
            ValueError: there is no split of this name.
        """
        classes = self.split(split)
        images, count = classes.images, classes.count
        fewest = int(count.min())
        if len(images) != fewest * len(count):
            first = count.cumsum(0) - count
            images = images[(first.unsqueeze(1) + torch.arange(fewest)).flatten()]
        return images.view(len(count), fewest, *self.shape)


def omniglot(path: Where, *, split: str = "authors", cache: Where | None = None) -> Images:
    """Omniglot (Lake et al. 2015): 1623 characters with 20 images each, ``[1, 28, 28]``, light ink on a dark
    background.

    The split "authors" is that of the MAML paper: 1100 characters for training, 100 for validation, 423 for test, of
    all alphabets. The sorted names are shuffled by ``random.Random(1)`` and cut in this order. The authors' own split
    has this seed too, and depended on the order of files in their file system. The split "alphabets" tests on alphabets
    that training has not seen (Lake et al. 2015): the 659 characters of the 20 evaluation alphabets are for test. Of
    the 30 background alphabets, 5 are for validation, drawn in the same way, and 25 for training.

    Use ``rotations=4`` of the sampler for quarter turns as classes of their own.

    Images are resized from 105 x 105 by Lanczos resampling. The authors' script asks for the same, but on 1-bit images,
    which Pillow resizes by nearest neighbours; their images are therefore rougher.

    Args:
        path: a folder that holds, directly or in ``omniglot-py``, ``images_background`` and ``images_evaluation``, each
            as .zip or unpacked, from https://github.com/brendenlake/omniglot/raw/master/python/.
        split: "authors" or "alphabets".
        cache: the folder of the converted images; None: ``path``.
    """
    if split not in ("authors", "alphabets"):
        raise ValueError(f"split must be one of authors, alphabets for omniglot, got {split!r}")
    return Images("omniglot", path, partial(layouts.find_omniglot, split=split), cache)


def mini_imagenet(path: Where, *, cache: Where | None = None) -> Images:
    """mini-ImageNet (Vinyals et al. 2016): 100 classes of 600 images ``[3, 84, 84]``, split 64/16/20 (Ravi and
    Larochelle 2017).

    ``path`` holds one of these; the first one found is used:

    - ``mini-imagenet-cache-{train,val,test}.pkl`` (or ``validation``), https://zenodo.org/record/7978538
    - ``mini-imagenet.tar.gz`` with those, https://github.com/renmengye/few-shot-ssl-public
    - ``miniImageNet_category_split_{train_phase_train,val,test}.pickle``, https://github.com/kjunelee/MetaOptNet
    - ``images/`` with ``train.csv``, ``val.csv`` and ``test.csv`` (columns filename, label)
    - ``train/``, ``val/`` and ``test/`` with a folder for each class, as written by the MAML authors' script

    Image files of another size are resized by Lanczos resampling.

    Args:
        path: the folder that holds the data set.
        cache: the folder of the converted images; None: ``path``.
    """
    return Images("mini-imagenet", path, layouts.find_mini_imagenet, cache)


def cifar_fs(path: Where, *, cache: Where | None = None) -> Images:
    """CIFAR-FS (Bertinetto et al. 2019): 100 classes of 600 images ``[3, 32, 32]``, split 64/16/20.

    ``path`` holds one of these; the first one found is used:

    - ``CIFAR_FS_{train,val,test}.pickle``, or ``CIFAR_FS.zip`` with those, https://github.com/kjunelee/MetaOptNet
    - ``cifar100/`` with ``data/<class>/`` and ``splits/bertinetto/{train,val,test}.txt``, as unpacked by
      https://github.com/bertinetto/r2d2 and learn2learn (there in ``cifarfs/``), or their ``cifar100.zip``
    - ``train/``, ``val/`` and ``test/`` with a folder for each class, as sorted by learn2learn

    Args:
        path: the folder that holds the data set.
        cache: the folder of the converted images; None: ``path``.
    """
    return Images("cifar-fs", path, layouts.find_cifar_fs, cache)


def fc100(path: Where, *, cache: Where | None = None) -> Images:
    """FC100 (Oreshkin et al. 2018): 100 classes of 600 images ``[3, 32, 32]``, split 60/20/20 by superclass.

    Args:
        path: a folder that holds ``FC100_{train,val,test}.pickle``, or ``FC100.zip`` (``fc100.zip``) with those, from
            https://github.com/kjunelee/MetaOptNet or https://zenodo.org/record/7978538.
        cache: the folder of the converted images; None: ``path``.
    """
    return Images("fc100", path, layouts.find_fc100, cache)


def tiered_imagenet(path: Where, *, cache: Where | None = None) -> Images:
    """tiered-ImageNet (Ren et al. 2018): 608 classes of 732 to 1300 images ``[3, 84, 84]``, split 351/97/160.

    ``path``, or ``tiered-imagenet`` in it, holds ``{train,val,test}_labels.pkl`` and one of

    - ``{train,val,test}_images_png.pkl``, https://github.com/renmengye/few-shot-ssl-public
    - ``{train,val,test}_images.npz``, https://github.com/kjunelee/MetaOptNet

    or ``path`` holds the archive of the former, ``tiered-imagenet.tar`` (``tiered_imagenet.tar``). The conversion reads
    each of these files as a whole into memory.

    Args:
        path: the folder that holds the data set.
        cache: the folder of the converted images; None: ``path``.
    """
    return Images("tiered-imagenet", path, layouts.find_tiered_imagenet, cache)


def folder(
    path: Where,
    *,
    size: int | tuple[int, int] | None = None,
    background: str = "white",
    channels: int | None = None,
    split: Sequence[int] | None = None,
    light_ink: bool = False,
    cache: Where | None = None,
) -> Images:
    """Your own images: a folder with one folder of image files for each class.

    Images are decoded as a viewer shows them: rotated by their EXIF orientation, and drawn on a background where they
    are transparent. Files that are not images, and folders without images, are skipped with a warning. Each choice of
    options has its own conversion.

    If ``path`` has subfolders ``train``, ``val`` (``valid``, ``validation``) and ``test``, in upper or lower case,
    these hold the class folders of the splits, and no class may be in two of them. Otherwise the classes are drawn from
    the sorted names with a fixed seed.

    Args:
        path: the folder.
        size: height and width in pixels, or one number for both; images are resized by Lanczos resampling and may be
            stretched. None: all images must have the same size.
        background: the colour behind transparent images: "white", "black" or "#rrggbb".
        channels: 1 or 3; None: 1 if every file is grey, otherwise 3.
        split: the number of classes for training, validation and test, which add up to all classes. None: 20 % for test
            and 16 % for validation (both rounded, at least 1), the others for training.
        light_ink: characters become light ink on a dark ground, as those of Omniglot and of the glyphs are: an image is
            inverted if its median pixel is above 127.
        cache: the folder of the converted images, which is created if needed; None: ``path``.
    """
    find = partial(
        own_images.find, size=size, background=background, channels=channels, split=split, light_ink=light_ink
    )
    return Images("folder", path, find, cache)


OPEN = {
    "omniglot": omniglot,
    "mini-imagenet": mini_imagenet,
    "cifar-fs": cifar_fs,
    "fc100": fc100,
    "tiered-imagenet": tiered_imagenet,
    "folder": folder,
}
