"""``maml-cuda compare``: plots the test results of several runs."""

import argparse
from pathlib import Path
from typing import Any

from maml_cuda.extras import require


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("compare", help="plot the test results of several runs")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of one job")
    parser.add_argument("--labels", metavar="A,B", help="one label per run (default: the folders' names)")
    parser.add_argument("--out", default="compare.png", metavar="PNG", help="file of the plot (default: compare.png)")


def run(options: argparse.Namespace) -> int:
    """``maml-cuda compare``: plots the test results of several runs."""
    require("matplotlib", "safetensors", extra="train")
    from maml_cuda.rl.plots import returns
    from maml_cuda.train.checkpoint import read_json

    results: list[dict[str, Any]] = []
    for run in options.runs:
        path = Path(run) / "summary.json"
        summary = read_json(path)
        for key in ("task", "metric", "steps", "mean", "ci95", "test_tasks"):
            if key not in summary:
                raise ValueError(f"{path} must be the summary of a finished run, got one without {key}")
        if results and (summary["task"], summary["metric"]) != (results[0]["task"], results[0]["metric"]):
            raise ValueError(f"runs must be of one job, got {results[0]['task']} and {summary['task']} ({run})")
        results.append(summary)
    labels = options.labels.split(",") if options.labels else [Path(run).name for run in options.runs]
    if len(labels) != len(results):
        raise ValueError(f"labels must be {len(results)}, one for each run, got {len(labels)}")
    returns(results, labels, Path(options.out))
    print(f"{options.out}: {', '.join(labels)}")
    return 0
