"""Readers of published image data sets: every supported layout, compared with an independent reader."""

import io
import pickle
import random
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_cuda.data import ImageTasks, images
from tests.data import published
from tests.data.opened import SPLITS, assert_same, by_class, check_mini_imagenet, official


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory) -> tuple[Path, dict[str, list[bytes]]]:
    folder = tmp_path_factory.mktemp("omniglot")
    return folder, published.omniglot(folder)


def test_omniglot(omniglot, monkeypatch) -> None:
    folder, characters = omniglot
    official(monkeypatch, "OMNIGLOT_MD5", *folder.glob("*.zip"))
    opened = images.omniglot(folder)
    assert opened.shape == (1, 28, 28)
    shuffled = sorted(characters)
    random.Random(1).shuffle(shuffled)
    cut = {"train": shuffled[:1100], "validation": shuffled[1100:1200], "test": shuffled[1200:]}
    assert {split: len(names) for split, names in cut.items()} == {"train": 1100, "validation": 100, "test": 423}
    for split, names in cut.items():
        expected = {}
        for name in names:
            drawings = [Image.open(io.BytesIO(content)) for content in characters[name]]
            assert {(drawing.mode, drawing.size) for drawing in drawings} == {("1", (105, 105))}
            resized = [drawing.convert("L").resize((28, 28), Image.Resampling.LANCZOS) for drawing in drawings]
            expected[name] = np.stack([255 - np.asarray(image)[..., None] for image in resized])
        assert_same(opened, split, expected)


def test_omniglot_unpacked_is_the_same(omniglot, tmp_path, monkeypatch) -> None:
    folder, _ = omniglot
    official(monkeypatch, "OMNIGLOT_MD5", *folder.glob("*.zip"))
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "omniglot-py")
    published.write(tmp_path / "omniglot-py" / "images_background" / ".DS_Store", b"")
    for split in SPLITS:
        zipped, unpacked = (images.omniglot(path).split(split) for path in (folder, tmp_path))
        assert zipped.names == unpacked.names
        assert torch.equal(zipped.images, unpacked.images)


def test_omniglot_split_by_alphabets(omniglot, monkeypatch) -> None:
    folder, _ = omniglot
    official(monkeypatch, "OMNIGLOT_MD5", *folder.glob("*.zip"))
    authors, opened = images.omniglot(folder), images.omniglot(folder, split="alphabets")
    halves = {half: zipfile.ZipFile(folder / f"images_{half}.zip").namelist() for half in ("background", "evaluation")}
    of_half = {half: sorted({"/".join(name.split("/")[1:3]) for name in names}) for half, names in halves.items()}
    alphabets = sorted({name.split("/")[0] for name in of_half["background"]})
    random.Random(1).shuffle(alphabets)
    assert len(alphabets) == 30
    validation = [name for name in of_half["background"] if name.split("/")[0] in alphabets[25:]]
    assert opened.split("test").names == of_half["evaluation"]
    assert opened.split("validation").names == validation
    assert opened.split("train").names == [name for name in of_half["background"] if name not in validation]
    everywhere = {name: image for split in SPLITS for name, image in by_class(authors, split).items()}
    for name, image in by_class(opened, "validation").items():
        np.testing.assert_array_equal(image, everywhere[name])
    assert opened.sha256 != authors.sha256  # a run of one split is not resumed with the other
    assert images.omniglot(folder).split("test").names == authors.split("test").names  # both stay converted
    with pytest.raises(ValueError, match="split must be one of authors, alphabets for omniglot, got 'vinyals'"):
        images.omniglot(folder, split="vinyals")


def test_turned_characters_are_classes_of_their_own(omniglot, monkeypatch) -> None:
    folder, _ = omniglot
    official(monkeypatch, "OMNIGLOT_MD5", *folder.glob("*.zip"))
    characters = images.omniglot(folder).split("validation")
    turned = {image.rot90(turn, (1, 2)).numpy().tobytes() for image in characters.images for turn in range(4)}
    tasks = ImageTasks(characters, n_way=400, k_shot=1, n_query=1, rotations=4)
    drawn = (tasks.sample(1, torch.Generator()).x_spt * 255).to(torch.uint8)
    shown = {image.numpy().tobytes() for image in drawn[0]}
    assert len(shown) == 400  # every class at every rotation, each with one of two drawings
    assert shown <= turned


@pytest.mark.parametrize(
    ("validation", "dump"), [("val", published.python2), ("validation", partial(pickle.dumps, protocol=4))]
)
def test_mini_imagenet_pickles(tmp_path, validation: str, dump) -> None:
    data = published.mini_imagenet_pickles(tmp_path, validation, dump)
    check_mini_imagenet(images.mini_imagenet(tmp_path), data)


