"""get_tasksets: learn2learn's layout, names, splits and pixels, over our readers."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maml_cuda.data import benchmarks
from maml_cuda.data.benchmarks import Taskset, get_tasksets
from maml_cuda.data.image_tasks import ImageClasses
from tests.data import published
from tests.data.opened import SPLITS


@pytest.fixture(scope="module")
def fc100(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fc100")
    return folder, published.fc100(folder)


def places(data: torch.Tensor, of_split: dict) -> list[int]:
    """The row of each image of a task in the published array; its pixels are random, so no two are the same."""
    rows = {image.tobytes(): row for row, image in enumerate(of_split["data"])}
    drawn = (data * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [rows[np.ascontiguousarray(image).tobytes()] for image in drawn]


def test_a_task_is_class_by_class_and_of_its_split(fc100) -> None:
    folder, files = fc100
    tasksets = get_tasksets("fc100", train_ways=4, train_samples=3, test_ways=7, test_samples=2, root=folder)
    assert tasksets._fields == ("train", "validation", "test")
    for taskset, split in zip(tasksets, SPLITS, strict=True):
        ways, samples = (4, 3) if split == "train" else (7, 2)
        of_split = files[SPLITS[split]]
        data, labels = taskset.sample()
        assert (data.dtype, data.shape) == (torch.float32, (ways * samples, 3, 32, 32))
        assert (labels.dtype, labels.tolist()) == (torch.int64, [way for way in range(ways) for _ in range(samples)])
        rows = places(data, of_split)
        assert len(set(rows)) == len(rows)
        classes = np.array(of_split["labels"])[rows].reshape(ways, samples)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0].tolist())) == ways
    a, b = (tasksets.train.sample()[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_a_number_of_tasks_repeats_them(fc100) -> None:
    folder, _ = fc100
    torch.manual_seed(0)
    tasks = get_tasksets("fc100", train_samples=2, test_samples=2, num_tasks=3, root=folder).train
    first = [data for data, _ in tasks]
    assert len(tasks) == len(first) == 3
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(tasks[i][0], first[i]) for i in (2, 0, 1))
    sampled = [tasks.sample()[0] for _ in range(5)]
    assert all(any(torch.equal(data, known) for known in first) for data in sampled)
    with pytest.raises(IndexError, match="task must be 0 to 2, got 3"):
        tasks[3]
    torch.manual_seed(0)
    again = get_tasksets("fc100", train_samples=2, test_samples=2, num_tasks=3, root=folder).train
    assert all(torch.equal(a, b) for (a, _), b in zip(again, first, strict=True))

    endless = get_tasksets("fc100", train_samples=2, test_samples=2, root=folder).train
    a, b = (data for data, _ in islice(endless, 2))
    assert len(endless) == 1
    assert not torch.equal(a, b)
    loaded = next(iter(torch.utils.data.DataLoader(tasks, batch_size=3)))
    assert [list(part.shape) for part in loaded] == [[3, 10, 3, 32, 32], [3, 10]]


def test_pixels_are_those_of_learn2learn(monkeypatch) -> None:
    """Of mini-ImageNet 0 to 255 unless normalised, of all others [0, 1]."""
    white = ImageClasses("white", torch.full((20, 3, 2, 2), 255, dtype=torch.uint8), torch.full((10,), 2), [])
    asked = []

    def read(root, cache):
        return SimpleNamespace(split=lambda split: asked.append(split) or white)

    for name, benchmark in benchmarks.BENCHMARKS.items():
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, benchmark._replace(read=read))
        expected = 255 if name == "mini-imagenet" else 1
        assert {t.sample()[0].unique().item() for t in get_tasksets(name, 5, 2, 5, 2)} == {expected}
        if "imagenet" in name:
            normalised = get_tasksets(name, 5, 2, 5, 2, device="cpu", data_augmentation="normalize")
            assert normalised.train.sample()[0].unique().tolist() == [1]
    assert asked[:3] == ["train", "validation", "test"]


def test_names_are_read_by_our_readers(fc100, tmp_path) -> None:
    assert {name: b.read.__name__ for name, b in benchmarks.BENCHMARKS.items()} == {
        "omniglot": "omniglot", "mini-imagenet": "mini_imagenet", "tiered-imagenet": "tiered_imagenet",
        "fc100": "fc100", "cifarfs": "cifar_fs",
    }  # fmt: skip
    assert {name for name, b in benchmarks.BENCHMARKS.items() if b.turns == 4} == {"omniglot"}
    cache = tmp_path / "cache"
    get_tasksets("fc100", train_samples=2, test_samples=2, root=fc100[0], cache=cache)
    assert any(cache.iterdir())
    with pytest.raises(FileNotFoundError, match=r"CIFAR-FS is not in .*; it is published at"):
        get_tasksets("cifarfs", root=tmp_path)


def test_each_class_of_a_task_is_turned_as_a_whole() -> None:
    images = torch.arange(6 * 2 * 9, dtype=torch.uint8).view(12, 1, 3, 3)
    tasks = Taskset(ImageClasses("six", images, torch.full((6,), 2), []), 5, 2, white=1, turns=4)
    seen = set()
    for _ in range(20):
        data, _ = tasks.sample()
        characters = set()
        for pair in data.view(5, 2, 1, 3, 3):
            matches = {
                (c, turn)
                for c in range(6)
                for turn in range(4)
                for order in ((0, 1), (1, 0))
                if torch.equal(pair, images[2 * c :][list(order)].rot90(turn, (-2, -1)).float())
            }
            assert len(matches) == 1
            characters.add(next(iter(matches))[0])
            seen |= {turn for _, turn in matches}
        assert len(characters) == 5  # no character at two turns in one task
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar-fs"}, "name must be one of omniglot, mini-imagenet, .*, cifarfs, got 'cifar-fs'"),
        ({"data_augmentation": "lee2019"}, "data_augmentation must be None for fc100, got 'lee2019'"),
        ({"name": "mini-imagenet", "data_augmentation": "lee2019"}, "must be None or 'normalize' for mini-imagenet"),
        ({"num_tasks": 0}, "num_tasks must be at least 1, or -1 for new tasks without end, got 0"),
        ({"train_ways": 61}, r"train_ways must be 1 to 60 \(train classes of fc100\), got 61"),
        ({"test_ways": 21}, r"test_ways must be 1 to 20 \(validation classes of fc100\), got 21"),
        ({"train_samples": 4}, r"train_samples must be 1 to 3 \(images of a class of fc100\), got 4"),
        ({"test_samples": 0}, r"test_samples must be 1 to 3 \(images of a class of fc100\), got 0"),
    ],
)
def test_refused_arguments(fc100, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_tasksets(**{"name": "fc100", "train_samples": 2, "test_samples": 2, "root": fc100[0]} | arguments)
