"""Completion: what the shell is answered, without a wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete", reason="needs the extra [completion]")


def completions(line: str, folder: Path) -> list[str]:
    """What a shell in ``folder`` is offered at the end of a line; a torch that is imported ends the program."""
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "nothing" / "torch.py").write_text("import os; os._exit(3)")
    answer = folder / "nothing" / "answer"
    path = os.pathsep.join([str(folder / "nothing"), *sys.path])
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    variables |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n", "PYTHONPATH": path}
    command = [sys.executable, "-m", "maml_cuda"]
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in answer.read_text().split("\n")]


def test_commands_options_values_jobs_and_folders(tmp_path) -> None:
    (tmp_path / "runs" / "sine").mkdir(parents=True)
    assert completions("maml-cuda ev", tmp_path) == ["evaluate"]
    assert {"--inner-lr", "--inner-steps"} <= {*completions("maml-cuda train --inner", tmp_path)}
    assert completions("maml-cuda train --meta-schedule c", tmp_path) == ["constant", "cosine"]
    assert completions("maml-cuda train --preset fo", tmp_path) == ["fomaml"]
    assert completions("maml-cuda train omni", tmp_path) == ["omniglot"]
    assert completions("maml-cuda evaluate ru", tmp_path) == ["runs/"]
