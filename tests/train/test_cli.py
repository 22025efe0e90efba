"""The command line: what each command prints, writes and returns."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maml_cuda.cli import main
from maml_cuda.data import SinusoidTasks, images
from tests.data import published

SIZES = {"iterations": 20, "meta-batch": 2, "hidden": 5, "validation-interval": 10, "validation-tasks": 3}
SIZES |= {"test-tasks": 6, "test-queries": 4, "log-interval": 5}
TINY = ["train", "sinusoid", *(text for name, size in SIZES.items() for text in (f"--{name}", str(size)))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path) -> str:
    """The folder of a trained run, which the test may change."""
    return str(shutil.copytree(trained, tmp_path / "run"))


def test_train_writes_a_complete_run_and_prints_where(tmp_path, capsys) -> None:
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert f"sinusoid in {tmp_path / 'run'}: iteration 0 of 20" in captured.out
    assert "iteration 10: validation MSE" in captured.out
    assert "sinusoid: MSE on 6 test tasks, 5-shot" in captured.out
    assert f"summary.json are in {tmp_path / 'run'}" in captured.out
    assert "iteration 20 of 20, 00:0" in captured.err
    assert "MSE" in captured.err
    assert "tasks/s" in captured.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "adaptation.png", "best", "config.yaml", "fits.png", "last", "learning_curves.png", "metrics.csv",
        "summary.json",
    ]  # fmt: skip


def test_train_without_an_out_makes_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--ways", "2", "--queries", "1", "--test-queries", "1", "--filters", "2", "--test-tasks", "2"]
    assert main(["train", "--iterations", "1", "--meta-batch", "1", *options]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("glyphs-")
    assert json.loads((folder / "summary.json").read_text())["settings"]["ways"] == 2


def test_every_option_reaches_the_settings(tmp_path) -> None:
    given = {"ways": 2, "shots": 2, "queries": 3, "inner_lr": 0.25, "inner_steps": 2, "iterations": 2}
    given |= {"meta_batch": 2, "meta_lr": 0.002, "seed": 9, "validation_interval": 2, "validation_tasks": 2}
    given |= {"log_interval": 1, "test_tasks": 3, "test_shots": 1, "test_queries": 2, "test_steps": 1}
    given |= {"backend": "reference", "rotations": 2, "adapted": "no-norm", "meta_schedule": "cosine"}
    given |= {"best_checkpoints": 2, "first_order_iterations": 1, "preset": "maml", "train_ways": 2, "inner_batch": 0}
    given |= {"multi_step_iterations": 0, "batch_norm": "transductive"}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    out = ["--out", str(tmp_path / "run"), "--filters", "3", "--learn-inner-lr", "--first-order"]
    assert main(["train", "glyphs", *options, *out]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    expected = given | {"job": "glyphs", "width": 3, "learn_inner_lr": "step", "first_order": True}
    expected |= {"algorithm": "maml", "told": False, "net": "conv4"}
    expected |= {"data": "", "data_sha256": "", "cache": "", "image_shape": ""}
    expected |= {"image_size": 0, "background": "white", "split": ""}  # of a folder: tests/train/test_other_images.py
    assert summary["settings"] == expected
    assert summary["backend"] == "reference"


def test_evaluate_repeats_the_test_of_the_run(run: str, capsys) -> None:
    with open(f"{run}/summary.json") as file:
        summary = json.load(file)
    assert main(["evaluate", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mean"] == summary["mean"]
    assert result["ci95"] == summary["ci95"]
    assert result["checkpoint"] == "best"
    assert main(["evaluate", run, "--tasks", "4", "--shots", "3", "--seed", "5", "--checkpoint", "last"]) == 0
    assert "MSE on 4 test tasks, 3-shot" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["--resume RUN", "--resume --out RUN", "--resume RUN --out RUN"])
def test_resume_continues_the_run(run: str, capsys, spelling: str) -> None:
    assert main(["train", "--iterations", "30", *spelling.replace("RUN", run).split()]) == 0
    assert f"sinusoid in {run}: iteration 20 of 30" in capsys.readouterr().out
    with open(f"{run}/summary.json") as file:
        assert json.load(file)["meta_iterations"] == 30


BIRDS = [
    "--ways",
    "2",
    "--meta-batch",
    "2",
    "--filters",
    "3",
    "--queries",
    "2",
    "--test-queries",
    "3",
    "--inner-steps",
    "2",
]
BIRDS += ["--validation-interval", "2", "--validation-tasks", "2", "--test-tasks", "3", "--log-interval", "1"]


def test_a_folder_of_images_is_trained_tested_and_resumed(tmp_path, capsys) -> None:
    data, whole, halves = tmp_path / "birds", tmp_path / "whole", tmp_path / "halves"
    published.birds(data)
    assert main(["train", str(data), *BIRDS, "--iterations", "4", "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert f"opening {data}; the first time converts it" in printed
    assert f"folder in {whole}: iteration 0 of 4, cpu backend" in printed
    assert "folder: accuracy on 3 test tasks, 1-shot" in printed
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["settings"]["data"] == str(data)
    assert summary["settings"]["data_sha256"] == images.folder(data).sha256
    assert (whole / "task.png").is_file()

    assert main(["train", str(data), *BIRDS, "--iterations", "2", "--out", str(halves)]) == 0
    moved = data.rename(tmp_path / "moved")
    assert main(["train", "--resume", str(halves), "--iterations", "4"]) == 2
    assert "birds must be a folder of images (folder), got no folder" in capsys.readouterr().err
    assert main(["train", "--resume", str(halves), "--iterations", "4", "--data", str(moved)]) == 0
    for name in ("metrics.csv", "last/model.safetensors", "last/training.safetensors"):
        assert (whole / name).read_bytes() == (halves / name).read_bytes()

    capsys.readouterr()
    assert main(["evaluate", str(halves), "--data", str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] == summary["mean"]
    (moved / "bird 01" / "0.png").write_bytes(published.encoded(published.pixels(99, 20, 18, 3)))
    assert main(["evaluate", str(whole), "--data", str(moved)]) == 2
    assert f"moved must hold the images of this run, of sha256 {summary['settings']['data_sha256']}, got" in (
        capsys.readouterr().err
    )


def test_a_published_data_set_is_trained(tmp_path, capsys) -> None:
    published.cifar_fs(tmp_path)
    options = [*BIRDS, "--queries", "1", "--test-queries", "1", "--iterations", "2", "--out", str(tmp_path / "run")]
    assert main(["train", "cifar-fs", "--data", str(tmp_path), *options]) == 0
    assert "cifar-fs: accuracy on 3 test tasks, 1-shot" in capsys.readouterr().out


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_and_print_how_to_continue(tmp_path, capsys, monkeypatch, signum, status: int) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run = str(tmp_path / "run")
    sample = SinusoidTasks.sample
    draws = []

    def interrupting(tasks, *arguments):
        draws.append(1)
        if len(draws) == 8:
            signal.raise_signal(signum)
        return sample(tasks, *arguments)

    monkeypatch.setattr(SinusoidTasks, "sample", interrupting)
    assert main([*TINY, "--out", run]) == status
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert f"Continue with: maml-cuda train --resume {run}" in capsys.readouterr().err
    assert main(["train", "--resume", run]) == 0
    assert "iteration 8 of 20" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["build", "test"])
def test_sigterm_outside_of_the_loop_prints_what_was_saved(tmp_path, capsys, monkeypatch, moment: str) -> None:
    def terminated(*arguments: object, **named: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    where = {"build": "maml_cuda.train.loop.make_algorithm", "test": "maml_cuda.train.report.test_run"}[moment]
    monkeypatch.setattr(where, terminated)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 143
    words = {"build": "nothing was saved", "test": f"Continue with: maml-cuda train --resume {tmp_path / 'run'}"}
    assert words[moment] in capsys.readouterr().err
    assert (tmp_path / "run").exists() == (moment == "test")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_command_of_a_shell(tmp_path, signum, status: int) -> None:
    program = "import signal, sys; from maml_cuda.cli import main; "
    # A shell's background jobs ignore SIGINT, and the tests may run as one. This sets the handler of the foreground.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    arguments = ["train", "sinusoid", "--iterations", "100000000", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "iteration 0 of 100000000" in process.stdout.readline()
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Continue with: maml-cuda train --resume" in errors
    assert "Traceback" not in errors


def test_info_names_the_build_and_the_versions(capsys) -> None:
    assert main(["info"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"version", "cpu_isa", "python", "torch", "numpy", "threads", "devices"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sinusoid", "--resume"], "--resume must name one run folder"),
        (["train", "--resume", "a", "--out", "b"], "--resume must name one run folder"),
        (["train", "--resume", "nowhere"], "no checkpoint in nowhere"),
        (["train", "sinusoid", "--ways", "3"], "ways must be 1 for the sinusoid"),
        (["train", "glyphs", "--shots", "9", "--queries", "9"], "k_shot + n_query must be at most 17"),
        (["train", "glyphs", "--ways", "60"], "got 60; n_way is --ways, k_shot --test-shots, n_query --test-queries"),
        (
            ["train", "glyphs", "--preset", "protonet", "--train-ways", "4000"],
            "got 4000; n_way is --train-ways, k_shot --shots, n_query --queries",
        ),
        (["train", "omniglot"], "data must name the folder that holds omniglot: --data PATH"),
        (["train", "omniglot", "--data", "/nowhere"], "/nowhere must be a folder of images (omniglot), got no folder"),
        (["train", "glyphs", "--data", "/nowhere"], "data must be left out for glyphs, which needs none, got /nowhere"),
        (
            ["train", ".", "--data", "/nowhere"],
            "data must be left out if the job is the folder of the data, got /nowhere",
        ),
        (["train", "poker"], "or a folder of class folders, got 'poker'"),
        (["train", "--threads", "0"], "threads must be at least 1, got 0"),
        (["train", "--threads", "100000"], f"threads must be at most {os.cpu_count()}, the cores of this machine, got"),
        (["evaluate", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_errors_are_one_line_and_not_a_traceback(tmp_path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("maml-cuda: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_overwritten(run: str, capsys) -> None:
    assert main([*TINY, "--out", run]) == 2
    assert f"continue that run with --resume {run}" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name))
    assert main(["train", "glyphs"]) == 2
    assert 'tqdm must be installed: pip install "maml-cuda[train]"' in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["info"]])
def test_help_is_there_for_every_command(capsys, command: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: maml-cuda" in capsys.readouterr().out


def test_help_shows_the_defaults_of_every_job(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # so that argparse does not wrap names at hyphens
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    shared = "mini-imagenet/cifar-fs/fc100/tiered-imagenet/folder"
    assert f"(default: 0.4 glyphs, 0.01 sinusoid, 2.0 omniglot, 0.05 {shared}, 0.5 navigation" in shown
    assert "70000 sinusoid" in shown
