"""The two kinds of jobs, supervised and reinforcement learning, and which settings each has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from maml_cuda.rl import settings as rl_settings
from maml_cuda.rl.settings import (
    RL_JOBS,
    RLSettings,
    default_rl_settings,
    is_rl_job,
    is_rl_run,
    new_rl_settings,
)
from maml_cuda.train import presets
from maml_cuda.train.output import print_error
from maml_cuda.train.settings import JOBS, Settings, unknown_job


@dataclass(frozen=True)
class JobKind:
    """The parts of the commands that differ between supervised and reinforcement-learning jobs."""

    settings: type
    new_settings: Callable[..., Any]
    training: Any
    report: ModuleType


def job_kind(job: str) -> JobKind:
    if is_rl_job(job):
        return _of_policies()
    if job not in JOBS:
        raise unknown_job(job)
    from maml_cuda.train import report
    from maml_cuda.train.jobs import new_settings
    from maml_cuda.train.loop import Training

    return JobKind(Settings, new_settings, Training, report)


def _of_policies() -> JobKind:
    from maml_cuda.rl import report
    from maml_cuda.rl.training import RLTraining

    return JobKind(RLSettings, new_rl_settings, RLTraining, report)


def kind_of_run(info: dict[str, Any], folder: Path) -> JobKind:
    """The kind of the run that wrote the checkpoint in ``folder``."""
    from maml_cuda.train.checkpoint import DamagedCheckpoint

    settings = info.get("settings", {})
    if is_rl_run(settings):
        return _of_policies()
    job = settings.get("job")
    if job not in JOBS:
        words = f"job of {folder} must be one of {', '.join(JOBS | RL_JOBS)}, got {job!r}"
        raise DamagedCheckpoint(folder, words)
    return job_kind(job)


def stored_run(run: Path, checkpoint: str) -> tuple[JobKind, Any, dict[str, Any]]:
    """The kind of a run, its settings, and the info of a checkpoint.

    They come from the last checkpoint, because it holds the settings that were changed when the run was resumed. If it
    cannot be used, they come from ``checkpoint``.
    """
    from maml_cuda.train.checkpoint import UnusableCheckpoint, load_info, locate
    from maml_cuda.train.run_info import restore_settings

    def read(folder: Path) -> tuple[JobKind, Any, dict[str, Any]]:
        info = load_info(folder)
        kind = kind_of_run(info, folder)
        return kind, restore_settings(kind.settings, info, folder), info

    last, asked = run / "last", run / checkpoint
    try:
        return read(last)
    except UnusableCheckpoint as error:
        if asked == last or locate(asked) is None:
            raise
        print_error(f"maml-cuda: {error}; the settings are those of {asked}")
        return read(asked)


def checked_names(kind: JobKind, given: dict[str, Any]) -> dict[str, Any]:
    """``given``, with a preset of a reinforcement-learning job as its baseline.

    Raises:
        ValueError: a name is not a setting of this kind of job.
    """
    if kind.settings is RLSettings and "preset" in given:
        given = {"baseline": given["preset"]} | {name: value for name, value in given.items() if name != "preset"}
        if given["baseline"] not in rl_settings.BASELINES:
            raise ValueError(
                f"preset must be left out for a policy, or be one of {', '.join(rl_settings.BASELINES[1:])}, "
                f"got {given['baseline']}; --first-order, --inner-steps and --outer choose the algorithm"
            )
    names = {field.name for field in fields(kind.settings)}
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"{name} must be left out for this job, which has no such setting, got {value}")
    return given


def refuse_ignored(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError if a run of ``settings`` would ignore a value of ``given`` that is not the default."""
    job = settings["job"]
    if is_rl_run(settings) or is_rl_job(job):
        baseline, outer = settings.get("baseline", "none"), settings.get("outer", default_rl_settings(job).outer)
        used, what = rl_settings.used_settings(baseline, outer), f"{job} with outer {outer} and baseline {baseline}"
    else:
        what = settings.get("preset", "maml")
        used = presets.used_settings(job, what)
        if settings.get("net") == "mlp" and "width" in given:
            raise ValueError(
                f"width (--filters) must be left out for the net mlp, whose layers have their own, got {given['width']}"
            )
    for name, value in given.items():
        if name not in used and value != getattr(Settings, name, None):
            raise ValueError(f"{name} must be left out for {what}, which ignores it, got {value}")
