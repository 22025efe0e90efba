"""Runs on the user's own images: the options, and tests of a trained network on other classes."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maml_cuda.cli import main
from maml_cuda.data import conversion, images
from maml_cuda.train.algorithms import Maml
from maml_cuda.train.other_images import other_images
from maml_cuda.train.settings import JOBS
from tests.data import published

SIZES = ["--meta-batch", "1", "--filters", "2", "--queries", "1", "--validation-interval", "2", "--log-interval", "2"]
SIZES += ["--validation-tasks", "2", "--test-tasks", "4", "--iterations", "2", "--inner-steps", "1"]
BIRDS = ["--ways", "3", "--split", "6/3/3", "--test-queries", "2", "--image-size", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run, and the birds that it was trained on: 12 classes of 4 images."""
    folder = tmp_path_factory.mktemp("trained")
    published.birds(folder / "birds", classes=12)
    assert main(["train", str(folder / "birds"), *SIZES, *BIRDS, "--out", str(folder / "run")]) == 0
    return folder / "run", folder / "birds"


def settings_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["settings"]


def evaluated(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


# -- the options ---------------------------------------------------------------------------------------------


def test_options_for_images_are_part_of_the_run(trained) -> None:
    run, birds = trained
    settings = settings_of(run)
    assert (settings["image_size"], settings["split"], settings["background"]) == (16, "6/3/3", "white")
    assert settings["image_shape"] == "3 x 16 x 16"
    assert settings["data_sha256"] == images.folder(birds, size=16, split=(6, 3, 3)).sha256
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["data"], summary["classes"], summary["ways"]) == (str(birds), 3, 3)
    assert summary["data_sha256"] == settings["data_sha256"]
    checkpoint = json.loads((run / "last" / "checkpoint.json").read_text())
    assert checkpoint["classes"] == images.folder(birds, size=16, split=(6, 3, 3)).split("train").names


