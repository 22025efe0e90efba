"""The report in Markdown: the machine, us beside the fastest rival, every rival, where we are slower, targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .entrants import OURS
from .fit import lines as fitted_lines
from .markdown import markdown_table
from .targets import TARGETS, judged

Case = dict[str, Any]
Side = dict[str, Any]


def markdown(record: dict[str, Any]) -> str:
    """The whole report of `{"machine", "settings", "cases", "growth"}`."""
    cases = record["cases"]
    return "\n".join(
        [
            *heading(record, TIMES, RESOURCES, SHARES),
            "",
            *table(cases),
            "",
            *rivals_table(cases),
            "",
            *losses(cases),
            *overhead(cases),
            *order_ratios(cases),
            *fitted_lines(record["growth"]),
            *notes(cases),
            *not_timed([*cases, *record["growth"]]),
            *judged(cases, record["settings"]["quick"]),
        ]
    )


def in_short(record: dict[str, Any]) -> str:
    """What the README shows of the report: second order, medians alone."""
    cases = record["cases"]
    return "\n".join([*heading(record, MEDIANS), "", *speed_table(cases), "", *losses(cases)])


SHORT_COLUMNS = ("workload", "T", "K", OURS, "fastest rival", "", "speed-up")


def speed_table(cases: Sequence[Case]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for case in cases:
            if case["order"] == 2:
                cells = dict(zip(COLUMNS, row(case), strict=True))
                yield [cells[name].partition(" (")[0] for name in SHORT_COLUMNS]

    return markdown_table(SHORT_COLUMNS, rows())


def summary(record: dict[str, Any]) -> str:
    """What docs/benchmarks.md shows of the report: second order beside the fastest rival, and where we are slower."""
    cases = record["cases"]
    return "\n".join([*heading(record, TIMES, SHARES), "", *summary_table(cases), "", *losses(cases)])


SUMMARY_COLUMNS = ("second order", "T", "K", OURS, "fastest rival", "", "speed-up", "target", "limit", "floor")


def summary_table(cases: Sequence[Case]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for case in cases:
            if case["order"] == 2:
                cells = dict(zip(COLUMNS, row(case), strict=True))
                target = TARGETS.get(case["workload"])
                yield [
                    case["workload"],
                    *(cells[name] for name in ("T", "K", OURS, "fastest rival", "", "speed-up")),
                    f"{target:g}x" if target else "",
                    *(cells[name] for name in ("limit", "floor")),
                ]

    return markdown_table(SUMMARY_COLUMNS, rows())


MEDIANS = (
    "Median wall time in ms of a second-order meta-step with T tasks and K inner steps. Each side runs in a process of "
    "its own, one at a time, in interleaved rounds."
)
TIMES = (
    "Wall time in ms: median (lower to upper quartile). Each side runs in a process of its own, one at a time, in "
    "interleaved rounds."
)
RESOURCES = "CPU is process time. Memory is what one step adds to the resident memory of its process."
SHARES = (
    "Floor is the share of our time that the plain products of the step would take at the rate of this machine's "
    "sgemm, which is measured beside it. Limit is the speed-up that this rate would allow. Both can be passed, because "
    "Winograd convolutions take fewer multiplications."
)


def heading(record: dict[str, Any], *explained: str) -> Iterator[str]:
    where, settings = record["machine"], record["settings"]
    build = where["maml_cuda"]
    versions = ", ".join(f"{name} {version}" for name, version in where["rivals"].items())
    yield (
        f"One meta-step on {where['cpu']}, {where['threads']} of {where['cores']} cores; "
        f"torch {where['torch']}, maml_cuda {build['version']} ({build['cpu_isa']}), "
        f"commit {where['commit'] or 'unknown'}{'; ' * bool(versions)}{versions}."
    )
    yield " ".join(explained)
    if settings["quick"]:
        yield "**Quick run: shapes cut; it shows that everything works, its times mean nothing.**"


COLUMNS = (
    "workload", "order", "T", "K", OURS, "fastest rival", "", "speed-up", "limit", "floor", "CPU ms, ours / rival",
    "MB, ours / rival", "float64 error",
)  # fmt: skip


def table(cases: Sequence[Case]) -> Iterator[str]:
    return markdown_table(COLUMNS, map(row, cases))


def row(case: Case) -> list[str]:
    ours = case["sides"][OURS]
    rival = case["sides"].get(case["fastest_rival"])
    timed = ours["status"] == "timed"
    return [
        case["workload"],
        str(case["order"]),
        str(case["tasks"]),
        str(case["inner_steps"]),
        time_cell(ours),
        case["fastest_rival"] or "none",
        time_cell(rival) if rival else "",
        f"{case['speed_up']:.2f}x" if case["speed_up"] else "",
        f"{case['speed_up_limit']:.1f}x" if case["speed_up_limit"] else "",
        f"{ours['floor_fraction']:.0%}" if timed else "",
        f"{number(ours['cpu_ms']) if timed else '-'} / {number(rival['cpu_ms']) if rival else '-'}",
        f"{megabytes(ours)} / {megabytes(rival) if rival else '-'}",
        f"{ours['error_float64']:.0e}" if timed else "",
    ]


def rivals_table(cases: Sequence[Case]) -> Iterator[str]:
    """Every rival's median and how many times ours it is, or why there is none."""
    names = list(dict.fromkeys(name for case in cases for name in case["sides"] if name != OURS))

    def rows() -> Iterator[list[str]]:
        for case in cases:
            cells = [against(case, case["sides"].get(name)) for name in names]
            yield [case["workload"], str(case["order"]), *cells]

    return markdown_table(["workload", "order", *names], rows())


def against(case: Case, side: Side | None) -> str:
    if side is None:
        return ""
    if side["status"] != "timed":
        return side["status"]
    ours = case["sides"][OURS]
    times = f" ({median(side) / median(ours):.1f}x)" if ours["status"] == "timed" else ""
    return f"{number(median(side))}{times}"


def time_cell(side: Side) -> str:
    if side["status"] != "timed":
        return f"**{side['status']}**"
    wall = side["wall_ms"]
    return f"{number(wall['median'])} ({number(wall['q1'])} to {number(wall['q3'])})"


def median(side: Side) -> float:
    return side["wall_ms"]["median"]


def number(value: float) -> str:
    """Three significant digits, in full from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(side: Side) -> str:
    peak = side.get("peak_bytes")
    return "-" if peak is None else number(peak / 2**20)


def losses(cases: Sequence[Case]) -> Iterator[str]:
    """Every rival that is ahead of us."""
    compared = ahead = 0
    for case in cases:
        ours = case["sides"][OURS]
        for name, side in case["sides"].items():
            if name == OURS or not ours["status"] == side["status"] == "timed":
                continue
            compared += 1
            if median(side) < median(ours):
                ahead += 1
                yield f"- Slower than {name}: {title(case)}, {median(ours) / median(side):.2f}x its time."
    if compared and not ahead:
        yield f"- Slower in none of the {compared} comparisons."


def overhead(cases: Sequence[Case]) -> Iterator[str]:
    """The case with almost no arithmetic, in microseconds: what Python costs a call, core included."""
    for case in cases:
        ours = case["sides"][OURS]
        if case["workload"] == "overhead" and ours["status"] == "timed":
            time = f"{median(ours) * 1e3:.0f} us"
            yield f"- `maml.backward` with almost nothing to compute, order {case['order']}: {time}."


def order_ratios(cases: Sequence[Case]) -> Iterator[str]:
    """Second order over first order, in time and in FLOP, for each workload that ran at both."""
    by_key = {(case["workload"], case["order"]): case for case in cases}
    for (workload, order), second in by_key.items():
        first = by_key.get((workload, 1))
        if order != 2 or first is None:
            continue
        times = [
            f"{name} {median(second['sides'][name]) / median(side):.2f}"
            for name, side in first["sides"].items()
            if side["status"] == second["sides"].get(name, {}).get("status") == "timed"
        ]
        flops = second["flops"] / first["flops"]
        ours = [case["sides"][OURS] for case in (second, first)]
        share = ""
        if all(side["status"] == "timed" for side in ours):
            share = f"; ours is {median(ours[0]) / median(ours[1]) / flops:.2f} times that of the FLOP"
        yield f"- Second over first order, {workload}: FLOP {flops:.2f}, {', '.join(times)}{share}."


def notes(cases: Sequence[Case]) -> Iterator[str]:
    """What a side says of itself, once."""
    said = {(name, side["note"]): None for case in cases for name, side in case["sides"].items() if "note" in side}
    for name, note in said:
        yield f"- {name}: {flat(note)}."


def not_timed(cases: Sequence[Case]) -> Iterator[str]:
    """Each side without a time and the reason, with all the cases that share it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, side in case["sides"].items():
            if side["status"] != "timed":
                reasons.setdefault((name, f"{side['status']}: {flat(side['reason'])}"), []).append(title(case))
    for (name, reason), titles in reasons.items():
        where = "in all cases" if len(titles) == len(cases) > 1 else ", ".join(titles)
        yield f"- Not timed: {name}, {where}; {reason}"


def title(case: Case) -> str:
    return f"{case['workload']} (order {case['order']})"


def flat(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + " ..."
