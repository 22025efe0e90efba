"""The speed-ups asked for, of a second-order meta-step over the fastest rival of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .entrants import OURS, RIVALS

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
}


def judged(cases: Sequence[dict[str, Any]], quick: bool) -> Iterator[str]:
    """A line for each target."""
    second_order = {case["workload"]: case for case in cases if case["order"] == 2}
    for workload, target in TARGETS.items():
        yield f"- Target {workload}, {target:g}x: {judge(second_order.get(workload), target, quick)}."


def judge(case: dict[str, Any] | None, target: float, quick: bool) -> str:
    if quick:
        return "not judged, the run was quick"
    if case is None:
        return "not judged, not in this run"
    if case["sides"].get(OURS, {}).get("status") != "timed":
        return "not judged, we were not timed"
    if case["speed_up"] is None:
        return "not judged, no rival was timed"
    words = [
        f"{'met' if case['speed_up'] >= target else '**missed**'}: {case['speed_up']:.2f}x, {case['fastest_rival']}"
    ]
    limit = f"plain products at the rate of sgemm would allow {case['speed_up_limit']:.1f}x"
    words.append(limit if case["speed_up_limit"] >= target else f"{limit}: the target asks for fewer")
    absent = [name for name in RIVALS if case["sides"].get(name, {}).get("status") != "timed"]
    if absent:
        words.append(f"without {', '.join(absent)}")
    return "; ".join(words)
