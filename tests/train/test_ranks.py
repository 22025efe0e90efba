"""Several processes train a run: the same episodes to the bit and the same parameters to rounding as one process;
resumed by another number of processes; and after the death of one of them.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maml_cuda.cli import main
from maml_cuda.data import GlyphTasks, SinusoidTasks
from maml_cuda.rl.settings import new_rl_settings
from maml_cuda.rl.training import RLTraining
from maml_cuda.train.algorithms import make_algorithm
from maml_cuda.train.checkpoint import load_checkpoint, locate
from maml_cuda.train.devices import CPU
from maml_cuda.train.evaluate import evaluate
from maml_cuda.train.jobs import make_generator, make_tasks
from maml_cuda.train.loop import Training
from maml_cuda.train.ranks import ALONE, Ranks
from maml_cuda.train.run_info import resumed_settings
from tests.train.processes import ENVIRONMENT, end, in_float64, start
from tests.train.runs import rows, small, tiny, trained

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

# Meta-batches that two processes cannot divide evenly; a last validation chunk of fewer tasks than processes.
RUNS = {
    "maml": tiny("glyphs", iterations=6, meta_batch=3, inner_steps=2, log_interval=2, validation_interval=3,
                 validation_tasks=51),
    "maml++": small("glyphs", "maml++", meta_batch=3, learn_inner_lr="layer", best_checkpoints=2),
    "reptile": small("glyphs", "reptile", meta_batch=3, inner_batch=4, inner_steps=3),
    "protonet": small("glyphs", "protonet", meta_batch=3),
    "sinusoid": tiny("sinusoid", iterations=12, meta_batch=5, log_interval=5, validation_interval=4),
}  # fmt: skip
TOGETHER = """
import pickle, sys
from tests.train.processes import in_float64, trained_together
in_float64(setattr)
with open(sys.argv[1], "rb") as file:
    trained_together(pickle.load(file))
"""
# A command whose process receives a signal at a moment, by its rank and the number of torchrun's restarts.
COMMAND = """
import atexit, os, sys
from tests.train.processes import in_float64, kill_at, say_which_threads_are_left
atexit.register(say_which_threads_are_left)
from maml_cuda.cli import main
in_float64(setattr)
moments = dict(pair.split("=") for pair in os.environ.get("MOMENTS", "").split(",") if pair)
me = os.environ["RANK"] + ":" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
if moments.get(me) == "start":
    os.kill(os.getpid(), 9)
if me in moments:
    kill_at(moments[me])
sys.exit(main(sys.argv[1:]))
"""
SIZES = {"iterations": 40, "meta-batch": 5, "hidden": 7, "validation-interval": 10, "validation-tasks": 3}
SIZES |= {"test-tasks": 5, "test-steps": 2, "test-queries": 5, "log-interval": 7, "shots": 4, "queries": 3}
TRAIN = ["train", "sinusoid", *(text for name, size in SIZES.items() for text in (f"--{name}", str(size)))]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of `TRAIN` by one process, in float64."""
    in_float64(monkeypatch.setattr)
    trained(tmp_path / "whole", tiny("sinusoid", meta_batch=5))
    return tmp_path / "whole"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "command.py"
    path.write_text(COMMAND)
    return path


def same_run(got: Path, expected: Path) -> None:
    """Asserts that the draws of two runs are the same to the bit, and their numbers to rounding in float64."""
    for name in ("last", "best"):
        model, training, info = load_checkpoint(got / name)
        expected_model, expected_training, expected_info = load_checkpoint(expected / name)
        assert torch.equal(training.pop("generator"), expected_training.pop("generator"))
        assert info["iteration"] == expected_info["iteration"]
        found, truth = model | training, expected_model | expected_training
        assert found.keys() == truth.keys()
        for key, value in truth.items():
            tolerance = 1e-9
            if key == "running" or key.endswith("conv.bias"):
                tolerance = 1e-6  # sums in float32; Adam scales up the rounding of a gradient that is 0 (BatchNorm)
            torch.testing.assert_close(
                found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )
        bests = [[best["iteration"] for best in of["bests"]] for of in (info, expected_info)]
        assert bests[0] == bests[1]
    for row, truth_row in zip(rows(got), rows(expected), strict=True):
        assert row.keys() == truth_row.keys()
        for column, cell in truth_row.items():
            assert row[column] == cell or float(row[column]) == pytest.approx(float(cell), rel=2e-5)


def words_of(log: Path, rank: int) -> str:
    return log.with_suffix(f".{rank}").read_text()


