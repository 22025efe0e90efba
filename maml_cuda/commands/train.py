"""``maml-cuda train``: trains a new run, or continues one, and tests its best checkpoint."""

import argparse
import itertools
import time
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from maml_cuda.commands.job_kinds import checked_names, job_kind, kind_of_run, refuse_ignored
from maml_cuda.commands.shared_options import absolute, announce_data, set_threads
from maml_cuda.commands.train_options import add_parser
from maml_cuda.extras import require
from maml_cuda.rl.own_jobs import short_name
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train.interrupts import exit_status
from maml_cuda.train.output import print_error
from maml_cuda.train.run_lock import locked_run
from maml_cuda.train.settings import JOBS, Settings
from maml_cuda.train.tensorboard import FOLDER
from maml_cuda.user_code import absolute_name

__all__ = ["add_parser", "run"]


def run(options: argparse.Namespace) -> int:
    """``maml-cuda train``: trains a new run, or continues one, and tests its best checkpoint."""
    require("tqdm", "matplotlib", "safetensors", "yaml", extra="train")
    from maml_cuda.commands import config_file
    from maml_cuda.train.checkpoint import locate
    from maml_cuda.train.devices import device_of
    from maml_cuda.train.ranks import join, resume_after_a_restart

    if options.config is not None:
        config_file.apply(options)
    options.device = options.device or "cpu"
    set_threads(options.threads)
    if options.job is not None and options.job not in JOBS and Path(options.job).is_dir():
        if options.data is not None:
            raise ValueError(f"data must be left out if the job is the folder of the data, got {options.data}")
        options.job, options.data = "folder", absolute(options.job)
    elif options.job is not None:
        options.job = absolute_name(options.job)
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
                training = job_kind(settings.job).training.follow(run, settings, state, device, ranks)
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
    from maml_cuda.commands import config_file
    from maml_cuda.train.checkpoint import load_info
    from maml_cuda.train.run_info import resumed_settings

    handed = None
    curves = options.tensorboard  # None: where earlier parts of the run have them
    try:
        if curves:
            require("tensorboard", extra="tensorboard")
        announce_data(options.data)
        if options.resume is None:
            if options.resume_from is not None:
                raise ValueError("--from must be used with --resume: --resume RUN --from best")
            kind = job_kind(given.setdefault("job", "glyphs"))
            given = checked_names(kind, given)
            refuse_ignored(given, given)
            settings = kind.new_settings(**given)
            run = lock_new_run(options.out, short_name(settings.job), stack)
            training = kind.training.start(run, settings, device, ranks)
        else:
            if not (options.resume or options.out) or (options.resume and options.out not in (None, options.resume)):
                raise ValueError("--resume must name one run folder: --resume RUN, or --resume with --out RUN")
            run, checkpoint = Path(options.resume or options.out), options.resume_from or "last"
            kind = kind_of_run(load_info(run / checkpoint), run / checkpoint)
            stack.enter_context(locked_run(run))
            if curves is None and (curves := (run / FOLDER).is_dir()):
                require("tensorboard", extra="tensorboard")
            settings = resumed_settings(run, checked_names(kind, given), kind.settings, checkpoint)
            training = kind.training.resume(run, settings, checkpoint, device, ranks)
        training.tensorboard = bool(curves)
        config_file.write(
            run,
            settings,
            ranks.count,
            device=options.device,
            threads=options.threads,
            tensorboard=training.tensorboard or None,
        )
        if ranks.count > 1:
            handed = run, settings, training.state()
    finally:
        ranks.from_first(handed)
    return run, training


def lock_new_run(out: str | None, job: str, stack: ExitStack) -> Path:
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
    report = job_kind(settings.job).report
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
