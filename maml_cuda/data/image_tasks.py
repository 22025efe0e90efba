"""Samplers of N-way K-shot tasks and of plain batches. Classes may have different numbers of images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maml_cuda.data.meta_batch import WHOLE, MetaBatch


@dataclass(frozen=True)
class ImageClasses:
    """Images, class by class.

    Attributes:
        what: a description, for errors, such as "test glyphs".
        images: uint8 ``[images, channels, height, width]``.
        count: the number of images of each class, int64 ``[classes]``, each at least 1.
        names: the names of the classes.
        choice: the number of classes that the user divided into splits; 0 if the splits are fixed.
    """

    what: str
    images: Tensor
    count: Tensor
    names: Sequence[str]
    choice: int = 0


class ImageTasks:
    """N-way K-shot tasks. Classes, and the images of a class, are drawn without replacement.

    Args:
        classes: the classes to draw from, such as ``Images.split``.
        n_way: classes per task.
        k_shot: support images per class.
        n_query: query images per class.
        rotations: 1 to 4. Each class becomes this many classes, rotated by 0, 1, ... quarter turns, as in the Omniglot
            protocol. More than 1 needs square images.
        white: the pixel value that becomes 1.0.

    Raises:
        ValueError: there are too few classes, a class has too few images, or images that are not square are to be
            rotated.
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
                f"k_shot + n_query must be at most {fewest}, each at least 1 (of the {what}, {smallest} has the fewest "
                f"images), got k_shot {k_shot} and n_query {n_query}"
            )
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.rotations, self.white = rotations, white
        self.first = self.count.cumsum(0) - self.count  # [classes]: the row of the first image of each class
        self.missing = torch.arange(int(self.count.max())) >= self.count.unsqueeze(1)  # [classes, most images]

    def to(self, device: torch.device) -> ImageTasks:
        """The same tasks, with the images on another device. Draws are the same on every device."""
        moved = copy.copy(self)
        moved.images = self.images.to(device)
        return moved

    def sample(self, num_tasks: int, generator: Generator, part: slice = WHOLE) -> MetaBatch:
        """Draws tasks.

        Args:
            num_tasks: the number of tasks.
            generator: the source of random numbers, on the CPU.
            part: of these tasks the ones to return; all are drawn.

        Returns:
            x float32 ``[num_tasks, n_way * images per class, channels, height, width]`` in [0, 1], class by class, and
                int64 labels y ``[num_tasks, n_way * images per class]``. Labels number the classes of a task in the
                random order in which they were drawn.
        """
        # The n_way largest of random keys are a draw without replacement, for all tasks at once.
        keys = torch.rand(num_tasks, self.rotations * len(self.count), generator=generator)[part]
        drawn = keys.topk(self.n_way).indices  # [tasks, n_way]
        turns, classes = drawn // len(self.count), drawn % len(self.count)
        missing = self.missing[classes]  # [tasks, n_way, most images]
        keys = torch.rand(num_tasks, *missing.shape[1:], generator=generator)[part].masked_fill_(missing, -1)
        rows = self.first[classes].unsqueeze(-1) + keys.topk(self.k_shot + self.n_query).indices
        x_spt, y_spt = self._gather(rows[..., : self.k_shot], turns)
        x_qry, y_qry = self._gather(rows[..., self.k_shot :], turns)
        return MetaBatch(x_spt, y_spt, x_qry, y_qry)

    def _gather(self, rows: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        tasks, n_way, n = rows.shape
        x = self.images.index_select(0, rows.flatten().to(self.images.device)).unflatten(0, (tasks, n_way, n))
        self._turn(x, turns)
        y = torch.arange(n_way, device=x.device).repeat_interleave(n).repeat(tasks, 1)
        return x.flatten(1, 2).float().div_(self.white), y

    def _turn(self, x: Tensor, turns: Tensor) -> None:
        for turn in range(1, self.rotations):
            turned = (turns == turn).to(x.device)
            x[turned] = x[turned].rot90(turn, (-2, -1))


class ImageBatches:
    """Batches of labelled images of all classes of ``tasks``, to train a classifier on.

    Attributes:
        classes: the number of classes, rotations included.
    """

    def __init__(self, tasks: ImageTasks) -> None:
        self.tasks = tasks
        self.classes = tasks.rotations * len(tasks.count)

    def sample(self, images: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draws images with replacement. Every class has the same probability.

        Args:
            images: the number of images.
            generator: the source of random numbers.

        Returns:
            x float32 ``[images, channels, height, width]`` in [0, 1], and int64 labels y ``[images]``.
        """
        tasks = self.tasks
        y = torch.randint(self.classes, (images,), generator=generator)
        turns, classes = y // len(tasks.count), y % len(tasks.count)
        uniform = torch.rand(images, generator=generator, dtype=torch.float64)
        rows = tasks.first[classes] + (uniform * tasks.count[classes]).long()
        x = tasks.images.index_select(0, rows.to(tasks.images.device))
        tasks._turn(x, turns)
        return x.float().div_(tasks.white), y.to(x.device)


def _choice(n_way: int, classes: int) -> str:
    """What to do if a split of ``classes`` classes in all has too few for ``n_way``."""
    ways = min(n_way, classes // 3)
    example = f", such as {classes - 2 * ways}/{ways}/{ways}" if ways >= 2 else ""
    if example and ways < n_way:
        example += f" for {ways} ways"
    return (
        f"; {n_way}-way tasks need at least {n_way} classes in each split, {3 * n_way} for all three, and there are "
        f"{classes}: set --split TRAIN/VALIDATION/TEST (split= in Python){example}, or make folders train, val and test"
    )
