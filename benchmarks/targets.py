"""Target speed-ups of a second-order meta-step over the fastest baseline of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .implementations import BASELINES, MAML_CUDA

TARGETS = {
    "sinusoid-k1": 2.0,
    "sinusoid-k5": 3.5,
    "sinusoid-k5-t1000": 4.0,
    "policy": 2.0,
    "omniglot": 4.0,
    "omniglot-t32": 5.0,
    "omniglot-20way": 5.0,
    "mini-imagenet": 6.0,
    "mini-imagenet-5shot": 6.0,
    "resnet12": 4.0,
    "lstm": 4.0,
}


def lines(cases: Sequence[dict[str, Any]], quick: bool) -> Iterator[str]:
    """One line of the report per target."""
    second_order = {case["workload"]: case for case in cases if case["order"] == 2}
    for workload, target in TARGETS.items():
        yield f"- Target {workload}, {target:g}x: {outcome(second_order.get(workload), target, quick)}."


def outcome(case: dict[str, Any] | None, target: float, quick: bool) -> str:
    if quick:
        return "not evaluated in a quick run"
    if case is None:
        return "not evaluated, the workload was not run"
    if case["sides"].get(MAML_CUDA, {}).get("status") != "timed":
        return "not evaluated, maml_cuda was not timed"
    if case["speed_up"] is None:
        return "not evaluated, no baseline was timed"
    parts = [
        f"{'met' if case['speed_up'] >= target else '**missed**'}: {case['speed_up']:.2f}x over {case['fastest_rival']}"
    ]
    parts.append(f"at the sgemm rate it would be {case['speed_up_limit']:.1f}x")
    absent = [name for name in BASELINES if case["sides"].get(name, {}).get("status") != "timed"]
    if absent:
        parts.append(f"not timed: {', '.join(absent)}")
    return "; ".join(parts)
