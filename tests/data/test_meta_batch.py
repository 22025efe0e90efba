"""Batches of torchmeta's BatchMetaDataLoader: its collated dictionaries, as torch's default_collate makes them."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from maml_cuda.data import MetaBatch


def task(keys: tuple[str, str], seed: int, shots: int, queries: int) -> OrderedDict:
    """A task as ClassSplitter makes it: entries of samples (input, target), each collated."""
    random = np.random.default_rng(seed)
    entries = []
    for key, n in zip(keys, (shots, queries), strict=True):
        labels = [label for label in range(3) for _ in range(n)]
        samples = [(torch.from_numpy(random.random((1, 4, 4), np.float32)), label) for label in labels]
        entries.append((key, default_collate(samples)))
    return OrderedDict(entries)


@pytest.mark.parametrize("keys", [("train", "test"), ("support", "query")])
def test_a_batch_of_torchmeta(keys: tuple[str, str]) -> None:
    batch = default_collate([task(keys, seed, 1, 5) for seed in range(4)])
    made = MetaBatch.from_torchmeta(batch)
    assert [list(t.shape) for t in made] == [[4, 3, 1, 4, 4], [4, 3], [4, 15, 1, 4, 4], [4, 15]]
    assert made.y_spt.dtype == torch.int64
    assert [id(t) for t in made] == [id(t) for key in keys for t in batch[key]]


def test_regression_keeps_its_targets() -> None:
    x = torch.rand(2, 7, 1)
    made = MetaBatch.from_torchmeta({"train": (x[:, :3], x[:, :3].sin()), "test": (x[:, 3:], x[:, 3:].sin())})
    assert torch.equal(made.y_qry, x[:, 3:].sin())


X, Y = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([(X, Y), (X, Y)], TypeError, "batch must be a dict of train and test, got list"),
        ({"train": (X, Y)}, ValueError, "batch must have the entries train and test, or support and query, got train"),
        ({}, ValueError, "or support and query, got none"),
        ({"train": (X, Y), "test": X}, TypeError, "test must be two tensors, inputs and targets, got Tensor"),
        ({"train": (X, ["a"]), "test": (X, Y)}, TypeError, r"train must be two tensors, .* got \['Tensor', 'list'\]"),
        ({"train": (X, Y), "test": (X, Y[:, :2])}, ValueError, r"test must be .*, got \[2, 3, 4\] and \[2, 2\]"),
        ({"train": (X[0], Y[0]), "test": (X, Y)}, ValueError, r"train must be inputs \[tasks, n, \.\.\.\]"),
        ({"train": (X, Y), "test": (X[:1], Y[:1])}, ValueError, "train and test must have as many tasks, got 2 and 1"),
    ],
)
def test_refused_batches(batch, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MetaBatch.from_torchmeta(batch)
