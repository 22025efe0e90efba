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
from torch import Generator, Tensor

from maml_cuda.data.meta_batch import MetaBatch

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


class GlyphTasks:
    """N-way K-shot tasks from the scripts of one split, classes drawn from all its scripts together."""

    def __init__(self, split: str, n_way: int, k_shot: int, n_query: int, rotations: int = 1) -> None:
        """``n_query`` query images a class; every glyph turned by each of ``rotations`` quarter turns is a class of
        its own, as in the Omniglot protocol. ValueError if the split has too few classes or images a class."""
        if split not in SCRIPTS:
            raise ValueError(f"split must be one of {', '.join(SCRIPTS)}, got {split!r}")
        if not 1 <= rotations <= 4:
            raise ValueError(f"rotations must be 1 to 4 quarter turns, got {rotations}")
        images, count, names = load_glyphs()
        chosen = torch.tensor([name.split("/")[0] in SCRIPTS[split] for name in names])
        images = images[chosen.repeat_interleave(count)]
        self.images = torch.cat([images.rot90(turns, (1, 2)) for turns in range(rotations)])  # [images, 28, 28]
        self.count = count[chosen].repeat(rotations)  # [classes]
        self.first = self.count.cumsum(0) - self.count  # [classes], the row of each class's first image
        if not 2 <= n_way <= len(self.count):
            raise ValueError(f"n_way must be 2 to {len(self.count)} ({split} glyphs), got {n_way}")
        fewest = int(self.count.min())
        if k_shot < 1 or n_query < 1 or k_shot + n_query > fewest:
            raise ValueError(
                f"k_shot + n_query must be at most {fewest}, each at least 1 (some {split} glyphs have no "
                f"more images), got k_shot {k_shot} and n_query {n_query}"
            )
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.missing = torch.arange(int(self.count.max())) >= self.count.unsqueeze(1)  # [classes, most images]

    def sample(self, num_tasks: int, generator: Generator) -> MetaBatch:
        """Draws ``num_tasks`` tasks: x ``[num_tasks, n_way * images a class, 1, 28, 28]`` float32 in [0, 1],
        class by class; y int64 labels, which number a task's classes in the random order they were drawn."""
        # The largest of random keys are a draw without replacement, for all tasks at once.
        keys = torch.rand(num_tasks, len(self.count), generator=generator)
        classes = keys.topk(self.n_way).indices  # [tasks, n_way]
        missing = self.missing[classes]  # [tasks, n_way, most images]
        keys = torch.rand(missing.shape, generator=generator).masked_fill_(missing, -1)
        rows = self.first[classes].unsqueeze(-1) + keys.topk(self.k_shot + self.n_query).indices
        x_spt, y_spt = self._gather(rows[..., : self.k_shot])
        x_qry, y_qry = self._gather(rows[..., self.k_shot :])
        return MetaBatch(x_spt, y_spt, x_qry, y_qry)

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        tasks, n_way, n = rows.shape
        x = self.images.index_select(0, rows.flatten()).float().div_(15)
        return x.view(tasks, n_way * n, 1, SIDE, SIDE), torch.arange(n_way).repeat_interleave(n).repeat(tasks, 1)
