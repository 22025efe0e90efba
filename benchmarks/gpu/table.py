"""The record as Markdown: the device, the table with its targets, facts, tests, and what was not measured and why.

Times are of one meta-step, forward and backward. Ours in the table is our fastest form and the rival's is its fastest,
both named; their ratio is of two medians of the same interleaved rounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Found = dict[str, Any]

OURS = "maml_cuda"
MOST_KERNELS = 12  # in the table of a profile
# (workload, tasks) -> ms of a second-order meta-step on an H100, and in which precision
TARGETS = {
    ("sinusoid-k1", 25): (0.012, "float32"),
    ("sinusoid-k5", 25): (0.025, "float32"),
    ("policy", 20): (0.25, "float32"),
    ("omniglot", 32): (0.75, "tf32"),
    ("mini-imagenet", 4): (0.90, "tf32"),
}
SPEED_UP = 5.0  # over the fastest rival at equal precision
ORDER_RATIO = 1.3  # second over first order in time, at most so many times that in FLOP
# A rival of no more accurate a precision than ours; bfloat16 has none.
RIVAL_PRECISION = {"float32": "float32", "bf16x3": "tf32", "tf32": "tf32"}
COLUMNS = (
    "workload", "T", "K", "order", "precision", "maml_cuda, ms", "called, ms", "TFLOP/s", "fastest rival, ms", "ratio",
    "peak MB, ours / rival", "error, smooth twin", "error, end to end", "target",
)  # fmt: skip


def markdown(record: Found) -> str:
    lines = [*heading(record), "", *table(record), "", *orders(record), *targets_of_orders(record)]
    lines += ["", *facts(record), *tests(record), *parts(record), *not_timed(record), "", *kernels(record)]
    lines += ["", *precision(record)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip()


def heading(record: Found) -> Iterator[str]:
    machine = record["machine"]
    gpu = machine.get("gpu", {"name": "no device was found"})
    words = [gpu["name"]]
    for key, text in (("multiprocessors", "{} multiprocessors"), ("memory_gib", "{} GiB")):
        if gpu.get(key):
            words.append(text.format(gpu[key]))
    for key in ("driver", "nvcc", "torch"):
        if machine.get(key):
            words.append(f"{key} {machine[key]}")
    if build := machine.get("build_info"):
        words.append(f"maml_cuda {build['version']} for {', '.join(map(str, build['cuda_architectures']))}")
    yield f"One meta-step, forward and backward, on: {', '.join(words)}."
    yield "Median (lower to upper quartile) over interleaved rounds in one process. What fails its proof is marked."
    yield (
        "maml_cuda and rivals: the fastest of their forms, called from Python or captured in a CUDA graph; errors are "
        "of the whole meta-gradient against float64. bf16x3 stands beside rivals in tf32, bfloat16 beside none."
    )
    if record["settings"]["emulated"]:
        yield "**Emulated on a CPU: it shows that the command works, its times mean nothing.**"
    elif record["settings"]["quick"]:
        yield "**Quick run: shapes cut; it shows that everything works, its times mean nothing.**"


def table(record: Found) -> Iterator[str]:
    rows = [row(record, case, precision) for case, precision in of_ours(record)]
    if not rows:
        yield "Nothing was timed."
        return
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(COLUMNS) - 1)])} |"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def of_ours(record: Found) -> Iterator[tuple[Found, str]]:
    """Every case of ours with each precision that we ran, timed or not."""
    for case in record["cases"].values():
        if "rival" not in case:
            names = [side["precision"] for side in case.get("sides", {}).values() if side["who"] == OURS]
            for precision in dict.fromkeys(names):
                yield case, precision


def row(record: Found, case: Found, precision: str) -> list[str]:
    mine = fastest(case, precision)
    called = [s for s in timed(case, OURS, precision) if s["form"] != "captured"]
    ratio, rival, _ = against(record, case, precision)
    smooth = case.get("smooth", {}).get(precision)
    cells = [case["workload"], str(case["tasks"]), str(case["inner_steps"]), str(case["order"]), precision]
    if mine is None:
        own = [s for s in case["sides"].values() if s["who"] == OURS and s["precision"] == precision]
        reasons = sorted({"not timed" if s["status"] == "built" else s["status"] for s in own})
        return [*cells, f"**{', '.join(reasons)}**", *[""] * (len(COLUMNS) - len(cells) - 1)]
    proof = " **unproven**" if "unproven" in mine else ""
    return [
        *cells,
        f"{time(mine)} {mine['form']}{proof}",
        time(min(called, key=median)) if called else "",
        number(case["flops"] / median(mine) / 1e9),
        f"{time(rival)} {rival['who']}, {rival['form']}" if rival else "",
        f"{ratio:.1f}x" if ratio else "",
        f"{megabytes(mine)} / {megabytes(rival) if rival else '-'}",
        f"{smooth:.1e}" if smooth is not None else "",
        f"{mine['error']:.1e}" if mine.get("error") is not None else "",
        target(record, case, precision, mine, ratio),
    ]


def timed(case: Found, who: str | None, precision: str) -> list[Found]:
    """The timed sides of us, or of all rivals with who=None."""
    sides = [s for s in case.get("sides", {}).values() if s["status"] == "timed" and s["precision"] == precision]
    return [s for s in sides if (s["who"] == who if who else s["who"] != OURS)]


def median(side: Found) -> float:
    return side["ms"]["median"]


def fastest(case: Found, precision: str) -> Found | None:
    return min(timed(case, OURS, precision), key=median, default=None)


def against(record: Found, case: Found, precision: str) -> tuple[float | None, Found | None, Found | None]:
    """The least ratio of a rival's time to ours beside it, both proven; the rival, and the record it stands in."""
    found: list[tuple[float, Found, Found]] = []
    for other in record["cases"].values():
        if "rival" in other and key(other) == key(case):
            mine = min(proven(timed(other, OURS, precision)), key=median, default=None)
            rivals = proven(timed(other, None, RIVAL_PRECISION.get(precision, "none")))
            found += [(median(rival) / median(mine), rival, other) for rival in rivals if mine]
    return min(found, key=lambda entry: entry[0], default=(None, None, None))


