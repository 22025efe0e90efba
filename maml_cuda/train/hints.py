"""Suggests names for one that the user misspelt."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path


def did_you_mean(got: str, names: Iterable[str], most: int = 3) -> str:
    """``; did you mean A or B?`` with up to ``most`` similar names; empty if none is similar.

    A name that shares a whole word with ``got`` counts as similar: ``--lr`` suggests ``--inner-lr``.
    """
    words = _words(got)
    likeness = {}
    for name in names:
        ratio = SequenceMatcher(None, "-".join(words), "-".join(_words(name))).ratio()
        likeness[name] = ratio + 0.5 * bool({*words} & {*_words(name)})
        if ratio == 1:
            return f"; did you mean {name}?"
    near = [name for name in sorted(likeness, key=lambda name: -likeness[name]) if likeness[name] >= 0.7][:most]
    *others, last = near or [""]
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if near else ""


def sibling_folders(path: Path) -> list[str]:
    """The folders in the parent of ``path``, written relative or absolute like ``path``."""
    parent = path.absolute().parent
    return [str(path.with_name(p.name)) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _words(name: str) -> list[str]:
    """The words of the last part of a path."""
    return name.rstrip("/").rpartition("/")[2].lower().strip("-").replace("_", "-").split("-")
