"""Which meta-gradient is computed, in place of the exact one: what FusedMAML's arguments `meta_gradient` and `truncate`
say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("unrolled", "truncated", "reptile")


@dataclass(frozen=True)
class MetaGradient:
    """A part of the plan (plan/schema.py). With theta the parameters and phi_K what the inner loop makes of them:

    Attributes:
        kind: "unrolled": the exact derivative of the query loss at phi_K by theta (Finn, Abbeel, Levine 2017).
            "truncated": the same through the last steps of the inner loop alone (Shaban, Cheng, Hatch, Boots 2019).
            "reptile": theta - phi_K (Nichol, Achiam, Schulman 2018, algorithm 2).
        truncate: of "truncated", how many steps; None otherwise.
    """

    kind: str
    truncate: int | None

    def first_differentiated(self, steps: int) -> int:
        """The first inner step of `steps` that is differentiated through."""
        return 0 if self.truncate is None else max(steps - self.truncate, 0)


UNROLLED = MetaGradient("unrolled", None)


def read(kind: Any, truncate: Any, inner_steps: int) -> MetaGradient:
    """What the arguments of FusedMAML say.

    Raises:
        ValueError, TypeError: an argument that does not fit, in words.
    """
    if kind not in KINDS:
        raise ValueError(f"meta_gradient must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "truncated":
        if truncate is not None:
            raise ValueError(f'truncate must be None unless meta_gradient is "truncated", got {truncate!r}')
        return MetaGradient(kind, None)
    if isinstance(truncate, bool) or not isinstance(truncate, int):
        raise TypeError(f"truncate must be an int, got {type(truncate).__name__}")
    if not 1 <= truncate <= inner_steps:
        raise ValueError(f"truncate must be from 1 to inner_steps={inner_steps}, got {truncate}")
    return MetaGradient(kind, truncate)


def check(
    how: MetaGradient, first_order: bool, query_weights: Sequence[float] | None, learned_rates: Sequence[str],
    not_adapted: Sequence[str],
) -> None:  # fmt: skip
    """Settings that such a meta-gradient cannot have.

    Args:
        learned_rates: names of rates that require grad.
        not_adapted: names of trainable parameters, of the model or the loss, that the inner loop does not change.

    Raises:
        ValueError: one of them is there.
    """
    if how.kind != "reptile":
        return
    if first_order:
        raise ValueError('first_order must be False with meta_gradient="reptile", which has no Hessians, got True')
    if query_weights is not None:
        raise ValueError(
            'query_weights must be None with meta_gradient="reptile", which no query loss is part of, '
            f"got {list(query_weights)}"
        )
    if learned_rates:
        raise ValueError(
            f'inner_lr must not require grad with meta_gradient="{how.kind}", which has no gradient of a rate, got '
            f"requires_grad=True of {', '.join(learned_rates)}"
        )
    if not_adapted:
        raise ValueError(
            'meta_gradient="reptile" must have adapted parameters alone, as it has no gradient of others, got '
            f"{', '.join(not_adapted)}"
        )
