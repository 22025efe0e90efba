"""Tests a model: the score of unseen tasks after 0, 1, 2, ... adaptation steps."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor

from maml_cuda.data import ImageTasks, MetaBatch, SinusoidTasks
from maml_cuda.train.jobs import score
from maml_cuda.train.ranks import ALONE, Ranks

CHUNK = 50  # tasks at a time; bounds memory. It is fixed, so that the first tasks do not depend on the number of tasks


def evaluate(
    predictions: Callable[[MetaBatch, Sequence[int]], Iterable[Tensor]],
    job: str,
    tasks: ImageTasks | SinusoidTasks,
    generator: Generator,
    num_tasks: int,
    steps: Sequence[int],
    ranks: Ranks = ALONE,
) -> Tensor:
    """The score (``jobs.score``) of each task after each number of adaptation steps.

    Args:
        predictions: ``predictions(batch, steps)`` yields predictions on the query sets ``[tasks, n_qry, ...]``, one for
            each number of steps.
        job: the job's name, which decides the metric.
        tasks: the sampler of the tasks.
        generator: the source of random numbers for the tasks.
        num_tasks: the number of tasks.
        steps: the numbers of adaptation steps, in ascending order.
        ranks: the processes that share the tasks; each gets all scores.

    Returns:
        ``[len(steps), num_tasks]``.
    """
    scores = torch.zeros(len(steps), num_tasks)
    for start in range(0, num_tasks, CHUNK):
        part = ranks.part(min(CHUNK, num_tasks - start))
        batch = tasks.sample(CHUNK, generator, part)
        if part.start == part.stop:  # fewer tasks than processes
            continue
        here = slice(start + part.start, start + part.stop)
        for row, prediction in zip(range(len(steps)), predictions(batch, steps), strict=True):
            scores[row, here] = score(job, prediction, batch.y_qry).detach()
    ranks.add(scores)
    return scores


def mean_and_ci95(scores: Tensor) -> tuple[list[float], list[float]]:
    """The mean over the last axis, and the half width of its 95 % confidence interval, ``1.96 * sd / sqrt(n)``."""
    half_width = 1.96 * scores.double().std(-1) / math.sqrt(scores.shape[-1])
    return scores.double().mean(-1).tolist(), half_width.tolist()
