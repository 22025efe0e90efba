"""Image files to arrays, by Pillow, which is imported here alone and only when an image file is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

GREY = ("1", "L", "LA")  # Pillow's modes of 8 bits a channel or fewer, by what they become
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
TRANSPARENT = ("LA", "PA", "RGBA")  # and whatever names a transparent colour

Colour = tuple[int, int, int]  # red, green, blue, each 0 to 255


def decode(
    file: IO[bytes],
    what: str,
    mode: str,
    size: tuple[int, int] | None = None,
    background: Colour | None = None,
) -> np.ndarray:
    """The image in ``file``: ``[channels, height, width]`` uint8.

    Args:
        what: the file's name, for errors.
        mode: "L" for one channel, "RGB" for three.
        size: height and width, by Lanczos resampling; None: as the file has them.
        background: the image is as a viewer shows it: turned as its EXIF orientation says, and on this colour where it
            is transparent. None: pixels as they are stored, which is how the authors of published sets read theirs.

    Raises:
        ModuleNotFoundError: Pillow is missing.
        ValueError: the file is no image, is cut short, or has more than 8 bits a channel.
    """
    with _opened(file, what) as (pillow, image):
        if background is not None:
            image = _as_shown(pillow, image, background)
        # A copy in the mode wanted comes first: Pillow resizes 1-bit images and palettes by nearest neighbours.
        image = image.convert(mode)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], pillow.Resampling.LANCZOS)
        pixels = np.asarray(image)
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def is_coloured(file: IO[bytes], what: str, background: Colour) -> bool:
    """Whether ``decode`` needs three channels for the image in ``file`` on this background: told by its header alone.
    Errors as ``decode``."""
    with _opened(file, what) as (_, image):
        return image.mode not in GREY or (_transparent(image) and len(set(background)) > 1)


@contextmanager
def _opened(file: IO[bytes], what: str) -> Iterator[tuple[Any, Any]]:
    """Pillow's module and the image; whatever fails while it is open is said of ``what``."""
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            if image.mode not in GREY + COLOUR:
                raise ValueError(f"pixels of mode {image.mode}")
            yield pillow, image
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in any way that its format can
        raise ValueError(f"{what} must be a whole image of 8 bits a channel, got: {error}") from error


def _as_shown(pillow: Any, image: Any, background: Colour) -> Any:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if not _transparent(image):
        return image
    image = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", image.size, (*background, 255)), image).convert("RGB")


def _transparent(image: Any) -> bool:
    return image.mode in TRANSPARENT or "transparency" in image.info


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Pillow must be installed to read image files: pip install "maml-cuda[images]"'
        ) from error
    return Image
