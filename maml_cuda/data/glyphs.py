"""Glyphs: a data set in the protocol of Omniglot, made from open fonts.

1141 characters of 14 scripts, each with 17 to 20 images of 28 x 28 pixels. Every image uses another typeface, distorted
by a seeded model of handwriting that is fixed. GLYPHS_CREDITS.md lists the typefaces and says how the file was made.
The splits have different scripts, so no alphabet is in two of them.
"""

import hashlib
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maml_cuda.data.image_tasks import ImageClasses, ImageTasks
from maml_cuda.data.splits import split_name

FILE = Path(__file__).with_name("glyphs.npz")
FILE_SIZE = 3_543_760
FILE_SHA256 = "414ee5658bb04918b016ae71ccca226d3dedb07a5fd1075df085823c0c8c4518"

SIDE = 28
SCRIPTS = {
    "train": ("Arabic", "Cyrillic", "Hangul", "Hiragana", "Kanji", "Latin", "Thai"),
    "validation": ("Greek", "Hebrew"),
    "test": ("Ethiopic", "Georgian", "Katakana", "Malayalam", "Telugu"),
}


def read_file(path: Path = FILE) -> bytes:
    """The bytes of the image file.

    Raises:
        ValueError: they are not those of this release.
    """
    content = path.read_bytes()
    if len(content) != FILE_SIZE:
        raise ValueError(f"{path.name} must have {FILE_SIZE} bytes, got {len(content)}: install maml-cuda again")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != FILE_SHA256:
        raise ValueError(f"{path.name} must have sha256 {FILE_SHA256}, got {sha256}: install maml-cuda again")
    return content


@lru_cache(maxsize=1)
def load_glyphs() -> tuple[Tensor, Tensor, list[str]]:
    """Loads all glyphs.

    Returns:
        The images, uint8 ``[22518, 28, 28]`` in 0 to 15 (0 is the background), class by class; the number of images of
            each class, int64 ``[1141]``; the names of the classes, ``Script/codepoint in hexadecimal``.
    """
    with np.load(io.BytesIO(read_file()), allow_pickle=False) as archive:
        packed, count, names = archive["packed"], archive["count"], archive["names"]
    pixels = np.stack([packed >> 4, packed & 15], axis=-1)  # two pixels per byte, the high four bits first
    images = torch.from_numpy(pixels.reshape(-1, SIDE, SIDE))
    return images, torch.from_numpy(count.astype(np.int64)), names.tolist()


class GlyphTasks(ImageTasks):
    """N-way K-shot tasks from the glyphs of one split. The classes of a task may be of different scripts.

    Args:
        split: train, validation or test.
        n_way: classes per task.
        k_shot: support images per class.
        n_query: query images per class.
        rotations: 1 to 4. Each class becomes this many classes, rotated by 0, 1, ... quarter turns.

    Raises:
        ValueError: the split has too few classes, or too few images of one.
    """

    def __init__(self, split: str, n_way: int, k_shot: int, n_query: int, rotations: int = 1) -> None:
        split = split_name(split)
        images, count, names = load_glyphs()
        chosen = torch.tensor([name.split("/")[0] in SCRIPTS[split] for name in names])
        images = images[chosen.repeat_interleave(count)].unsqueeze(1)
        names = [name for name, of_split in zip(names, chosen, strict=True) if of_split]
        classes = ImageClasses(f"{split} glyphs", images, count[chosen], names)
        super().__init__(classes, n_way, k_shot, n_query, rotations, white=15)