def test_mini_imagenet_archive(tmp_path, monkeypatch) -> None:
    data = published.mini_imagenet_archive(tmp_path)
    official(monkeypatch, "MINI_IMAGENET_MD5", tmp_path / "mini-imagenet.tar.gz")
    check_mini_imagenet(images.mini_imagenet(tmp_path), data)


def test_mini_imagenet_files(tmp_path) -> None:
    listed = published.mini_imagenet_files(tmp_path)
    sorted_by_hand = tmp_path / "processed"  # as the authors' script leaves them
    for split, classes in listed.items():
        for name, paths in classes.items():
            for path in paths:
                published.write(sorted_by_hand / split / name / path.name, path.read_bytes())
    for opened in (images.mini_imagenet(tmp_path), images.mini_imagenet(sorted_by_hand)):
        for split, published_as in SPLITS.items():
            expected = {}
            for name, paths in listed[published_as].items():
                resized = [Image.open(path).resize((84, 84), Image.Resampling.LANCZOS) for path in paths]
                expected[name] = np.stack([np.asarray(image) for image in resized])
            assert_same(opened, split, expected)


@pytest.mark.parametrize("name", ["cifar_fs", "fc100"])
def test_cifar(tmp_path, name: str) -> None:
    data = getattr(published, name)(tmp_path)
    opened = getattr(images, name)(tmp_path)
    assert opened.shape == (3, 32, 32)
    for split, published_as in SPLITS.items():
        array, labels = data[published_as]["data"], np.array(data[published_as]["labels"])
        got = by_class(opened, split)
        assert list(got) == [str(label) for label in sorted(set(labels))]
        for name, image in got.items():
            np.testing.assert_array_equal(image, array[labels == int(name)])


def test_cifar_in_zip_archives(tmp_path) -> None:
    """MetaOptNet's CIFAR_FS.zip and FC100.zip, and fc100.zip as learn2learn names it."""
    for name, prefix in (("cifar_fs", "CIFAR_FS"), ("fc100", "FC100"), ("fc100", "fc100")):
        folder = tmp_path / prefix
        data = published.zipped(folder, f"{prefix}.zip", getattr(published, name))
        opened = getattr(images, name)(folder)
        for split, published_as in SPLITS.items():
            array, labels = data[published_as]["data"], np.array(data[published_as]["labels"])
            assert_same_labels(opened, split, array, labels)


def assert_same_labels(opened: images.Images, split: str, array: np.ndarray, labels: np.ndarray) -> None:
    got = by_class(opened, split)
    assert list(got) == [str(label) for label in sorted(set(labels.tolist()))]
    for name, image in got.items():
        np.testing.assert_array_equal(image, array[labels == int(name)])


@pytest.mark.parametrize("where", ["cifar100.zip", "cifarfs.zip", "cifar100", "cifarfs/cifar100", "processed"])
def test_cifar_fs_of_its_authors(tmp_path, where: str) -> None:
    """One folder per class and the split of Bertinetto et al.: zipped, unpacked, in learn2learn's folder, sorted."""
    drawn = published.cifar100(tmp_path, where)
    opened = images.cifar_fs(tmp_path)
    assert opened.shape == (3, 32, 32)
    for split, published_as in SPLITS.items():
        assert_same(opened, split, drawn[published_as])


def test_mini_imagenet_of_metaoptnet(tmp_path) -> None:
    data = published.mini_imagenet_metaoptnet(tmp_path)
    opened = images.mini_imagenet(tmp_path)
    assert opened.shape == (3, 84, 84)
    for split, published_as in SPLITS.items():
        assert_same_labels(opened, split, data[published_as]["data"], np.array(data[published_as]["labels"]))


@pytest.mark.parametrize("folder", ["", "tiered-imagenet"])
def test_tiered_imagenet_of_metaoptnet(tmp_path, folder: str) -> None:
    data = published.tiered_imagenet_metaoptnet(tmp_path / folder)
    opened = images.tiered_imagenet(tmp_path)
    for split, published_as in SPLITS.items():
        assert_same_labels(opened, split, *data[published_as])


@pytest.mark.parametrize("archived", [False, True])
def test_tiered_imagenet(tmp_path, monkeypatch, archived: bool) -> None:
    folder = tmp_path / "tiered-imagenet"
    data = published.tiered_imagenet(folder)
    if archived:
        with tarfile.open(tmp_path / "tiered-imagenet.tar", "w") as archive:
            archive.add(folder, "tiered-imagenet")
        folder.rename(tmp_path / "elsewhere")
        official(monkeypatch, "TIERED_IMAGENET_MD5", tmp_path / "tiered-imagenet.tar")
    opened = images.tiered_imagenet(tmp_path)
    for split, published_as in SPLITS.items():
        array, labels = data[published_as]
        got = by_class(opened, split)
        assert list(got) == [f"class {label} of {published_as}" for label in range(labels.max() + 1)]
        for label, image in enumerate(got.values()):
            np.testing.assert_array_equal(image, np.stack(array)[labels == label])
