"""The Markdown report of a run, and its summaries for the README and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .fit import lines as fitted_lines
from .implementations import MAML_CUDA
from .markdown import markdown_table
from .targets import cell as target_cell
from .targets import lines as target_lines

Case = dict[str, Any]
Result = dict[str, Any]


def markdown(record: dict[str, Any]) -> str:
    """The whole report. `record` has the keys machine, settings, cases and growth."""
    cases = record["cases"]
    return "\n".join(
        [
            *heading(record, TIMES, RESOURCES, SGEMM),
            "",
            *table(cases),
            "",
            *baselines_table(cases),
            "",
            *slower(cases),
            *overhead(cases),
            *order_ratios(cases),
            *fitted_lines(record["growth"]),
            *notes(cases),
            *not_timed([*cases, *record["growth"]]),
            *target_lines(cases, record["settings"]["quick"]),
        ]
    )


def short_summary(record: dict[str, Any]) -> str:
    """The part that the README shows: median times at second order, and the cases in which a baseline is faster."""
    cases = record["cases"]
    return "\n".join([*heading(record, MEDIANS), "", *speed_table(cases), "", *slower(cases)])


def speed_table(cases: Sequence[Case]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for case in cases:
            if case["order"] == 2:
                cells = dict(zip(COLUMNS, row(case), strict=True))
                yield [case["workload"], *(cells[name].partition(" (")[0] for name in SHARED)]

    return markdown_table(("workload", *SHARED), rows())


def summary(record: dict[str, Any]) -> str:
    """The part that docs/benchmarks.md shows: second order, and the cases in which a baseline is faster."""
    cases = record["cases"]
    return "\n".join([*heading(record, TIMES, SGEMM), "", *summary_table(cases), "", *slower(cases)])


SHARED = ("T", "K", f"{MAML_CUDA}, ms", "fastest baseline", "its time, ms", "speed-up")
SHARES = ("speed-up at sgemm rate", "sgemm share")
SUMMARY_COLUMNS = ("second order", *SHARED, "target", *SHARES)


def summary_table(cases: Sequence[Case]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for case in cases:
            if case["order"] == 2:
                cells = dict(zip(COLUMNS, row(case), strict=True))
                yield [
                    case["workload"],
                    *(cells[name] for name in SHARED),
                    target_cell(case["workload"]),
                    *(cells[name] for name in SHARES),
                ]

    return markdown_table(SUMMARY_COLUMNS, rows())


MEDIANS = (
    "Median wall time of a second-order meta-step with T tasks and K inner steps. Each implementation has its own "
    "process, and only one runs at a time, in interleaved rounds."
)
TIMES = (
    "T: tasks. K: inner steps. Wall time: median (lower to upper quartile) over interleaved rounds. Each "
    "implementation has its own process, and only one runs at a time."
)
RESOURCES = "CPU: time of all threads of the process. Memory: what one step adds to the process's resident memory."
SGEMM = (
    "Sgemm share: the time that the FLOP of the direct matrix products would take at the rate of a large sgemm, "
    "measured in the same rounds, as a share of the time of maml_cuda. Speed-up at sgemm rate: the speed-up if "
    "maml_cuda took exactly that time. Winograd convolutions need fewer FLOP, so both can be exceeded."
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
        yield "**Quick run with reduced shapes: it tests the benchmark; the times are not meaningful.**"


COLUMNS = (
    "workload", "order", *SHARED, *SHARES, f"CPU ms, {MAML_CUDA} / baseline", f"MB, {MAML_CUDA} / baseline",
    "float64 error",
)  # fmt: skip


def table(cases: Sequence[Case]) -> Iterator[str]:
    return markdown_table(COLUMNS, map(row, cases))


def row(case: Case) -> list[str]:
    own = case["sides"][MAML_CUDA]
    baseline = case["sides"].get(case["fastest_rival"])
    timed = own["status"] == "timed"
    return [
        case["workload"],
        str(case["order"]),
        str(case["tasks"]),
        str(case["inner_steps"]),
        time_cell(own),
        case["fastest_rival"] or "none",
        time_cell(baseline) if baseline else "",
        f"{case['speed_up']:.2f}x" if case["speed_up"] else "",
        f"{case['speed_up_limit']:.1f}x" if case["speed_up_limit"] else "",
        f"{own['floor_fraction']:.0%}" if timed else "",
        f"{number(own['cpu_ms']) if timed else '-'} / {number(baseline['cpu_ms']) if baseline else '-'}",
        f"{megabytes(own)} / {megabytes(baseline) if baseline else '-'}",
        f"{own['error_float64']:.0e}" if timed else "",
    ]


def baselines_table(cases: Sequence[Case]) -> Iterator[str]:
    """Each baseline's median, relative to maml_cuda in parentheses, or its status if it has none."""
    names = list(dict.fromkeys(name for case in cases for name in case["sides"] if name != MAML_CUDA))

    def rows() -> Iterator[list[str]]:
        for case in cases:
            cells = [against(case, case["sides"].get(name)) for name in names]
            yield [case["workload"], str(case["order"]), *cells]

    return markdown_table(["workload", "order", *names], rows())


