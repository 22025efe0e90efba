"""The command `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

from .cases import cases
from .parts import DEFAULT_PARTS, PARTS
from .record import RESERVE, Run
from .table import markdown

SECONDS = 540.0
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test, prove, profile and time maml_cuda on one NVIDIA GPU, and then its rivals beside it.",
    )
    add = parser.add_argument
    names = [case.name for case in cases(quick=False, emulated=False)]
    add("--parts", default=",".join(DEFAULT_PARTS), help=f"of {','.join(PARTS)}, in this order (%(default)s)")
    add("--cases", help=f"of {','.join(names)}, in this order (all)")
    add("--seconds", type=float, default=SECONDS, help="for the whole command (%(default)g); from 300 on all parts fit")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the JSON and the table (docs/benchmarks)")
    add("--prebuilt", type=Path, metavar="FILE", help="the compiled module to take, in place of a build")
    add("--quick", action="store_true", help="cut shapes: does everything work?")
    add("--emulated", action="store_true", help="on the CPU, with the emulated kernels: a test of this command")
    options = parser.parse_args(arguments)
    if not options.seconds > RESERVE:
        parser.error(f"--seconds must be above {RESERVE:g}, got {options.seconds:g}")
    options.parts = options.parts.split(",")
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"--parts must be of {', '.join(PARTS)}; got {part}")
    options.cases = options.cases.split(",") if options.cases else None
    try:
        cases(options.quick, options.emulated, options.cases)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """All steps; 0 if every one of them was done, or had good reason not to be, and none of our answers was wrong."""
    from .machine import emulation
    from .parts import perform

    options = parse(arguments)
    run = Run(options)
    try:
        with emulation() if options.emulated else nullcontext():
            perform(run)
    finally:
        run.close()
    print(markdown(run.record))
    for path in run.files():
        print(f"written: {path}")
    return int(run.failed())


if __name__ == "__main__":
    sys.exit(main())
