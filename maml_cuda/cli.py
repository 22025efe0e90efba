"""The command line: ``maml-cuda train | evaluate | compare | info``.

Modules that need torch or the extra [train] are imported inside the commands, so that ``--help`` is fast and a missing
package is reported by name.
"""

import argparse
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from maml_cuda import build_info
from maml_cuda.extras import require
from maml_cuda.rl import settings as rl_settings
from maml_cuda.rl.settings import RL_JOBS, RLSettings, new_rl_settings
from maml_cuda.train import presets
from maml_cuda.train.arguments import absolute, parser
from maml_cuda.train.hints import did_you_mean, sibling_folders
from maml_cuda.train.interrupts import exit_status, sigterm_raises
from maml_cuda.train.output import discard_broken_streams, print_error, readable_output
from maml_cuda.train.run_lock import locked_run
from maml_cuda.train.settings import JOBS, Settings, unknown_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words of the command line; None: ``sys.argv[1:]``.

    Returns:
        The exit status: 0 on success, 2 after an error, which is printed in one line, 130 after Ctrl-C, 143 after
            SIGTERM, 141 if standard output was closed.
    """
    try:
        with readable_output(), sigterm_raises():
            options = parser().parse_args(arguments)
            return COMMANDS[options.command](options)
    except KeyboardInterrupt as interrupt:
        print_error(f"\nmaml-cuda: {_which_process()}interrupted")
        return exit_status(interrupt)
    except BrokenPipeError:
        discard_broken_streams()
        return 128 + signal.SIGPIPE
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        lost = discard_broken_streams()  # the error does not name a stream; errors of files name the file
        print_error(f"maml-cuda: {_which_process()}error: {error}{f': {lost}' if lost else _other_checkpoints(error)}")
        return 2


def _which_process() -> str:
    """The process that prints, where torchrun has started several."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def _other_checkpoints(error: Exception) -> str:
    """A hint for the user if a checkpoint cannot be used: which other checkpoint or folder there is."""
    folder = getattr(error, "folder", None)
    if folder is None:
        return ""
    from maml_cuda.train.checkpoint import locate

    run = folder.parent
    if not run.is_dir():
        return did_you_mean(str(run), sibling_folders(run))
    if folder.name != "best" and locate(run / "best"):
        return (
            f"; maml-cuda train --resume {run} --from best continues from the best checkpoint, "
            f"maml-cuda evaluate {run} tests it"
        )
    if folder.name != "last" and locate(run / "last"):
        return f"; maml-cuda evaluate {run} --checkpoint last tests the last checkpoint"
    return ""


@dataclass(frozen=True)
class _JobKind:
    """The parts of the commands that differ between supervised and reinforcement-learning jobs."""

    settings: type
    new_settings: Callable[..., Any]
    training: Any
    report: ModuleType


def _job_kind(job: str) -> _JobKind:
    if job in RL_JOBS:
        from maml_cuda.rl import report as rl_report
        from maml_cuda.rl.training import RLTraining

        return _JobKind(RLSettings, new_rl_settings, RLTraining, rl_report)
    if job not in JOBS:
        raise unknown_job(job)
    from maml_cuda.train import report
    from maml_cuda.train.jobs import new_settings
    from maml_cuda.train.loop import Training

    return _JobKind(Settings, new_settings, Training, report)


def _kind_of_run(info: dict[str, Any], folder: Path) -> _JobKind:
    """The kind of the run that wrote the checkpoint in ``folder``."""
    from maml_cuda.train.checkpoint import DamagedCheckpoint

    job = info.get("settings", {}).get("job")
    if job not in JOBS | RL_JOBS:
        words = f"job of {folder} must be one of {', '.join(JOBS | RL_JOBS)}, got {job!r}"
        raise DamagedCheckpoint(folder, words)
    return _job_kind(job)


