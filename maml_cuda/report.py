"""What stands in a run's folder at its end: the test scores in summary.json, and the pictures."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from maml_cuda import plots
from maml_cuda.checkpoint import load_checkpoint, write_file
from maml_cuda.evaluate import evaluate, mean_and_ci95
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.jobs import Settings, classifies, make_generator, make_maml, make_tasks, metric, show
from maml_cuda.versions import versions

STEPS = range(11)


def load_run(run: Path, checkpoint: str = "best", **given: Any) -> tuple[FusedMAML, dict[str, Any]]:
    """The model of a checkpoint of ``run``, with the settings of ``given``, and the checkpoint's info.
    FileNotFoundError where no run is."""
    model, _, info = load_checkpoint(run / checkpoint)
    maml = make_maml(replace(Settings(**info["settings"]), **given))
    maml.load_state_dict(model)
    return maml, info


def test_run(maml: FusedMAML, settings: Settings) -> dict[str, Any]:
    """The metric on ``settings.test_tasks`` test tasks after 0..10 adaptation steps, as JSON-able values."""
    scores = evaluate(
        maml,
        settings.job,
        make_tasks(settings, "test"),
        make_generator(settings, "test"),
        settings.test_tasks,
        STEPS,
    )
    mean, ci95 = mean_and_ci95(scores)
    return {
        "task": settings.job,
        "metric": metric(settings.job),
        "steps": list(STEPS),
        "mean": mean,
        "ci95": ci95,
        "test_tasks": settings.test_tasks,
        "test_shots": settings.test_shots,
    }


def table(result: dict[str, Any]) -> str:
    """The result of ``test_run`` for people."""
    job = result["task"]
    lines = [f"{job}: {result['metric']} on {result['test_tasks']} test tasks, {result['test_shots']}-shot"]
    for step, mean, ci95 in zip(result["steps"], result["mean"], result["ci95"], strict=True):
        lines.append(f"  after {step:2d} steps  {show(job, mean):>7} ± {show(job, ci95)}")
    return "\n".join(lines)


def finish(run: Path, settings: Settings) -> dict[str, Any]:
    """Tests the best checkpoint of a trained run and writes the pictures and, last of all, summary.json."""
    maml, best = load_run(run, data=settings.data)  # which may have moved since the best checkpoint
    last = load_checkpoint(run / "last")[2]
    result = test_run(maml, settings)
    plots.learning_curves(run / "metrics.csv", run / "learning_curves.png", settings)
    plots.adaptation(result, run / "adaptation.png")
    batch = make_tasks(settings, "test").sample(1, make_generator(settings, "test"))
    if classifies(settings.job):
        plots.image_task(maml, batch, settings.test_steps, run / "task.png")
    else:
        plots.sinusoid_fits(maml, batch, run / "fits.png")
    summary = result | {
        "meta_iterations": last["iteration"],
        "seconds": last["seconds"],
        "tasks_per_second": last["iteration"] * settings.meta_batch / last["seconds"],
        "best": best["best"],
        "backend": maml.backend,
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
        "versions": versions(),
    }
    write_file(run / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary
