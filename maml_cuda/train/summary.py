"""``summary.json``: the test result of a finished run, its cost, its settings and where it ran."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from maml_cuda.train.checkpoint import write_file
from maml_cuda.train.provenance import commit, machine, versions


def write_summary(
    run: Path, settings: Any, result: dict[str, Any], last: dict[str, Any], backend: str, **facts: Any
) -> dict[str, Any]:
    """Writes ``summary.json`` of a run.

    Args:
        run: the run's folder.
        settings: the run's settings, a dataclass.
        result: what the test found.
        last: the info of the run's last checkpoint.
        backend: the backend that computed the result.
        facts: entries that only this kind of job has.

    Returns:
        What was written.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    summary = result | {
        "meta_iterations": last["iteration"],
        "seconds": last["seconds"],
        "cpu_seconds": last["cpu_seconds"],
        **facts,
        "best": last["bests"][0] if last["bests"] else None,
        "backend": backend,
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }
    write_file(run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary
