"""Which meta-gradient is computed, in place of the exact one: what FusedMAML's arguments `meta_gradient`, `truncate`,
`proximal`, `cg_steps` and `cg_tolerance` say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

KINDS = ("unrolled", "truncated", "implicit", "reptile")


@dataclass(frozen=True)
class MetaGradient:
    """A part of the plan (plan/schema.py). With theta the parameters and phi_K what the inner loop makes of them:

    Attributes:
        kind: "unrolled": the exact derivative of the query loss at phi_K by theta (Finn, Abbeel, Levine 2017).
            "truncated": the same through the last steps of the inner loop alone (Shaban, Cheng, Hatch, Boots 2019).
            "reptile": theta - phi_K (Nichol, Achiam, Schulman 2018, algorithm 2).
            "implicit": the exact derivative as if phi_K were the minimum of the support loss with the further term
            proximal / 2 |phi - theta|^2, which is part of the loss of each inner step (Rajeswaran, Finn, Kakade, Levine
            2019).
        truncate: of "truncated", how many steps; None otherwise.
        proximal: of "implicit", lambda; None otherwise.
        cg_steps, cg_tolerance: of "implicit": conjugate gradients solve its linear system, in at most so many steps,
            which end where the residual has fallen by this factor. None: it is solved exactly (reference.py).
    """

    kind: str
    truncate: int | None
    proximal: float | None
    cg_steps: int | None
    cg_tolerance: float

    def first_differentiated(self, steps: int) -> int:
        """The first inner step of `steps` that is differentiated through."""
        return 0 if self.truncate is None else max(steps - self.truncate, 0)


UNROLLED = MetaGradient("unrolled", None, None, None, 0.0)


def read(
    kind: Any, truncate: Any, proximal: Any, inner_steps: int, cg_steps: Any = None, cg_tolerance: Any = 0.0
) -> MetaGradient:
    """What the arguments of FusedMAML say.

    Raises:
        ValueError, TypeError: an argument that does not fit, in words.
    """
    if kind not in KINDS:
        raise ValueError(f"meta_gradient must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, value, of in (("truncate", truncate, "truncated"), ("proximal", proximal, "implicit")):
        if kind != of and value is not None:
            raise ValueError(f'{name} must be None unless meta_gradient is "{of}", got {value!r}')
    if kind == "implicit":
        return _implicit(proximal, cg_steps, cg_tolerance)
    if kind != "truncated":
        return replace(UNROLLED, kind=kind)
    if isinstance(truncate, bool) or not isinstance(truncate, int):
        raise TypeError(f"truncate must be an int, got {type(truncate).__name__}")
    if not 1 <= truncate <= inner_steps:
        raise ValueError(f"truncate must be from 1 to inner_steps={inner_steps}, got {truncate}")
    return replace(UNROLLED, kind=kind, truncate=truncate)


def _implicit(proximal: Any, steps: Any, tolerance: Any) -> MetaGradient:
    for name, value in (("proximal", proximal), ("cg_tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(proximal) and proximal > 0):
        raise ValueError(f"proximal must be finite and above 0, got {proximal}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"cg_tolerance must be from 0 to less than 1, got {tolerance}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
        raise TypeError(f"cg_steps must be an int, got {type(steps).__name__}")
    if steps is not None and steps < 1:
        raise ValueError(f"cg_steps must be at least 1, got {steps}")
    return MetaGradient("implicit", None, float(proximal), steps, float(tolerance))


def check(
    how: MetaGradient, first_order: bool, query_weights: Sequence[float] | None, learned_rates: Sequence[str],
    not_adapted: Sequence[str], per_step_support: bool,
) -> None:  # fmt: skip
    """Settings that such a meta-gradient cannot have.

    Args:
        learned_rates: names of rates that require grad.
        not_adapted: names of trainable parameters, of the model or the loss, that the inner loop does not change.

    Raises:
        ValueError: one of them is there.
    """
    if how.kind not in ("implicit", "reptile"):
        return
    if first_order:
        why = "has no Hessians" if how.kind == "reptile" else "is one of the second order"
        raise ValueError(f'first_order must be False with meta_gradient="{how.kind}", which {why}, got True')
    if query_weights is not None:
        why = "has none" if how.kind == "reptile" else "has that after the last step alone"
        raise ValueError(
            f'query_weights must be None with meta_gradient="{how.kind}", whose gradient of a query loss {why}, '
            f"got {list(query_weights)}"
        )
    if learned_rates:
        raise ValueError(
            f'inner_lr must not require grad with meta_gradient="{how.kind}", which has no gradient of a rate, got '
            f"requires_grad=True of {', '.join(learned_rates)}"
        )
    if per_step_support and how.kind == "implicit":
        raise ValueError(
            'per_step_support and support_batch must not be given with meta_gradient="implicit", which is that of the '
            "minimum of one support loss, got a set for each step"
        )
    if not_adapted and how.kind == "reptile":
        raise ValueError(
            'meta_gradient="reptile" must have adapted parameters alone, as it has no gradient of others, got '
            f"{', '.join(not_adapted)}"
        )
