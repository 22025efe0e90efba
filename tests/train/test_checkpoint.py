"""Checkpoints: complete after a crash at any moment, and loaded with the same bits."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from maml_cuda.train import checkpoint
from maml_cuda.train.checkpoint import load_checkpoint, load_optimizer, locate, optimizer_tensors, save_checkpoint


class Crash(BaseException):
    """Simulates that the process is killed: no code may catch it."""


def save(folder: Path, number: int) -> None:
    tensor = torch.full((3,), float(number))
    save_checkpoint(folder, {"model.w": tensor}, {"running": tensor}, {"iteration": number})


def load(folder: Path) -> int:
    """The number of a checkpoint; asserts that all its parts have the same one."""
    model, training, info = load_checkpoint(folder)
    assert model["model.w"].tolist() == training["running"].tolist() == [float(info["iteration"])] * 3
    return info["iteration"]


def crash_at(monkeypatch: pytest.MonkeyPatch, moment: int, after: bool) -> list[str]:
    """Makes the ``moment``-th call that writes to the disk crash, before or after its work. Returns the list of all
    calls.
    """
    calls: list[str] = []

    def crashing(module, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == moment and not after:
                raise Crash
            original(*arguments, **options)
            if len(calls) == moment:
                raise Crash

        monkeypatch.setattr(module, name, call)

    crashing(checkpoint, "_write_to_disk")
    crashing(checkpoint, "_sync_folder")
    crashing(os, "replace")
    crashing(shutil, "rmtree")
    return calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_moment_leaves_a_complete_checkpoint(tmp_path, after: bool) -> None:
    found = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment) / "last"
        save(folder, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = crash_at(monkeypatch, moment, after)
            try:
                save(folder, 2)
            except Crash:
                pass
            else:
                break
        found.append(load(folder))
        save(folder, 3)  # the next save works, whatever the crash left
        assert load(folder) == 3
        assert os.listdir(folder.parent) == ["last"]
    assert {"_write_to_disk", "_sync_folder", "replace", "rmtree"} == set(calls)
    assert len(found) == len(calls)
    assert found == sorted(found)  # the old checkpoint up to some moment, then the new one
    assert set(found) == {1, 2}


def test_a_crash_in_the_very_first_save_leaves_none(tmp_path, monkeypatch) -> None:
    crash_at(monkeypatch, 3, after=False)
    with pytest.raises(Crash):
        save(tmp_path / "last", 1)
    assert locate(tmp_path / "last") is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*last"):
        load_checkpoint(tmp_path / "last")


def test_a_half_written_file_never_replaces_a_whole_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / "summary.json"
    checkpoint.write_file(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_checkpoint_holds_tensors_of_every_kind_and_no_pickle(tmp_path) -> None:
    tied = torch.randn(3, 5)
    model = {
        "model.a": tied,
        "model.b": tied,
        "model.t": tied.t(),
        "inner_lr": torch.tensor(0.4, dtype=torch.float64),
    }
    save_checkpoint(tmp_path / "best", model, {"generator": torch.Generator().get_state()}, {"iteration": 5})
    loaded, training, info = load_checkpoint(tmp_path / "best")
    assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
        name: (t.dtype, t.tolist()) for name, t in model.items()
    }
    assert torch.equal(training["generator"], torch.Generator().get_state())
    assert info == {"format": 1, "iteration": 5}
    assert sorted(os.listdir(tmp_path / "best")) == [
        "checkpoint.json",
        "model.safetensors",
        "training.safetensors",
    ]


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path / "last", 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="last must be a checkpoint of format 1, got 2"):
        load_checkpoint(tmp_path / "last")


def test_a_loaded_optimizer_continues_with_the_same_bits() -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    resumed, resumed_optimizer = make()
    load_optimizer(resumed_optimizer, optimizer_tensors(optimizer))
    resumed.load_state_dict(model.state_dict())
    assert optimizer_tensors(optimizer).keys() == {
        f"optimizer.{index}.{name}" for index in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")
    }
    step(model, optimizer)
    step(resumed, resumed_optimizer)
    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(model.bias, resumed.bias)