def proven(sides: list[Found]) -> list[Found]:
    return [side for side in sides if "unproven" not in side]


def key(case: Found) -> tuple[str, int, int]:
    return case["workload"], case["tasks"], case["order"]


def target(record: Found, case: Found, precision: str, mine: Found, ratio: float | None) -> str:
    """The target, met or missed; nothing where it has none or the times mean nothing."""
    most, at = TARGETS.get((case["workload"], case["tasks"]), (None, None))
    if most is None or case["order"] != 2 or precision != at or not counts(record):
        return ""
    if "unproven" in mine:
        return "not judged: unproven"
    words = [f"{number(most)} ms {verdict(median(mine) <= most)}"]
    words.append(
        f"{SPEED_UP:g}x {verdict(ratio >= SPEED_UP)}" if ratio else f"{SPEED_UP:g}x not judged: no rival timed"
    )
    return "; ".join(words)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def counts(record: Found) -> bool:
    """Whether the times are of the true shapes on a GPU."""
    return not (record["settings"]["quick"] or record["settings"]["emulated"])


def orders(record: Found) -> Iterator[str]:
    """Second order over first, in time and in FLOP."""
    for (workload, tasks), precision, time_ratio, flop_ratio in order_ratios(record):
        excess = time_ratio / flop_ratio
        judged = f", target {ORDER_RATIO}x: {verdict(excess <= ORDER_RATIO)}" if counts(record) else ""
        yield (
            f"- Second over first order, {workload} T={tasks} {precision}: time {time_ratio:.2f}, "
            f"FLOP {flop_ratio:.2f}, {excess:.2f}x the FLOP ratio{judged}."
        )


def order_ratios(record: Found) -> Iterator[tuple[tuple[str, int], str, float, float]]:
    whole = {key(case): case for case in record["cases"].values() if "sides" in case and "rival" not in case}
    for case, precision in of_ours(record):
        first = whole.get((case["workload"], case["tasks"], 1))
        if case["order"] == 2 and first:
            ours, theirs = fastest(case, precision), fastest(first, precision)
            if ours and theirs:
                ratio = median(ours) / median(theirs)
                yield (case["workload"], case["tasks"]), precision, ratio, case["flops"] / first["flops"]


