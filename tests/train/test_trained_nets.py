"""A trained net for use: maml_cuda.load, ``maml-cuda predict`` and the statistics by which a picture is classified."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import maml_cuda
from maml_cuda.cli import main
from maml_cuda.train.algorithms import Maml
from maml_cuda.train.report import load_run
from tests.data import published
from tests.train.runs import small, trained

SIZES = ["--meta-batch", "1", "--filters", "2", "--queries", "1", "--validation-interval", "2", "--log-interval", "2"]
SIZES += [
    "--validation-tasks",
    "2",
    "--test-tasks",
    "3",
    "--iterations",
    "2",
    "--inner-steps",
    "1",
    "--inner-lr",
    "1.0",
]
SIZES += ["--ways", "3", "--split", "6/3/3", "--test-queries", "2", "--image-size", "17", "--test-steps", "2"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    """A run on 12 birds of 4 images, for 3-way tasks."""
    folder = tmp_path_factory.mktemp("trained")
    published.birds(folder / "birds", classes=12)
    assert main(["train", str(folder / "birds"), *SIZES, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def fish(tmp_path) -> Path:
    """Support and query pictures of three classes, of other sizes, grey and transparent ones among them."""
    names = ["a, b", "$x$ fish", "zander"]
    for number, name in enumerate(names):
        shape = [(31, 40), (20, 20, 4), (5, 90, 3)][number]
        for i in range(2):
            published.write(tmp_path / "support" / name / f"{i}.png", published.encoded(published.pixels(i, *shape)))
        for i in range(2, 4):
            published.write(tmp_path / "query" / name / f"{i}.png", published.encoded(published.pixels(i, *shape)))
    return tmp_path


def pixels(path: Path) -> torch.Tensor:
    """A picture as the run on birds takes it, by Pillow alone."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    shown = Image.alpha_composite(white, image).convert("RGB").resize((17, 17), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1).float() / 255


