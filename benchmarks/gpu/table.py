"""The Markdown report: the device, times and targets, rates, tests, and what was not measured.

Times are per meta-step. The table shows the fastest form of maml_cuda and of the baselines. Their ratio is that of two
medians from the same interleaved rounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Found = dict[str, Any]

MAML_CUDA = "maml_cuda"
MOST_KERNELS = 12  # rows of a kernel table
# (workload, tasks) -> (target ms of a second-order meta-step on an H100, precision)
TARGETS = {
    ("sinusoid-k1", 25): (0.012, "float32"),
    ("sinusoid-k5", 25): (0.025, "float32"),
    ("policy", 20): (0.25, "float32"),
    ("omniglot", 32): (0.75, "tf32"),
    ("mini-imagenet", 4): (0.90, "tf32"),
}
SPEED_UP = 5.0  # over the fastest baseline at equal precision
ORDER_RATIO = 1.3  # target: time ratio of second to first order over FLOP ratio
# The precision of the baselines that each precision is compared with; bfloat16 has none.
BASELINE_PRECISION = {"float32": "float32", "bf16x3": "tf32", "tf32": "tf32"}
COLUMNS = (
    "workload", "T", "K", "order", "precision", "maml_cuda, ms", "called, ms", "TFLOP/s", "fastest baseline, ms",
    "speed-up", "peak MB, maml_cuda / baseline", "error, smooth variant", "error, end to end", "target",
)  # fmt: skip


def markdown(record: Found) -> str:
    lines = [*heading(record), "", *table(record), "", *orders(record), *targets_of_orders(record)]
    lines += ["", *facts(record), *tests(record), *parts(record), *not_timed(record), "", *kernels(record)]
    lines += ["", *precision(record)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip()


def heading(record: Found) -> Iterator[str]:
    machine = record["machine"]
    gpu = machine.get("gpu", {"name": "no device"})
    words = [gpu["name"]]
    for key, text in (("multiprocessors", "{} multiprocessors"), ("memory_gib", "{} GiB")):
        if gpu.get(key):
            words.append(text.format(gpu[key]))
    for key in ("driver", "nvcc", "torch"):
        if machine.get(key):
            words.append(f"{key} {machine[key]}")
    if build := machine.get("build_info"):
        words.append(f"maml_cuda {build['version']} for {', '.join(map(str, build['cuda_architectures']))}")
    yield f"One meta-step on: {', '.join(words)}."
    yield "Median (lower to upper quartile) over interleaved rounds in one process. Unverified results are marked."
    yield (
        "Times are those of the fastest form: called from Python, or captured in a CUDA graph. Errors are relative, of "
        "the whole meta-gradient against float64. bf16x3 is compared with baselines in tf32, bfloat16 with none."
    )
    if record["settings"]["emulated"]:
        yield "**Emulated on a CPU, to test the command; the times are not meaningful.**"
    elif record["settings"]["quick"]:
        yield "**Quick run with reduced shapes, to test the command; the times are not meaningful.**"


def table(record: Found) -> Iterator[str]:
    rows = [row(record, case, precision) for case, precision in of_maml_cuda(record)]
    if not rows:
        yield "Nothing was timed."
        return
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(COLUMNS) - 1)])} |"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def of_maml_cuda(record: Found) -> Iterator[tuple[Found, str]]:
    """Each case of maml_cuda with each of its precisions, timed or not."""
    for case in record["cases"].values():
        if "baseline" not in case:
            results = [r for r in case.get("implementations", {}).values() if r["method"] == MAML_CUDA]
            names = [result["precision"] for result in results]
            for precision in dict.fromkeys(names):
                yield case, precision


def row(record: Found, case: Found, precision: str) -> list[str]:
    own = fastest(case, precision)
    called = [s for s in timed(case, MAML_CUDA, precision) if s["form"] != "captured"]
    ratio, baseline, _ = smallest_speed_up(record, case, precision)
    smooth = case.get("smooth", {}).get(precision)
    cells = [case["workload"], str(case["tasks"]), str(case["inner_steps"]), str(case["order"]), precision]
    if own is None:
        results = [r for r in case["implementations"].values() if r["method"] == MAML_CUDA]
        statuses = [r["status"] for r in results if r["precision"] == precision]
        reasons = sorted({"not timed" if status == "built" else status for status in statuses})
        return [*cells, f"**{', '.join(reasons)}**", *[""] * (len(COLUMNS) - len(cells) - 1)]
    mark = " **unverified**" if "unverified" in own else ""
    return [
        *cells,
        f"{time(own)} {own['form']}{mark}",
        time(min(called, key=median)) if called else "",
        number(case["flops"] / median(own) / 1e9),
        f"{time(baseline)} {baseline['method']}, {baseline['form']}" if baseline else "",
        f"{ratio:.1f}x" if ratio else "",
        f"{megabytes(own)} / {megabytes(baseline) if baseline else '-'}",
        f"{smooth:.1e}" if smooth is not None else "",
        f"{own['error']:.1e}" if own.get("error") is not None else "",
        target(record, case, precision, own, ratio),
    ]


def timed(case: Found, method: str | None, precision: str) -> list[Found]:
    """The timed results of a method; of all baselines if it is None."""
    results = [r for r in case.get("implementations", {}).values() if r["status"] == "timed"]
    results = [r for r in results if r["precision"] == precision]
    return [r for r in results if (r["method"] == method if method else r["method"] != MAML_CUDA)]


def median(result: Found) -> float:
    return result["ms"]["median"]


def fastest(case: Found, precision: str) -> Found | None:
    return min(timed(case, MAML_CUDA, precision), key=median, default=None)


def smallest_speed_up(record: Found, case: Found, precision: str) -> tuple[float | None, Found | None, Found | None]:
    """The smallest speed-up over a verified baseline: the ratio, the baseline's result, and its record."""
    found: list[tuple[float, Found, Found]] = []
    for other in record["cases"].values():
        if "baseline" in other and key(other) == key(case):
            own = min(verified(timed(other, MAML_CUDA, precision)), key=median, default=None)
            baselines = verified(timed(other, None, BASELINE_PRECISION.get(precision, "none")))
            found += [(median(baseline) / median(own), baseline, other) for baseline in baselines if own]
    return min(found, key=lambda entry: entry[0], default=(None, None, None))


def verified(results: list[Found]) -> list[Found]:
    return [result for result in results if "unverified" not in result]


def key(case: Found) -> tuple[str, int, int]:
    return case["workload"], case["tasks"], case["order"]


def target(record: Found, case: Found, precision: str, own: Found, ratio: float | None) -> str:
    """Whether the target is met; "" without a target, or if the times are not meaningful."""
    most, at = TARGETS.get((case["workload"], case["tasks"]), (None, None))
    if most is None or case["order"] != 2 or precision != at or not is_meaningful(record):
        return ""
    if "unverified" in own:
        return "not evaluated: unverified"
    words = [f"{number(most)} ms {verdict(median(own) <= most)}"]
    words.append(
        f"{SPEED_UP:g}x {verdict(ratio >= SPEED_UP)}" if ratio else f"{SPEED_UP:g}x not evaluated: no baseline timed"
    )
    return "; ".join(words)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def is_meaningful(record: Found) -> bool:
    """Whether the times are those of full shapes on a GPU."""
    return not (record["settings"]["quick"] or record["settings"]["emulated"])


def orders(record: Found) -> Iterator[str]:
    """Second order relative to first order, in time and in FLOP."""
    for (workload, tasks), precision, time_ratio, flop_ratio in order_ratios(record):
        excess = time_ratio / flop_ratio
        target = f", target {ORDER_RATIO}x: {verdict(excess <= ORDER_RATIO)}" if is_meaningful(record) else ""
        yield (
            f"- Second order over first order, {workload} T={tasks} {precision}: time {time_ratio:.2f}, "
            f"FLOP {flop_ratio:.2f}, {excess:.2f}x the FLOP ratio{target}."
        )


def order_ratios(record: Found) -> Iterator[tuple[tuple[str, int], str, float, float]]:
    whole = {
        key(case): case for case in record["cases"].values() if "implementations" in case and "baseline" not in case
    }
    for case, precision in of_maml_cuda(record):
        first = whole.get((case["workload"], case["tasks"], 1))
        if case["order"] == 2 and first:
            at_second, at_first = fastest(case, precision), fastest(first, precision)
            if at_second and at_first:
                ratio = median(at_second) / median(at_first)
                yield (case["workload"], case["tasks"]), precision, ratio, case["flops"] / first["flops"]


def targets_of_orders(record: Found) -> Iterator[str]:
    """The targets whose case was not timed."""
    if not is_meaningful(record):
        return
    done = {(*key(case), p) for case, p in of_maml_cuda(record) if fastest(case, p)}
    for (workload, tasks), (most, precision) in TARGETS.items():
        if (workload, tasks, 2, precision) not in done:
            yield f"- Target not evaluated: {workload} T={tasks}, {number(most)} ms in {precision}: not timed."


def measured(found: Found) -> Iterator[tuple[str, Found]]:
    """The pieces of a job, without the reason of a failure."""
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
    yield "| model | precision | smooth variant | the model itself | decisions that differ |"
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
    """The jobs that did not finish, and the implementations without a verified time, with the reasons."""
    for name, case in record["cases"].items():
        for end in ("failed", "stopped"):
            if end in case:
                yield f"- Not finished: {name}: {flat(case[end])}"
        reasons: dict[str, list[str]] = {}
        for implementation, result in case.get("implementations", {}).items():
            if result["status"] in ("failed", "stopped", "slow"):
                reason = f"not timed: {result['status']}: {flat(result['reason'])}"
            elif "unverified" in result:
                reason = f"unverified: {flat(result['unverified'])}"
            else:
                continue
            reasons.setdefault(reason, []).append(implementation)
        for reason, implementations in reasons.items():
            yield f"- {name}: {', '.join(implementations)} {reason}"


def kernels(record: Found) -> Iterator[str]:
    """The slowest kernels of each profiled meta-step."""
    for name, precisions in record.get("kernels", {}).items():
        for precision, found in measured(precisions):
            total = sum(kernel["us"] for kernel in found.values())
            yield f"Kernels of {name}, {precision}, {number(total)} us in total:"
            yield ""
            yield "| kernel | launches | us | share |"
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


def time(result: Found) -> str:
    ms = result["ms"]
    return f"{number(ms['median'])} ({number(ms['q1'])} to {number(ms['q3'])})"


def number(value: float) -> str:
    """Three significant digits; integers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(result: Found) -> str:
    peak = result.get("peak_bytes")
    return "-" if peak is None else number(peak / 2**20)
