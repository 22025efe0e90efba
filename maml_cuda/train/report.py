"""What stands in a run's folder at its end: the test scores in summary.json, and the pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maml_cuda.data import ImageTasks, MetaBatch
from maml_cuda.data.images import Images
from maml_cuda.train import plots
from maml_cuda.train.algorithms import Algorithm, Maml, make_algorithm
from maml_cuda.train.checkpoint import load_info, load_model, load_parameters, locate
from maml_cuda.train.evaluate import evaluate, mean_and_ci95
from maml_cuda.train.jobs import format_score, make_generator, make_tasks
from maml_cuda.train.run_info import restore_settings
from maml_cuda.train.settings import Settings, is_classification, metric_name
from maml_cuda.train.summary import write_summary


def load_run(run: Path, checkpoint: str = "best", **given: Any) -> tuple[Algorithm, dict[str, Any]]:
    """What a checkpoint of ``run`` has learned, with the settings of ``given``, and the checkpoint's info. Errors are
    those of ``checkpoint.load_checkpoint``."""
    folder = run / checkpoint
    learned, info = load_model(folder)
    algorithm = make_algorithm(replace(restore_settings(Settings, info, folder), **given))
    load_parameters(algorithm.module, learned, folder)
    return algorithm, info


def load_ensemble(run: Path, **given: Any) -> tuple[list[Algorithm], list[int]]:
    """The best checkpoints of ``run``, the best first, and their iterations. ValueError where the run kept one only."""
    names = {path.name.partition(".")[0] for path in run.glob("best-*")}
    kept = [load_info(run / name) for name in names if locate(run / name)]
    bests = max(kept, key=lambda info: info["iteration"])["bests"] if kept else []  # the newest has the list
    if not bests:
        raise ValueError(f"an ensemble must have a run that keeps several checkpoints (--best-checkpoints), got {run}")
    return [load_run(run, best["checkpoint"], **given)[0] for best in bests], [best["iteration"] for best in bests]


def collect_statistics(algorithm: Algorithm, settings: Settings, batches: int = 20) -> None:
    """Statistics of training tasks for BatchNorm, in place of those of the set at hand. ValueError where the algorithm
    has no inner loop to take them over."""
    if not isinstance(algorithm, Maml):
        raise ValueError(f"running statistics are collected over MAML's inner loop, got {settings.algorithm}")
    tasks, generator = make_tasks(settings, "train"), make_generator(settings, "train")
    algorithm.use_running_statistics(tasks.sample(settings.meta_batch, generator) for _ in range(batches))


def ensemble_predictions(
    algorithms: Sequence[Algorithm], job: str
) -> Callable[[MetaBatch, Sequence[int]], Iterator[Tensor]]:
    """Predicts the mean of what ``algorithms`` predict: probabilities of classes, values of curves."""

    def predictions(batch: MetaBatch, steps: Sequence[int]) -> Iterator[Tensor]:
        for each in zip(*(algorithm.predictions(batch, steps) for algorithm in algorithms), strict=True):
            detached = [p.detach() for p in each]
            yield torch.stack([p.softmax(-1) if is_classification(job) else p for p in detached]).mean(0)

    return predictions


def test_run(
    algorithms: Sequence[Algorithm],
    settings: Settings,
    other: Images | None = None,  # noqa: PT028 (this is no test)
) -> dict[str, Any]:
    """The metric on ``settings.test_tasks`` test tasks after each number of adaptation steps, as JSON-able values; of
    several algorithms, that of their mean prediction. The tasks are of the run's data, or of ``other`` images.

    ``reported`` is what a table of the field says: the score after ``settings.test_steps`` steps.
    """
    steps = list(algorithms[0].steps)
    predictions = algorithms[0].predictions if len(algorithms) == 1 else ensemble_predictions(algorithms, settings.job)
    tasks = make_tasks(settings, "test", other)
    scores = evaluate(predictions, settings.job, tasks, make_generator(settings, "test"), settings.test_tasks, steps)
    mean, ci95 = mean_and_ci95(scores)
    row = steps.index(min(settings.test_steps, steps[-1]))
    data = {"data": settings.data, "data_sha256": settings.data_sha256}
    if other is not None:
        data = {"data": str(other.folder), "data_sha256": other.sha256}
    classes = {"ways": settings.ways, "classes": len(tasks.names)} if isinstance(tasks, ImageTasks) else {}
    return {
        "task": settings.job,
        "metric": metric_name(settings.job),
        "steps": steps,
        "mean": mean,
        "ci95": ci95,
        "reported": {"steps": steps[row], "mean": mean[row], "ci95": ci95[row]},
        "test_tasks": settings.test_tasks,
        "test_shots": settings.test_shots,
        "test_queries": settings.test_queries,
        "batch_norm": settings.batch_norm,
        **classes,
        **data,
    }


def table(result: dict[str, Any]) -> str:
    """The result of ``test_run`` for people."""
    job = result["task"]
    ways = f", {result['ways']}-way" if is_classification(job) else ""
    lines = [f"{job}: {result['metric']} on {result['test_tasks']} test tasks, {result['test_shots']}-shot{ways}"]
    if result["data"]:
        lines.append(f"  {result['classes']} test classes of {result['data']}")
    for step, mean, ci95 in zip(result["steps"], result["mean"], result["ci95"], strict=True):
        lines.append(f"  after {step:2d} steps  {format_score(job, mean):>7} ± {format_score(job, ci95)}")
    return "\n".join(lines)


def finish(run: Path, settings: Settings) -> dict[str, Any]:
    """Tests the best checkpoint of a trained run, and the vote of the best ones where it kept several, and writes the
    pictures and, last of all, summary.json."""
    place = {"data": settings.data, "cache": settings.cache}  # which may have moved since the best checkpoint
    algorithm, _ = load_run(run, **place)
    last = load_info(run / "last")
    result = test_run([algorithm], settings)
    if any("checkpoint" in one for one in last["bests"]):
        several, iterations = load_ensemble(run, **place)
        voted = test_run(several, settings)
        result["ensemble"] = {key: voted[key] for key in ("mean", "ci95", "reported")} | {"iterations": iterations}
    plots.learning_curves(run / "metrics.csv", run / "learning_curves.png", settings)
    plots.adaptation(result, run / "adaptation.png")
    batch = make_tasks(settings, "test").sample(1, make_generator(settings, "test"))
    if is_classification(settings.job):
        plots.image_task(algorithm, batch, result["reported"]["steps"], run / "task.png")
    else:
        plots.sinusoid_fits(algorithm, batch, run / "fits.png")
    return write_summary(
        run,
        settings,
        result,
        last,
        algorithm.backend,
        tasks_per_second=last["iteration"] * settings.meta_batch / last["seconds"] if last["seconds"] else 0.0,
        parameters=sum(p.numel() for p in algorithm.module.parameters()),
    )