def against(case: Case, result: Result | None) -> str:
    if result is None:
        return ""
    if result["status"] != "timed":
        return result["status"]
    own = case["sides"][MAML_CUDA]
    times = f" ({median(result) / median(own):.1f}x)" if own["status"] == "timed" else ""
    return f"{number(median(result))}{times}"


def time_cell(result: Result) -> str:
    if result["status"] != "timed":
        return f"**{result['status']}**"
    wall = result["wall_ms"]
    return f"{number(wall['median'])} ({number(wall['q1'])} to {number(wall['q3'])})"


def median(result: Result) -> float:
    return result["wall_ms"]["median"]


def number(value: float) -> str:
    """Three significant digits; integers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(result: Result) -> str:
    peak = result.get("peak_bytes")
    return "-" if peak is None else number(peak / 2**20)


def slower(cases: Sequence[Case]) -> Iterator[str]:
    """One line per case and baseline that is faster than maml_cuda."""
    compared = faster = 0
    for case in cases:
        own = case["sides"][MAML_CUDA]
        for name, result in case["sides"].items():
            if name == MAML_CUDA or not own["status"] == result["status"] == "timed":
                continue
            compared += 1
            if median(result) < median(own):
                faster += 1
                yield f"- Slower than {name}: {title(case)}, {median(own) / median(result):.2f}x its time."
    if compared and not faster:
        yield f"- Slower in none of the {compared} comparisons."


def overhead(cases: Sequence[Case]) -> Iterator[str]:
    """The time of the workload `overhead`, which has almost no arithmetic."""
    for case in cases:
        own = case["sides"][MAML_CUDA]
        if case["workload"] == "overhead" and own["status"] == "timed":
            yield f"- A meta-step with almost no arithmetic, order {case['order']}: {median(own) * 1e3:.0f} us."


def order_ratios(cases: Sequence[Case]) -> Iterator[str]:
    """Second order relative to first order, in time and in FLOP, for each workload with both."""
    by_key = {(case["workload"], case["order"]): case for case in cases}
    for (workload, order), second in by_key.items():
        first = by_key.get((workload, 1))
        if order != 2 or first is None:
            continue
        times = [
            f"{name} {median(second['sides'][name]) / median(result):.2f}"
            for name, result in first["sides"].items()
            if result["status"] == second["sides"].get(name, {}).get("status") == "timed"
        ]
        flops = second["flops"] / first["flops"]
        own = [case["sides"][MAML_CUDA] for case in (second, first)]
        share = ""
        if all(result["status"] == "timed" for result in own):
            share = f"; time over FLOP, {MAML_CUDA}: {median(own[0]) / median(own[1]) / flops:.2f}"
        yield f"- Second order over first order, {workload}: FLOP {flops:.2f}; time: {', '.join(times)}{share}."


def notes(cases: Sequence[Case]) -> Iterator[str]:
    """The notes of the implementations, each once."""
    found = {
        (name, result["note"]): None for case in cases for name, result in case["sides"].items() if "note" in result
    }
    for name, note in found:
        yield f"- {name}: {flat(note)}."


def not_timed(cases: Sequence[Case]) -> Iterator[str]:
    """Each implementation without a time: the reason, and the cases with this reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, result in case["sides"].items():
            if result["status"] != "timed":
                reasons.setdefault((name, f"{result['status']}: {flat(result['reason'])}"), []).append(title(case))
    for (name, reason), titles in reasons.items():
        where = "in all cases" if len(titles) == len(cases) > 1 else ", ".join(titles)
        yield f"- Not timed: {name}, {where}; {reason}"


def title(case: Case) -> str:
    return f"{case['workload']} (order {case['order']})"


def flat(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + " ..."