def targets_of_orders(record: Found) -> Iterator[str]:
    """Which targets were not judged, because their case was not timed."""
    if not counts(record):
        return
    done = {(*key(case), p) for case, p in of_ours(record) if fastest(case, p)}
    for (workload, tasks), (most, precision) in TARGETS.items():
        if (workload, tasks, 2, precision) not in done:
            yield f"- Target not judged: {workload} T={tasks}, {number(most)} ms in {precision}: not timed."


def measured(found: Found) -> Iterator[tuple[str, Found]]:
    """What a job has found, without the words of why it did not come to its end."""
    yield from ((name, piece) for name, piece in found.items() if isinstance(piece, dict))


def facts(record: Found) -> Iterator[str]:
    for name, fact in measured(record.get("facts", {})):
        if "value" in fact:
            yield f"- {name}: {number(fact['value'])} {fact['unit']} ({fact['of']})."
        else:
            yield f"- {name}: not measured: {flat(fact['failed'])}"


def precision(record: Found) -> Iterator[str]:
    """The table of the part "precision"."""
    if not record.get("precision"):
        return
    yield "Errors of the meta-gradient against float64, |error| / |gradient|, medians over seeds:"
    yield ""
    yield "| net | precision | smooth twin | the net itself | decisions that differ |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for _, workload in measured(record["precision"]):
        for name, e in workload["errors"].items():
            cells = (workload["size"], f"`{name}`", f"{e['smooth']:.0e}", f"{e['net']:.0e}")
            yield f"| {' | '.join(cells)} | {e['flips']:.0f} of {e['decisions']:.0f} |"


def tests(record: Found) -> Iterator[str]:
    if found := record.get("tests"):
        text = ", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items()) or "none ran"
        yield f"- Tests, backend {found['backend']}: {'; '.join([text, *found['notes']])}."
    for name, found in record.get("sanitizer", {}).items():
        summary = f" ({found['summary']})" if found["summary"] else ""
        yield f"- compute-sanitizer {name}: {found['verdict']}{summary}."


def parts(record: Found) -> Iterator[str]:
    for name, part in record["parts"].items():
        if part["status"] in ("failed", "stopped", "skipped"):
            yield f"- Step {name} {part['status']}: {flat(part['reason'])}"


def not_timed(record: Found) -> Iterator[str]:
    for name, case in record["cases"].items():
        for end in ("failed", "stopped"):
            if end in case:
                yield f"- Not at its end: {name}: {flat(case[end])}"
        reasons: dict[str, list[str]] = {}
        for side_name, side in case.get("sides", {}).items():
            if side["status"] in ("failed", "stopped", "slow"):
                reasons.setdefault(f"not timed: {side['status']}: {flat(side['reason'])}", []).append(side_name)
            elif "unproven" in side:
                reasons.setdefault(f"unproven: {flat(side['unproven'])}", []).append(side_name)
        for reason, names in reasons.items():
            yield f"- {name}: {', '.join(names)} {reason}"


def kernels(record: Found) -> Iterator[str]:
    """The kernels that take most of a meta-step's time."""
    for name, precisions in record.get("kernels", {}).items():
        for precision, found in measured(precisions):
            total = sum(kernel["us"] for kernel in found.values())
            yield f"Kernels of {name}, {precision}, {number(total)} us in all:"
            yield ""
            yield "| kernel | launches | us | of all |"
            yield "| --- | ---: | ---: | ---: |"
            for kernel, f in list(found.items())[:MOST_KERNELS]:
                cells = (f"`{short(kernel)}`", f"{f['launches']:g}", number(f["us"]), f"{f['us'] / total:.0%}")
                yield f"| {' | '.join(cells)} |"
            yield ""


def short(kernel: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"maml::cuda::|maml::|\(anonymous namespace\)::|^void ", "", kernel)
    return name.partition(">(")[0] + ">" if ">(" in name else name.partition("(")[0]


def flat(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + " ..."


def time(side: Found) -> str:
    ms = side["ms"]
    return f"{number(ms['median'])} ({number(ms['q1'])} to {number(ms['q3'])})"


def number(value: float) -> str:
    """Three significant digits, in full from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(side: Found) -> str:
    peak = side.get("peak_bytes")
    return "-" if peak is None else number(peak / 2**20)
