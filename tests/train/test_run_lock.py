"""The lock of a run folder: one process at a time, released however that process ends."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from maml_cuda import cli
from maml_cuda.commands.train import lock_new_run
from maml_cuda.train.run_lock import LOCK, locked_run

HOLD = (
    "import sys, pathlib; from maml_cuda.train.run_lock import locked_run\nwith locked_run(pathlib.Path(sys.argv[1])): "
)


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path) -> None:
    run = tmp_path / "runs" / "one"
    program = HOLD + "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(
            BlockingIOError, match=f"one must not be in use by another process, got process {first.pid} on "
        ):
            locked_run(run).__enter__()
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (run / LOCK).exists()  # a process that is killed leaves the file
    with locked_run(run):
        assert (run / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (run / LOCK).exists()


def test_folders_that_stay_empty_are_removed(tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with locked_run(mine / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == [mine]
    assert list(mine.iterdir()) == []
    with locked_run(mine / "a" / "b"):
        (mine / "a" / "b" / "file").touch()
    assert [path.name for path in (mine / "a" / "b").iterdir()] == ["file"]


def test_a_lock_file_that_is_removed_meanwhile_is_created_again(tmp_path, monkeypatch) -> None:
    flock, calls = fcntl.flock, []

    def removed_first(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked_run(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(BlockingIOError):
            locked_run(tmp_path).__enter__()


def test_a_file_system_without_locks_causes_a_warning(tmp_path, monkeypatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match=r"cannot be locked \(Operation not supported\): make sure that no other"),
        locked_run(tmp_path),
    ):
        pass


def test_a_file_is_no_run_folder(tmp_path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError, match="run must be a folder, got a file"):
        locked_run(tmp_path / "run").__enter__()


def test_runs_started_in_the_same_second_have_different_folders(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "now"))
    with ExitStack() as stack:
        folders = [lock_new_run(None, "glyphs", stack) for _ in range(3)]
        assert folders == [Path("runs/glyphs-now"), Path("runs/glyphs-now-2"), Path("runs/glyphs-now-3")]
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_a_run_that_is_running(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    short = ["train", "sinusoid", "--iterations", "4", "--hidden", "3", "--test-tasks", "2", "--out", str(run)]
    assert cli.main(short) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with locked_run(run):
        (run / LOCK).write_text("process 17 on elsewhere\n")
        for command in (short, ["train", "--resume", str(run), "--iterations", "9"]):
            assert cli.main(command) == 2
            words = capsys.readouterr().err
            assert f"{run} must not be in use by another process, got process 17 on elsewhere" in words
        assert cli.main(["evaluate", str(run)]) == 0  # reading needs no lock
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
