"""Progress is a bar on a terminal, and lines in a log file."""

import io
import sys

import pytest

from maml_cuda.train import progress
from maml_cuda.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def seconds(monkeypatch) -> list[float]:
    """What the clock shows."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then_and_at_the_end(seconds, capsys) -> None:
    with Progress(200, 20) as shown:
        for done in range(25, 200, 5):
            seconds[0] += 2
            shown.words = f"loss {done}"
            assert shown.rate(done) == pytest.approx(2.5)
            shown.update(done)
        shown.print("validation")
        seconds[0] += 2
        shown.update(200)
        shown.update(200)
    captured = capsys.readouterr()
    assert captured.out == "validation\n"
    assert captured.err.splitlines() == [
        "iteration 95 of 200, 00:30 passed, 00:42 left: loss 95",
        "iteration 170 of 200, 01:00 passed, 00:12 left: loss 170",
        "iteration 200 of 200, 01:12 passed, 00:00 left: loss 195",
    ]


def test_a_run_of_no_iterations_prints_no_line(capsys) -> None:
    with Progress(0, 0) as shown:
        shown.update(0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(20, 10) as shown:
        shown.words = "loss 0.5"
        shown.update(20)
        shown.print("validation")
    assert "\r" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    assert capsys.readouterr().out == "validation\n"


def test_nothing_is_shown_by_other_processes(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(2, 0, shown=False) as shown:
        shown.update(2)
        shown.print("validation")
    assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().out == ""
