"""Environments of a user: both ways of writing one give the same numbers, runs resume to the bit, errors are clear."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Generator

import maml_cuda
from maml_cuda import policies
from maml_cuda.cli import main
from maml_cuda.rl import Environment, GymnasiumEnvironment, Step, make_environment
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.own_environments import try_episodes
from maml_cuda.rl.policy import CategoricalPolicy
from maml_cuda.rl.sampling import sample_episodes
from maml_cuda.rl.settings import RLSettings, new_rl_settings
from maml_cuda.rl.task_numbers import TaskNumbers
from maml_cuda.rl.training import RLTraining
from maml_cuda.train.run_info import resumed_settings

from .own_environments import Point

HERE = "tests.rl.own_environments"
TINY = {
    "meta_batch": 2, "episodes": 2, "horizon": 6, "width": 5, "iterations": 4, "validation_interval": 2,
    "validation_tasks": 2, "test_tasks": 2, "test_steps": 1, "test_episodes": 2,
}  # fmt: skip
OPTIONS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
OPTIONS[OPTIONS.index("--width")] = "--filters"


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def trained(run: Path, name: str, **given) -> RLTraining:
    training = RLTraining.start(run, new_rl_settings(f"{HERE}:{name}", **(TINY | given)))
    training.loop()
    return training


def learned(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("metrics.csv", "last/model.safetensors", "best/model.safetensors")]


@pytest.mark.parametrize("kind", ["", "Discrete"])
def test_both_ways_of_writing_an_environment_give_the_same_bits(tmp_path, kind: str) -> None:
    for one in ("Point", "BatchedPoint"):
        trained(tmp_path / one, kind + one)
    assert learned(tmp_path / "Point") == learned(tmp_path / "BatchedPoint")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("PendulumGoal", {"outer": "trpo"}),
        ("short_cart_pole", {"inner_steps": 2}),
        ("short_cart_pole", {"outer": "trpo"}),
    ],
    ids=str,
)
def test_a_resumed_run_of_a_classic_has_the_same_bits(tmp_path, name: str, given: dict) -> None:
    trained(tmp_path / "whole", name, **given)
    trained(tmp_path / "halves", name, **given, iterations=2)
    RLTraining.resume(tmp_path / "halves", resumed_settings(tmp_path / "halves", {"iterations": 4}, RLSettings)).loop()
    assert learned(tmp_path / "whole") == learned(tmp_path / "halves")


def test_a_file_is_trained_tested_and_resumed_from_another_folder(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    file, run = tmp_path / "poles.py", tmp_path / "run"
    file.write_text("from tests.rl.own_environments import short_cart_pole\n")
    assert main(["train", "poles.py:short_cart_pole", *OPTIONS, "--baseline", "oracle", "--out", str(run)]) == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["train", "--resume", str(run), "--iterations", "5"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == f"{file}:short_cart_pole"
    assert maml_cuda.load(run).model(torch.zeros(3, 5)).shape == (3, 2)  # the oracle observes the goal too
    settings = json.loads((run / "last/checkpoint.json").read_text())["settings"]
    assert settings["spaces"] == "observations [4], 2 discrete actions, goals [1]"

    file.rename(tmp_path / "pole.py")
    for command in (["evaluate", str(run)], ["train", "--resume", str(run)]):
        monkeypatch.delitem(sys.modules, "maml_cuda_user_code_poles", raising=False)
        assert main(command) == 2
        assert f"{file} must be a Python file, got none; did you mean {tmp_path}/pole.py?" in capsys.readouterr().err
    file.write_text("from tests.rl.own_environments import Point as short_cart_pole\n")
    for command in (["evaluate", str(run)], ["train", "--resume", str(run)]):
        assert main(command) == 2
        words = (
            "must have the spaces that this run was started with, observations [4], 2 discrete actions, goals [1], got"
        )
        assert words in capsys.readouterr().err


def test_a_package_registers_a_name(tmp_path, monkeypatch, capsys) -> None:
    installed = tmp_path / "own-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[maml_cuda.environments]\nown-point = {HERE}:Point\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = str(tmp_path / "run")
    assert main(["train", "own-point", *OPTIONS, "--out", run]) == 0
    (installed / "entry_points.txt").unlink()
    capsys.readouterr()
    assert main(["evaluate", run]) == 2
    assert "must be an environment that an installed package registers" in capsys.readouterr().err
    assert main(["train", "own-point"]) == 2
    assert (
        "FILE.py:NAME of your own environment, or a folder of class folders, got 'own-point'" in capsys.readouterr().err
    )


def test_a_classic_through_the_adapter_is_the_classic() -> None:
    environment = make_environment(f"{HERE}:PendulumGoal")
    goals = environment.sample_goals(2, seeded())
    assert goals.shape == (2, 3)
    first = environment.reset(goals, 2, seeded(1))
    actions = torch.randn(3, 2, 2, 1, generator=seeded(2))
    seeds = torch.randint(2**31, (4,), generator=seeded(1)).tolist()
    steps = [environment.step(environment.clip(of_step)) for of_step in actions]
    for index, seed in enumerate(seeds):
        task, episode = divmod(index, 2)
        alone = make_environment(f"{HERE}:PendulumGoal")._copies[0]
        alone.set_task({"angle": float(goals[task, 0]), "name": np.arange(2)})
        observation, _ = alone.reset(seed=seed)
        assert first[task, episode].tolist() == observation.tolist()
        for action, step in zip(actions, steps, strict=True):
            torque = np.clip(2 * action[task, episode].numpy(), -2, 2)
            observation, reward, *_ = alone.step(torque)
            assert step.observations[task, episode].tolist() == observation.tolist()
            assert float(step.rewards[task, episode]) == np.float32(reward)


def test_episodes_end_where_they_are_terminated_or_truncated() -> None:
    environment = make_environment(f"{HERE}:short_cart_pole")
    goals = environment.sample_goals(1, seeded())
    environment.reset(goals, 2, seeded())
    environment._copies[0].unwrapped.state[2] = 1.0  # the pole has fallen
    ends = [environment.step(torch.zeros(1, 2, dtype=torch.int64)).done.tolist() for _ in range(3)]
    assert ends == [[[True, False]], [[False, False]], [[False, True]]]
    assert environment.step(torch.zeros(1, 2, dtype=torch.int64)).rewards.tolist() == [[0, 0]]


class Odd(Point):
    """Spaces that are no plain boxes."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (1, 2), np.float32), "b": spaces.Discrete(3, start=5)})
    action_space = spaces.Box(np.array([[-1.0], [0.0]]), np.array([[3.0], [1.0]]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        return {"a": np.zeros((1, 2), np.float32), "b": 6}, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.action = action
        return {"a": np.full((1, 2), 0.5, np.float32), "b": 7}, np.float64(1), False, False, {}


def test_other_spaces_are_flattened_and_scaled() -> None:
    environment = GymnasiumEnvironment(Odd, "odd")
    assert environment.spaces == ("observations [5], actions [2, 1] from [[-1.0], [0.0]] to [[3.0], [1.0]], goals [2]")
    assert environment.reset(torch.zeros(1, 2), 1, seeded()).tolist() == [[[0, 0, 0, 1, 0]]]
    step = environment.step(environment.clip(torch.tensor([[[-2.0, 0.5]]])))
    assert step.observations.tolist() == [[[0.5, 0.5, 0, 0, 1]]]
    assert environment._copies[0].action.tolist() == [[-1.0], [0.75]]


def test_discrete_actions_have_the_probabilities_of_the_policy() -> None:
    environment = make_environment(f"{HERE}:DiscreteBatchedPoint")
    policy = CategoricalPolicy(2, 3, width=5)
    fast = {name: torch.stack([p.detach(), 3 * p.detach()]) for name, p in policy.named_parameters()}
    goals = torch.full((2, 2), 9.0, dtype=torch.float64)
    episodes = sample_episodes(environment, goals, fast, 4000, 1, seeded(), Clock(), tell_goal=False)
    logits = torch.stack(
        [
            torch.func.functional_call(policy, {k: v[task] for k, v in fast.items()}, episodes.observations[task, :, 0])
            for task in range(2)
        ]
    )
    drawn = episodes.actions[:, :, 0]
    torch.testing.assert_close(episodes.log_probs[:, :, 0], policies.log_prob(logits, drawn))
    for task in range(2):
        shares = Counter(drawn[task].tolist())
        for action, chance in enumerate(logits[task].softmax(-1).mean(0).tolist()):
            assert abs(shares[action] / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5


@pytest.mark.parametrize(
    "task",
    [0.1, -3, True, np.float32(0.1), np.array([[1, 2]]), {"a": (0.3, [1]), "b": np.zeros(2, np.float32)}],
    ids=str,
)
def test_tasks_are_numbers_and_back(task) -> None:
    form = TaskNumbers("mine", task)
    numbers = form.numbers(task)
    assert len(numbers) == form.size
    np.testing.assert_equal(form.task(numbers), task)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("x = 1", "Missing", "own.py must define Missing, got a module without it"),
        ("class Pendulum: pass", "Pendulums", "did you mean Pendulum?"),
        ("x = 1", "x", "must be a subclass of maml_cuda.rl.Environment or gymnasium.Env, or a function"),
        ("x = object", "x", "must be a maml_cuda.rl.Environment or gymnasium.Env, got an object of builtins.object"),
        ("def x(a): pass", "x", "must be created without arguments, got TypeError: x() missing 1 required"),
        ("import no_such_thing", "x", "own.py must be importable, got ModuleNotFoundError: No module named 'no_such"),
        ("\n1 +", "x", "got SyntaxError: invalid syntax"),
        ("\n\n1 / 0", "x", "own.py, line 3)"),
        (f"import {HERE} as e\nx = e.PendulumEnv", "x", "x must have sample_task(rng) or sample_tasks("),
    ],
)  # fmt: skip
def test_code_that_cannot_be_used(tmp_path, capsys, text: str, name: str, words: str) -> None:
    file, run = tmp_path / "own.py", tmp_path / "run"
    file.write_text(text)
    sys.modules.pop("maml_cuda_user_code_own", None)
    assert main(["train", f"{file}:{name}", "--out", str(run)]) == 2
    assert words in capsys.readouterr().err
    assert not run.exists()


def test_names_that_are_none(capsys) -> None:
    for name, words in {
        "no_module:X": "no_module must be a module that is installed, on PYTHONPATH or in",
        f"{HERE}.nothing:X": f"got no module {HERE}.nothing",
        "maml_cuda:": "must be package.module:NAME or FILE.py:NAME, got 'maml_cuda:'",
    }.items():
        assert main(["train", name]) == 2
        assert words in capsys.readouterr().err


def test_options_that_do_not_fit(tmp_path, capsys) -> None:
    run = ["--out", str(tmp_path / "run")]
    assert main(["train", f"{HERE}:DiscretePoint", "--start-std", "2", *run]) == 2
    assert "start_std must be left out for discrete actions, got 2.0" in capsys.readouterr().err
    assert main(["train", f"{HERE}:Point", "--ways", "2", *run]) == 2
    assert "ways must be left out for this job, which has no such setting, got 2" in capsys.readouterr().err
    assert main(["train", f"{HERE}:Point", "--max-kl", "2", *run]) == 2
    assert "max_kl must be left out for" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def changed(**attributes) -> Environment:
    return GymnasiumEnvironment(type("Changed", (Point,), attributes), "mine")


def returns(*parts):
    return lambda self, action: parts


PLACE = np.zeros(2)
GLOBAL = np.random.RandomState(0)


def unseeded_reset(self, **given):
    self.place = GLOBAL.rand(2)
    return self.place, {}


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"sample_task": None, "set_task": None}, "must have"),
        ({"action_space": spaces.MultiDiscrete([2, 3])}, "action_space of mine must be Discrete or a Box of floating"),
        ({"action_space": spaces.Box(-np.inf, 1, (2,))}, "with bounds, got Box"),
        ({"action_space": None}, "with bounds, got None"),
        ({"observation_space": spaces.Sequence(spaces.Discrete(2))}, "observation_space of mine must be one that gymn"),
        ({"sample_task": lambda self, rng: "left"}, "a task of mine must be a number, an array, or a dict"),
        ({"sample_task": lambda self, rng: rng.random(rng.integers(1, 9))}, "all tasks of mine must have one"),
        ({"sample_task": lambda self, rng: int(rng.integers(2**60, 2**61))}, "a task of mine must fit float64, got"),
        ({"sample_task": lambda self, rng: [np.nan, 0.0]}, "goals must be finite, got nan"),
        ({"sample_task": lambda self, rng: GLOBAL.rand(2)}, "goals of mine must be the same if the seed is"),
        ({"reset": unseeded_reset}, "observations of mine must be the same if the seed is"),
        ({"reset": lambda self, **given: PLACE}, "reset of mine must return (observation, info), as in"),
        ({"reset": lambda self, **given: (np.zeros(3), {})}, "an observation of mine must be in Box"),
        ({"reset": lambda self, **given: (PLACE * np.nan, {})}, "must return finite numbers, got observ"),
        ({"step": returns(PLACE, 0.0, False, {})}, "step of mine must return (observation, reward, terminated, trunc"),
        ({"step": returns(np.zeros((2, 1)), 0.0, False, False, {})}, "an observation of mine must be in Box"),
        ({"step": returns(PLACE, "1", False, False, {})}, "a reward of mine must be a number, got '1'"),
        ({"step": returns(PLACE, np.zeros(1), False, False, {})}, "a reward of mine must be a number, got array"),
        ({"step": returns(PLACE, np.nan, False, False, {})}, "must return finite numbers, got reward nan and observ"),
        (
            {"sample_task": property(), "sample_tasks": lambda self, n: [0.0, 1.0, 2.0]},
            "sample_tasks(1) of mine must return 1 tasks, got 3",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)  # fmt: skip
