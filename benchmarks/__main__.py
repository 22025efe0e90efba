"""The command `python -m benchmarks`: a Markdown report on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .case import OURS, measure
from .report import machine, markdown
from .rivals import RIVALS, fused
from .workloads import WORKLOADS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time one meta-step of maml_cuda beside its rivals, each proven in float64 first.",
    )
    add = parser.add_argument
    names = ", ".join(WORKLOADS)
    add(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="NAME",
        help=f"which to run: {names} (default: all)",
    )
    add("--order", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="first, second (default: both)")
    add("--threads", type=int, help="CPU threads for every side (default: torch's own choice)")
    add("--seconds", type=float, help="timed seconds per side and case (default: 5; quick: 0.1)")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
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
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else 5.0
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json must name a file in a folder that exists, got {options.json}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; 1 if any of our own answers was refused."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    builders = {OURS: fused(options.backend), **RIVALS}
    settings = {name: getattr(options, name) for name in ("seconds", "quick", "backend")}
    cases: list[dict[str, Any]] = []
    record = {"machine": machine(), "settings": settings, "cases": cases}
    for name in options.workload:
        workload = WORKLOADS[name].shrunk() if options.quick else WORKLOADS[name]
        for order in options.order:
            say = partial(progress, f"{name}, order {order}:")
            cases.append(measure(workload, order, builders, options.seconds, say))
            if options.json:  # after each case, so that a run that is cut short keeps what it measured
                write(options.json, json.dumps(record, indent=2))
    print(markdown(record))
    return int(any(case["sides"][OURS]["status"] != "timed" for case in cases))


def progress(*words: str) -> None:
    print(*words, file=sys.stderr, flush=True)


def write(path: Path, text: str) -> None:
    """Replace the file in one move, so that it is never half written."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)


if __name__ == "__main__":
    sys.exit(main())
