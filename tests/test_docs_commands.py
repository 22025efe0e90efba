"""README.md and docs/: the commands that take seconds run, with as little training as they can have.

The commands of a page run one after the other, in an empty folder that is also `~`. A command that an earlier page has
runs there only. Those that are not run are in NOT_RUN, each with the reason; test_docs.py parses them.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maml_cuda import cli
from maml_cuda.rl.settings import RL_JOBS
from tests.data import published
from tests.test_docs import PAGES, WRITTEN_BY_HAND, Command, commands

# How a command begins: why it is not run.
NOT_RUN = {
    "pip install": "CI installs the package by the command of the README, in a fresh environment",
    "pytest": "this is a test",
    "python setup.py build_ext": "tests/test_adding_a_layer.py builds a copy of the sources",
    "python -m benchmarks": "minutes to hours; tests/benchmarks runs small versions",
    "maml-cuda benchmark": "a minute; the tests/benchmarks/test_own_model.py runs it on small nets",
    "maml-cuda predict": "tests/train/test_trained_nets.py",
    "maml-cuda export": "needs onnx: tests/train/test_export.py",
    "maml-cuda train sinusoid --tensorboard": "needs tensorboard: tests/train/test_tensorboard.py",
    "maml-cuda train pendulum.py": "tests/rl trains in an environment of a user's file",
    "maml-cuda evaluate runs/pendulum": "likewise",
    "maml-cuda train --resume runs/pendulum": "likewise",
    "torchrun": "several processes: tests/train/test_ranks.py",
    "maml-cuda train omniglot": "published data; tests/train and tests/data have small files in its layout",
    "maml-cuda train mini-imagenet": "published data, likewise",
    "maml-cuda train cifar-fs": "published data, likewise",
    "maml-cuda train fc100": "published data, likewise",
    "maml-cuda train tiered-imagenet": "published data, likewise",
}
RUN_ALL_THE_SAME = ("python -m benchmarks.paper --list",)
# What pages take for granted: runs by their folder, and folders of pictures.
RUNS = {
    "RUN": "train glyphs --best-checkpoints 2 --validation-interval 1",
    "runs/maml": "train sinusoid",
    "runs/pretrained": "train sinusoid --baseline pretrained",
}
PICTURES = {"birds": 32, "boats": 12, "fish": 10}  # classes of 15 pictures


def reason(text: str) -> str | None:
    """Why a command is not run."""
    text = re.sub(r"^([A-Z_]+=\S* )*", "", text)
    if text.startswith(RUN_ALL_THE_SAME):
        return None
    return next((why for start, why in NOT_RUN.items() if text.startswith(start)), None)


def first_of_each() -> Iterator[tuple[str, Command]]:
    """The commands of ```sh blocks by their page, each on the first page that has it."""
    seen = set()
    for page in WRITTEN_BY_HAND:
        for command in commands(PAGES[page].read_text(encoding="utf-8")):
            if not command.inline and command.text not in seen:
                seen.add(command.text)
                yield page, command


RUN: dict[str, list[Command]] = {}
for _page, _command in first_of_each():
    if reason(_command.text) is None:
        RUN.setdefault(_page, []).append(_command)


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = PAGES[page].read_text(encoding="utf-8")
    for name, classes in PICTURES.items():
        if f"~/{name}" in text:
            published.birds(tmp_path / name, classes, 15, (18, 16, 3), name)
    for folder, made_by in RUNS.items():
        if any(folder in command.words for command in RUN[page]):
            run_maml_cuda([*made_by.split(), "--out", folder], "made before")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, out, **options: out.write(b"PNG"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for command in RUN[page]:
            where = f"{page}, line {command.line}: {command.text}"
            program, *arguments = [str(Path(word).expanduser()) if word[0] == "~" else word for word in command.words]
            if program == "maml-cuda":
                run_maml_cuda(arguments, where)
            else:
                assert [program, arguments[0]] == ["python", "-m"], f"{where}: not run, and not in NOT_RUN"
                run_module(arguments[1:], monkeypatch)
    finally:
        torch.set_num_threads(threads)


def run_maml_cuda(arguments: list[str], where: str) -> None:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli.main([*arguments, *least(arguments)])
    assert status == 0, f"{where}\n{errors.getvalue()[-3000:]}"


def least(arguments: list[str]) -> list[str]:
    """Options behind those of a command, by which it takes no longer than it must. The last one of a name counts."""
    command, *words = arguments
    if command == "evaluate":
        return ["--tasks", "2"]
    if command != "train" or "--resume" in words:
        return []
    if "nearest-pixel" in words:
        return ["--test-tasks", "2"]
    if "random" in words:
        return ["--iterations", "0", "--test-tasks", "2"]
    sizes = ["--iterations", "2", "--meta-batch", "2", "--validation-tasks", "2", "--test-tasks", "2"]
    return [*sizes, "--horizon", "5", "--test-episodes", "2"] if words[0] in RL_JOBS else sizes


def run_module(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m` does with these arguments."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.delitem(sys.modules, f"{arguments[0]}.__main__", raising=False)  # of another test; runpy warns
        with contextlib.suppress(SystemExit):
            runpy.run_module(arguments[0], run_name="__main__")


def test_what_is_not_run_is_on_a_page() -> None:
    texts = [command.text for _, command in first_of_each()]
    for start in [*NOT_RUN, *RUN_ALL_THE_SAME]:
        assert any(re.match(rf"([A-Z_]+=\S* )*{re.escape(start)}", text) for text in texts), f"no page has {start}"