def test_a_gymnasium_environment_that_is_wrong(attributes: dict, words: str) -> None:
    with pytest.raises((ValueError, FloatingPointError)) as caught:
        try_episodes(changed(**attributes))
    assert words in str(caught.value)


class Wrong(Environment):
    """A batched environment whose parts a test replaces."""

    observation_size = action_size = goal_size = 1

    def sample_goals(self, tasks, generator):
        return torch.zeros(tasks, 1)

    def _reset(self, episodes, generator):
        return torch.zeros(len(self.goals), episodes, 1)

    def _step(self, actions):
        return Step(torch.zeros(2, 2, 1), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))


RIGHT = Wrong()._step(None)


@pytest.mark.parametrize(
    ("method", "found", "words"),
    [
        ("sample_goals", torch.zeros(2, 1, dtype=torch.int64), "goals of Wrong must be a tensor of floating point"),
        ("sample_goals", torch.zeros(3, 1), "sample_goals of Wrong must return 2 goals, got [3, 1]"),
        ("sample_goals", torch.zeros(2, 2), "goals must be [tasks, 1] for Wrong, got [2, 2]"),
        ("_reset", torch.zeros(2, 2), "observations of Wrong must be torch.float32 [2, 2, 1], got"),
        ("_reset", np.zeros((2, 2, 1)), "observations of Wrong must be torch.float32 [2, 2, 1], got ndarray"),
        ("_reset", torch.full((2, 2, 1), torch.inf), "must return finite numbers, got observations up to inf"),
        ("_step", (1, 2, 3), "_step of Wrong must return a Step, got tuple"),
        ("_step", RIGHT._replace(rewards=torch.zeros(2, 2).double()), "rewards of Wrong must be torch.float32 [2, 2],"),
        ("_step", RIGHT._replace(done=torch.zeros(2, 2)), "done of Wrong must be torch.bool [2, 2], got torch.float32"),
        ("_step", RIGHT._replace(rewards=torch.full((2, 2), torch.nan)), "got reward nan and observations up to 0.0"),
    ],
)  # fmt: skip
def test_a_batched_environment_that_is_wrong(monkeypatch, method: str, found, words: str) -> None:
    monkeypatch.setattr(Wrong, method, lambda self, *given: found)
    with pytest.raises((ValueError, FloatingPointError)) as caught:
        try_episodes(Wrong())
    assert words in str(caught.value)


def test_discrete_actions_out_of_range() -> None:
    environment = make_environment(f"{HERE}:DiscreteBatchedPoint")
    environment.reset(torch.zeros(1, 2), 2, seeded())
    with pytest.raises(ValueError, match=r"actions must be 0 to 2 for DiscreteBatchedPoint, got 3.0 in task 0"):
        environment.step(torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"actions must be int64 for DiscreteBatchedPoint, got torch.float32"):
        environment.step(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"actions must be \[1, 2\] for DiscreteBatchedPoint, got \[1, 2, 1\]"):
        environment.step(torch.zeros(1, 2, 1, dtype=torch.int64))
