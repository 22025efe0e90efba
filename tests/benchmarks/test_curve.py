"""Accuracy against time: both sides learn the same, and a side continues to the bit."""

import pytest
import torch

from benchmarks.paper import curve
from maml_cuda.train.settings import Settings
from tests.train.runs import small


def tiny(**given) -> Settings:
    sizes = {"iterations": 4, "shots": 3, "inner_lr": 0.1, "inner_steps": 2, "validation_tasks": 3}
    return small("glyphs", "maml", **(sizes | given))


def test_both_sides_take_the_same_meta_steps(tmp_path) -> None:
    rows = {side: curve.train(side, tiny(), 60, tmp_path) for side in curve.SIDES}
    ours, theirs = (torch.load(tmp_path / f"{side}.pt", weights_only=True) for side in curve.SIDES)
    first = curve.SIDES["maml_cuda"](tiny(), torch.device("cpu")).module.state_dict()
    assert all(not torch.equal(ours["module"][name], first[name]) for name in first if name.endswith("norm.weight"))
    for name, tensor in ours["module"].items():
        if not name.endswith("conv.bias"):  # BatchNorm follows: its gradient is rounding, which Adam makes a step of
            torch.testing.assert_close(theirs["module"][name], tensor, rtol=1e-3, atol=1e-4)
    assert [row["iteration"] for row in rows["maml_cuda"]] == [2, 4]
    for row in rows["learn2learn"]:
        assert 0 <= row["validation"] <= 1
    curve.draw(tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("side", curve.SIDES)
def test_a_side_continues_to_the_bit(tmp_path, side: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    curve.train(side, tiny(), 60, whole)
    curve.train(side, tiny(iterations=2), 60, halves)
    assert curve.train(side, tiny(), 0, halves)[-1]["iteration"] == 2  # no time is left
    curve.train(side, tiny(), 60, halves)
    one, other = (torch.load(folder / f"{side}.pt", weights_only=True) for folder in (whole, halves))
    assert all(torch.equal(tensor, other["module"][name]) for name, tensor in one["module"].items())
    scores = [[row["validation"] for row in curve.read(folder, side)] for folder in (whole, halves)]
    assert scores[0] == scores[1]
    with pytest.raises(ValueError, match=r"out must be a folder without a run of other settings, got .*\.pt"):
        curve.train(side, tiny(inner_lr=0.2), 60, halves)


def test_the_time_to_an_accuracy_is_that_of_its_first_validation() -> None:
    rows = [{"iteration": n, "seconds": 60.0 * n, "validation": v} for n, v in ((1, 0.9), (2, 0.96), (3, 0.94))]
    assert (curve.time_to(rows, 0.95), curve.time_to(rows, 0.98)) == (120.0, None)
    assert curve.words("maml_cuda", rows) == "maml_cuda (95 %: 2.0 min, 98 %: not reached; 3 iterations)"
    assert curve.read(curve.Path("/nowhere"), "maml_cuda") == []
