"""Damaged runs and failing disks: damage is detected and reported with a way to continue; no file is written partly."""

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from maml_cuda.cli import COMMANDS, main
from maml_cuda.train import checkpoint
from maml_cuda.train.loop import Training
from maml_cuda.train.metrics import Metrics
from maml_cuda.train.report import load_ensemble
from maml_cuda.train.run_info import resumed_settings, with_checksum
from tests.train.runs import files, rows, small, tiny, trained

SHORT = (
    "sinusoid --hidden 3 --meta-batch 2 --iterations 12 --validation-interval 4 --validation-tasks 2 --log-interval 2"
)
TINY = ["train", *SHORT.split(), "--test-tasks", "3", "--test-queries", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*TINY, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(whole: Path, tmp_path) -> Path:
    """A copy of a finished run, for a test to damage."""
    return shutil.copytree(whole, tmp_path / "run")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    """Flips one bit of the last number."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def put_nan(path: Path) -> None:
    """Puts NaN into a tensor, with a valid checksum."""
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith(("model", "optimizer")))
    tensors[name].view(-1)[0] = torch.nan
    path.write_bytes(save(tensors))
    note = path.with_name("checkpoint.json")
    info = json.loads(note.read_bytes())
    info["sha256"][path.name] = sha256(path.read_bytes()).hexdigest()
    note.write_text(json.dumps(info))


def set_unknown(path: Path) -> None:
    info = json.loads(path.read_bytes())
    info["settings"]["annealing"] = 0.5
    path.write_text(json.dumps(info))


def set_nothing(path: Path) -> None:
    info = json.loads(path.read_bytes())
    del info["settings"]["ways"]
    path.write_text(json.dumps(info))


def set_rate(path: Path) -> None:
    path.write_text(path.read_text().replace('"inner_lr": 0.01', '"inner_lr": 0.03'))


def set_iteration(path: Path) -> None:
    path.write_text(path.read_text().replace('"iteration": 12', '"iteration": 52'))


def set_width(path: Path) -> None:
    """Changes the width, with a valid checksum."""
    info = json.loads(path.read_bytes())
    info["settings"]["width"] = 7
    path.write_text(json.dumps(with_checksum(info)))


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("model.safetensors", truncate, "model.safetensors must have sha256 "),
    ("model.safetensors", flip, "its bytes have changed"),
    ("model.safetensors", put_nan, "model.safetensors must hold finite numbers, got NaN or infinity in model.0"),
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("checkpoint.json", truncate, "checkpoint.json must be JSON, got "),
    ("checkpoint.json", set_rate, "/last must match its checksum, got changed values"),
    ("checkpoint.json", set_iteration, "/last must match its checksum, got changed values"),
    ("checkpoint.json", set_width, "model.safetensors must fit the settings in checkpoint.json beside it: "),
    ("checkpoint.json", set_unknown, "must be ones that this version of maml_cuda knows, got annealing=0.5: "),
    ("checkpoint.json", set_nothing, "must have ways, got none: it was written by another version"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_named_with_what_to_do(run: Path, capsys, name: str, damage, words: str) -> None:
    damage(run / "last" / name)
    kept = files_of(run)
    capsys.readouterr()
    for command in (["train", "--resume", str(run)], ["evaluate", str(run), "--checkpoint", "last"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("maml-cuda: error: ")
        assert words in error
        assert f"{run}/last" in error
        if "settings" not in words and "version" not in words:
            assert f"maml-cuda train --resume {run} --from best continues from the best checkpoint" in error
    assert files_of(run) == kept
    assert main(["train", "--resume", str(run), "--from", "best"]) == 0
    assert main(["evaluate", str(run), "--checkpoint", "last"]) == 0


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_evaluate_does_not_read_the_training_tensors(run: Path, capsys) -> None:
    for damage in (flip, put_nan):
        damage(run / "last" / "training.safetensors")
        assert main(["evaluate", str(run), "--checkpoint", "last"]) == 0
        assert main(["train", "--resume", str(run)]) == 2
        assert "training.safetensors must " in capsys.readouterr().err


def truncate_info(last: Path) -> None:
    truncate(last / "checkpoint.json")


def set_rate_of(last: Path) -> None:
    set_rate(last / "checkpoint.json")


@pytest.mark.parametrize("damage", [shutil.rmtree, truncate_info, set_rate_of])
def test_the_best_checkpoint_is_tested_without_the_last(run: Path, capsys, damage) -> None:
    damage(run / "last")
    assert main(["evaluate", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mean"] == json.loads((run / "summary.json").read_bytes())["mean"]
    assert f"the settings are those of {run / 'best'}" in captured.err


def test_a_damaged_best_checkpoint_leaves_the_last(run: Path, capsys) -> None:
    flip(run / "best" / "model.safetensors")
    assert main(["evaluate", str(run)]) == 2
    assert f"; maml-cuda evaluate {run} --checkpoint last tests the last checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_before_the_checksums_is_used_with_a_warning(run: Path) -> None:
    note = run / "best" / "checkpoint.json"
    info = json.loads(note.read_bytes())
    del info["sha256"], info["info_sha256"]
    note.write_text(json.dumps(info))
    with pytest.warns(
        UserWarning, match="best has no checksums, because an older version wrote it: its tensors are not "
    ):
        assert main(["evaluate", str(run)]) == 0


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch) -> None:
    folder, read, calls = tmp_path / "last", Path.read_bytes, []

    def save_number(number: int) -> None:
        tensor = torch.full((3,), float(number))
        checkpoint.save_checkpoint(folder, {"w": tensor}, {"running": tensor}, {"iteration": number})

    def replaced(path: Path) -> bytes:
        calls.append(path)
        if len(calls) in (2, 5):  # after the JSON was read
            save_number(len(calls))
        return read(path)

    save_number(1)
    monkeypatch.setattr(Path, "read_bytes", replaced)
    model, training, info = checkpoint.load_checkpoint(folder)
    assert model["w"].tolist() == training["running"].tolist() == [float(info["iteration"])] * 3
    assert info["iteration"] == 5


@pytest.mark.parametrize("kept", [1, 2])
def test_a_run_resumed_from_its_best_checkpoint_has_the_same_bits(tmp_path, kept: int) -> None:
    settings = tiny(
        "sinusoid", meta_lr=0.3, best_checkpoints=kept
    )  # a large rate, so that the last checkpoint is not the best
    training = trained(tmp_path / "whole", settings)
    best = training.bests[0]["iteration"]
    assert best < 40
    again = shutil.copytree(tmp_path / "whole", tmp_path / "again")
    truncate(again / "last" / "model.safetensors")
    resumed = Training.resume(again, resumed_settings(again, {}, checkpoint="best"), "best")
    assert resumed.iteration == best
    assert Training.resume(again, settings).iteration == best  # the best checkpoint is now the last one
    assert int(rows(again)[-1]["iteration"]) == best
    resumed.loop()
    assert files(again) == files(tmp_path / "whole")


def test_a_best_checkpoint_that_a_later_one_replaced_is_dropped(tmp_path) -> None:
    settings = small("glyphs", "maml", iterations=8, validation_interval=1, best_checkpoints=3)
    run = tmp_path / "run"
    training = trained(run, settings)
    first = training.bests[0]
    listed = checkpoint.load_info(run / "best")["bests"]
    resumed = Training.resume(run, settings, "best")
    assert resumed.iteration == first["iteration"]
    for best in resumed.bests:
        assert best in listed
        assert checkpoint.load_info(run / best["checkpoint"])["iteration"] == best["iteration"]
    assert {path.name for path in run.glob("best-*")} == {best["checkpoint"] for best in resumed.bests}
    assert load_ensemble(run)[1] == [best["iteration"] for best in resumed.bests]
    shutil.rmtree(run / "last")
    assert load_ensemble(run)[1] == [best["iteration"] for best in resumed.bests]


def test_numbers_that_diverged_are_not_saved(tmp_path, monkeypatch) -> None:
    training = Training.start(tmp_path, tiny("sinusoid"))
    step = training.algorithm.step

    def broken(batch, iteration: int):
        result = step(batch, iteration)  # its loss is still finite
        if iteration == 10:
            next(training.module.parameters()).data[0] = torch.inf
        return result

    monkeypatch.setattr(training.algorithm, "step", broken)
    with pytest.raises(ValueError, match=r"model\.0\.weight must be finite, got NaN .* before iteration 10"):
        training.loop()
    assert checkpoint.load_info(tmp_path / "last")["iteration"] == 0


# -- a disk that is full -------------------------------------------------------------------------------------------


@pytest.fixture
def largest():
    """Limits the size of files, as a disk that is nearly full does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_row_that_does_not_fit_is_not_half_written(tmp_path, largest) -> None:
    path = tmp_path / "metrics.csv"
    with Metrics(path, ("iteration", "loss")) as metrics:
        pass
    metrics.start()
    with metrics:
        metrics.add(1, {"loss": 0.5})
        largest(path.stat().st_size + 3)
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            metrics.add(2, {"loss": 0.25})
        assert path.read_text() == "iteration,loss\n1,0.5\n"
        largest(1000)
        metrics.add(3, {})
    assert path.read_text() == "iteration,loss\n1,0.5\n3,\n"


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, largest) -> None:
    folder = tmp_path / "last"
    checkpoint.save_checkpoint(folder, {"w": torch.zeros(3)}, {}, {"iteration": 1})
    largest(600)
    with pytest.raises(OSError, match=f"File too large: '{folder}'"):
        checkpoint.save_checkpoint(folder, {"w": torch.zeros(1000)}, {}, {"iteration": 2})
    with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'summary.json'}'"):
        checkpoint.write_file(tmp_path / "summary.json", bytes(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert checkpoint.load_info(folder)["iteration"] == 1


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_disk_that_is_full_at_any_moment_leaves_one_whole_checkpoint(tmp_path, monkeypatch, moment: int) -> None:
    folder, calls = tmp_path / "last", []

    def save_number(number: int) -> None:
        tensor = torch.full((3,), float(number))
        checkpoint.save_checkpoint(folder, {"w": tensor}, {"running": tensor}, {"iteration": number})

    def fills(module, name: str) -> None:
        original = getattr(module, name)

        def full(*arguments):
            calls.append(name)
            if len(calls) == moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments)

        monkeypatch.setattr(module, name, full)

    save_number(1)
    fills(os, "fsync")
    fills(os, "replace")
    if moment < 8:
        with pytest.raises(OSError, match=f"No space left on device: '{folder}'"):
            save_number(2)
    else:
        save_number(2)
        assert len(calls) == 7
    model, training, info = checkpoint.load_checkpoint(folder)
    assert model["w"].tolist() == training["running"].tolist() == [float(info["iteration"])] * 3
    assert not (tmp_path / "last.new").exists()


def test_a_run_stopped_by_a_full_disk_resumes_with_the_same_bits(whole: Path, tmp_path, capsys, monkeypatch) -> None:
    run, write = tmp_path / "run", checkpoint._write_to_disk

    def full(path: Path, content: bytes) -> None:
        if path.parent.name == "last.new" and len(rows(run)) == 4:
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(checkpoint, "_write_to_disk", full)
    assert main([*TINY, "--out", str(run)]) == 2
    words = capsys.readouterr().err
    assert f"Continue with: maml-cuda train --resume {run}" in words
    assert f"error: [Errno 28] No space left on device: '{run}/last'" in words
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["best", "last"]
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    for name in ("metrics.csv", "last/model.safetensors", "last/training.safetensors", "best/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


# -- an output that nobody reads, or that lacks a letter -----------------------------------------------------------


class Closed(io.StringIO):
    """A pipe whose reader closes it after some lines."""

    def __init__(self, lines: int, number: int = errno.EPIPE) -> None:
        super().__init__()
        self.left, self.number = lines, number

    def write(self, text: str) -> int:
        self.left -= text.count("\n")
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize(("number", "status"), [(errno.EPIPE, 141), (errno.ENOSPC, 2)])
def test_a_run_whose_output_breaks_is_saved_first(whole: Path, tmp_path, monkeypatch, number: int, status: int) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed(2, number))  # closed when the second validation is printed
        assert main([*TINY, "--out", str(run)]) == status
    assert checkpoint.load_info(run / "last")["iteration"] == 8
    assert [row["iteration"] for row in rows(run)] == ["2", "4", "6", "8"]
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.parametrize("command", [["train", "--help"], ["--version"], ["info"]], ids=" ".join)
def test_a_closed_pipe_prints_no_error(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "maml_cuda", *command]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in ((141,) if command == ["info"] else (0, 141))  # argparse may ignore the error


def test_a_full_device_is_named(capsys, monkeypatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 2
    assert capsys.readouterr().err == "maml-cuda: error: [Errno 28] No space left on device: standard output\n"


def test_an_error_of_a_file_does_not_name_standard_output(capsys, monkeypatch) -> None:
    def broken(options: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(COMMANDS["info"], "run", broken)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "maml-cuda: error: [Errno 5] Input/output error\n"


def test_characters_that_ascii_lacks_are_replaced(run: Path, monkeypatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main(["evaluate", str(run)]) == 0
    assert b"+/-" in terminal.buffer.getvalue()
    assert (terminal.errors, terminal.line_buffering) == ("strict", False)
