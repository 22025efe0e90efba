"""The best validations of a run, and the checkpoints that they keep: ``best`` and, if several are kept, ``best-1`` to
``best-N`` in any order.

A validation is a dict with its iteration, its score and, if several are kept, the name of its checkpoint. In a list of
them the best one is first.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from maml_cuda.train.checkpoint import UnusableCheckpoint, load_model


def with_validation(
    bests: list[dict[str, Any]], iteration: int, score: float, *, rising: bool, kept: int = 1
) -> list[dict[str, Any]]:
    """``bests`` with a validation among them, if it is one of the ``kept`` best ones; equal ones stay before it. It
    takes over the checkpoint name of the one that it displaces.

    Args:
        bests: the best validations so far.
        iteration: of the validation.
        score: of the validation; ignored if it is not finite.
        rising: whether a larger score is better.
        kept: the number of validations to keep.
    """
    if not math.isfinite(score):
        return bests
    new: dict[str, Any] = {"iteration": iteration, "score": score}
    bests = sorted([*bests, new], key=lambda best: -best["score"] if rising else best["score"])[:kept]
    if kept > 1 and new in bests:
        taken = {best.get("checkpoint") for best in bests}
        new["checkpoint"] = next(name for n in range(kept) if (name := f"best-{n + 1}") not in taken)
    return bests


def checkpoints_at(bests: list[dict[str, Any]], iteration: int) -> list[str]:
    """The checkpoints to write in an iteration: none if its validation is not among the best."""
    names = []
    for rank, best in enumerate(bests):
        if best["iteration"] == iteration:
            names += ["best"] if rank == 0 else []
            names += [best["checkpoint"]] if "checkpoint" in best else []
    return names


def remove_others(run: Path, bests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best validations whose checkpoints are intact. The other checkpoints of best validations are removed."""
    bests = [best for best in bests if "checkpoint" not in best or _is_intact(run, best)]
    for path in run.glob("best-*"):
        if path.name not in {best["checkpoint"] for best in bests}:
            shutil.rmtree(path)
    return bests


def _is_intact(run: Path, best: dict[str, Any]) -> bool:
    """Whether the checkpoint of a best validation can be loaded and is of that iteration."""
    try:
        return bool(load_model(run / best["checkpoint"])[1]["iteration"] == best["iteration"])
    except UnusableCheckpoint:
        return False
