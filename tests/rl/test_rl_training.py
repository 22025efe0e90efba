"""Training runs of a policy: resumed with the same bits, finished with a summary, stopped by errors; and that it
learns.
"""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch

from maml_cuda.cli import main
from maml_cuda.rl import render
from maml_cuda.rl.adaptation import evaluate_returns
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environments import make_environment
from maml_cuda.rl.locomotion import Locomotion
from maml_cuda.rl.navigation import Navigation
from maml_cuda.rl.outer import OuterStep
from maml_cuda.rl.report import finish, load_run, table
from maml_cuda.rl.settings import RL_JOBS, RLSettings, new_rl_settings
from maml_cuda.rl.training import RLTraining, make_policy
from maml_cuda.train import plots
from maml_cuda.train.jobs import make_generator
from maml_cuda.train.run_info import resumed_settings

TINY = {
    "meta_batch": 2,
    "episodes": 3,
    "horizon": 6,
    "width": 5,
    "iterations": 6,
    "validation_interval": 2,
    "validation_tasks": 2,
    "test_tasks": 3,
    "test_steps": 2,
    "test_episodes": 3,
}


def tiny(job: str = "navigation", **given) -> RLSettings:
    return new_rl_settings(job, **(TINY | given))


def trained(run: Path, settings: RLSettings) -> RLTraining:
    training = RLTraining.start(run, settings)
    training.loop()
    return training


def resumed(run: Path, **given) -> RLTraining:
    training = RLTraining.resume(run, resumed_settings(run, given, RLSettings))
    training.loop()
    return training


