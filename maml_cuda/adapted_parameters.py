"""Which parameters the inner loop changes, as a user says it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass

AdaptParams = Callable[[str], bool] | Iterable[str] | None


@dataclass(frozen=True)
class Decided:
    """What a function on names has decided that cannot be pickled itself (a lambda). It knows of no other names."""

    names: dict[str, bool]

    def __call__(self, name: str) -> bool:
        if name not in self.names:
            raise ValueError(
                f"adapt_params must say whether the inner loop changes {name}, got a function that was lost when this "
                "FusedMAML was copied or saved, before the model had that parameter: give a named function or names"
            )
        return self.names[name]


def as_pickled(rule: Callable[[str], bool], names: Iterable[str]) -> Callable[[str], bool]:
    """The rule, or where it cannot be pickled what it says of these names."""
    try:
        pickle.dumps(rule)
    except Exception:
        return Decided({name: bool(rule(name)) for name in names})
    return rule
