"""Further tests of a finished run: with the authors' number of queries, and with each query by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from maml_cuda.commands.job_kinds import stored_run
from maml_cuda.train import report
from maml_cuda.train.algorithms import Adapting, Maml
from maml_cuda.train.settings import Settings

from ..files import replace as write

NAME = "protocols.json"


def measure(run: Path, data: str | None = None) -> dict[str, Any]:
    """Tests the best checkpoint of a finished run, or their ensemble if it keeps several, and writes the scores into
    the run's folder.

    Args:
        run: the run's folder.
        data: the folder of the data set, if it has moved.

    Returns:
        ``iterations`` of the run, and by protocol the score after ``test_steps`` steps: ``authors``, as many queries of
            a class as support samples; ``support`` and ``running``, the queries of the run and BatchNorm with the
            statistics of the support set, for nets that are adapted, or with running ones, for nets that MAML adapts.

    Raises:
        ValueError: the run is none on pictures.
    """
    _, settings, info = stored_run(run, "best")
    if not isinstance(settings, Settings) or settings.job == "sinusoid":
        raise ValueError(f"RUNS must be runs on pictures with --protocols, got one of {settings.job}: {run}")
    settings = replace(settings, data=data or settings.data)
    place = {"data": settings.data, "cache": settings.cache}
    several = any("checkpoint" in one for one in info["bests"])

    def load() -> list[report.Algorithm]:
        return report.load_ensemble(run, **place)[0] if several else [report.load_run(run, **place)[0]]

    algorithms = load()
    as_authors = replace(settings, test_queries=settings.test_shots)
    found: dict[str, Any] = {"iterations": info["iteration"], "authors": _score(algorithms, as_authors)}
    for statistics, kind in {"support": Adapting, "running": Maml}.items():
        if isinstance(algorithms[0], kind) and report.has_batch_norm(algorithms[0]):
            algorithms = load()
            for algorithm in algorithms:
                report.normalise_by(statistics, algorithm, settings)
            found[statistics] = _score(algorithms, settings)
    write(run / NAME, json.dumps(found, indent=1))
    return found


def _score(algorithms: list[report.Algorithm], settings: Settings) -> dict[str, Any]:
    result = report.test_run(algorithms, settings)
    return {"queries": settings.test_queries} | result["reported"]


def of_run(run: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """``protocols``: what ``measure`` has found of a run; {} if it was not tested since its last iteration."""
    if not (run / NAME).exists():
        return {}
    found: dict[str, Any] = json.loads((run / NAME).read_text())
    return {"protocols": found} if found.pop("iterations") == summary["meta_iterations"] else {}
