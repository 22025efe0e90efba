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
        description="Builds, tests, verifies, profiles and times maml_cuda on one NVIDIA GPU, then its baselines.",
    )
    add = parser.add_argument
    names = [case.name for case in cases(quick=False, emulated=False)]
    add(
        "--parts", default=",".join(DEFAULT_PARTS), help=f"comma-separated, of {','.join(PARTS)} (default: %(default)s)"
    )
    add("--cases", help=f"comma-separated, of {','.join(names)} (default: all)")
    add(
        "--seconds",
        type=float,
        default=SECONDS,
        help="for the whole command (default: %(default)g); all parts need at least 300",
    )
    add(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="of the JSON and the report (default: docs/benchmarks)",
    )
    add("--prebuilt", type=Path, metavar="FILE", help="a compiled module to use instead of building")
    add("--quick", action="store_true", help="reduced shapes, to test the benchmark")
    add("--emulated", action="store_true", help="run on the CPU with the emulated kernels, to test this command")
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
    """Runs all steps. Returns 1 if a step failed or a result of maml_cuda is wrong, else 0."""
    from .machine import emulation
    from .parts import perform

    options = parse(arguments)
    with emulation() if options.emulated else nullcontext():  # the emulation is built before the time starts
        run = Run(options)
        try:
            perform(run)
        finally:
            run.close()
    print(markdown(run.record))
    for path in run.files():
        print(f"written: {path}")
    return int(run.failed())


if __name__ == "__main__":
    sys.exit(main())
