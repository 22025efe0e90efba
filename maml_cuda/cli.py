"""The command line: ``maml-cuda train | evaluate | compare | info``.

What needs torch or the extra [train] is imported inside the commands: help comes at once, and a missing package can be
named in words.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from maml_cuda import build_info
from maml_cuda.arguments import absolute, parser
from maml_cuda.rl.settings import BASELINES as RL_BASELINES
from maml_cuda.rl.settings import RL_JOBS, RLSettings, new_rl_settings
from maml_cuda.settings import JOBS, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for an error in words, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        print(f"maml-cuda: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmaml-cuda: interrupted", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class _Kind:
    """What a kind of jobs brings to the commands."""

    settings: type
    new_settings: Callable[..., Any]
    training: Any
    report: ModuleType


def _kind(job: str) -> _Kind:
    if job in RL_JOBS:
        from maml_cuda.rl import report as rl_report
        from maml_cuda.rl.training import RLTraining

        return _Kind(RLSettings, new_rl_settings, RLTraining, rl_report)
    from maml_cuda import report
    from maml_cuda.jobs import new_settings
    from maml_cuda.train import Training

    return _Kind(Settings, new_settings, Training, report)


def _kind_of_run(run: Path, checkpoint: str) -> _Kind:
    """FileNotFoundError where no run is."""
    from maml_cuda.checkpoint import load_checkpoint

    return _kind(load_checkpoint(run / checkpoint)[2]["settings"]["job"])


def train(options: argparse.Namespace) -> int:
    _need("tqdm", "matplotlib", "safetensors")
    import torch

    from maml_cuda.checkpoint import locate
    from maml_cuda.train import resumed_settings

    _set_threads(options.threads)
    if options.job is not None and options.job not in JOBS and Path(options.job).is_dir():
        if options.data is not None:
            raise ValueError(f"data must be left out for a folder, which is the data, got {options.data}")
        options.job, options.data = "folder", absolute(options.job)
    names = {field.name for kind in (Settings, RLSettings) for field in fields(kind)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.data is not None:
        print(f"opening {options.data}; the first time converts it, which may take minutes", flush=True)
    if options.resume is None:
        kind = _kind(given.get("job", ""))
        settings = kind.new_settings(**_only(kind, given))
        run = Path(options.out or time.strftime(f"runs/{settings.job}-%Y%m%d-%H%M%S"))
        start = kind.training.start
    else:
        if not (options.resume or options.out) or (options.resume and options.out not in (None, options.resume)):
            raise ValueError("--resume must name one run folder: --resume RUN, or --resume with --out RUN")
        run = Path(options.resume or options.out)
        kind = _kind_of_run(run, "last")
        settings = resumed_settings(run, _only(kind, given), kind.settings)
        start = kind.training.resume
    try:
        training = start(run, settings)
        print(
            f"{settings.job} in {run}: iteration {training.iteration} of {settings.iterations}, "
            f"{training.backend} backend, {torch.get_num_threads()} threads"
        )
        training.loop()
        print(f"testing the best checkpoint on {settings.test_tasks} tasks")
        print(kind.report.table(kind.report.finish(run, settings)))
    except KeyboardInterrupt:
        if locate(run / "last") is None:
            print("\nInterrupted before the first checkpoint; nothing was saved.", file=sys.stderr)
        else:
            print(f"\nInterrupted; saved in {run}. Go on with: maml-cuda train --resume {run}", file=sys.stderr)
        return 130
    print(f"metrics, checkpoints, pictures and summary.json are in {run}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    _need("safetensors")
    from maml_cuda.checkpoint import load_checkpoint

    _set_threads(options.threads)
    run = Path(options.run)
    stored = load_checkpoint(run / "last")[2]["settings"]
    kind = _kind(stored["job"])
    model = _only(kind, _given(backend=options.backend, data=options.data))
    test = _given(test_tasks=options.tasks, test_shots=options.shots, test_queries=options.queries, seed=options.seed)
    settings = kind.settings(**stored | model | _only(kind, test))
    if options.ensemble:
        if kind.settings is not Settings:
            raise ValueError(f"ensemble must be left out for {stored['job']}, whose runs keep one best checkpoint")
        algorithms, iterations = kind.report.load_ensemble(run, **model)
        tested: dict[str, Any] = {"ensemble": iterations}
    else:
        learned, info = kind.report.load_run(run, options.checkpoint, **model)
        algorithms, tested = [learned], {"checkpoint": options.checkpoint, "iteration": info["iteration"]}
    if options.batch_norm == "running":
        if kind.settings is not Settings:
            raise ValueError(f"batch_norm must be left out for {stored['job']}, whose policy has none")
        for algorithm in algorithms:
            kind.report.hold_statistics(algorithm, settings)
        tested["batch_norm"] = options.batch_norm
    result = kind.report.test_run(algorithms, settings) | tested
    print(json.dumps(result, indent=1) if options.json else kind.report.table(result))
    return 0


def compare(options: argparse.Namespace) -> int:
    _need("matplotlib", "safetensors")
    from maml_cuda.rl.plots import returns

    results: list[dict[str, Any]] = []
    for run in options.runs:
        summary = json.loads((Path(run) / "summary.json").read_text())
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
    import torch

    from maml_cuda.versions import versions

    for name, value in (build_info() | versions() | {"threads": torch.get_num_threads()}).items():
        print(f"{name:20} {value}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "info": info,
}


def _only(kind: _Kind, given: dict[str, Any]) -> dict[str, Any]:
    """``given``. ValueError where one of them is no setting of this kind of jobs."""
    if kind.settings is RLSettings and "preset" in given:
        given = {"baseline": given["preset"]} | {name: value for name, value in given.items() if name != "preset"}
        if given["baseline"] not in RL_BASELINES:
            raise ValueError(
                f"a policy is trained by MAML and has no preset but --baseline {', '.join(RL_BASELINES[1:])}, "
                f"got {given['baseline']}; --first-order, --inner-steps and --outer choose its algorithm"
            )
    names = {field.name for field in fields(kind.settings)}
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"{name} must be left out for this job, which has no such setting, got {value}")
    return given


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f'{" and ".join(missing)} must be installed: pip install "maml-cuda[train]"')


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)