def files(run: Path) -> dict[str, bytes]:
    """All bytes of a run's files except its times."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("best/checkpoint.json", "last/checkpoint.json"):
        info = json.loads(found.pop(name))
        assert sum(info.pop("seconds_of").values()) > 0
        assert all(info.pop(name) > 0 for name in ("seconds", "cpu_seconds"))
        info["settings"].pop("iterations")
        found[name] = json.dumps(info).encode()
    return found


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"outer": "vpg"},
        {"outer": "clipped", "epochs": 2},
        {"first_order": True},
        {"inner_steps": 2},
        {"inner_steps": 3, "outer": "clipped", "rate_decay": 1.0, "every_step": True},
        {"baseline": "pretrained"},
        {"baseline": "oracle", "outer": "vpg"},
        {"job": "ant-goal", "horizon": 3},
    ],
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(tmp_path, given: dict) -> None:
    trained(tmp_path / "whole", tiny(**given))
    trained(tmp_path / "halves", tiny(**given | {"iterations": 2}))
    resumed(tmp_path / "halves", iterations=6)
    whole = files(tmp_path / "whole")
    assert whole == files(tmp_path / "halves")
    assert [row["iteration"] for row in rows(tmp_path / "whole")] == ["1", "2", "3", "4", "5", "6"]
    assert [bool(row["validation"]) for row in rows(tmp_path / "whole")] == [False, True] * 3


def test_an_interrupted_run_resumes_with_the_same_bits(tmp_path, monkeypatch) -> None:
    trained(tmp_path / "whole", tiny())
    training = RLTraining.start(tmp_path / "broken", tiny())
    draw = training.environment.sample_goals

    def interrupting(*arguments):
        if training.iteration == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(training.environment, "sample_goals", interrupting)
    with pytest.raises(KeyboardInterrupt):
        training.loop()
    resumed(tmp_path / "broken")
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_navigation_learns_to_adapt(tmp_path) -> None:
    run = tmp_path / "run"
    trained(run, new_rl_settings("navigation", meta_batch=8, episodes=8, iterations=10, validation_interval=100))
    found = rows(run)
    first, last = float(found[0]["after"]), sum(float(row["after"]) for row in found[-3:]) / 3
    assert last > first + 20  # about -60 to about -25
    assert last > sum(float(row["before"]) for row in found[-3:]) / 3 + 10
    assert all(float(row["kl"]) > 0 for row in found)


def test_a_finished_run(tmp_path) -> None:
    run, settings = tmp_path / "run", tiny()
    trained(run, settings)
    summary = finish(run, settings)
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["steps"] == [0, 1, 2]
    assert len(summary["mean"]) == len(summary["ci95"]) == 3
    assert sum(summary["shares"].values()) == pytest.approx(1)
    assert set(summary["shares"]) == {"physics", "policy", "gradient"}
    for picture in ("learning_curves.png", "adaptation.png", "paths.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert table(summary).splitlines()[0] == "navigation: return on 3 test tasks, 3 episodes a task and step"
    maml, info = load_run(run)
    assert info["settings"]["job"] == "navigation"
    assert maml.inner_steps == 1


def test_the_random_baseline_is_the_initial_policy(tmp_path) -> None:
    run, settings = tmp_path / "run", tiny(baseline="random", iterations=0)
    trained(run, settings)
    fresh = make_policy(settings).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in load_run(run)[0].state_dict().items())
    assert finish(run, settings)["baseline"] == "random"
    assert rows(run) == []


def test_a_run_reports_that_nothing_can_render(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(render, "LIBRARIES", ("none-such",))
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    run, settings = tmp_path / "run", tiny("cheetah-direction", iterations=1, horizon=3)
    trained(run, settings)
    summary = finish(run, settings)
    assert summary["animation"].startswith("no GIF: MuJoCo cannot render on this machine.")
    assert table(summary).endswith(summary["animation"])
    assert not (run / "before_and_after.gif").exists()


def test_a_gif_of_before_and_after(tmp_path) -> None:
    run, settings = tmp_path / "run", tiny("ant-goal", iterations=1, horizon=4)
    trained(run, settings)
    summary = finish(run, settings)
    if summary["animation"].startswith("no GIF"):
        pytest.skip(summary["animation"])
    assert "rendered by" in summary["animation"]
    assert (run / "before_and_after.gif").read_bytes().startswith(b"GIF8")


# -- the command -------------------------------------------------------------------------------------------------

SHORT = [
    "--iterations", "2", "--meta-batch", "2", "--episodes", "2", "--horizon", "4", "--validation-tasks", "2",
    "--test-tasks", "2", "--test-steps", "1", "--test-episodes", "3",
]  # fmt: skip


def test_train_resume_evaluate_and_compare(tmp_path, capsys) -> None:
    for name, baseline in (("none", []), ("oracle", ["--baseline", "oracle"])):
        assert main(["train", "navigation", *SHORT, *baseline, "--out", str(tmp_path / name)]) == 0
    assert "after  1 steps" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "none"), "--iterations", "3"]) == 0
    assert main(["train", "--resume", str(tmp_path / "none"), "--from", "best"]) == 0
    assert main(["evaluate", str(tmp_path / "none"), "--tasks", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.rindex("\n{") :])["test_tasks"] == 3
    plot = tmp_path / "both.png"
    runs = [str(tmp_path / "none"), str(tmp_path / "oracle")]
    assert main(["compare", *runs, "--labels", "MAML,oracle", "--out", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", *runs, "--labels", "MAML", "--out", str(plot)]) == 2
    assert "labels must be 2, one for each run, got 1" in capsys.readouterr().err


def test_nan_in_training_names_the_task_and_the_run_can_be_resumed(tmp_path, capsys, monkeypatch) -> None:
    run = tmp_path / "run"
    step, calls = Navigation._step, [0]

    def breaking(self, actions):
        calls[0] += 1
        result = step(self, actions)
        if calls[0] == 2 * 4 * 2 + 3:  # in the second iteration; 4 steps, before and after adaptation, and a validation
            result.rewards[1, 0] = torch.nan
        return result

    monkeypatch.setattr(Navigation, "_step", breaking)
    options = ["train", "navigation", *SHORT, "--validation-interval", "1", "--out", str(run)]
    assert main(options) == 2
    assert "the simulator of navigation must return finite numbers, got reward nan" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text())["meta_iterations"] == 2


def test_settings_of_another_kind_are_refused(tmp_path, capsys) -> None:
    assert main(["train", "navigation", "--ways", "5", "--out", str(tmp_path / "a")]) == 2
    assert "ways must be left out for this job, which has no such setting, got 5" in capsys.readouterr().err
    assert main(["train", "glyphs", "--horizon", "5", "--out", str(tmp_path / "a")]) == 2
    assert "horizon must be left out for this job, which has no such setting, got 5" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_preset_for_images_is_refused(tmp_path, capsys) -> None:
    assert main(["train", "navigation", "--preset", "anil", "--out", str(tmp_path / "a")]) == 2
    words = "preset must be left out for a policy, or be one of pretrained, random, oracle, got anil; "
    assert words + "--first-order, --inner-steps and --outer choose the algorithm" in capsys.readouterr().err
    assert main(["train", "navigation", "--baseline", "nearest-pixel", "--out", str(tmp_path / "a")]) == 2
    assert "got nearest-pixel" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_output_layer_starts_scaled(scale: float) -> None:
    plain, policy = make_policy(tiny()), make_policy(tiny(output_scale=scale))
    for (name, value), expected in zip(policy.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected * (scale if name == "model.layers.4.weight" else 1)), name


def test_initial_standard_deviations_are_those_given() -> None:
    found = make_policy(tiny(start_std=0.35)).model.log_std.exp()
    torch.testing.assert_close(found, torch.full((2,), 0.35))


@pytest.mark.parametrize(("given", "steps"), [({}, 2), ({"baseline": "pretrained"}, 0), ({"test_steps": 1}, 1)])
def test_validation_is_the_mean_over_the_steps_of_the_test(tmp_path, capsys, given: dict, steps: int) -> None:
    settings = tiny(iterations=2, **given)
    trained(tmp_path, settings)
    generator, environment = make_generator(settings, "validation"), make_environment(settings.job)
    maml, tasks = load_run(tmp_path, "last")[0], settings.validation_tasks
    returns = evaluate_returns(maml, environment, settings, generator, Clock(), tasks, steps).mean(1)
    assert len(returns) == steps + 1
    assert float(rows(tmp_path)[-1]["validation"]) == pytest.approx(float(returns[min(1, steps) :].mean()), rel=1e-5)
    assert f"after 0 to {steps} steps" in capsys.readouterr().out


@pytest.mark.parametrize("every_step", [False, True])
def test_each_inner_step_has_its_own_rate_and_episodes(tmp_path, monkeypatch, every_step: bool) -> None:
    settings, seen = tiny(inner_steps=3, every_step=every_step), []
    assert make_policy(settings).inner_lr.tolist() == [0.5, 0.25, 0.125]
    assert [settings.rate(step) for step in range(4)] == [0.5, 0.25, 0.125, 0.0625]
    monkeypatch.setattr(RLTraining, "_outer", lambda self, batch: seen.append(batch) or OuterStep(0.0, 0.0, 0.0, True))
    RLTraining(tmp_path, settings)._step(True)
    (batch,) = seen
    sets = [*batch.support, batch.query[-1]]
    between = [x for x, _ in batch.query[:-1]]  # which are support sets of the steps after them, too
    assert len(between) == 2 * every_step
    assert all(torch.equal(x, set_[0]) for x, set_ in zip(between, batch.support[1:], strict=False))
    assert all(y.old_log_probs is not None for _, y in batch.query)
    assert len(sets) == 4
    assert [y.old_log_probs is None for _, y in sets] == [True, True, True, False]
    drawn = [y.actions[:, :5].flatten().tolist() for _, y in sets]
    assert all(a != b for index, a in enumerate(drawn) for b in drawn[:index])


def test_a_label_is_plotted_verbatim(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    result = {"task": "navigation", "metric": "return", "steps": [0, 1], "mean": [-4.0, -3.0], "ci95": [0.1, 0.1]}
    plots.comparison([result | {"test_tasks": 2}], ["none"], tmp_path / "plot.png")
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == ["none"]


def test_a_missing_extra_is_named_by_the_command(tmp_path, capsys, monkeypatch) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mujoco" else find_spec(name))
    assert main(["train", "ant-goal", "--out", str(tmp_path / "a")]) == 2
    assert 'mujoco must be installed: pip install "maml-cuda[rl]"' in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["train", "navigation", *SHORT, "--out", str(tmp_path / "b")]) == 0  # which has no robot


def test_a_random_policy_stays_untrained_when_resumed(tmp_path) -> None:
    trained(tmp_path, tiny(baseline="random", iterations=0))
    with pytest.raises(ValueError, match="iterations must be 0 for the baseline random, got 5"):
        resumed(tmp_path, iterations=5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"inner_lr": -0.1}, "inner_lr must be a positive number, got -0.1"),
        ({"inner_steps": 11}, "inner_steps must be 0 to 10, got 11"),
        ({"rate_decay": 1.5}, "rate_decay must be at most 1, got 1.5"),
        ({"start_std": 0.0}, "start_std must be a positive number, got 0.0"),
        ({"outer": "sgd"}, "outer must be one of trpo, vpg, clipped, got 'sgd'"),
        ({"baseline": "best"}, "baseline must be one of none, pretrained, random, oracle, got 'best'"),
        ({"discount": 1.5}, "discount must be at most 1, got 1.5"),
        ({"baseline": "oracle", "inner_steps": 1}, "inner_steps must be 0 for the baseline oracle, got 1"),
        ({"baseline": "random", "iterations": 5}, "iterations must be 0 for the baseline random, got 5"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"test_steps": 11}, "test_steps must be 1 to 10, got 11"),
        ({"test_tasks": 1}, "test_tasks must be at least 2, got 1"),
        ({"seed": 2**32}, r"seed must be 0 to 2\*\*32 - 1, got 4294967296"),
    ],
)
def test_settings_out_of_range(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        new_rl_settings("navigation", **given)


def test_the_jobs_are_the_environments() -> None:
    from maml_cuda.rl import ENVIRONMENTS

    assert list(RL_JOBS) == list(ENVIRONMENTS)
    assert all(settings.job == name for name, settings in RL_JOBS.items())
    assert issubclass(ENVIRONMENTS["ant-goal"], Locomotion)
