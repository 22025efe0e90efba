"""The metric after 0, 1, 2, ... adaptation steps on tasks that training has not seen."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor

from maml_cuda.data import ImageTasks, MetaBatch, SinusoidTasks
from maml_cuda.train.jobs import score

CHUNK = 50  # tasks at a time: bounds memory, and the tasks drawn do not depend on how many are asked for


def evaluate(
    predictions: Callable[[MetaBatch, Sequence[int]], Iterable[Tensor]],
    job: str,
    tasks: ImageTasks | SinusoidTasks,
    generator: Generator,
    num_tasks: int,
    steps: Sequence[int],
) -> Tensor:
    """Scores ``[len(steps), num_tasks]``: each task's query metric (``jobs.score``) after so many steps.

    ``predictions(batch, steps)`` are what the model says of the query sets ``[tasks, n_qry, ...]`` after each of them.
    """
    scores = torch.empty(len(steps), num_tasks)
    for start in range(0, num_tasks, CHUNK):
        drawn = tasks.sample(CHUNK, generator)
        here = slice(start, min(start + CHUNK, num_tasks))
        batch = MetaBatch(*(part[: here.stop - here.start] for part in drawn))
        for row, prediction in zip(range(len(steps)), predictions(batch, steps), strict=True):
            scores[row, here] = score(job, prediction, batch.y_qry).detach()
    return scores


def mean_and_ci95(scores: Tensor) -> tuple[list[float], list[float]]:
    """Over the last axis: the mean, and the half width ``1.96 * sd / sqrt(n)`` of its 95 % interval."""
    half_width = 1.96 * scores.double().std(-1) / math.sqrt(scores.shape[-1])
    return scores.double().mean(-1).tolist(), half_width.tolist()
