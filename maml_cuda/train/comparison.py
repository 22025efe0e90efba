"""Compares the test results of finished runs of one job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maml_cuda.train.checkpoint import read_json
from maml_cuda.train.hints import did_you_mean, sibling_folders

KEYS = ("task", "metric", "steps", "mean", "ci95", "test_tasks")
TASKS = ("ways", "test_shots", "test_queries", "test_episodes", "data_sha256")  # what decides how hard the tasks are


def read_results(runs: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of runs.

    Raises:
        FileNotFoundError: a run has no summary, which is written at its end.
        ValueError: a file is not the summary of a run, or the runs are of several jobs.
    """
    results: list[dict[str, Any]] = []
    for run in runs:
        path = Path(run) / "summary.json"
        if not path.is_file():
            there = Path(run).is_dir()
            hint = "" if there else did_you_mean(run, sibling_folders(Path(run)))
            what = "no folder"
            if there:
                what = f"a folder without {path.name}; maml-cuda train --resume {run} finishes a run"
            raise FileNotFoundError(f"{run} must be a finished run, got {what}{hint}")
        summary = read_json(path)
        for key in KEYS:
            if key not in summary:
                raise ValueError(f"{path} must be the summary of a finished run, got one without {key}")
        if results and (summary["task"], summary["metric"]) != (results[0]["task"], results[0]["metric"]):
            raise ValueError(f"runs must be of one job, got {results[0]['task']} and {summary['task']} ({run})")
        results.append(summary)
    return results


def table(results: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    """The results as text: before adaptation, after one step, as reported, and how the runs differ from the first.

    The interval of a difference is that of two independent tests.
    """
    job, metric = results[0]["task"], results[0]["metric"]
    entries = []  # label, result, scores
    for result, label in zip(results, labels, strict=True):
        entries.append((label, result, result))
        if "ensemble" in result:
            entries.append((f"{label}, ensemble", result, result["ensemble"]))
    steps = sorted({0, 1} & {step for result in results for step in result["steps"]})
    first = _reported(results[0], results[0])
    rows = [["run", "algorithm", "test tasks", *map(_after, steps), "reported", "difference"]]
    for label, result, scores in entries:
        found = dict(zip(result["steps"], zip(scores["mean"], scores["ci95"], strict=True), strict=True))
        early = [_score(metric, *found[step]) if step in found else "-" for step in steps]
        reported = _reported(result, scores)
        last = f"{_score(metric, reported['mean'], reported['ci95'])} ({_after(reported['steps'])})"
        error = math.hypot(reported["ci95"], first["ci95"])
        difference = _score(metric, reported["mean"] - first["mean"], error, sign="+")
        own = "" if scores is results[0] else difference
        rows.append([label, _algorithm(result), _tasks(result), *early, last, own])
    if len(entries) == 1:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{job}: {metric}, mean and 95 % interval over test tasks"]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if len(entries) > 1:
        lines.append(f"difference: of the reported {metric} from that of {labels[0]}")
    different = [key for key in TASKS if len({str(result.get(key)) for result in results}) > 1]
    if different:
        lines.append(f"The runs were not tested on the same tasks: they differ in {', '.join(different)}.")
    return "\n".join(lines)


def _reported(result: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """The score that papers report; of a policy, that after the last step."""
    last = {"steps": result["steps"][-1], "mean": scores["mean"][-1], "ci95": scores["ci95"][-1]}
    reported: dict[str, Any] = scores.get("reported", last)
    return reported


def _algorithm(result: dict[str, Any]) -> str:
    settings = result.get("settings", {})
    baseline = settings.get("baseline", "none")
    return str(settings.get("preset", "maml" if baseline == "none" else baseline))


def _tasks(result: dict[str, Any]) -> str:
    sizes = [f"{result[key]}-{key.rpartition('_')[2].rstrip('s')}" for key in ("ways", "test_shots") if key in result]
    return " ".join([str(result["test_tasks"]), *sizes])


def _after(steps: int) -> str:
    return f"after {steps} step{'s' * (steps != 1)}"


def _score(metric: str, mean: float, ci95: float, sign: str = "") -> str:
    if metric == "accuracy":
        return f"{100 * mean:{sign}.1f} ± {100 * ci95:.1f} %"
    return f"{mean:{sign}.3f} ± {ci95:.3f}" if metric == "MSE" else f"{mean:{sign}.2f} ± {ci95:.2f}"
