"""The command `python -m benchmarks`: JSON, a Markdown report and two plots; progress on stderr."""

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
from .entrants import COMPILED, GROWTH_SIDES, OURS, RIVALS, SECOND_ORDER
from .files import replace, slug
from .growth import points
from .machine import machine
from .report import in_short, markdown, summary
from .rivals import Builder, fused
from .workloads import WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
GROWTH = "growth"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time one meta-step of maml_cuda beside its rivals, each proven in float64 first.",
    )
    add = parser.add_argument
    names = [*WORKLOADS, GROWTH]
    add(
        "--workload",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"which to run: {', '.join(names)} (the cost as T, K and width grow); default: all",
    )
    rivals = {slug(name): name for name in RIVALS}
    add(
        "--rival",
        nargs="*",
        choices=rivals,
        metavar="NAME",
        help=f"beside whom: {', '.join(rivals)} (default: all; quick: those that need no compilation)",
    )
    add("--order", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="first, second (default: both)")
    add(
        "--rival-order",
        nargs="+",
        type=int,
        choices=(1, 2),
        default=[1, 2],
        help="of them, where rivals run, too (both)",
    )
    add("--threads", type=int, help="CPU threads for every side (default: torch's own choice)")
    add("--seconds", type=float, help="timed seconds per side and case (default: 3; quick: 0.05)")
    add("--limit", type=float, default=300.0, help="seconds in which a side must be built and proven (default: 300)")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the results (default: docs/benchmarks)")
    add("--readme", action="store_true", help="also write its summaries into README.md and docs/benchmarks.md")
    add("--quick", action="store_true", help="cut shapes: does everything work? (times mean nothing)")
    add(
        "--backend",
        choices=("fused", "auto", "reference"),
        default="fused",
        help="backend of maml_cuda; with the default, falling back is an error",
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
        parser.error("--readme must go with a full run of every workload, got --quick or some workloads only")
    if options.rival is None:
        options.rival = [name for name in RIVALS if not (options.quick and name in COMPILED)]
    else:
        options.rival = [rivals[name] for name in options.rival]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; 1 if any of our own answers was refused."""
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
        readme.write(in_short(run.record), plots[:1], report_file, readme.README)
        readme.write(summary(run.record), plots, report_file, readme.PAGE)
    cases = run.record["cases"] + run.record["growth"]
    return int(any(case["sides"][OURS]["status"] != "timed" for case in cases))


class Run:
    """The record of a run, on disk after each case, so that a run that is cut short keeps what it measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = {name: getattr(options, name) for name in ("seconds", "limit", "quick", "backend")}
        self.record: dict[str, Any] = {"machine": machine(), "settings": settings, "cases": [], "growth": []}
        self._options = options
        self._ours = {OURS: fused(options.backend)}
        self._gave_up: dict[tuple[str, str, int], str] = {}  # rival, net, K: where there was no result in time

    def case(self, workload: Workload, order: int) -> None:
        wanted = self._options.rival if order in self._options.rival_order else []
        rivals = {name: RIVALS[name] for name in wanted if order == 2 or name not in SECOND_ORDER}
        # What gives no result in time will not on a larger batch or at second order either, nor what does not compile
        # at any: the net and its steps are the same, and the smaller cases come first.
        net = (repr(workload.model), workload.inner_steps)
        given_up = {name: self._gave_up[(name, *net)] for name in rivals if (name, *net) in self._gave_up}
        case = self._measure(workload, order, self._ours | rivals, self._options.seconds, given_up)
        for name, side in case["sides"].items():
            if side["status"] == "no result" and name not in given_up:
                where = f"{workload.name}, order {order}"
                self._gave_up[(name, *net)] = f"not tried after {side['reason']} on {where}, the same net"
        self.record["cases"].append(case)
        self._write()

    def grow(self) -> None:
        sides = {name: (self._ours | RIVALS)[name] for name in GROWTH_SIDES}
        for axis, value, workload in points(self._options.quick):
            case = self._measure(workload, 2, sides, self._options.seconds / 3, {})
            self.record["growth"].append({"axis": axis, "value": value, **case})
            self._write()

    def _measure(
        self, workload: Workload, order: int, sides: Mapping[str, Builder], seconds: float, given_up: dict[str, str]
    ) -> dict[str, Any]:
        def say(line: str) -> None:
            print(f"{workload.name}, order {order}: {line}", file=sys.stderr, flush=True)

        return measure(workload, order, sides, seconds, self._options.limit, given_up, say)

    def files(self) -> tuple[Path, Path]:
        """The JSON and the Markdown."""
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
        """Those plots that the run has measured; none without matplotlib."""
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
