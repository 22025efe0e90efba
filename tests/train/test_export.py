"""``maml-cuda export``: programs of an adapted net, compared with the net."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import maml_cuda
from maml_cuda.cli import main
from maml_cuda.train import exported
from tests.data import published
from tests.train.runs import small, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of MAML++ on glyphs, and a support set of three characters."""
    folder = tmp_path_factory.mktemp("export")
    trained(folder / "run", small("glyphs", "maml++"))
    published.birds(folder / "support", classes=3, size=(28, 28), images=2)
    published.birds(folder / "query", classes=3, size=(28, 28), images=3)
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["export", str(folder / "run"), "--support", str(folder / "support"), "--out", str(out), *more]


@pytest.mark.parametrize("statistics", ["support", "running"])
def test_programs_classify_as_predict_does(folder: Path, tmp_path, capsys, statistics: str) -> None:
    out, table = tmp_path / "out", tmp_path / "table"
    assert main(command(folder, out, "--format", "pt2", "--batch-norm", statistics)) == 0
    assert (
        f"maml-cuda evaluate {folder / 'run'} --batch-norm {statistics} prints the accuracy" in capsys.readouterr().out
    )
    predict = ["predict", str(folder / "run"), "--support", str(folder / "support"), "--query", str(folder / "query")]
    assert main([*predict, "--batch-norm", statistics, "--out", str(table)]) == 0
    facts = json.loads((out / "net.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["net.json", "net.pt2"]
    assert facts["classes"] == ["bird 00", "bird 01", "bird 02"]
    assert facts["batch_norm"] == statistics
    assert facts["preprocessing"] == {
        "orientation": "as EXIF says", "transparent_on": "white", "colours": "grey", "height": 28, "width": 28,
        "resampling": "Lanczos", "inverted_if_median_above": 127, "divided_by": 255,
    }  # fmt: skip
    pictures = maml_cuda.load(folder / "run").pictures
    x = pictures.read(sorted((folder / "query").glob("*/*.png")))
    rows = np.loadtxt(table / "predictions.csv", delimiter=",", skiprows=1, usecols=(3, 4, 5))
    program = torch.export.load(out / "net.pt2").module()
    torch.testing.assert_close(program(x), torch.tensor(rows, dtype=torch.float32), rtol=1e-3, atol=1e-5)
    assert torch.allclose(program(x[4:5]), program(x)[4:5], atol=1e-6)


def test_onnx_is_the_same_program(folder: Path, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(command(folder, tmp_path / "out")) == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "net.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(5, 1, 28, 28)
    (got,) = session.run(["probabilities"], {"pictures": x.numpy()})
    expected = torch.export.load(tmp_path / "out" / "net.pt2").module()(x)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-5)


def test_a_program_that_differs_is_not_kept(folder: Path, tmp_path, capsys, monkeypatch) -> None:
    right = exported._pt2

    def wrong(program, path):
        run = right(program, path)
        return lambda x: run(x) + 1e-4 * (len(x) == 1)

    monkeypatch.setattr(exported, "_pt2", wrong)
    assert main(command(folder, tmp_path / "out", "--format", "pt2")) == 2
    assert "net.pt2 must give the probabilities of the net, got a difference of 0.0001" in capsys.readouterr().err
    monkeypatch.setattr(exported, "_pt2", lambda program, path: lambda x: right(program, path)(x) * torch.nan)
    assert main(command(folder, tmp_path / "out", "--format", "pt2")) == 2
    assert "net.pt2 must give finite probabilities [6, 3], got [6, 3]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(folder: Path, tmp_path, capsys, monkeypatch) -> None:
    trained(tmp_path / "matching", small("glyphs", "matching", iterations=1))
    words = ["export", str(tmp_path / "matching"), "--support", str(folder / "support"), "--format", "pt2"]
    assert main([*words, "--checkpoint", "last", "--out", str(tmp_path / "out")]) == 2
    assert "run must be of an algorithm with an inner loop to be exported, got matching" in capsys.readouterr().err
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    monkeypatch.setattr("maml_cuda.commands.export.require", maml_cuda.extras.require)
    assert main(command(folder, tmp_path / "out")) == 2
    assert "onnx" in (words := capsys.readouterr().err)
    assert 'must be installed: pip install "maml-cuda[export]"' in words
    assert not (tmp_path / "out").exists()
