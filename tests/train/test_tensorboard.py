"""Curves for TensorBoard: the numbers of metrics.csv, once each, however often a run was stopped and resumed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest

from maml_cuda.cli import main
from maml_cuda.train.loop import Training
from maml_cuda.train.run_info import resumed_settings
from tests.train.runs import rows, tiny

pytest.importorskip("tensorboard", reason="needs the extra [tensorboard]")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SIZES = "sinusoid --iterations 12 --meta-batch 2 --hidden 3 --validation-interval 4 --validation-tasks 2"
SIZES += " --log-interval 3 --test-tasks 2 --test-queries 2"


@pytest.fixture(autouse=True)
def untested(monkeypatch) -> None:
    """Leaves out the test and the pictures at the end of a run, which take most of the time."""
    monkeypatch.setattr("maml_cuda.train.report.finish", lambda *_: {})
    monkeypatch.setattr("maml_cuda.train.report.table", lambda _: "")


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def expected(found: list[Mapping[str, str]]) -> dict[str, list[tuple[int, float]]]:
    """The points of the rows of metrics.csv, to its six digits."""
    columns = [column for column in found[0] if column != "iteration" and any(row[column] for row in found)]
    near = {row["iteration"]: row for row in found}
    return {
        column: [(int(at), pytest.approx(float(row[column]), rel=1e-5)) for at, row in near.items() if row[column]]
        for column in columns
    }


def train(run: Path, checkpoint: str = "last", **given) -> Training:
    training = Training.resume(run, resumed_settings(run, given, checkpoint=checkpoint), checkpoint)
    training.tensorboard = True
    return training


def test_a_resumed_run_has_each_point_once(tmp_path, monkeypatch) -> None:
    settings = tiny("sinusoid", meta_lr=0.3)  # a large rate, so that the last is not the best
    training = Training.start(tmp_path, settings)
    training.tensorboard = True
    save = training.save

    def crash(name: str) -> None:
        if training.iteration == 30:
            raise MemoryError
        save(name)

    monkeypatch.setattr(training, "save", crash)
    with pytest.raises(MemoryError):
        training.loop()
    assert points(tmp_path)["loss"][-1][0] == 28  # after the last checkpoint
    train(tmp_path).loop()
    whole = points(tmp_path)
    assert whole == expected(rows(tmp_path))
    assert [step for step, _ in whole["loss"]] == [7, 14, 21, 28, 35]
    resumed = train(tmp_path, "best")
    assert resumed.iteration < 40
    resumed.loop()
    assert points(tmp_path) == whole


def test_the_command_goes_on_with_the_curves_of_a_run(tmp_path, capsys, monkeypatch) -> None:
    run = tmp_path / "run"
    assert main(["train", *SIZES.split(), "--tensorboard", "--out", str(run)]) == 0
    assert "tensorboard: true" in (run / "config.yaml").read_text()
    assert main(["train", "--resume", str(run), "--iterations", "15"]) == 0
    assert points(run) == expected(rows(run))
    assert points(run)["loss"][-1][0] == 15
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    for words in (["--tensorboard", *SIZES.split()], ["--resume", str(run), "--iterations", "18"]):
        assert main(["train", *words]) == 2
        assert 'tensorboard must be installed: pip install "maml-cuda[tensorboard]"' in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--iterations", "18", "--no-tensorboard"]) == 0
    assert points(run)["loss"][-1][0] == 15
    assert rows(run)[-1]["iteration"] == "18"
