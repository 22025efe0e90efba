"""N-way K-shot tasks, and plain batches, from classes of images that need not be of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maml_cuda.data.meta_batch import MetaBatch


@dataclass(frozen=True)
class ImageClasses:
    """Images, class by class."""

    what: str  # for errors: "test glyphs"
    images: Tensor  # [images, channels, height, width] uint8
    count: Tensor  # [classes] int64, each at least 1
    names: Sequence[str]  # of the classes
    choice: int = 0  # of how many classes the user chose them; 0: there is no choice


class ImageTasks:
    """Tasks of ``n_way`` classes drawn from all of ``classes``, with ``k_shot`` support and ``n_query`` query images
    of each, without replacement.

    Args:
        rotations: every class is so many, its images turned by 0, 1, ... quarter turns, as in the Omniglot protocol.
        white: the pixel that becomes 1.

    Raises:
        ValueError: ``classes`` has too few classes or too few images of one, or is not square where it is to be turned.
    """

    def __init__(
        self, classes: ImageClasses, n_way: int, k_shot: int, n_query: int, rotations: int = 1, white: int = 255
    ) -> None:
        self.images, self.count, self.names, what = classes.images, classes.count, classes.names, classes.what
        height, width = self.images.shape[-2:]
        if not 1 <= rotations <= 4:
            raise ValueError(f"rotations must be 1 to 4 quarter turns, got {rotations}")
        if rotations > 1 and height != width:
            raise ValueError(f"rotations must be 1 where images are not square, got {rotations} of {height} x {width}")
        if not 2 <= n_way <= rotations * len(self.count):
            more = _choice(n_way, classes.choice) if classes.choice and n_way >= 2 else ""
            raise ValueError(f"n_way must be 2 to {rotations * len(self.count)} ({what}), got {n_way}{more}")
        fewest = int(self.count.min())
        if k_shot < 1 or n_query < 1 or k_shot + n_query > fewest:
            smallest = classes.names[int(self.count.argmin())]
            raise ValueError(
                f"k_shot + n_query must be at most {fewest}, each at least 1 (of the {what}, {smallest} has no more "
                f"images), got k_shot {k_shot} and n_query {n_query}"
            )
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.rotations, self.white = rotations, white
        self.first = self.count.cumsum(0) - self.count  # [classes], the row of each class's first image
        self.missing = torch.arange(int(self.count.max())) >= self.count.unsqueeze(1)  # [classes, most images]

    def sample(self, num_tasks: int, generator: Generator) -> MetaBatch:
        """Draws ``num_tasks`` tasks: x ``[num_tasks, n_way * images a class, channels, height, width]`` float32 in
        [0, 1], class by class; y int64 labels, which number a task's classes in the random order they were drawn."""
        # The largest of random keys are a draw without replacement, for all tasks at once.
        keys = torch.rand(num_tasks, self.rotations * len(self.count), generator=generator)
        drawn = keys.topk(self.n_way).indices  # [tasks, n_way]
        turns, classes = drawn // len(self.count), drawn % len(self.count)
        missing = self.missing[classes]  # [tasks, n_way, most images]
        keys = torch.rand(missing.shape, generator=generator).masked_fill_(missing, -1)
        rows = self.first[classes].unsqueeze(-1) + keys.topk(self.k_shot + self.n_query).indices
        x_spt, y_spt = self._gather(rows[..., : self.k_shot], turns)
        x_qry, y_qry = self._gather(rows[..., self.k_shot :], turns)
        return MetaBatch(x_spt, y_spt, x_qry, y_qry)

    def _gather(self, rows: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        tasks, n_way, n = rows.shape
        x = self.images.index_select(0, rows.flatten()).unflatten(0, (tasks, n_way, n))
        self._turn(x, turns)
        y = torch.arange(n_way).repeat_interleave(n).repeat(tasks, 1)
        return x.flatten(1, 2).float().div_(self.white), y

    def _turn(self, x: Tensor, turns: Tensor) -> None:
        for turn in range(1, self.rotations):
            turned = turns == turn
            x[turned] = x[turned].rot90(turn, (-2, -1))


class ImageBatches:
    """Batches of images of all the classes that ``tasks`` draws from: what a classifier of them is trained on."""

    def __init__(self, tasks: ImageTasks) -> None:
        self.tasks = tasks
        self.classes = tasks.rotations * len(tasks.count)

    def sample(self, images: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draws with replacement: x ``[images, channels, height, width]`` float32 in [0, 1], y int64 ``[images]``,
        every class as likely as any other."""
        tasks = self.tasks
        y = torch.randint(self.classes, (images,), generator=generator)
        turns, classes = y // len(tasks.count), y % len(tasks.count)
        uniform = torch.rand(images, generator=generator, dtype=torch.float64)
        rows = tasks.first[classes] + (uniform * tasks.count[classes]).long()
        x = tasks.images.index_select(0, rows)
        tasks._turn(x, turns)
        return x.float().div_(tasks.white), y


def _choice(n_way: int, classes: int) -> str:
    """What to do where a split of so many classes has too few for ``n_way``."""
    ways = min(n_way, classes // 3)
    example = f", such as {classes - 2 * ways}/{ways}/{ways}" if ways >= 2 else ""
    if example and ways < n_way:
        example += f" for {ways} ways"
    return (
        f"; {n_way}-way tasks need {n_way} classes or more in a split, {3 * n_way} for all three, of {classes} here: "
        f"choose by --split TRAIN/VALIDATION/TEST (split= in Python){example}, or by folders train, val and test"
    )
