"""Short training runs: small settings, started, resumed or interrupted, and the files that they leave."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest

from maml_cuda.train import presets
from maml_cuda.train.jobs import new_settings
from maml_cuda.train.loop import Training
from maml_cuda.train.run_info import resumed_settings
from maml_cuda.train.settings import Settings

NAMES = [("glyphs", name) for name in presets.IMAGE_PRESETS] + [("sinusoid", name) for name in presets.CURVE_PRESETS]
TINY = {
    "glyphs": {"ways": 3, "queries": 2, "test_queries": 3, "meta_batch": 2, "width": 3},
    "sinusoid": {"shots": 4, "queries": 3, "test_queries": 5, "meta_batch": 3, "width": 7},
}


def tiny(job: str, **given) -> Settings:
    common = {"iterations": 40, "log_interval": 7, "validation_interval": 10, "validation_tasks": 3}
    return new_settings(job, **(TINY[job] | common | {"test_tasks": 5, "test_steps": 2} | given))


def trained(run: Path, settings: Settings) -> Training:
    training = Training.start(run, settings)
    training.loop()
    return training


def resumed(run: Path, **given) -> Training:
    training = Training.resume(run, resumed_settings(run, given))
    training.loop()
    return training


def files(run: Path) -> dict[str, bytes]:
    """All bytes of a run's files except JSON files, which also hold wall-clock times."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith(".json")]:
        info = json.loads(found.pop(name))
        assert info.pop("seconds") > 0
        assert info.pop("cpu_seconds") > 0
        info["settings"].pop("iterations")
        found[name] = json.dumps(info).encode()
    return found


def interrupt_at(monkeypatch: pytest.MonkeyPatch, training: Training, iteration: int) -> None:
    """Simulates Ctrl-C while the tasks of this meta-iteration are drawn."""
    sample = training.tasks.sample

    def interrupting(*arguments):
        if training.iteration == iteration:
            signal.raise_signal(signal.SIGINT)
        return sample(*arguments)

    monkeypatch.setattr(training.tasks, "sample", interrupting)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def small(job: str, preset: str, **given) -> Settings:
    sizes = {"iterations": 6, "log_interval": 2, "validation_interval": 2, "validation_tasks": 2, "test_tasks": 3}
    sizes |= {"meta_batch": 2, "width": 3, "test_queries": 2, "test_steps": 2}
    if job == "glyphs":
        sizes |= {"ways": 3, "queries": 2}
    if preset == "protonet":
        sizes |= {"train_ways": 4}
    if preset in ("random", "nearest-pixel"):
        sizes |= {"iterations": 0}
    if preset == "maml++":
        sizes |= {"inner_steps": 2, "multi_step_iterations": 4, "first_order_iterations": 3, "best_checkpoints": 2}
    return new_settings(job, preset, **(sizes | given))
