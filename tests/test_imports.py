"""`import maml_cuda`: it does not import torch, has all public names, and says what to do if the core is not built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import maml_cuda
from maml_cuda.data import images
from maml_cuda.train.settings import JOBS, SHIPPED

ROOT = Path(__file__).parent.parent


def python(program: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["evaluate", "--help"], ["--version"], ["train", "--no-such-option"]],
    ids=" ".join,
)
def test_help_and_errors_of_typing_do_not_wait_for_torch(arguments: list[str]) -> None:
    program = f"""
import sys
from maml_cuda.cli import main
try:
    main({arguments!r})
except SystemExit:
    sys.exit("torch was imported" if "torch" in sys.modules else 0)
sys.exit("went on")
"""
    done = python(program)
    assert done.returncode == 0, done.stderr


def test_every_name_stands_where_it_is_promised() -> None:
    program = """
import sys
import maml_cuda
assert "torch" not in sys.modules
assert set(maml_cuda.__all__) < set(dir(maml_cuda))
import maml_cuda.gradient_check
from maml_cuda import *
assert all(globals()[name] is getattr(maml_cuda, name) for name in maml_cuda.__all__)
import torch
assert callable(torch.ops.maml_cuda.meta_gradient)
assert maml_cuda.data.GlyphTasks and maml_cuda.rl.make_environment and maml_cuda._core.version
assert not hasattr(maml_cuda, "no_such_name")
"""
    done = python(program)
    assert done.returncode == 0, done.stderr


def test_no_name_is_that_of_a_submodule_that_holds_it() -> None:
    for name in maml_cuda.__all__:
        found = getattr(maml_cuda, name)
        assert (ROOT / "maml_cuda" / f"{name}.py").exists() == (type(found) is type(sys)), name


def test_a_job_needs_data_where_it_does_not_ship() -> None:
    assert [job for job in JOBS if job not in SHIPPED] == list(images.OPEN)


@pytest.mark.parametrize("command", [["-c", "import maml_cuda"], ["-m", "benchmarks"]], ids=" ".join)
def test_a_checkout_whose_core_is_not_built_says_what_to_type(tmp_path, command: list[str]) -> None:
    for package in ("maml_cuda", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.npz", "results")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    assert (tmp_path / "maml_cuda" / "_core.pyi").exists()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    words = done.stderr.strip().splitlines()[-1]
    assert words.startswith(f"ImportError: maml_cuda was imported from {tmp_path / 'maml_cuda'}, where its compiled")
    assert "build it in place: pip install -c constraints.txt -e ." in words
