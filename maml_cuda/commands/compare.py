"""``maml-cuda compare``: the test results of several runs of one job, as a table and a plot."""

import argparse
from pathlib import Path
from typing import Any

from maml_cuda.extras import require


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare the test results of several runs",
        description="Prints a table of the test scores of finished runs with their 95 % intervals, and plots them "
        "against the adaptation steps.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of one job")
    parser.add_argument("--labels", metavar="A,B", help="one label per run (default: the folders' names)")
    parser.add_argument("--out", default="compare.png", metavar="PNG", help="file of the plot (default: compare.png)")


def run(options: argparse.Namespace) -> int:
    require("matplotlib", "safetensors", extra="train")
    from maml_cuda.train import plots
    from maml_cuda.train.comparison import read_results, table

    results = read_results(options.runs)
    labels = options.labels.split(",") if options.labels else [Path(run).resolve().name for run in options.runs]
    if len(labels) != len(results):
        raise ValueError(f"labels must be {len(results)}, one for each run, got {len(labels)}")
    plots.comparison(results, labels, Path(options.out))
    print(table(results, labels))
    print(f"{options.out}: {', '.join(labels)}")
    return 0
