"""--device: what it names, what is refused, and that nets, tasks and checkpoints move between devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maml_cuda.cli import main
from maml_cuda.data import GlyphTasks, SinusoidTasks
from maml_cuda.rl import report as rl_report
from maml_cuda.rl.settings import new_rl_settings
from maml_cuda.rl.training import RLTraining
from maml_cuda.train import report
from maml_cuda.train.algorithms import make_algorithm
from maml_cuda.train.checkpoint import load_checkpoint
from maml_cuda.train.devices import CPU, device_of
from maml_cuda.train.loop import Training
from maml_cuda.train.report import collect_statistics, finish, load_run
from maml_cuda.train.run_info import resumed_settings
from tests.conftest import _no_gpu
from tests.train.runs import small

META = torch.device("meta")  # tensors without values: whatever is elsewhere is an error or seen


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A torch that finds two GPUs. The list holds those that were made the current one."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("words", ["cpu", "cpu:0"])
def test_the_cpu(words: str) -> None:
    assert device_of(words) == CPU


@pytest.mark.parametrize(
    ("words", "rank", "index"), [("cuda", None, 0), ("cuda:1", None, 1), ("cuda", "0", 0), ("cuda", "1", 1)]
)
def test_a_gpu_for_each_process(words: str, rank: str | None, index: int, two_gpus, monkeypatch) -> None:
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_of(words) == torch.device("cuda", index)
    assert two_gpus == [index]


@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        ("tpu", "1", "device must be cpu, cuda or cuda:N, got tpu"),
        ("cuda:x", "1", "device must be cpu, cuda or cuda:N, got cuda:x"),
        ("mps", "1", "device must be cpu, cuda or cuda:N, got mps"),
        ("cuda:7", "1", "device must be cuda:0 to cuda:1, the GPUs of this machine, got cuda:7"),
        ("cuda:1", "2", "device must be cuda for 2 processes, each of which takes its own GPU, got cuda:1"),
        ("cuda", "3", "processes must be at most 2 on this machine, one for each GPU, got 3"),
    ],
)
def test_a_device_that_is_not_there(words: str, processes: str, message: str, two_gpus, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=message):
        device_of(words)


@pytest.mark.parametrize("command", [["train", "glyphs", "--out", "run"], ["evaluate", "run"]])
def test_a_command_without_a_gpu_says_so_and_leaves_nothing(command, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*command, "--device", "cuda"]) == 2
    words = "maml-cuda: error: device must be cpu, since torch finds no GPU here, got cuda\n"
    assert capsys.readouterr().err == words
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert main([*command, "--device", "cuda:0"]) == 2
    words = f"maml-cuda: error: device must be cpu, since this torch ({torch.__version__}) has no CUDA, got cuda:0\n"
    assert capsys.readouterr().err == words
    assert not list(tmp_path.iterdir())


def test_policies_run_on_the_cpu(tmp_path) -> None:
    message = "device must be cpu for navigation, whose episodes run there, got meta"
    settings = new_rl_settings("navigation", iterations=1)
    with pytest.raises(ValueError, match=message):
        RLTraining.start(tmp_path / "run", settings, META)
    RLTraining.start(tmp_path / "run", settings)
    with pytest.raises(ValueError, match=message):
        rl_report.load_run(tmp_path / "run", "last", META)


@pytest.mark.parametrize("tasks", [GlyphTasks("test", 3, 1, 2), SinusoidTasks(2, 3, oracle=True)])
def test_tasks_are_drawn_on_their_device(tasks) -> None:
    here, there = (torch.Generator().manual_seed(0) for _ in range(2))
    moved = tasks.to(META)
    for t, m in zip(tasks.sample(2, here), moved.sample(2, there), strict=True):
        assert (t.shape, t.dtype, t.device, m.device) == (m.shape, m.dtype, CPU, META)
    assert torch.equal(here.get_state(), there.get_state())


@pytest.mark.parametrize("preset", ["maml", "maml++", "reptile", "protonet", "pretrained"])
def test_an_algorithm_is_wholly_on_its_device(preset: str) -> None:
    algorithm = make_algorithm(small("glyphs", preset), META)
    assert algorithm.optimizer is not None
    for p in [*algorithm.module.parameters(), *algorithm.optimizer.param_groups[0]["params"]]:
        assert p.device == META


def test_the_summary_says_where_the_test_ran(tmp_path) -> None:
    settings = small("sinusoid", "maml")
    training = Training.start(tmp_path / "run", settings)
    training.loop()
    finish(tmp_path / "run", settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["device"], summary["processes"]) == ("cpu", 1)


@pytest.mark.skipif(bool(_no_gpu()), reason=_no_gpu() or "there is one")
@pytest.mark.parametrize(
    ("job", "preset"),
    [
        *(("glyphs", name) for name in ("maml", "maml++", "reptile", "protonet", "pretrained", "nearest-pixel")),
        ("sinusoid", "maml"),
    ],
)
def test_a_run_moves_between_a_gpu_and_the_cpu(job: str, preset: str, tmp_path: Path) -> None:
    gpu = torch.device("cuda", 0)
    settings = small(job, preset)
    for device in (gpu, CPU):
        training = Training.start(tmp_path / device.type, settings, device)
        assert {t.device for t in training.module.state_dict().values()} <= {device}
        training.loop()
        finish(tmp_path / device.type, settings, device)
    on_gpu, on_cpu = (load_checkpoint(tmp_path / name / "last") for name in ("cuda", "cpu"))
    assert torch.equal(on_gpu[1]["generator"], on_cpu[1]["generator"])
    for name, there in (("cuda", CPU), ("cpu", gpu)):
        again = Training.resume(tmp_path / name, resumed_settings(tmp_path / name, {}), device=there)
        model, tensors, _ = again.state()
        saved = load_checkpoint(tmp_path / name / "last")
        assert all(torch.equal(model[key], saved[0][key]) for key in model)
        assert all(torch.equal(tensors[key], saved[1][key]) for key in tensors)
    results = []
    for device in (gpu, CPU):
        algorithm, _ = load_run(tmp_path / "cpu", device=device)
        if preset == "maml" and job == "glyphs":
            collect_statistics(algorithm, settings, 2, device)
        results.append(torch.tensor(report.test_run([algorithm], settings, device=device)["mean"]))
    torch.testing.assert_close(*results, rtol=1e-2, atol=0.12)  # one of nine answers may differ by rounding
