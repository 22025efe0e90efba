"""What the commands that use a trained net on pictures have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from maml_cuda.commands.job_kinds import stored_run
from maml_cuda.train.settings import WITHOUT_INNER_LOOP, Settings, is_classification

if TYPE_CHECKING:
    from maml_cuda.data.pictures import SupportSet
    from maml_cuda.train.classify import Classifier


def check_out(options: argparse.Namespace, *names: str) -> Path:
    """The folder of the results, which is not made yet.

    Raises:
        ValueError: it is a file, or holds one of ``names`` and ``--overwrite`` is not given.
    """
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    there = [name for name in names if (out / name).exists()]
    if there and not options.overwrite:
        raise ValueError(f"out must be a folder without {there[0]}, got {out}; --overwrite replaces it")
    return out


def opened_run(options: argparse.Namespace, command: str) -> tuple[Settings, Callable[[], Classifier]]:
    """The settings of a run on pictures, and a function that loads its net.

    Raises:
        ValueError: it is not a run on pictures.
        MissingCheckpoint, DamagedCheckpoint: as ``load_info``.
    """
    from maml_cuda.train.classify import open_classifier
    from maml_cuda.train.devices import device_of

    device, run = device_of(options.device), Path(options.run)
    _, settings, _ = stored_run(run, options.checkpoint)
    if not isinstance(settings, Settings) or not is_classification(settings.job):
        raise ValueError(
            f"run must be one on pictures for maml-cuda {command}, got one of {settings.job}; "
            f'maml_cuda.load("{run}") in Python returns its net'
        )
    if options.data is not None:
        if options.batch_norm != "running":
            raise ValueError(f"data must be left out, since only --batch-norm running reads them, got {options.data}")
        settings = replace(settings, data=options.data)
    chosen = options.checkpoint, options.steps, options.batch_norm, device, options.backend
    return settings, lambda: open_classifier(run, settings, *chosen)


def described(options: argparse.Namespace, settings: Settings, net: Classifier, support: SupportSet) -> str:
    """What classifies: the run, the checkpoint and the support set, in words."""
    classes = f"{counted(len(support.x), 'picture')} of {len(support.classes)} classes"
    adapted = f"adapted by {counted(net.steps, 'step')} to" if net.steps else "given"
    lines = [f"{options.run}, {options.checkpoint} checkpoint of iteration {net.iteration}, {adapted} {classes}"]
    if len(support.classes) < settings.ways and settings.algorithm not in WITHOUT_INNER_LOOP:
        first = f"the first {len(support.classes)} of its outputs count"
        lines.append(f"The net was trained on {settings.ways}-way tasks; {first}.")
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
