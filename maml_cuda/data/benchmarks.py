"""Tasks of the published data sets in the form of learn2learn's ``vision.benchmarks``.

    tasksets = get_tasksets("mini-imagenet", train_samples=2, test_samples=2, root="~/data")
    data, labels = tasksets.train.sample()  # one task: [5 * 2, 3, 84, 84], [5 * 2]

The files are read by ``maml_cuda.data.images``, which finds those that learn2learn has left in ``root``. Nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maml_cuda.data import images
from maml_cuda.data.image_tasks import ImageClasses
from maml_cuda.data.images import Images, Where


class Benchmark(NamedTuple):
    """How a data set is read.

    Attributes:
        read: opens it.
        white: the value of ``data_augmentation`` -> the pixel value that becomes 1.0.
        turns: quarter turns of which each class of a task gets a random one; 1: none.
    """

    read: Callable[..., Images]
    white: dict[str | None, int]
    turns: int = 1


BENCHMARKS = {
    "omniglot": Benchmark(images.omniglot, {None: 255}, turns=4),
    "mini-imagenet": Benchmark(images.mini_imagenet, {None: 1, "normalize": 255}),
    "tiered-imagenet": Benchmark(images.tiered_imagenet, {None: 255, "normalize": 255}),
    "fc100": Benchmark(images.fc100, {None: 255}),
    "cifarfs": Benchmark(images.cifar_fs, {None: 255}),
}


class Taskset:
    """Tasks of one split, drawn from torch's default generator. ``get_tasksets`` makes it.

    The length is ``num_tasks``: task i is drawn when it is first asked for, and stays the same. With ``num_tasks=-1``
    the length is 1, every task is a new one, and an iteration has no end.
    """

    def __init__(
        self,
        classes: ImageClasses,
        ways: int,
        samples: int,
        num_tasks: int = -1,
        white: int = 255,
        turns: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        self.images = classes.images if device is None else classes.images.to(device)
        self.count = classes.count.tolist()
        self.first = (classes.count.cumsum(0) - classes.count).tolist()  # the row of the first image of each class
        self.ways, self.samples, self.num_tasks = ways, samples, num_tasks
        self.white, self.turns = white, turns
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def sample(self) -> tuple[Tensor, Tensor]:
        """One of the tasks.

        Returns:
            data float32 ``[ways * samples, channels, height, width]``, class by class, and int64 labels ``[ways *
                samples]``: 0 to ``ways - 1`` in the order of the classes, which is random. Of ``2 * shots`` samples
                those at even places are the support set and the others the query set, as learn2learn's examples have
                it.
        """
        return self[int(torch.randint(len(self), (), device="cpu"))]

    def __len__(self) -> int:
        return max(self.num_tasks, 1)

    def __getitem__(self, task: int) -> tuple[Tensor, Tensor]:
        if self.num_tasks == -1:
            return self._load(*self._draw())
        if not 0 <= task < self.num_tasks:
            raise IndexError(f"task must be 0 to {self.num_tasks - 1}, got {task}")
        if task not in self.drawn:
            self.drawn[task] = self._draw()
        return self._load(*self.drawn[task])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.num_tasks == -1:
            while True:
                yield self[0]
        for task in range(self.num_tasks):
            yield self[task]

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The rows of a task's images ``[ways, samples]``, and the quarter turns of its classes ``[ways]``."""
        classes = torch.randperm(len(self.count), device="cpu")[: self.ways].tolist()
        rows = [self.first[c] + torch.randperm(self.count[c], device="cpu")[: self.samples] for c in classes]
        return torch.stack(rows), torch.randint(self.turns, (self.ways,), device="cpu")

    def _load(self, rows: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        data = self.images.index_select(0, rows.flatten().to(self.images.device))
        of_classes = data.unflatten(0, rows.shape)
        for way, turn in enumerate(turns.tolist()):
            if turn:
                of_classes[way] = of_classes[way].rot90(turn, (-2, -1))
        labels = torch.arange(self.ways, device=data.device).repeat_interleave(self.samples)
        return data.float().div_(self.white), labels


class Tasksets(NamedTuple):
    """The tasks of the three splits, which have no class in common."""

    train: Taskset
    validation: Taskset
    test: Taskset


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: Where = "~/data",
    device: torch.device | str | None = None,
    *,
    data_augmentation: str | None = None,
    cache: Where | None = None,
) -> Tasksets:
    """The tasks of a published data set, with the names and arguments of learn2learn's function.

    Its splits are those of ``maml_cuda.data.images``. They are learn2learn's, except for Omniglot, which learn2learn
    splits anew in each run, by Python's random generator; here 1100, 100 and 423 characters are always the same ones.

    Args:
        name: omniglot, mini-imagenet, tiered-imagenet, fc100 or cifarfs.
        train_ways: classes of a training task.
        train_samples: images of each class of a training task, support and query together.
        test_ways, test_samples: of a validation or test task.
        num_tasks: the number of tasks of each split; -1: no end of new ones.
        root: the folder with the files, see ``maml_cuda.data.images``.
        device: where the images are held and the tasks made; None: the CPU, and the images stay on the disk.
        data_augmentation: "normalize" gives pixels in [0, 1]. With None they are what they are in learn2learn: in [0,
            1], but 0 to 255 for mini-imagenet. Augmentations of images are not offered.
        cache: the folder of the converted images; None: ``root``.

    Raises:
        ValueError: an argument is out of range, or a file is damaged.
        FileNotFoundError: a file is missing; the error says where it is published.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    benchmark = BENCHMARKS[name]
    if data_augmentation not in benchmark.white:
        raise ValueError(
            f"data_augmentation must be {' or '.join(map(repr, benchmark.white))} for {name}, got {data_augmentation!r}"
        )
    if num_tasks < -1 or num_tasks == 0:
        raise ValueError(f"num_tasks must be at least 1, or -1 for new tasks without end, got {num_tasks}")
    opened = benchmark.read(root, cache=cache)
    tasksets = []
    for split, of, ways, samples in (
        ("train", "train", train_ways, train_samples),
        ("validation", "test", test_ways, test_samples),
        ("test", "test", test_ways, test_samples),
    ):
        classes = opened.split(split)
        fewest = int(classes.count.min())
        if not 1 <= ways <= len(classes.count):
            raise ValueError(f"{of}_ways must be 1 to {len(classes.count)} ({classes.what}), got {ways}")
        if not 1 <= samples <= fewest:
            raise ValueError(f"{of}_samples must be 1 to {fewest} (images of a class of {name}), got {samples}")
        white, turns = benchmark.white[data_augmentation], benchmark.turns
        tasksets.append(Taskset(classes, ways, samples, num_tasks, white, turns, device))
    return Tasksets(*tasksets)
