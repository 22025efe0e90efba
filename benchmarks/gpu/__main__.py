"""The command `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from .record import Run
from .table import markdown

MINUTES = 9.0
RESERVE = 15.0  # seconds kept free for ending a process that does not answer, and for this one to start and to write
RESULTS = Path(__file__).resolve().parents[1] / "results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test, prove and time maml_cuda and its rivals on one NVIDIA GPU, within nine minutes.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="cut shapes, no compiled rivals: does everything work?")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the JSON and the table (benchmarks/results)")
    add("--seconds", type=float, help="timed seconds per side and case (default: 0.3; quick: 0.05)")
    add("--emulated", action="store_true", help="on the CPU, with the emulated kernels: a test of this command")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.05 if options.quick else 0.3
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    return options


def main(arguments: list[str] | None = None, minutes: float = MINUTES) -> int:
    """All parts; 0 if every one of them was done or had good reason not to be, and none of our answers refused."""
    from .machine import emulation
    from .parts import perform

    options = parse(arguments)
    settings = {name: getattr(options, name) for name in ("quick", "emulated", "seconds")}
    run = Run(settings, options.out, minutes * 60 - RESERVE)
    try:
        with emulation() if options.emulated else nullcontext():
            perform(run)
    finally:
        run.close()
    print(markdown(run.record))
    for path in run.files():
        print(f"written: {path}")
    failed = run.failed()
    sides = (side for case in run.record["cases"] for side in case.get("sides", {}).values())
    refused = any(side["who"] == "maml_cuda" and side["status"] != "timed" for side in sides)
    return int(failed or refused)


if __name__ == "__main__":
    sys.exit(main())
