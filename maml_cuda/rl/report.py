"""The end of a reinforcement-learning run: tests the best checkpoint and writes the plots and summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maml_cuda import FusedMAML
from maml_cuda.rl import plots, render
from maml_cuda.rl.adaptation import adapt_and_sample, evaluate_returns
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environments import environment_of
from maml_cuda.rl.locomotion import Locomotion
from maml_cuda.rl.settings import RLSettings
from maml_cuda.rl.training import make_policy
from maml_cuda.train.checkpoint import load_info, load_model, load_parameters
from maml_cuda.train.devices import CPU, only_on_cpu
from maml_cuda.train.evaluate import mean_and_ci95
from maml_cuda.train.jobs import make_generator
from maml_cuda.train.plots import comparison
from maml_cuda.train.run_info import restore_settings
from maml_cuda.train.summary import write_summary


def load_run(
    run: Path, checkpoint: str = "best", device: torch.device = CPU, **given: Any
) -> tuple[FusedMAML, dict[str, Any]]:
    """Loads the policy of a checkpoint.

    Args:
        run: the run's folder.
        checkpoint: the name of the checkpoint.
        device: the CPU.
        given: settings that override the stored ones.

    Returns:
        The policy and the checkpoint's info.

    Raises:
        MissingCheckpoint: see ``checkpoint.load_checkpoint``.
        DamagedCheckpoint: see ``checkpoint.load_checkpoint``.
    """
    folder = run / checkpoint
    learned, info = load_model(folder)
    settings = replace(restore_settings(RLSettings, info, folder), **given)
    only_on_cpu(settings.job, device)
    maml = make_policy(settings)
    load_parameters(maml, learned, folder)
    return maml, info


def test_run(
    policies: Sequence[FusedMAML],
    settings: RLSettings,
    device: torch.device = CPU,  # noqa: PT028 (this is no test)
) -> dict[str, Any]:
    """Tests a policy on ``settings.test_tasks`` test tasks after 0 to ``test_steps`` adaptation steps.

    Args:
        policies: the policy, the only element.
        settings: the settings of the run.
        device: the CPU.

    Returns:
        JSON-able values; ``mean`` and ``ci95`` are lists over ``steps``.
    """
    returns = evaluate_returns(
        policies[0], environment_of(settings), settings, make_generator(settings, "test"), Clock(),
        settings.test_tasks, settings.test_steps,
    )  # fmt: skip
    mean, ci95 = mean_and_ci95(returns)
    return {
        "task": settings.job,
        "metric": "return",
        "baseline": settings.baseline,
        "steps": list(range(settings.test_steps + 1)),
        "mean": mean,
        "ci95": ci95,
        "test_tasks": settings.test_tasks,
        "test_episodes": settings.test_episodes,
    }


def table(result: dict[str, Any]) -> str:
    """The result of ``test_run`` as text."""
    kind = "" if result["baseline"] == "none" else f", {result['baseline']}"
    lines = [
        f"{result['task']}{kind}: return on {result['test_tasks']} test tasks, "
        f"{result['test_episodes']} episodes a task and step"
    ]
    for step, mean, ci95 in zip(result["steps"], result["mean"], result["ci95"], strict=True):
        lines.append(f"  after {step:2d} steps  {mean:8.2f} ± {ci95:.2f}")
    if result.get("animation"):
        lines.append(result["animation"])
    return "\n".join(lines)


def finish(run: Path, settings: RLSettings, device: torch.device = CPU) -> dict[str, Any]:
    """Tests the best checkpoint of a trained run; writes the plots and, at the end, summary.json.

    Returns:
        The content of summary.json.
    """
    maml, _ = load_run(run, device=device)
    last = load_info(run / "last")
    result = test_run([maml], settings)
    plots.learning_curve(run / "metrics.csv", run / "learning_curves.png", settings)
    label = "MAML" if settings.baseline == "none" else settings.baseline
    comparison([result], [label], run / "adaptation.png")
    result |= _pictures(run, maml, settings)
    parts = last["seconds_of"]
    total = sum(parts.values())
    return write_summary(
        run,
        settings,
        result,
        last,
        maml.backend,
        seconds_of=parts,
        shares={what: seconds / total if total else 0.0 for what, seconds in parts.items()},
    )


def _pictures(run: Path, maml: FusedMAML, settings: RLSettings) -> dict[str, str]:
    """Plots paths for navigation, or renders a GIF of a robot, before and after adaptation. Other environments have no
    picture.
    """
    environment = environment_of(settings)
    generator = make_generator(settings, "test")
    goals = environment.sample_goals(settings.test_tasks, generator)[:4]
    if settings.job == "navigation":
        found = adapt_and_sample(maml, environment, goals, settings, generator, Clock(), settings.test_steps)
        plots.paths(goals, list(found), run / "paths.png")
        return {}
    if not isinstance(environment, Locomotion):
        return {}
    words = render.before_and_after(maml, environment, goals[-1:], settings, generator, run / "before_and_after.gif")
    return {"animation": words}
