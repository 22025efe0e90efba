"""Image files to arrays, by Pillow, which is imported here alone and only when an image file is read."""

from __future__ import annotations

from typing import IO, Any

import numpy as np

GREY = ("1", "L", "LA")  # Pillow's modes of 8 bits a channel or fewer, by what they become
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def decode(file: IO[bytes], what: str, mode: str | None = None, side: int | None = None) -> np.ndarray:
    """The image in ``file``: ``[channels, height, width]`` uint8.

    Args:
        what: the file's name, for errors.
        mode: "L" for one channel, "RGB" for three; None: as the file has it.
        side: height and width, by Lanczos resampling; None: as the file has them.

    Raises:
        ModuleNotFoundError: Pillow is missing.
        ValueError: the file is no image, is cut short, or has more than 8 bits a channel.
    """
    pillow = _pillow()
    try:
        with pillow.open(file) as image:
            if image.mode not in GREY + COLOUR:
                raise ValueError(f"pixels of mode {image.mode}")
            # A copy in the mode wanted comes first: Pillow resizes 1-bit images and palettes by nearest neighbours.
            image = image.convert(mode or ("L" if image.mode in GREY else "RGB"))
            if side is not None and image.size != (side, side):
                image = image.resize((side, side), pillow.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in any way that its format can
        raise ValueError(f"{what} must be a whole image of 8 bits a channel, got: {error}") from error
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Pillow must be installed to read image files: pip install "maml-cuda[images]"'
        ) from error
    return Image
