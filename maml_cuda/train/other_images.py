"""Tests a trained network on images of other classes than its run's."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from maml_cuda.data import images, own_images
from maml_cuda.train.jobs import images_of_run, pictures_of
from maml_cuda.train.settings import SHIPPED, WITHOUT_INNER_LOOP, Settings


def other_images(
    settings: Settings, path: str, trained: Collection[str], cache: str | None = None
) -> images.Images | None:
    """Opens a folder of classes as the network of a run takes them, with its height, width and channels.

    The test split holds the classes of the folder's own test split, or all classes if the folder has no splits.

    Args:
        settings: the settings of the run.
        path: the folder.
        trained: the names of the classes that the network was trained on.
        cache: the folder of the converted images; None: ``path``.

    Returns:
        The images; None if ``path`` holds those of the run itself, which may have moved, or if ``trained`` is empty.

    Raises:
        ValueError: a class is in ``trained`` and the images are not those of the run, or see ``images.folder``.
        FileNotFoundError: see ``images.folder``.
    """
    if not trained:
        return None
    try:
        found = own_images.class_names(Path(path))
    except (FileNotFoundError, ValueError):
        if settings.job in SHIPPED:
            raise
        return None  # there are no class folders, so this is another layout: the run's own data set
    names = {name for of_split in found.values() for name in of_split}
    if len(names) < 2:
        return None  # a single class: a folder of another layout, such as ``images`` of mini-ImageNet
    if known := sorted(names & set(trained)):
        try:
            images_of_run(replace(settings, data=path, cache=cache or settings.cache))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{path} must hold the images of this run, or classes that it was not trained on, got the "
                f"trained class {known[0]}: {error}"
            ) from None
        return None
    taken = pictures_of(settings)
    return images.folder(
        path,
        size=(taken.height, taken.width),
        channels=taken.channels,
        background=taken.background,
        light_ink=taken.light_ink,
        split=None if len(found) > 1 else (0, 0, len(found["test"])),
        cache=cache,
    )


def check_ways(settings: Settings, trained: int) -> None:
    """Raises ValueError if a network that was trained for ``trained`` classes per task cannot be tested with
    ``settings.ways``.
    """
    if settings.ways != trained and settings.algorithm not in WITHOUT_INNER_LOOP:
        raise ValueError(
            f"ways must be {trained} for this net of {settings.algorithm}, whose last layer has {trained} outputs, "
            f"got {settings.ways}; protonet and matching have no such layer and accept any number"
        )
