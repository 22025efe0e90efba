"""Decodes image files with Pillow. Only this module imports Pillow, and only when an image file is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

# Pillow's modes with at most 8 bits per channel, by the array that they are converted to: one channel or three.
GREY = ("1", "L", "LA")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
TRANSPARENT = ("LA", "PA", "RGBA")  # an image of another mode is transparent if its info has "transparency"

Colour = tuple[int, int, int]  # red, green, blue, each 0 to 255


def decode(
    file: IO[bytes],
    what: str,
    mode: str,
    size: tuple[int, int] | None = None,
    background: Colour | None = None,
    light_ink: bool = False,
) -> np.ndarray:
    """Decodes one image file.

    Args:
        file: the open file.
        what: the file's name, for errors.
        mode: "L" for one channel, "RGB" for three.
        size: height and width in pixels, reached by Lanczos resampling; None: those of the file.
        background: the image is decoded as a viewer shows it: rotated by its EXIF orientation, and drawn on this colour
            where it is transparent. None: the stored pixels, which is how the authors of published data sets read
            theirs.
        light_ink: characters become light ink on a dark ground: the image is inverted if its median pixel is above 127.

    Returns:
        uint8 ``[channels, height, width]``.

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: the file is not an image, is incomplete, or has more than 8 bits per channel.
    """
    with _opened(file, what) as (pillow, image):
        if background is not None:
            image = _as_shown(pillow, image, background)
        # Converts before it resizes: Pillow resizes 1-bit and palette images by nearest neighbours only.
        image = image.convert(mode)
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], pillow.Resampling.LANCZOS)
        pixels = np.asarray(image)
    if light_ink and np.median(pixels) > 127:
        pixels = 255 - pixels
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def is_coloured(file: IO[bytes], what: str, background: Colour) -> bool:
    """Whether an image needs three channels on this background. Reads the header only; raises as ``decode``."""
    with _opened(file, what) as (_, image):
        return image.mode not in GREY or (_transparent(image) and len(set(background)) > 1)


@contextmanager
def _opened(file: IO[bytes], what: str) -> Iterator[tuple[Any, Any]]:
    """Pillow's module and the open image. Errors while it is open name ``what``."""
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            if image.mode not in GREY + COLOUR:
                raise ValueError(f"pixels of mode {image.mode}")
            yield pillow, image
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise ValueError(f"{what} must be a complete image with 8 bits per channel, got: {error}") from error


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