def test_read_only_data_are_trained_on_by_a_cache(tmp_path, capsys) -> None:
    birds = tmp_path / "birds"
    published.birds(birds, classes=12, size=(16, 16))
    before = sorted(birds.rglob("*"))
    options = [*SIZES, "--ways", "2", "--test-queries", "2", "--background", "black"]
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert main(["train", str(birds), *options, "--cache", str(cache), "--out", str(run)]) == 0
    assert settings_of(run)["cache"] == str(cache)
    assert settings_of(run)["background"] == "black"
    first = evaluated(capsys, run)
    shutil.rmtree(cache)
    other = tmp_path / "other"
    assert main(["train", "--resume", str(run), "--iterations", "3", "--cache", str(other)]) == 0
    assert evaluated(capsys, run, "--checkpoint", "best")["mean"] == first["mean"]
    assert not cache.exists()
    assert sorted(birds.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["glyphs", "--image-size", "20"], "image_size must be left out for glyphs, which is not a folder of"),
        (["omniglot", "--data", ".", "--split", "6/3/3"], "split must be one of authors, alphabets for omniglot, got"),
        (["glyphs", "--split", "authors"], "split must be left out for glyphs, which is not a folder of"),
        (["glyphs", "--net", "mlp", "--filters", "8"], "width (--filters) must be left out for the net mlp"),
        (["sinusoid", "--net", "mlp"], "net must be left out for maml, which ignores it, got mlp"),
        (["sinusoid", "--background", "black"], "background must be left out for sinusoid, which is not a folder of"),
        (["glyphs", "--cache", "/nowhere"], "cache must be left out for glyphs, which needs no data, got /nowhere"),
        (["BIRDS", "--split", "6-3"], "split must be TRAIN/VALIDATION/TEST, numbers of classes such as 6/3/3, got"),
        (["BIRDS", "--split", "6/3/4"], "split must be three numbers that add up to the 12 classes of"),
        (["BIRDS", "--background", "grey"], "background must be white, black or #rrggbb, got 'grey'"),
        (["BIRDS", "--ways", "5", "--queries", "1"], "5-way tasks need at least 5 classes in each split, 15 for all "
         "three, and there are 12: set --split TRAIN/VALIDATION/TEST (split= in Python), such as 4/4/4 for 4 ways, or "
         "make folders train, val and test; n_way is --ways"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(trained, tmp_path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(trained[1]) if word == "BIRDS" else word for word in arguments]
    assert message in refused(capsys, "train", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_one_line_of_the_command(tmp_path, capsys, monkeypatch) -> None:
    published.birds(tmp_path / "birds", classes=3)
    published.write(tmp_path / "birds" / "bird 00" / "Thumbs.db", b"")
    shown = []

    def warn(text: str) -> None:
        shown.append(warnings.formatwarning(text, UserWarning, "images.py", 1))  # as it will be printed

    monkeypatch.setattr(conversion, "warn", warn)
    assert main(["train", str(tmp_path / "birds"), "--out", str(tmp_path / "run")]) == 2
    line = f"skipped in {tmp_path / 'birds'}, not images of a class: bird 00/Thumbs.db"
    assert shown == [f"maml-cuda: {line}\n"]


# -- other classes -------------------------------------------------------------------------------------------


@pytest.fixture
def fish(tmp_path) -> Path:
    """Five other classes of grey images of another size."""
    published.birds(tmp_path / "fish", classes=5, size=(31, 40), name="fish")
    return tmp_path / "fish"


def test_a_trained_net_is_tested_on_other_classes(trained, fish, tmp_path, capsys, monkeypatch) -> None:
    run, birds = trained
    known = set()  # images as the network takes them: colour, 16 x 16
    for path in fish.rglob("*.png"):
        known.add(np.asarray(Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)).tobytes())
    assert len(known) == 20
    shown = []

    def predictions(algorithm, batch, steps, before=Maml.predictions):
        shown.extend([batch.x_spt, batch.x_qry])
        return before(algorithm, batch, steps)

    monkeypatch.setattr(Maml, "predictions", predictions)
    birds.rename(birds.with_name("away"))  # the training data are not needed
    try:
        result = evaluated(capsys, run, "--data", fish, "--ways", "3", "--shots", "2", "--cache", tmp_path / "cache")
    finally:
        birds.with_name("away").rename(birds)
    assert (result["data"], result["classes"], result["ways"], result["test_shots"]) == (str(fish), 5, 3, 2)
    assert len(result["data_sha256"]) == 64
    seen = [(image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() for x in shown for image in x.flatten(0, 1)]
    assert len(seen) == 4 * 3 * (2 + 2)
    assert set(seen) <= known
    assert not list(fish.glob("maml_cuda.*"))
    assert main(["evaluate", str(run), "--data", str(fish), "--shots", "2"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy on 4 test tasks, 2-shot, 3-way" in printed
    assert f"5 test classes of {fish}" in printed


def test_other_classes_may_have_folders_for_splits(trained, tmp_path, capsys) -> None:
    names = {"Train": 2, "Val": 2, "Test": 4}
    for split, classes in names.items():
        published.birds(tmp_path / "fish" / split, classes, name=f"{split} fish")
    assert evaluated(capsys, trained[0], "--data", tmp_path / "fish")["classes"] == 4


def test_the_number_of_ways_is_that_of_the_last_layer(trained, fish, tmp_path, capsys) -> None:
    run, birds = trained
    message = "ways must be 3 for this net of maml, whose last layer has 3 outputs, got 2; protonet"
    assert message in refused(capsys, "evaluate", run, "--data", fish, "--ways", "2")
    without = tmp_path / "protonet"
    options = [*SIZES[:-2], *BIRDS, "--preset", "protonet", "--train-ways", "4", "--out", str(without)]
    assert main(["train", str(birds), *options]) == 0
    result = evaluated(capsys, without, "--data", fish, "--ways", "5")
    assert (result["ways"], result["classes"]) == (5, 5)
    assert evaluated(capsys, without, "--ways", "2")["ways"] == 2  # and on its own test classes
    message = "n_way must be 2 to 5 (test classes of folder), got 6; n_way is --ways, k_shot --test-shots"  # or --shots
    assert message in refused(capsys, "evaluate", without, "--data", fish, "--ways", "6")


def test_classes_that_were_trained_on_are_refused(trained, fish, capsys) -> None:
    run, birds = trained
    name = json.loads((run / "last" / "checkpoint.json").read_text())["classes"][0]
    shutil.copytree(birds / name, fish / name)
    message = (
        f"{fish} must hold the images of this run, or classes that it was not trained on, got the trained class {name}"
        ": split must be three numbers that add up to the 6 classes of"
    )
    assert message in refused(capsys, "evaluate", run, "--data", fish)


def test_moved_data_are_the_run_s_own(trained, tmp_path, capsys) -> None:
    run, birds = trained
    shutil.copytree(birds, tmp_path / "moved")
    expected = json.loads((run / "summary.json").read_text())
    result = evaluated(capsys, run, "--data", tmp_path / "moved")
    assert (result["mean"], result["data_sha256"]) == (expected["mean"], expected["data_sha256"])
    assert (result["data"], result["classes"]) == (str(tmp_path / "moved"), 3)


def test_a_run_of_an_earlier_version_knows_no_other_classes(trained, fish, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    for path in run.glob("*/checkpoint.json"):
        info = json.loads(path.read_text())
        del info["classes"]
        path.write_text(json.dumps(info))
    message = "split must be three numbers that add up to the 5 classes of"  # as for the run's own data
    assert message in refused(capsys, "evaluate", run, "--data", fish)


def test_a_net_of_glyphs_is_tested_on_other_characters(fish, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    options = ["--ways", "2", "--test-queries", "2", "--meta-batch", "1", "--iterations", "1", "--filters", "2"]
    assert main(["train", "glyphs", *options, "--test-tasks", "2", "--out", str(run)]) == 0
    assert evaluated(capsys, run, "--data", fish)["data"] == str(fish)
    assert images.folder(fish, size=28, channels=1, split=(0, 0, 5)).shape == (1, 28, 28)
    assert "nowhere must be a folder of images (folder), got no folder" in refused(
        capsys, "evaluate", run, "--data", tmp_path / "nowhere"
    )


def test_the_layout_of_a_published_data_set_is_not_taken_for_classes(tmp_path) -> None:
    """The layouts are the image files of mini-ImageNet, and Omniglot unpacked."""
    published.mini_imagenet_files(tmp_path / "mini")
    drawing = published.encoded(published.pixels(0, 105, 105) < 20)
    published.write(tmp_path / "omniglot" / "images_background" / "Greek" / "character01" / "0001_01.png", drawing)
    for job, folder in (("mini-imagenet", "mini"), ("omniglot", "omniglot")):
        assert other_images(JOBS[job], str(tmp_path / folder), ["n01532829"]) is None


def test_curves_have_no_other_data(tmp_path, fish, capsys) -> None:
    run = tmp_path / "run"
    options = ["--meta-batch", "1", "--iterations", "1", "--filters", "2", "--test-tasks", "2", "--out", str(run)]
    assert main(["train", "sinusoid", *options]) == 0
    error = refused(capsys, "evaluate", run, "--data", fish)
    assert "data must be left out for sinusoid, which needs none" in error
    assert "ways must be 1 for the sinusoid" in refused(capsys, "evaluate", run, "--ways", "2")
