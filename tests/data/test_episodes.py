"""Episodes of the user's own images: every backend against a definition in plain Python; the distribution of draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.data import Episodes, MetaBatch

WORD = 2**32


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 of Salmon et al. 2011."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b // WORD ^ counter[1] ^ key[0], b % WORD, a // WORD ^ counter[3] ^ key[1], a % WORD]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def shuffled(seed: int, episode: int, stream: int, count: int) -> list[int]:
    order = list(range(count))
    for i in range(count):
        high, low, *_ = philox([i, stream, episode % WORD, episode // WORD], [seed % WORD, seed // WORD])
        j = i + (high * WORD + low) * (count - i) // WORD**2
        order[i], order[j] = order[j], order[i]
    return order


def defined(
    images: Tensor, n_way: int, k_shot: int, n_query: int, tasks: int, seed: int, first: int, rotations: int = 1
) -> MetaBatch:
    """The expected episodes, from images [classes, samples, channels, height, width] in the dtype of the episodes."""
    x: list[Tensor] = []
    for episode in range(first, first + tasks):
        for way, c in enumerate(shuffled(seed, episode, 0, len(images) * rotations)[:n_way]):
            samples = shuffled(seed, episode, 1 + way, images.shape[1])[: k_shot + n_query]
            x.append(images[c % len(images), samples].rot90(c // len(images), (-2, -1)))
    shown = torch.stack(x).unflatten(0, (tasks, n_way))  # [tasks, n_way, k_shot + n_query, ...]
    data: list[Tensor] = []
    for part in (shown[:, :, :k_shot], shown[:, :, k_shot:]):
        data.append(part.flatten(1, 2))
        data.append(torch.arange(n_way).repeat_interleave(part.shape[2]).repeat(tasks, 1))
    return MetaBatch(*data)


def assert_same(got: MetaBatch, expected: MetaBatch) -> None:
    for name, a, b in zip(MetaBatch._fields, got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b), name


def some_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def numbered(classes: int, samples: int) -> Tensor:
    """Images of two pixels, the numbers of the class and of the sample."""
    pixels = torch.cartesian_prod(torch.arange(classes), torch.arange(samples))
    return pixels.to(torch.uint8).view(classes, samples, 1, 2)


def numbers(x: Tensor) -> Tensor:
    """Class and sample of numbered images [..., 1, 1, 2]."""
    return (x * 255).round().long()[..., 0, 0, :]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_philox(counter: str, key: str, expected: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert philox(words[0], words[1]) == words[2]


@pytest.mark.parametrize(
    ("shape", "n_way", "k_shot", "n_query", "rotations"),
    [
        ((6, 5, 1, 7, 7), 5, 1, 2, 1),
        ((3, 4, 3, 6, 6), 12, 2, 2, 4),  # every turned class, every sample
        ((4, 3, 2, 3, 5), 2, 1, 1, 1),  # not square
        ((5, 6, 2, 9, 9), 4, 1, 3, 3),
        ((41, 140, 1, 1, 1), 40, 3, 135, 1),  # more draws than a block has threads
        ((2, 2, 1, 30, 40), 2, 1, 1, 1),  # more pixels
    ],
)
def test_episodes_are_those_of_the_definition(
    machine: str, shape: tuple[int, ...], n_way: int, k_shot: int, n_query: int, rotations: int
) -> None:
    images = some_images(*shape)
    many = n_way * (k_shot + n_query) > 1000  # a block of fibers for each image: only as many as needed
    tasks, seed, first = (1, 3, 5) if many else (3, 2**40 + 5, 2**33 - 1)
    got = Episodes(images, n_way, k_shot, n_query, rotations=rotations).draw(tasks, seed, first)
    shown = (images.double() / 255).float()
    assert_same(got, defined(shown, n_way, k_shot, n_query, tasks, seed, first, rotations))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisation_is_exact(machine: str, dtype: torch.dtype) -> None:
    images = torch.arange(256).repeat(3, 1).to(torch.uint8).view(1, 1, 3, 16, 16).repeat(2, 2, 1, 1, 1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = Episodes(images, 2, 1, 1, mean=mean, std=std, dtype=dtype).draw(1, 0).x_qry
    assert x.dtype == dtype
    columns = [torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std)]
    expected = (images[0, 0].double() / 255 - columns[0]) / columns[1]
    assert torch.equal(x[0, 0], expected.to(dtype))
    one = Episodes(images, 2, 1, 1, mean=0.5, std=torch.tensor(0.25), dtype=dtype).draw(1, 0).x_spt
    assert torch.equal(one[0, 1], ((images[0, 0].double() / 255 - 0.5) / 0.25).to(dtype))


def test_images_without_channels_have_one(machine: str) -> None:
    images = some_images(4, 3, 5, 5)
    got = Episodes(images, 3, 1, 2).draw(2, seed=0)
    assert got.x_spt.shape == (2, 3, 1, 5, 5)
    assert_same(got, Episodes(images.unsqueeze(2), 3, 1, 2).draw(2, seed=0))
    turned = images.transpose(-1, -2)  # not contiguous
    assert_same(Episodes(turned, 3, 1, 2).draw(2, 0), Episodes(turned.clone().contiguous(), 3, 1, 2).draw(2, 0))


def test_an_episode_does_not_depend_on_its_batch(machine: str) -> None:
    episodes = Episodes(some_images(8, 6, 4, 4), 5, 1, 3)
    together = episodes.draw(7, seed=11)
    parts = [episodes.draw(3, seed=11), episodes.draw(1, seed=11, first=3), episodes.draw(3, seed=11, first=4)]
    assert_same(together, MetaBatch(*map(torch.cat, zip(*parts, strict=True))))
    assert_same(together, episodes.draw(7, seed=11))


def test_seeds_and_episodes_differ() -> None:
    episodes = Episodes(numbered(100, 100), 5, 1, 1)
    drawn = [episodes.draw(1, seed, first) for seed in (0, 1, 2**32, 2**62) for first in (0, 1, 2**32, 2**62)]
    assert len({tuple(numbers(batch.x_spt).flatten().tolist()) for batch in drawn}) == 16


def test_no_class_and_no_sample_twice() -> None:
    x_spt, y_spt, x_qry, y_qry = Episodes(numbered(9, 8), 9, 3, 5).draw(50, seed=1)
    drawn, labels = numbers(torch.cat([x_spt, x_qry], 1)), torch.cat([y_spt, y_qry], 1)
    for images, label in zip(drawn, labels, strict=True):
        assert len({tuple(image) for image in images.tolist()}) == 72
        pairs = set(zip(label.tolist(), images[:, 0].tolist(), strict=True))
        assert len(pairs) == 9
        assert {c for _, c in pairs} == set(range(9))


@pytest.mark.parametrize(
    ("what", "cells"),
    [
        (
            lambda spt, qry: spt[..., 0, 0] * 49 + spt[..., 1, 0] * 7 + spt[..., 2, 0],
            7 * 6 * 5,
        ),  # the classes, in order
        (lambda spt, qry: spt[..., 1, 1] * 25 + qry[..., 2, 1] * 5 + qry[..., 3, 1], 5 * 4 * 3),  # a class's samples
        (lambda spt, qry: spt[..., 0, 0] * 5 + spt[..., 0, 1], 7 * 5),  # a class with its sample
        (lambda spt, qry: spt[..., 0, 1] * 25 + spt[..., 1, 1] * 5 + spt[..., 2, 1], 5**3),  # samples of three classes
        (lambda spt, qry: qry[:-1, 5, 1] * 5 + qry[1:, 5, 1], 5 * 5),  # two episodes in a row
    ],
    ids=["classes", "samples", "class and sample", "samples of classes", "episodes"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_all_draws_are_equally_likely(what: Callable[[Tensor, Tensor], Tensor], cells: int, seed: int) -> None:
    x_spt, _, x_qry, _ = Episodes(numbered(7, 5), 3, 1, 2).draw(40_000, seed)
    counts = what(numbers(x_spt), numbers(x_qry)).unique(return_counts=True)[1].double()
    assert len(counts) == cells
    expected = counts.sum() / cells
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (cells - 1)) < 4 * math.sqrt(2 * (cells - 1))


def test_turned_classes_are_equally_likely() -> None:
    images = torch.zeros(3, 2, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(1, 4).unsqueeze(1)  # the position of the bright pixel shows the rotation
    x = Episodes(images, 2, 1, 1, rotations=4).draw(24_000, seed=0).x_qry[:, 0, 0]
    counts = (x * 255).round().long().flatten(1).unique(dim=0, return_counts=True)[1].double()
    assert len(counts) == 12
    assert ((counts - 2000) ** 2 / 2000).sum().item() < 11 + 4 * math.sqrt(22)


def test_another_device_draws_the_same() -> None:
    episodes = Episodes(some_images(5, 4, 3, 3), 3, 1, 2)
    moved = episodes.to("cpu")
    assert moved.device == episodes.device == torch.device("cpu")
    assert_same(moved.draw(2, 0), episodes.draw(2, 0))
    with pytest.raises(ValueError, match="episodes cannot be drawn on meta: maml_cuda has no fused layers for meta"):
        episodes.to("meta")


def test_threads_draw_the_same() -> None:
    episodes = Episodes(some_images(6, 5, 3, 32, 32), 5, 1, 4)
    threads = torch.get_num_threads()
    try:
        batches = []
        for count in (1, 3):
            torch.set_num_threads(count)
            batches.append(episodes.draw(9, seed=4))
    finally:
        torch.set_num_threads(threads)
    assert_same(*batches)


def test_training_on_drawn_episodes(machine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    maml = FusedMAML(model, inner_lr=0.1, inner_steps=1)
    episodes = Episodes(some_images(4, 4, 3, 3), 3, 1, 2)
    out = maml(*episodes.draw(2, seed=0))
    out.loss.backward()
    assert maml.backend in ("cpu", "cuda")
    assert out.loss.isfinite()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_draws() -> None:
    episodes = Episodes(some_images(5, 4, 3, 3), 3, 1, 2)
    torch._dynamo.reset()
    draw = torch.compile(lambda tasks, first: episodes.draw(tasks, 7, first), fullgraph=True, backend="aot_eager")
    for tasks, first in ((2, 0), (2, 2), (3, 4), (3, 7)):
        assert_same(draw(tasks, first), episodes.draw(tasks, 7, first))
    torch._dynamo.reset()


GOOD: dict[str, Any] = {"images": torch.zeros(4, 5, 3, 6, 6, dtype=torch.uint8), "n_way": 3, "k_shot": 1, "n_query": 2}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"images": [[1]]}, TypeError, "images must be a tensor, got list"),
        ({"images": torch.zeros(4, 5, 6, 6)}, TypeError, "images must be uint8, got torch.float32"),
        (
            {"images": torch.zeros(5, 6, 6, dtype=torch.uint8)},
            ValueError,
            r"images must have shape \[classes, .* got \[5, 6, 6\]",
        ),
        (
            {"images": torch.zeros(5, 0, 6, 6, dtype=torch.uint8)},
            ValueError,
            r"no axis of length 0, got \[5, 0, 6, 6\]",
        ),
        ({"n_way": 5}, ValueError, "n_way must be 2 to 4, the number of classes, got 5"),
        ({"n_way": 17, "rotations": 4}, ValueError, "n_way must be 2 to 16, the number of classes, got 17"),
        ({"n_way": 1}, ValueError, "n_way must be 2 to 4, the number of classes, got 1"),
        (
            {"k_shot": 3, "n_query": 3},
            ValueError,
            r"k_shot \+ n_query must be at most 5, the samples of a class, each at least 1, got k_shot 3 and n_query 3",
        ),
        ({"k_shot": 0}, ValueError, "each at least 1, got k_shot 0 and n_query 2"),
        ({"n_query": 0}, ValueError, "each at least 1, got k_shot 1 and n_query 0"),
        ({"rotations": 5}, ValueError, "rotations must be 1 to 4 quarter turns, got 5"),
        (
            {"images": torch.zeros(4, 5, 6, 7, dtype=torch.uint8), "rotations": 2},
            ValueError,
            "rotations must be 1 where images are not square, got 2 of 6 x 7",
        ),
        ({"std": 0}, ValueError, "std must not be 0, got 0"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, r"std must not be 0, got \(1.0, 0.0, 1.0\)"),
        ({"std": math.inf}, ValueError, "std must be finite, got inf"),
        ({"mean": math.nan}, ValueError, "mean must be finite, got nan"),
        ({"mean": (0.5, 0.5)}, ValueError, r"mean must be a number or 3 numbers, one per channel, got \(0.5, 0.5\)"),
        ({"dtype": torch.float16}, TypeError, "dtype must be float32 or float64, got torch.float16"),
    ],
)
def test_impossible_episodes_are_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Episodes(**(GOOD | given))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "num_tasks must be at least 1, got 0"),
        ((1, -1), r"seed must be 0 to 2\*\*63 - 1, got -1"),
        ((1, 2**63), r"seed must be 0 to 2\*\*63 - 1, got 9223372036854775808"),
        ((1, 0, -1), r"first must be at least 0, and first \+ num_tasks less than 2\*\*63, got first -1"),
        ((2, 0, 2**63 - 2), r"first must be at least 0, and first \+ num_tasks less than 2\*\*63"),
    ],
)
def test_impossible_draws_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Episodes(**GOOD).draw(*arguments)
