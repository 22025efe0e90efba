"""The three splits of a data set's classes: their names, and how classes are assigned to them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate

SPLITS = ("train", "validation", "test")
# Names of the splits and of their folders, in upper or lower case.
FOLDER_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# The seed of the MAML authors. It is fixed, so that no run is tested on classes that another run was trained on.
SPLIT_SEED = 1
VALIDATION_ALPHABETS = 5  # of the 30 background alphabets of Omniglot
FOLDER_SPLIT = {"validation": 0.16, "test": 0.2}  # shares as in mini-ImageNet; the other classes are for training


def split_name(word: str) -> str:
    """The split that ``word`` names: one of SPLITS.

    Raises:
        ValueError: there is none.
    """
    for split, words in FOLDER_NAMES.items():
        if word.lower() in words:
            return split
    raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {word!r}")


def parse_split(text: str) -> tuple[int, int, int]:
    """Parses numbers of classes for training, validation and test, such as ``6/3/3``.

    Raises:
        ValueError: ``text`` has another form.
    """
    if not re.fullmatch(r"\d+/\d+/\d+", text):
        raise ValueError(f"split must be TRAIN/VALIDATION/TEST, numbers of classes such as 6/3/3, got {text!r}")
    train, validation, test = map(int, text.split("/"))
    return train, validation, test


def default_sizes(classes: int) -> tuple[int, int, int]:
    """The number of classes of each split of a folder, if the user does not choose them."""
    validation, test = (max(1, round(share * classes)) for share in FOLDER_SPLIT.values())
    return classes - validation - test, validation, test


def split_alphabets(background: Iterable[str], evaluation: Iterable[str]) -> dict[str, list[str]]:
    """Splits characters, named Alphabet/character, by alphabets: those of VALIDATION_ALPHABETS background alphabets are
    for validation, drawn as ``draw_split`` draws classes; evaluation alphabets are for test.
    """
    background = sorted(background)
    alphabets = {name.partition("/")[0] for name in background}
    drawn = draw_split(alphabets, (len(alphabets) - VALIDATION_ALPHABETS, VALIDATION_ALPHABETS, 0))
    split = {each: [name for name in background if name.partition("/")[0] in drawn[each]] for each in SPLITS}
    return split | {"test": sorted(evaluation)}


def draw_split(names: Iterable[str], sizes: Sequence[int]) -> dict[str, list[str]]:
    """Assigns classes to the splits: sorted, shuffled with SPLIT_SEED, cut into ``sizes``, and sorted again."""
    shuffled = sorted(names)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    ends = accumulate(sizes)
    return {split: sorted(shuffled[end - size : end]) for split, size, end in zip(SPLITS, sizes, ends, strict=True)}
