"""The three splits of a data set's classes: what they are called, and which classes they have."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate

SPLITS = ("train", "validation", "test")
# What people call them and their folders, in upper or lower case.
FOLDER_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLIT_SEED = 1  # the MAML authors'. No setting: a run must not be tested on classes that another was trained on
FOLDER_SPLIT = {"validation": 0.16, "test": 0.2}  # mini-ImageNet's shares; the other classes are trained on


def split_name(word: str) -> str:
    """The one of SPLITS that ``word`` spells. ValueError where none is."""
    for split, words in FOLDER_NAMES.items():
        if word.lower() in words:
            return split
    raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {word!r}")


def parse_split(text: str) -> tuple[int, int, int]:
    """``6/3/3``, the number of classes to train, to validate and to test on. ValueError for another form."""
    if not re.fullmatch(r"\d+/\d+/\d+", text):
        raise ValueError(f"split must be TRAIN/VALIDATION/TEST, numbers of classes such as 6/3/3, got {text!r}")
    train, validation, test = map(int, text.split("/"))
    return train, validation, test


def default_sizes(classes: int) -> tuple[int, int, int]:
    """How many of a folder's classes each split has, where nobody chooses."""
    validation, test = (max(1, round(share * classes)) for share in FOLDER_SPLIT.values())
    return classes - validation - test, validation, test


def draw_split(names: Iterable[str], sizes: Sequence[int]) -> dict[str, list[str]]:
    """The classes of each split, so many: sorted, shuffled by SPLIT_SEED, cut, and sorted again."""
    shuffled = sorted(names)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    ends = accumulate(sizes)
    return {split: sorted(shuffled[end - size : end]) for split, size, end in zip(SPLITS, sizes, ends, strict=True)}
