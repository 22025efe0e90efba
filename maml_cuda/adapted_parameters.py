"""The argument `adapt_params`, which says which parameters the inner loop changes: its type, and how such a function on
names is pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass

AdaptParams = Callable[[str], bool] | Iterable[str] | None


@dataclass(frozen=True)
class RecordedRule:
    """Stands for a function on names that cannot be pickled, such as a lambda: its answers for the model's names.

    Attributes:
        names: the answers.
        asks: the beginning of an error about another name.

    Raises:
        ValueError: it is asked about a name that the model did not have when the answers were recorded.
    """

    names: dict[str, bool]
    asks: str = "adapt_params must say whether the inner loop changes"

    def __call__(self, name: str) -> bool:
        if name not in self.names:
            raise ValueError(
                f"{self.asks} {name}, got a function that could not be pickled when this FusedMAML was copied or "
                "saved, before the model had that parameter: give a function that can be pickled, or names"
            )
        return self.names[name]


def as_pickled(
    rule: Callable[[str], bool], names: Iterable[str], asks: str = RecordedRule.asks
) -> Callable[[str], bool]:
    """Returns the rule, or its recorded answers for these names if it cannot be pickled."""
    try:
        pickle.dumps(rule)
    except Exception:
        return RecordedRule({name: bool(rule(name)) for name in names}, asks)
    return rule
