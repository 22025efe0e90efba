"""The end of a run: tests the best checkpoint and writes the plots and summary.json."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maml_cuda.data import ImageTasks, MetaBatch
from maml_cuda.data.images import Images
from maml_cuda.train import plots
from maml_cuda.train.algorithms import Adapting, Algorithm, Maml, make_algorithm
from maml_cuda.train.checkpoint import load_info, load_model, load_parameters, locate
from maml_cuda.train.devices import CPU
from maml_cuda.train.evaluate import evaluate, mean_and_ci95
from maml_cuda.train.fixed_statistics import NORMS
from maml_cuda.train.jobs import format_score, make_generator, make_tasks
from maml_cuda.train.ranks import count
from maml_cuda.train.run_info import restore_settings
from maml_cuda.train.settings import Settings, is_classification, metric_name
from maml_cuda.train.summary import write_summary


def load_run(
    run: Path, checkpoint: str = "best", device: torch.device = CPU, **given: Any
) -> tuple[Algorithm, dict[str, Any]]:
    """Loads a checkpoint of a run.

    Args:
        run: the run's folder.
        checkpoint: the name of the checkpoint.
        device: where the algorithm is to be, wherever it was trained.
        given: settings that override the stored ones.

    Returns:
        The algorithm and the checkpoint's info.

    Raises:
        MissingCheckpoint: see ``checkpoint.load_checkpoint``.
        DamagedCheckpoint: see ``checkpoint.load_checkpoint``.
    """
    folder = run / checkpoint
    learned, info = load_model(folder)
    algorithm = make_algorithm(replace(restore_settings(Settings, info, folder), **given), device)
    load_parameters(algorithm.module, learned, folder)
    return algorithm, info


def load_ensemble(run: Path, device: torch.device = CPU, **given: Any) -> tuple[list[Algorithm], list[int]]:
    """Loads the best checkpoints of a run.

    Returns:
        The algorithms, the best first, and their iterations.

    Raises:
        ValueError: the run keeps one best checkpoint only.
    """
    names = {path.name.partition(".")[0] for path in run.glob("best-*")}
    kept = [load_info(run / name) for name in names if locate(run / name)]
    bests = max(kept, key=lambda info: info["iteration"])["bests"] if kept else []  # the newest lists all
    if not bests:
        raise ValueError(f"an ensemble needs a run that keeps several checkpoints (--best-checkpoints), got {run}")
    algorithms = [load_run(run, best["checkpoint"], device, **given)[0] for best in bests]
    return algorithms, [best["iteration"] for best in bests]


def collect_statistics(algorithm: Algorithm, settings: Settings, batches: int = 20, device: torch.device = CPU) -> None:
    """Makes BatchNorm use running statistics of training tasks instead of those of the set at hand.

    Raises:
        ValueError: the algorithm is not MAML or its network has no BatchNorm.
    """
    if not isinstance(algorithm, Maml):
        raise ValueError(f"running statistics need MAML's inner loop, got {settings.algorithm}")
    tasks, generator = make_tasks(settings, "train", device=device), make_generator(settings, "train")
    algorithm.use_running_statistics(tasks.sample(settings.meta_batch, generator) for _ in range(batches))


def normalise_by(statistics: str | None, algorithm: Algorithm, settings: Settings, device: torch.device = CPU) -> None:
    """Chooses the statistics by which BatchNorm normalises queries in a test.

    Args:
        statistics: "transductive" or None: those of the queries, together. "running": of training tasks, which are
            drawn for it. "support": of the support set. The last two classify each query by itself.
        algorithm: is changed.
        settings: those of the run, with the place of its data.
        device: of the algorithm.

    Raises:
        ValueError: the algorithm or its net has no such statistics.
    """
    if statistics == "running":
        collect_statistics(algorithm, settings, device=device)
    elif statistics == "support":
        if not isinstance(algorithm, Adapting):
            raise ValueError(f"statistics of the support set need an inner loop, got {settings.algorithm}")
        if not has_batch_norm(algorithm):
            raise ValueError("statistics of the support set need a net with BatchNorm layers, got none")
        algorithm.support_statistics = True


def has_batch_norm(algorithm: Algorithm) -> bool:
    """Whether the net of an algorithm has BatchNorm layers."""
    return any(isinstance(m, NORMS) for m in algorithm.module.modules())


def ensemble_predictions(
    algorithms: Sequence[Algorithm], job: str
) -> Callable[[MetaBatch, Sequence[int]], Iterator[Tensor]]:
    """Predicts the mean prediction of ``algorithms``: of class probabilities for images, of values for curves."""

    def predictions(batch: MetaBatch, steps: Sequence[int]) -> Iterator[Tensor]:
        for each in zip(*(algorithm.predictions(batch, steps) for algorithm in algorithms), strict=True):
            detached = [p.detach() for p in each]
            yield torch.stack([p.softmax(-1) if is_classification(job) else p for p in detached]).mean(0)

    return predictions


def test_run(
    algorithms: Sequence[Algorithm],
    settings: Settings,
    other: Images | None = None,  # noqa: PT028 (this is no test)
    device: torch.device = CPU,  # noqa: PT028
) -> dict[str, Any]:
    """Tests algorithms on ``settings.test_tasks`` test tasks after each number of adaptation steps.

    Args:
        algorithms: one algorithm, or several, whose mean prediction is tested.
        settings: the settings of the run.
        other: images to test on; None: the data of the run.
        device: the device of the algorithms.

    Returns:
        JSON-able values. ``mean`` and ``ci95`` are lists over ``steps``; ``reported`` is the score after
            ``settings.test_steps`` steps, which papers report.
    """
    steps = list(algorithms[0].steps)
    predictions = algorithms[0].predictions if len(algorithms) == 1 else ensemble_predictions(algorithms, settings.job)
    tasks = make_tasks(settings, "test", other, device)
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
    """The result of ``test_run`` as text."""
    job = result["task"]
    ways = f", {result['ways']}-way" if is_classification(job) else ""
    lines = [f"{job}: {result['metric']} on {result['test_tasks']} test tasks, {result['test_shots']}-shot{ways}"]
    if result["data"]:
        lines.append(f"  {result['classes']} test classes of {result['data']}")
    for step, mean, ci95 in zip(result["steps"], result["mean"], result["ci95"], strict=True):
        lines.append(f"  after {step:2d} steps  {format_score(job, mean):>7} ± {format_score(job, ci95)}")
    return "\n".join(lines)


def finish(run: Path, settings: Settings, device: torch.device = CPU) -> dict[str, Any]:
    """Tests the best checkpoint of a trained run, and the ensemble of the best ones if there are several; writes the
    plots and, at the end, summary.json.

    Returns:
        The content of summary.json.
    """
    place = {"data": settings.data, "cache": settings.cache}  # the data may have moved since the best checkpoint
    algorithm, _ = load_run(run, device=device, **place)
    last = load_info(run / "last")
    result = test_run([algorithm], settings, device=device)
    if any("checkpoint" in one for one in last["bests"]):
        several, iterations = load_ensemble(run, device, **place)
        ensemble = test_run(several, settings, device=device)
        result["ensemble"] = {key: ensemble[key] for key in ("mean", "ci95", "reported")} | {"iterations": iterations}
    backend = algorithm.backend
    algorithm.module.cpu()  # matplotlib draws what is there
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
        backend,
        device=str(device),
        processes=count(),
        tasks_per_second=last["iteration"] * settings.meta_batch / last["seconds"] if last["seconds"] else 0.0,
        parameters=sum(p.numel() for p in algorithm.module.parameters()),
    )
