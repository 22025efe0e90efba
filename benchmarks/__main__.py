"""The command `python -m benchmarks`. Writes JSON, a Markdown report and two plots; progress goes to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import readme
from .case import measure
from .files import replace, slug
from .growth import points
from .implementations import BASELINES, COMPILED, GROWTH_IMPLEMENTATIONS, MAML_CUDA, SECOND_ORDER_ONLY
from .machine import machine
from .meta_steps import Builder, fused
from .report import markdown, short_summary, summary
from .workloads import WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
GROWTH = "growth"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times a meta-step of maml_cuda and of baselines. Each is first verified against the reference.",
    )
    add = parser.add_argument
    names = [*WORKLOADS, GROWTH]
    add(
        "--workload",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"what to run: {', '.join(names)} (growth: time against T, K and width; default: all)",
    )
    baselines = {slug(name): name for name in BASELINES}
    add(
        "--baseline",
        nargs="*",
        choices=baselines,
        metavar="NAME",
        help=f"baselines: {', '.join(baselines)} (default: all; with --quick: those that do not compile)",
    )
    add("--order", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="orders to run (default: 1 2)")
    add(
        "--baseline-order",
        nargs="+",
        type=int,
        choices=(1, 2),
        default=[1, 2],
        help="orders at which baselines run (default: 1 2)",
    )
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--seconds", type=float, help="timed seconds per implementation and case (default: 3; with --quick: 0.05)")
    add("--limit", type=float, default=300.0, help="seconds to build and verify an implementation (default: 300)")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="of the results (default: docs/benchmarks)")
    add("--readme", action="store_true", help="also write the summaries into README.md and docs/benchmarks.md")
    add("--quick", action="store_true", help="reduced shapes, to test the benchmark; the times are not meaningful")
    add(
        "--backend",
        choices=("fused", "auto", "reference"),
        default="fused",
        help="backend of maml_cuda (default: fused, which makes a fallback an error)",
    )
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.threads is not None and options.threads > (os.cpu_count() or 1):
        parser.error(f"--threads must be at most {os.cpu_count()}, the cores of this machine, got {options.threads}")
    if options.seconds is None:
        options.seconds = 0.05 if options.quick else 3.0
    for name in ("seconds", "limit"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(options, name)}")
    if options.readme and (options.quick or set(options.workload) < set(names)):
        parser.error("--readme must go with a full run of all workloads, got --quick or only some workloads")
    if options.baseline is None:
        options.baseline = [name for name in BASELINES if not (options.quick and name in COMPILED)]
    else:
        options.baseline = [baselines[name] for name in options.baseline]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen cases. Returns 1 if maml_cuda was wrong or failed in one of them, else 0."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options)
    for name in options.workload:
        if name == GROWTH:
            run.grow()
            continue
        workload = WORKLOADS[name].shrunk() if options.quick else WORKLOADS[name]
        for order in sorted(options.order):
            run.case(workload, order)
    plots = run.plot()
    report = markdown(run.record)
    print(report)
    for path in (*run.files(), *plots):
        print(f"written: {path}", file=sys.stderr)
    if options.readme:
        report_file = run.files()[1]
        readme.write(short_summary(run.record), plots[:1], report_file, readme.README)
        readme.write(summary(run.record), plots, report_file, readme.PAGE)
    cases = run.record["cases"] + run.record["growth"]
    return int(any(case["sides"][MAML_CUDA]["status"] != "timed" for case in cases))


class Run:
    """The record of a run. It is written after each case, so that an interrupted run keeps its measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {name: getattr(options, name) for name in ("seconds", "limit", "quick", "backend")}
        self.record: dict[str, Any] = {"machine": machine(), "settings": settings, "cases": [], "growth": []}
        self._options = options
        self._own = {MAML_CUDA: fused(options.backend)}
        self._timed_out: dict[tuple[str, str, int], str] = {}  # (baseline, model, K) -> why it is skipped

    def case(self, workload: Workload, order: int) -> None:
        wanted = self._options.baseline if order in self._options.baseline_order else []
        baselines = {name: BASELINES[name] for name in wanted if order == 2 or name not in SECOND_ORDER_ONLY}
        # A baseline that has timed out is skipped in later cases with the same model and K. They are larger, so it
        # would time out again.
        key = (repr(workload.model), workload.inner_steps)
        skipped = {name: self._timed_out[(name, *key)] for name in baselines if (name, *key) in self._timed_out}
        case = self._measure(workload, order, self._own | baselines, self._options.seconds, skipped)
        for name, result in case["sides"].items():
            if result["status"] == "no result" and name not in skipped:
                where = f"{workload.name}, order {order}"
                self._timed_out[(name, *key)] = f"skipped after {result['reason']} on {where}, which has the same model"
        self.record["cases"].append(case)
        self._write()

    def grow(self) -> None:
        implementations = {name: (self._own | BASELINES)[name] for name in GROWTH_IMPLEMENTATIONS}
        for axis, value, workload in points(self._options.quick):
            case = self._measure(workload, 2, implementations, self._options.seconds / 3, {})
            self.record["growth"].append({"axis": axis, "value": value, **case})
            self._write()

    def _measure(
        self, workload: Workload, order: int, builders: Mapping[str, Builder], seconds: float, skipped: dict[str, str]
    ) -> dict[str, Any]:
        def log(line: str) -> None:
            print(f"{workload.name}, order {order}: {line}", file=sys.stderr, flush=True)

        return measure(workload, order, builders, seconds, self._options.limit, skipped, log)

    def files(self) -> tuple[Path, Path]:
        """The paths of the JSON and the Markdown file."""
        return self._path(".json"), self._path(".md")

    def _path(self, ending: str) -> Path:
        where, quick = self.record["machine"], "-quick" * self._options.quick
        name = slug(f"{where['cpu']} {where['maml_cuda']['cpu_isa']}")
        return self._options.out / f"{name}{quick}{ending}"

    def _write(self) -> None:
        texts = (json.dumps(self.record, indent=2), markdown(self.record))
        for path, text in zip(self.files(), texts, strict=True):
            replace(path, text)

    def plot(self) -> list[Path]:
        """Draws the plots for which the run has data; none without matplotlib."""
        try:
            from . import plots
        except ModuleNotFoundError as error:
            print(f"no plots: {error}", file=sys.stderr)
            return []
        drawn = []
        for draw, cases, ending in (
            (plots.speed_up, self.record["cases"], "-speed-up.png"),
            (plots.growth, self.record["growth"], "-growth.png"),
        ):
            if cases:
                draw(cases, self._path(ending))
                drawn.append(self._path(ending))
        return drawn


if __name__ == "__main__":
    sys.exit(main())
