"""A trained net is tested on classes of other images than its run's."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from maml_cuda.data import images, own_images
from maml_cuda.train.jobs import image_shape, images_of_run
from maml_cuda.train.settings import SHIPPED, Settings

WITHOUT_HEAD = ("protonet", "matching", "nearest-pixel")  # the algorithms that answer for any number of classes


def other_images(
    settings: Settings, path: str, trained: Collection[str], cache: str | None = None
) -> images.Images | None:
    """The images in ``path``, a folder of classes, as the net of a run of ``settings`` takes them: brought to its
    height, width and channels. Their split for test holds the classes of the folder's own, or, without folders for
    splits, all. None where ``path`` holds the images of the run itself, which may have moved.

    Args:
        trained: the names of the classes that the net was trained on; without any, no class is known to be another.
        cache: the folder for the converted images; None: ``path``.

    Raises:
        ValueError: a class is one of ``trained`` and the images are not those of the run.
        FileNotFoundError, ValueError: those of ``images.folder``.
    """
    if not trained:
        return None
    try:
        found = own_images.class_names(Path(path))
    except (FileNotFoundError, ValueError):
        if settings.job in SHIPPED:
            raise
        return None  # no class folders: another layout, of the run itself
    names = {name for of_split in found.values() for name in of_split}
    if len(names) < 2:
        return None  # such as the folder images of mini-ImageNet
    if known := sorted(names & set(trained)):
        try:
            images_of_run(replace(settings, data=path, cache=cache or settings.cache))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{path} must hold the images of this run, or classes that it was not trained on, got {known[0]}, on "
                f"which it was: {error}"
            ) from None
        return None
    channels, height, width = image_shape(settings)
    return images.folder(
        path,
        size=(height, width),
        channels=channels,
        background=settings.background,
        split=None if len(found) > 1 else (0, 0, len(found["test"])),
        cache=cache,
    )


def check_ways(settings: Settings, trained: int) -> None:
    """ValueError where a net that was trained for so many classes a task cannot tell apart ``settings.ways``."""
    if settings.ways != trained and settings.algorithm not in WITHOUT_HEAD:
        raise ValueError(
            f"ways must be {trained} for this net of {settings.algorithm}, whose last layer was trained for so many "
            f"classes, got {settings.ways}; protonet and matching have no such layer and take any"
        )