@pytest.mark.parametrize("tasks", [GlyphTasks("test", 3, 1, 2, rotations=4), SinusoidTasks(2, 3)])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_parts_of_the_processes_are_the_draw_of_one(tasks, count: int) -> None:
    generators = [torch.Generator().manual_seed(4) for _ in range(count + 1)]
    whole = tasks.sample(5, generators[0])
    parts = [tasks.sample(5, g, Ranks(rank, count).part(5)) for rank, g in enumerate(generators[1:])]
    for tensor, *of_parts in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(of_parts), tensor)
    assert all(torch.equal(g.get_state(), generators[0].get_state()) for g in generators)


def test_two_processes_train_as_one_does_and_go_on_with_its_run(tmp_path: Path, monkeypatch) -> None:
    in_float64(monkeypatch.setattr)
    together = {tmp_path / f"two-{name}": settings for name, settings in RUNS.items()}
    together[tmp_path / "again"] = RUNS["maml"]
    together[tmp_path / "halves"] = RUNS["maml"]
    trained(tmp_path / "halves", replace(RUNS["maml"], iterations=3))
    (tmp_path / "together.py").write_text(TOGETHER)
    (tmp_path / "runs").write_bytes(pickle.dumps(together))
    processes = start(2, tmp_path / "together.py", str(tmp_path / "runs"), log=tmp_path / "log")
    for name, settings in RUNS.items():
        trained(tmp_path / name, settings)
    assert end(processes) == [0, 0], words_of(tmp_path / "log", 0) + words_of(tmp_path / "log", 1)
    for name in RUNS:
        same_run(tmp_path / f"two-{name}", tmp_path / name)
    same_run(tmp_path / "halves", tmp_path / "maml")
    first, again = (load_checkpoint(tmp_path / name / "last")[0] for name in ("two-maml", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)  # the same number of processes, the same bits


def test_torchrun_trains_a_run_and_goes_on_after_each_death(tmp_path: Path, whole: Path, script: Path) -> None:
    moments = {
        "1:0": "start",  # before the processes have met
        "0:1": "KILL replace 10",  # the first process, in the middle of a checkpoint
        "1:2": "KILL step 7",
        "0:3": "KILL validate 20",
    }
    text = ",".join(f"{who}={moment}" for who, moment in moments.items())
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    restarts = ["--max-restarts", "4", "--monitor-interval", "0.1"]
    done = subprocess.run(
        [*torchrun, *restarts, str(script), *TRAIN, "--out", str(run)],
        env=os.environ | ENVIRONMENT | {"MOMENTS": text}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"sinusoid in {run}: iteration 0 of 40, cpu backend, 2 processes of 1 threads" in done.stdout
    assert f"metrics, checkpoints, pictures and summary.json are in {run}" in done.stdout
    same_run(run, whole)


@pytest.mark.parametrize("dies", [0, 1])
def test_the_death_of_a_process_ends_the_job_in_words(
    dies: int, tmp_path: Path, whole: Path, script: Path, monkeypatch
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setenv("MOMENTS", f"{dies}:0=KILL step 13")
    statuses = end(start(2, script, *TRAIN, "--out", str(run), log=log))
    assert statuses[dies] == -signal.SIGKILL
    words = words_of(log, 1 - dies)
    assert statuses[1 - dies] == 2, words
    assert "threads are left" not in words
    who = "" if dies else "process 1: "
    assert f"maml-cuda: {who}error: another process of this run has ended or cannot be reached: " in words
    go_on = f"everything up to the last checkpoint is in {run}. Continue with: maml-cuda train --resume {run}"
    assert (go_on in words) == (dies == 1)  # the first process alone knows
    training = Training.resume(run, resumed_settings(run, {}))
    assert training.iteration == 10
    training.loop()
    same_run(run, whole)


def test_a_signal_to_one_process_saves_the_run_and_stops_all(
    tmp_path: Path, whole: Path, script: Path, monkeypatch
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setenv("MOMENTS", "1:0=TERM step 13")
    assert end(start(2, script, *TRAIN, "--out", str(run), log=log)) == [143, 143]
    assert f"Interrupted; the run is saved in {run}. Continue with: maml-cuda train" in words_of(log, 0)
    assert words_of(log, 1) == ""
    assert load_checkpoint(run / "last")[2]["iteration"] == 13
    Training.resume(run, resumed_settings(run, {})).loop()
    same_run(run, whole)


@pytest.mark.skipif("MAML_CUDA_KILLS" not in os.environ, reason="MAML_CUDA_KILLS is the number of kills")
def test_a_run_survives_kills_at_random_moments(tmp_path: Path, script: Path, monkeypatch) -> None:
    in_float64(monkeypatch.setattr)
    trained(tmp_path / "whole", tiny("sinusoid", meta_batch=5, iterations=200))
    run, chance, killed = tmp_path / "run", random.Random(0), 0
    command = [*TRAIN, "--iterations", "200"]
    for number in range(int(os.environ["MAML_CUDA_KILLS"])):
        done = load_checkpoint(run / "last")[2]["iteration"] if locate(run / "last") else 0
        checkpoint = min(done + 10, 200)
        moments = [f"step {chance.randint(1, 15)}", f"validate {checkpoint}", f"replace {checkpoint}"]
        moment = moments[number % 3]
        dies = 0 if moment.startswith("replace") else chance.randrange(2)
        with monkeypatch.context() as patch:
            patch.setenv("MOMENTS", f"{dies}:0=KILL {moment}")
            statuses = end(start(2, script, *command, "--out", str(run), log=tmp_path / f"log-{number}"))
        killed += statuses[dies] == -signal.SIGKILL
        assert statuses[1 - dies] in (0, 2), words_of(tmp_path / f"log-{number}", 1 - dies)
        command = ["train", "--resume"]
    assert killed == number + 1
    assert end(start(2, script, *command, "--out", str(run), log=tmp_path / "log")) == [0, 0]
    same_run(run, tmp_path / "whole")


def test_an_error_of_the_first_process_is_said_once(tmp_path: Path, script: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    log = tmp_path / "log"
    assert end(start(2, script, *TRAIN, "--out", str(tmp_path / "run"), log=log)) == [2, 2]
    assert f"maml-cuda: error: {tmp_path}/run exists already: choose another --out" in words_of(log, 0)
    assert words_of(log, 1) == ""


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    two = Ranks(0, 2)
    with pytest.raises(ValueError, match="processes must be 1 for pretrained, which has no tasks to divide, got 2"):
        Training.start(tmp_path, small("glyphs", "pretrained"), ranks=two)
    with pytest.raises(ValueError, match="processes must be at most 2, the tasks of a meta-batch, got 3"):
        Training.start(tmp_path, small("glyphs", "maml"), ranks=Ranks(1, 3))
    with pytest.raises(ValueError, match="processes must be 1 for navigation, a policy, got 2"):
        RLTraining.start(tmp_path, new_rl_settings("navigation"), ranks=two)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["evaluate", "run"], {"WORLD_SIZE": "2"}, "processes must be 1 for maml-cuda evaluate, got 2"),
        (["train", "sinusoid"], {"TORCHELASTIC_MAX_RESTARTS": "3"}, "--out must name the run's folder for torchrun"),
        (
            ["train", "--resume", "run", "--from", "best"],
            {"TORCHELASTIC_MAX_RESTARTS": "3"},
            "--from must be left out for torchrun --max-restarts, got best: each restart would go back to it",
        ),
    ],
)
def test_what_torchrun_cannot_do_is_refused(arguments, environment, words, capsys, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 2
    assert f"maml-cuda: error: {words}" in capsys.readouterr().err


def test_what_a_killed_start_leaves_is_no_run(tmp_path: Path) -> None:
    settings = tiny("sinusoid", iterations=2)
    for name in ("metrics.csv.new", "lock"):
        (tmp_path / name).write_text("")
    (tmp_path / "metrics.csv").write_text("iteration,loss,before,after,validation\n")
    (tmp_path / "last.new").mkdir()
    Training.start(tmp_path, settings)
    with pytest.raises(FileExistsError, match="exists already"):
        Training.start(tmp_path, settings)
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.csv").write_text("iteration,loss,before,after,validation\n1,1,,1,\n")
    with pytest.raises(FileExistsError, match="exists already"):
        Training.start(other, settings)


def test_one_process_needs_no_group() -> None:
    x = torch.ones(3)
    ALONE.average([x], 3)
    ALONE.add(x)
    ALONE.leave()
    assert torch.equal(x, torch.ones(3))
    assert ALONE.part(5) == slice(0, 5)
    assert ALONE.any(True)
    assert ALONE.from_first(3) == 3
    assert [Ranks(rank, 4).part(2) for rank in range(4)] == [slice(0, 0), slice(0, 1), slice(1, 1), slice(1, 2)]
    settings = tiny("sinusoid")
    predictions = make_algorithm(settings, CPU).predictions
    arguments = "sinusoid", make_tasks(settings, "test"), make_generator(settings, "test"), 3, (0, 1)
    assert evaluate(predictions, *arguments).shape == (2, 3)
