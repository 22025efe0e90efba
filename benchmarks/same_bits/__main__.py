"""The command `python -m benchmarks.same_bits`: a table in Markdown, progress on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from . import alternate, compare
from .cases import NAMES, of_plans, of_workloads
from .jobs import EMULATED
from .version import started

INSTRUCTION_SETS = ("avx512", "avx2", "baseline", EMULATED)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_bits",
        description="Compare the bits, or the times, of two installed versions of maml_cuda.",
    )
    add = parser.add_argument
    site = "a folder that holds an installed maml_cuda (pip install --no-deps --target FOLDER .), or a built checkout"
    add("old", type=Path, metavar="OLD", help=site)
    add("new", type=Path, metavar="NEW", help="another; with OLD itself the times show the noise of the machine")
    add(
        "--isa",
        nargs="+",
        choices=INSTRUCTION_SETS,
        help="instruction sets (default: those that this machine and both builds have; with --time: the widest); "
        f"{EMULATED}: the CUDA kernels compiled for the CPU, on cut shapes, where OLD and NEW are checkouts",
    )
    add("--plans", type=int, default=1000, metavar="N", help="how many random plans (default: 1000)")
    add(
        "--workloads",
        nargs="*",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"of {', '.join(NAMES)} (default: all)",
    )
    add("--time", type=float, metavar="SECONDS", help="time the workloads, so many seconds a version and case")
    add("--quick", action="store_true", help="cut shapes: does everything work? (times mean nothing)")
    options = parser.parse_args(arguments)
    for folder in (options.old, options.new):
        if not (folder / "maml_cuda").is_dir():
            parser.error(f"OLD and NEW must be folders that hold a package maml_cuda, got {folder}")
    if options.plans < 0:
        parser.error(f"--plans must be at least 0, got {options.plans}")
    if options.time is not None and not options.time > 0:
        parser.error(f"--time must be above 0, got {options.time}")
    if not options.workloads and (options.time or not options.plans):
        parser.error("--workloads must name some, got none: there is nothing to compare")
    options.folders = [options.old.resolve(), options.new.resolve()]
    return options


def main(arguments: list[str] | None = None) -> int:
    """1 where bits differ or a case did not run; with --time, where NEW is slower."""
    options = parse(arguments)
    isas = options.isa or common_instruction_sets(options.folders)
    if options.time:
        times = [timed for isa in (options.isa or isas[:1]) for timed in time_all(options, isa)]
        print(alternate.report(times))
        return int(any(timed.slower for timed in times))
    outcomes = []
    for isa in isas:
        small = options.quick or isa == EMULATED
        cases = [*of_workloads(options.workloads, small), *of_plans(options.plans)]
        outcomes += compare.compare(options.folders, isa, cases, say)
    print(compare.report(outcomes))
    return int(any(outcome.difference for outcome in outcomes))


def common_instruction_sets(folders: list[Path]) -> list[str]:
    """Those that this machine and both builds have, widest first."""
    with started(folders, "") as versions:
        first, second = (version.instruction_sets() for version in versions)
    return [isa for isa in first if isa in second]


def time_all(options: argparse.Namespace, isa: str) -> Iterator[alternate.Times]:
    """Every workload by `maml.backward`; the one with almost no arithmetic through autograd as well."""
    for case in of_workloads(options.workloads, options.quick or isa == EMULATED):
        for through_autograd in (False, True) if case.group == "overhead" else (False,):
            times = alternate.alternate(options.folders, isa, case, through_autograd, options.time)
            say(" | ".join(alternate.row(times)))
            yield times


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
