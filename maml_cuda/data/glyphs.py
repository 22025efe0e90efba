"""Glyphs: 1141 characters of 14 scripts, 17 to 20 typefaces each, 28x28; the Omniglot protocol on open fonts.

Every image is another typeface under one fixed, seeded "hand" (GLYPHS_CREDITS.md lists the faces and says how
the file came about). Classes are split by script, so no alphabet is on two sides.
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
    """The bytes of the image file, or ValueError if they are not those that this release was tested with."""
    content = path.read_bytes()
    if len(content) != FILE_SIZE:
        raise ValueError(f"{path.name} must have {FILE_SIZE} bytes, got {len(content)}: install maml-cuda again")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != FILE_SHA256:
        raise ValueError(f"{path.name} must have sha256 {FILE_SHA256}, got {sha256}: install maml-cuda again")
    return content


@lru_cache(maxsize=1)
def load_glyphs() -> tuple[Tensor, Tensor, list[str]]:
    """All images ``[22518, 28, 28]`` uint8 in 0..15 (light ink on dark), class by class; images per class
    ``[1141]`` int64; and the classes' names, ``Script/codepoint in hex``."""
    with np.load(io.BytesIO(read_file()), allow_pickle=False) as archive:
        packed, count, names = archive["packed"], archive["count"], archive["names"]
    pixels = np.stack([packed >> 4, packed & 15], axis=-1)  # two pixels a byte, the high nibble first
    images = torch.from_numpy(pixels.reshape(-1, SIDE, SIDE))
    return images, torch.from_numpy(count.astype(np.int64)), names.tolist()


class GlyphTasks(ImageTasks):
    """N-way K-shot tasks from the scripts of one split, classes drawn from all its scripts together."""

    def __init__(self, split: str, n_way: int, k_shot: int, n_query: int, rotations: int = 1) -> None:
        """``n_query`` query images a class. ValueError if the split has too few classes or images a class."""
        split = split_name(split)
        images, count, names = load_glyphs()
        chosen = torch.tensor([name.split("/")[0] in SCRIPTS[split] for name in names])
        images = images[chosen.repeat_interleave(count)].unsqueeze(1)
        names = [name for name, of_split in zip(names, chosen, strict=True) if of_split]
        classes = ImageClasses(f"{split} glyphs", images, count[chosen], names)
        super().__init__(classes, n_way, k_shot, n_query, rotations, white=15)
