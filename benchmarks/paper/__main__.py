"""The command `python -m benchmarks.paper`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from maml_cuda import cli

from ..files import replace
from . import figures, protocols, results
from .cells import CELLS
from .page import markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Lists, runs and collects the cells of the result tables, and writes docs/results.md.",
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUNS", help="runs, or folders of runs, to add to the results")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the command of every cell")
    what.add_argument("--run", nargs="+", metavar="CELL", help="run these cells; an interrupted one resumes")
    what.add_argument(
        "--protocols",
        action="store_true",
        help="test the finished RUNS with the authors' number of queries and with each query by itself, then add them",
    )
    add("--data", metavar="PATH", help="with --run or --protocols: folder of the data set")
    add("--threads", metavar="N", help="with --run: CPU threads")
    add("--out", type=Path, default=Path("runs/paper"), metavar="FOLDER", help="for the runs (default: runs/paper)")
    add("--docs", type=Path, default=DOCS, metavar="FOLDER", help="for the page (default: docs)")
    options = parser.parse_args(arguments)
    for name in options.run or ():
        if name not in CELLS:
            parser.error(f"CELL must be a name that --list prints, got {name}")
    if options.protocols and not options.runs:
        parser.error("RUNS must be named with --protocols, got none")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    known = results.load(options.docs / "results.json")
    if options.list:
        for name, cell in CELLS.items():
            print(f"{name}{' (filled)' if name in known else ''}\n  maml-cuda {shlex.join(cell.command)}")
        return 0
    for folder in options.runs if options.protocols else ():
        for run in results.finished(folder):
            print(f"{run}: {json.dumps(protocols.measure(run, options.data))}")
    for name in options.run or ():
        if status := run_cell(name, options):
            return status
        known = take_in(known, [options.out / name], options.docs)
    if options.runs or not options.run:
        take_in(known, options.runs, options.docs)
    return 0


def run_cell(name: str, options: argparse.Namespace) -> int:
    """Trains and tests a cell in its own folder; resumes an interrupted run. Returns the exit code."""
    cell, run = CELLS[name], options.out / name
    if (run / "summary.json").exists():
        print(f"{name}: {run} is complete")
        return 0
    machine = ["--threads", options.threads] if options.threads else []
    if (run / "last").exists():
        data = ["--data", options.data] if options.data else []
        return cli.main(["train", "--resume", str(run), *data, *machine])
    command = [options.data if word == "FOLDER" and options.data else word for word in cell.command]
    return cli.main([*command, *machine, "--out", str(run)])


def take_in(known: dict[str, Any], folders: list[Path], docs: Path) -> dict[str, Any]:
    """Adds the runs of ``folders`` to the results and writes the page. Returns the results."""
    merged, unknown = results.merged(known, results.summaries(folders))
    for run in unknown:
        print(f"no cell has the settings of this run: {run}", file=sys.stderr)
    results.save(merged, docs / "results.json")
    sinusoid = "sinusoid.png" if figures.adaptation(merged, docs / "sinusoid.png") else None
    learning = "learning.png" if figures.learning(merged, docs / "learning.png") else None
    omniglot = "omniglot.png" if figures.omniglot(merged, docs / "omniglot.png") else None
    replace(docs / "results.md", markdown(merged, sinusoid, learning, omniglot))
    print(f"{len(merged)} of {len(CELLS)} cells are filled: {docs / 'results.md'}")
    return merged


if __name__ == "__main__":
    sys.exit(main())
