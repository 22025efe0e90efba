"""What somebody may have meant who typed a name that is not there."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path


def did_you_mean(got: str, names: Iterable[str], most: int = 3) -> str:
    """``; did you mean A or B?`` with the names that are most like ``got``, or nothing where none is. One that shares
    a whole word with it is: ``--lr`` may be ``--inner-lr``."""
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
    """The folders in that of ``path``, spelt like it."""
    parent = path.absolute().parent
    return [str(path.with_name(p.name)) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []


def _words(name: str) -> list[str]:
    """Of the last part of a path: the others are the same."""
    return name.rstrip("/").rpartition("/")[2].lower().strip("-").replace("_", "-").split("-")