def train(options: argparse.Namespace) -> int:
    """``maml-cuda train``: trains a new run, or continues one, and tests its best checkpoint."""
    require("tqdm", "matplotlib", "safetensors", extra="train")
    from maml_cuda.train.checkpoint import locate
    from maml_cuda.train.devices import device_of
    from maml_cuda.train.ranks import join, resume_after_a_restart

    _set_threads(options.threads)
    if options.job is not None and options.job not in JOBS and Path(options.job).is_dir():
        if options.data is not None:
            raise ValueError(f"data must be left out if the job is the folder of the data, got {options.data}")
        options.job, options.data = "folder", absolute(options.job)
    names = {field.name for kind in (Settings, RLSettings) for field in fields(kind)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    device = device_of(options.device)
    options.resume = resume_after_a_restart(options.out, options.resume, options.resume_from)
    ranks = join(device)
    run = None if options.resume is None else Path(options.resume or options.out or "")
    with ExitStack() as stack:
        try:
            if ranks.first:
                run, training = _first_training(options, given, device, ranks, stack)
            elif (handed := ranks.from_first()) is None:
                return 2  # the first process has said why
            else:
                run, settings, state = handed
                training = _job_kind(settings.job).training.follow(run, settings, state, device, ranks)
            _train_and_test(training)
        except KeyboardInterrupt as interrupt:
            if ranks.first and (run is None or locate(run / "last") is None):
                print_error("\nInterrupted before the first checkpoint; nothing was saved.")
            elif ranks.first:
                print_error(f"\nInterrupted; the run is saved in {run}. Continue with: maml-cuda train --resume {run}")
            return exit_status(interrupt)
    return 0


def _first_training(
    options: argparse.Namespace, given: dict[str, Any], device: Any, ranks: Any, stack: ExitStack
) -> tuple[Path, Any]:
    """The folder of the run, locked until ``stack`` is closed, and its training, which is handed to the other
    processes. They get None if an error is raised.
    """
    from maml_cuda.train.checkpoint import load_info
    from maml_cuda.train.loop import resumed_settings

    handed = None
    try:
        _announce_data(options.data)
        if options.resume is None:
            if options.resume_from is not None:
                raise ValueError("--from must be used with --resume: --resume RUN --from best")
            kind = _job_kind(given.setdefault("job", "glyphs"))
            given = _checked_names(kind, given)
            _refuse_ignored(given, given)
            settings = kind.new_settings(**given)
            run = _lock_new_run(options.out, settings.job, stack)
            training = kind.training.start(run, settings, device, ranks)
        else:
            if not (options.resume or options.out) or (options.resume and options.out not in (None, options.resume)):
                raise ValueError("--resume must name one run folder: --resume RUN, or --resume with --out RUN")
            run, checkpoint = Path(options.resume or options.out), options.resume_from or "last"
            kind = _kind_of_run(load_info(run / checkpoint), run / checkpoint)
            stack.enter_context(locked_run(run))
            settings = resumed_settings(run, _checked_names(kind, given), kind.settings, checkpoint)
            training = kind.training.resume(run, settings, checkpoint, device, ranks)
        if ranks.count > 1:
            handed = run, settings, training.state()
    finally:
        ranks.from_first(handed)
    return run, training


def _lock_new_run(out: str | None, job: str, stack: ExitStack) -> Path:
    """The folder of a new run, locked until ``stack`` is closed: ``out``, or a new folder even if other runs start in
    the same second.
    """
    if out is not None:
        stack.enter_context(locked_run(Path(out)))
        return Path(out)
    name = time.strftime(f"runs/{job}-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        run = Path(name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            stack.enter_context(locked_run(run, new=True))
            break
    return run


def _train_and_test(training: Any) -> None:
    import torch

    run, settings, ranks = training.run, training.settings, training.ranks
    if not ranks.first:
        training.loop()
        ranks.leave()
        return
    report = _job_kind(settings.job).report
    processes = f"{ranks.count} processes of " if ranks.count > 1 else ""
    try:
        print(
            f"{settings.job} in {run}: iteration {training.iteration} of {settings.iterations}, "
            f"{training.backend} backend, {processes}{torch.get_num_threads()} threads"
        )
        training.loop()
        ranks.leave()
        print(f"testing the best checkpoint on {settings.test_tasks} tasks")
        print(report.table(report.finish(run, settings, training.device)))
        print(f"metrics, checkpoints, pictures and summary.json are in {run}")
    except OSError:  # a full disk, a closed pipe
        print_error(
            f"\nStopped by an error; everything up to the last checkpoint is in {run}. "
            f"Continue with: maml-cuda train --resume {run}"
        )
        raise


def evaluate(options: argparse.Namespace) -> int:
    """``maml-cuda evaluate``: tests a checkpoint of a run, on the run's data or on other images."""
    require("safetensors", extra="train")
    from maml_cuda.train.devices import device_of
    from maml_cuda.train.other_images import check_ways, other_images
    from maml_cuda.train.ranks import count

    _set_threads(options.threads)
    if count() > 1:
        raise ValueError(f"processes must be 1 for maml-cuda evaluate, got {count()}")
    device = device_of(options.device)
    run = Path(options.run)
    kind, stored, info = _stored_run(run, options.checkpoint)
    other: dict[str, Any] = {}
    if kind.settings is Settings and options.data is not None:
        if not options.json:
            _announce_data(options.data)
        trained = info.get("classes", ())  # checkpoints of earlier versions do not have them
        if images := other_images(stored, options.data, trained, options.cache):
            other, options.data, options.cache = {"other": images}, None, None
    model = _checked_names(kind, _without_none(backend=options.backend, data=options.data, cache=options.cache))
    test = _without_none(
        ways=options.ways,
        test_tasks=options.tasks,
        test_shots=options.shots,
        test_queries=options.queries,
        seed=options.seed,
    )
    _refuse_ignored(model | _checked_names(kind, test), asdict(stored))
    settings = replace(stored, **model, **test)
    if kind.settings is Settings:
        check_ways(settings, stored.ways)
    if options.ensemble:
        if kind.settings is not Settings:
            raise ValueError(f"ensemble must be left out for {stored.job}, whose runs keep one best checkpoint")
        algorithms, iterations = kind.report.load_ensemble(run, device, **model)
        tested: dict[str, Any] = {"ensemble": iterations}
    else:
        learned, info = kind.report.load_run(run, options.checkpoint, device, **model)
        algorithms, tested = [learned], {"checkpoint": options.checkpoint, "iteration": info["iteration"]}
    if options.batch_norm == "running":
        if kind.settings is not Settings:
            raise ValueError(f"batch_norm must be left out for {stored.job}, whose policy has no BatchNorm")
        for algorithm in algorithms:
            kind.report.collect_statistics(algorithm, settings, device=device)
        tested["batch_norm"] = options.batch_norm
    result = kind.report.test_run(algorithms, settings, device=device, **other) | tested
    print(json.dumps(result, indent=1) if options.json else kind.report.table(result))
    return 0


def _stored_run(run: Path, checkpoint: str) -> tuple[_JobKind, Any, dict[str, Any]]:
    """The kind of a run, its settings, and the info of a checkpoint.

    They come from the last checkpoint, because it holds the settings that were changed when the run was resumed. If it
    cannot be used, they come from ``checkpoint``.
    """
    from maml_cuda.train.checkpoint import UnusableCheckpoint, load_info, locate
    from maml_cuda.train.run_info import restore_settings

    def read(folder: Path) -> tuple[_JobKind, Any, dict[str, Any]]:
        info = load_info(folder)
        kind = _kind_of_run(info, folder)
        return kind, restore_settings(kind.settings, info, folder), info

    last, asked = run / "last", run / checkpoint
    try:
        return read(last)
    except UnusableCheckpoint as error:
        if asked == last or locate(asked) is None:
            raise
        print_error(f"maml-cuda: {error}; the settings are those of {asked}")
        return read(asked)


def compare(options: argparse.Namespace) -> int:
    """``maml-cuda compare``: plots the test results of several runs."""
    require("matplotlib", "safetensors", extra="train")
    from maml_cuda.rl.plots import returns
    from maml_cuda.train.checkpoint import read_json

    results: list[dict[str, Any]] = []
    for run in options.runs:
        path = Path(run) / "summary.json"
        summary = read_json(path)
        for key in ("task", "metric", "steps", "mean", "ci95", "test_tasks"):
            if key not in summary:
                raise ValueError(f"{path} must be the summary of a finished run, got one without {key}")
        if results and (summary["task"], summary["metric"]) != (results[0]["task"], results[0]["metric"]):
            raise ValueError(f"runs must be of one job, got {results[0]['task']} and {summary['task']} ({run})")
        results.append(summary)
    labels = options.labels.split(",") if options.labels else [Path(run).name for run in options.runs]
    if len(labels) != len(results):
        raise ValueError(f"labels must be {len(results)}, one for each run, got {len(labels)}")
    returns(results, labels, Path(options.out))
    print(f"{options.out}: {', '.join(labels)}")
    return 0


def info(options: argparse.Namespace) -> int:
    """``maml-cuda info``: prints the build, the versions, the number of threads and the devices."""
    import torch

    from maml_cuda.train.provenance import versions

    gpus = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    machine = {"threads": torch.get_num_threads(), "devices": ", ".join(["cpu", *gpus])}
    for name, value in (build_info() | versions() | machine).items():
        print(f"{name:20} {value}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "info": info,
}


def _checked_names(kind: _JobKind, given: dict[str, Any]) -> dict[str, Any]:
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


def _refuse_ignored(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError if a run of ``settings`` would ignore a value of ``given`` that is not the default."""
    job = settings["job"]
    if job in RL_JOBS:
        baseline, outer = settings.get("baseline", "none"), settings.get("outer", RL_JOBS[job].outer)
        used, what = rl_settings.used_settings(baseline, outer), f"{job} with outer {outer} and baseline {baseline}"
    else:
        what = settings.get("preset", "maml")
        used = presets.used_settings(job, what)
    for name, value in given.items():
        if name not in used and value != getattr(Settings, name, None):
            raise ValueError(f"{name} must be left out for {what}, which ignores it, got {value}")


def _announce_data(data: str | None) -> None:
    if data is not None:
        print(f"opening {data}; the first time converts it, which may take minutes")


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    cores = os.cpu_count() or 1
    if threads > cores:  # torch crashes if there are far too many, such as 100000
        raise ValueError(f"threads must be at most {cores}, the cores of this machine, got {threads}")
    torch.set_num_threads(threads)
