"""Target speed-ups of a second-order meta-step over the fastest baseline of the run, and over some by name."""

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
    "siren": 2.0,
    "siren-gradncp": 2.0,
    "mbconv": 3.0,
    "unet": 3.0,
    "vit": 3.0,
    "pinn": 3.0,
}

LOOP = ("autograd loop",)
JAX = ("JAX", "JAX forward-over-reverse")  # the faster of its two modes
NAMED_TARGETS = {
    "lstm": ((20.0, LOOP), (4.0, JAX)),
    "transformer": ((4.0, LOOP), (3.0, JAX)),
    "transformer-k1": ((1.5, ("torch.compile",)),),
}


def cell(workload: str) -> str:
    """The target of a workload in the table of docs/benchmarks.md; "" if it has none."""
    if workload in TARGETS:
        return f"{TARGETS[workload]:g}x"
    return ", ".join(f"{target:g}x {names[0]}" for target, names in NAMED_TARGETS.get(workload, ()))


def lines(cases: Sequence[dict[str, Any]], quick: bool) -> Iterator[str]:
    """One line of the report per target."""
    second_order = {case["workload"]: case for case in cases if case["order"] == 2}
    for workload, target in TARGETS.items():
        yield f"- Target {workload}, {target:g}x: {outcome(second_order.get(workload), target, quick)}."
    for workload, targets in NAMED_TARGETS.items():
        for target, names in targets:
            found = outcome(second_order.get(workload), target, quick, names)
            yield f"- Target {workload}, {target:g}x {' or '.join(names)}: {found}."


def outcome(case: dict[str, Any] | None, target: float, quick: bool, names: Sequence[str] = tuple(BASELINES)) -> str:
    """Of a target over the fastest of the baselines named."""
    if quick:
        return "not evaluated in a quick run"
    if case is None:
        return "not evaluated, the workload was not run"
    medians = {name: side["wall_ms"]["median"] for name, side in case["sides"].items() if side["status"] == "timed"}
    if MAML_CUDA not in medians:
        return f"not evaluated, {MAML_CUDA} was not timed"
    timed = [name for name in names if name in medians]
    if not timed:
        return "not evaluated, no baseline was timed"
    fastest = min(timed, key=medians.__getitem__)
    speed_up = medians[fastest] / medians[MAML_CUDA]
    parts = [
        f"{'met' if speed_up >= target else '**missed**'}: {speed_up:.2f}x over {fastest}",
        f"at the sgemm rate it would be {medians[fastest] / case['floor_ms']:.1f}x",
    ]
    if absent := [name for name in names if name not in medians]:
        parts.append(f"not timed: {', '.join(absent)}")
    return "; ".join(parts)