def predicted(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    return capsys.readouterr().err


def adapted(run: Path, x: torch.Tensor, y: torch.Tensor, steps: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The net of a run after plain gradient steps, by autograd."""
    model = maml_cuda.load(run).model
    parameters = dict(model.named_parameters())
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(model, parameters, x), y)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        parameters = {name: p - g for (name, p), g in zip(parameters.items(), gradients, strict=True)}  # rate 1.0
    return model, {name: p.detach() for name, p in parameters.items()}


# -- maml_cuda.load ------------------------------------------------------------------------------------------


def test_load_and_its_pictures_give_the_numbers_of_evaluate(birds, fish, tmp_path, monkeypatch) -> None:
    tasks = []

    def predictions(algorithm, batch, steps, before=Maml.predictions):
        found = list(before(algorithm, batch, steps))
        tasks.append((batch, found))
        return found

    monkeypatch.setattr(Maml, "predictions", predictions)
    support = fish / "support"
    options = ["--shots", "1", "--test-queries", "1", "--cache", str(tmp_path / "cache")]
    assert main(["evaluate", str(birds), "--data", str(support), *options]) == 0
    maml = maml_cuda.load(birds)
    assert (type(maml), maml.steps, maml.iteration) == (maml_cuda.TrainedMAML, 2, maml.iteration)
    x, _, classes, _ = maml.pictures.read_classes(support)
    assert classes == sorted(["a, b", "$x$ fish", "zander"])
    ((batch, found),) = tasks
    ours = [torch.stack([next(p for p in x if torch.equal(p, seen)) for seen in part.flatten(0, 1)]).view_as(part)
            for part in (batch.x_spt, batch.x_qry)]  # fmt: skip
    fast = maml.adapt(ours[0], batch.y_spt, maml.steps)
    assert torch.equal(maml.predict(fast, ours[1], slot=maml.steps - 1), found[maml.steps])


@pytest.mark.parametrize("preset", ["maml++", "meta-sgd", "reptile", "pretrained"])
def test_every_algorithm_with_an_inner_loop_is_loaded(tmp_path, preset: str) -> None:
    run = tmp_path / "run"
    settings = small("glyphs", preset)
    trained(run, settings)
    algorithm, info = load_run(run, "last")
    maml = maml_cuda.load(str(run), checkpoint="last", device=torch.device("cpu"))
    assert (maml.iteration, maml.settings) == (info["iteration"], settings)
    x, y = torch.rand(1, 6, 1, 28, 28), torch.arange(6).view(1, 6) % 3
    for name, p in algorithm.maml.adapt(x, y, maml.steps).items():
        assert torch.equal(maml.adapt(x, y, maml.steps)[name], p)


def test_what_has_no_inner_loop_or_no_pictures_is_answered(tmp_path) -> None:
    trained(tmp_path / "protonet", small("glyphs", "protonet", iterations=1))
    with pytest.raises(
        ValueError, match=r"must be of an algorithm with an inner loop, got protonet \(.*maml-cuda predict"
    ):
        maml_cuda.load(tmp_path / "protonet", "last")
    trained(tmp_path / "curves", small("sinusoid", "oracle", iterations=1))
    curves = maml_cuda.load(tmp_path / "curves", "last")
    assert curves.steps == 0
    with pytest.raises(ValueError, match="run must be one on pictures, got one of sinusoid"):
        _ = curves.pictures
    options = ["--iterations", "1", "--meta-batch", "1", "--episodes", "2", "--horizon", "3", "--validation-tasks", "2"]
    options += ["--test-tasks", "2", "--test-steps", "1", "--test-episodes", "2", "--out", str(tmp_path / "policy")]
    assert main(["train", "navigation", *options]) == 0
    policy = maml_cuda.load(tmp_path / "policy")
    mean, log_std = policy.model(torch.zeros(4, 2))
    assert (policy.steps, mean.shape, log_std.shape[-1]) == (1, (4, 2), 2)
    with pytest.raises(ValueError, match="run must be one on pictures, got one of navigation"):
        _ = policy.pictures
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        maml_cuda.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device must be cpu"):
        maml_cuda.load(tmp_path / "curves", "last", device="tpu")


# -- maml-cuda predict ---------------------------------------------------------------------------------------


def test_predict_gives_the_probabilities_of_plain_autograd(birds, fish, tmp_path, capsys) -> None:
    for path in (fish / "query").glob("zander/*"):
        shutil.move(path, fish / "query" / f"unknown {path.name}")
    out = tmp_path / "out"
    command = ["predict", str(birds), "--support", str(fish / "support"), "--query", str(fish / "query")]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    classes = ["$x$ fish", "a, b", "zander"]
    x = torch.stack([pixels(fish / "support" / name / f"{i}.png") for name in classes for i in range(2)])
    files = [f"unknown {i}.png" for i in (2, 3)] + [f"{name}/{i}.png" for name in classes[:2] for i in (2, 3)]
    queries = torch.stack([pixels(fish / "query" / file) for file in files])
    model, fast = adapted(birds, x, torch.arange(3).repeat_interleave(2), 2)
    expected = functional_call(model, fast, queries).softmax(-1)
    rows = predicted(out)
    assert [row["file"] for row in rows] == files
    assert [row["class"] for row in rows] == ["", "", *(name for name in classes[:2] for _ in range(2))]
    got = torch.tensor([[float(row[f"P({name})"]) for name in classes] for row in rows])
    torch.testing.assert_close(got, expected.detach(), rtol=1e-3, atol=1e-5)
    assert [row["predicted"] for row in rows] == [classes[i] for i in expected.argmax(-1)]
    right = sum(row["predicted"] == row["class"] for row in rows)
    assert f": {right} of 4 pictures of known class (95 % interval" in printed
    assert "adapted by 2 steps to 6 pictures of 3 classes\nThe 6 pictures are classified together: BatchNorm" in printed
    assert (out / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["predictions.csv", "predictions.png"]

    assert "out must be a folder without predictions.csv, got" in refused(capsys, *command, "--out", out)
    assert main([*command, "--out", str(out), "--overwrite", "--steps", "0", "--batch-norm", "running"]) == 0
    assert "adapted" not in capsys.readouterr().out
    assert predicted(out) != rows


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if not list(m.children())]


def test_statistics_of_the_support_set_classify_each_picture_by_itself(birds, fish, tmp_path, capsys) -> None:
    shutil.rmtree(fish / "support" / "zander")  # two classes, of a net for three
    classes = ["$x$ fish", "a, b"]
    x = torch.stack([pixels(fish / "support" / name / f"{i}.png") for name in classes for i in range(2)])
    one = fish / "query" / "zander" / "2.png"
    model, fast = adapted(birds, x, torch.tensor([0, 0, 1, 1]), 2)
    h, q = x, pixels(one)[None]
    for name, layer in leaves(model):
        of_layer = {key: fast[f"{name}.{key}"] for key, _ in layer.named_parameters()}
        if isinstance(layer, nn.BatchNorm2d):
            mean, variance = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
            h, q = (
                F.batch_norm(z, mean, variance, of_layer["weight"], of_layer["bias"], eps=layer.eps) for z in (h, q)
            )
        else:
            h, q = (functional_call(layer, of_layer, z) for z in (h, q))
    alone = fish / "alone"
    alone.mkdir()
    shutil.copy(one, alone)
    command = ["predict", str(birds), "--support", str(fish / "support"), "--query", str(alone)]
    assert "query must be at least 2 pictures if BatchNorm normalises them by their own statistics, got 1" in (
        refused(capsys, *command, "--out", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()
    assert main([*command, "--batch-norm", "support", "--out", str(tmp_path / "out")]) == 0
    (row,) = predicted(tmp_path / "out")
    got = torch.tensor([float(row[f"P({name})"]) for name in classes])
    torch.testing.assert_close(got, q[0, :2].softmax(-1).detach(), rtol=1e-3, atol=1e-5)
    printed = capsys.readouterr().out
    assert "The net was trained on 3-way tasks; the first 2 of its outputs count." in printed
    assert f"1 picture: 1 of {row['predicted']}" in printed
    assert "together" not in printed


def test_evaluate_has_the_statistics_of_the_support_set(birds, tmp_path, capsys) -> None:
    assert main(["evaluate", str(birds), "--batch-norm", "support", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["batch_norm"] == "support"
    trained(tmp_path / "curves", small("sinusoid", "maml", iterations=2))
    message = "statistics of the support set need a net with BatchNorm layers, got none"
    assert message in refused(capsys, "evaluate", tmp_path / "curves", "--batch-norm", "support")


def test_nets_that_compare_take_any_number_of_classes(fish, tmp_path, capsys) -> None:
    trained(tmp_path / "run", small("glyphs", "protonet", ways=2))
    command = ["predict", tmp_path / "run", "--support", fish / "support", "--query", fish / "support"]
    assert main([*map(str, command), "--checkpoint", "last", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "given 6 pictures of 3 classes" in printed
    assert "6 of the 6 pictures are in the support set too" in printed
    assert "are classified together" in printed
    message = "statistics of the support set need an inner loop, got protonet"
    assert message in refused(capsys, *command, "--batch-norm", "support", "--out", tmp_path / "other")
    message = "steps must be left out for protonet, which has no inner loop, got 1"
    assert message in refused(capsys, *command, "--steps", "1", "--out", tmp_path / "other")


def test_impossible_pictures_and_options_are_refused(birds, fish, tmp_path, capsys) -> None:
    support, query, out = fish / "support", fish / "query", tmp_path / "out"
    before = sorted(fish.rglob("*"))

    def error(*more: object, support: Path = support, query: Path = query) -> str:
        return refused(capsys, "predict", birds, "--support", support, "--query", query, "--out", out, *more)

    assert "query/a must be a folder of pictures, got no folder" in error(query=query / "a")
    assert "steps must be at least 0, got -1" in error("--steps", "-1")
    assert "data must be left out, since only --batch-norm running reads them" in error("--data", "/nowhere")
    assert "nowhere must be a folder of images (folder), got no folder" in (
        error("--data", "/nowhere", "--batch-norm", "running")
    )
    assert f"out must be a folder, got the file {birds / 'summary.json'}" in error("--out", birds / "summary.json")
    assert sorted(fish.rglob("*")) == before
    for name in ("one", "two"):
        shutil.copytree(support / "zander", support / name)
    message = (
        "support must hold at most 3 classes for this net of 3-way tasks, whose last layer has as many outputs, got 5"
    )
    assert message in error()
    single = tmp_path / "single"
    shutil.copytree(support / "one", single / "one")
    assert "support must hold at least 2 classes, a folder each, got 1: one" in error(support=single)
    for name in ("one", "two"):
        shutil.rmtree(support / name)
    (query / "zander" / "2.png").write_bytes((query / "zander" / "2.png").read_bytes()[:60])
    assert "zander/2.png must be a complete image with 8 bits per channel, got: " in error()
    trained(tmp_path / "curves", small("sinusoid", "maml", iterations=1))
    words = refused(
        capsys, "predict", tmp_path / "curves", "--support", support, "--query", query, "--checkpoint", "last"
    )
    assert "run must be one on pictures for maml-cuda predict, got one of sinusoid; maml_cuda.load(" in words
    assert not out.exists()
