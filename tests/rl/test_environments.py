"""Environments: rewards, resets, ends and observations against the formulas and against MuJoCo's own fields."""

import warnings

import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Generator

from maml_cuda.rl import ENVIRONMENTS, make_environment
from maml_cuda.rl.gym_view import SingleTask

ROBOTS = [name for name in ENVIRONMENTS if name != "navigation"]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def drawn(environment, generator: Generator) -> torch.Tensor:
    return environment.clip(torch.randn(*environment.alive.shape, environment.action_size, generator=generator))


def test_navigation_by_hand() -> None:
    environment = make_environment("navigation")
    goals = torch.tensor([[0.1, 0.0], [-0.3, 0.4]])
    assert torch.equal(environment.reset(goals, 2, seeded()), torch.zeros(2, 2, 2))
    move = torch.tensor([[[0.095, 0.005], [0.0, 0.1]], [[-0.1, 0.1], [0.0, 0.0]]])
    step = environment.step(move)
    assert torch.equal(step.observations, move)
    distances = torch.tensor([[0.005 * 2**0.5, 0.1 * 2**0.5], [0.13**0.5, 0.5]])
    torch.testing.assert_close(step.rewards, -distances)
    assert step.done.tolist() == [[True, False], [False, False]]  # 0.005 away in both coordinates
    after = environment.step(torch.full((2, 2, 2), 0.1))
    assert float(after.rewards[0, 0]) == 0
    assert torch.equal(after.observations[0, 0], move[0, 0])


def test_an_episode_of_navigation_ends_near_the_goal_in_both_coordinates() -> None:
    environment = make_environment("navigation")
    environment.reset(torch.tensor([[0.0, 0.05]]), 1, seeded())
    assert not environment.step(torch.zeros(1, 1, 2)).done.any()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("navigation", -0.5, 0.5),
        ("cheetah-direction", 0, 2),
        ("cheetah-velocity", 0, 2),
        ("ant-direction", 0, 3),
        ("ant-velocity", 0, 3),
        ("ant-goal", -3, 3),
    ],
)
def test_goals_are_uniform(name: str, low: float, high: float) -> None:
    goals = make_environment(name).sample_goals(4000, seeded())
    assert goals.shape == (4000, 2 if name in ("navigation", "ant-goal") else 1)
    span = high - low
    assert low <= goals.min() < low + 0.01 * span
    assert high - 0.01 * span < goals.max() <= high
    assert abs(goals.mean() - (low + high) / 2) < 0.03 * span


@pytest.mark.parametrize("name", ["cheetah-velocity", "ant-velocity"])
def test_resets_have_the_authors_noise(name: str) -> None:
    environment = make_environment(name)
    environment.reset(environment.sample_goals(40, seeded()), 50, seeded(1))
    nq = environment.model.nq
    qpos, qvel = np.split(environment._position(environment._states) - 0.0, [nq], axis=1)
    qpos = qpos - environment._start
    assert abs(qpos.mean()) < 5e-4
    assert qpos.std() == pytest.approx(0.01, rel=0.03)
    assert abs(qvel.mean()) < 5e-3
    assert qvel.std() == pytest.approx(0.1, rel=0.03)
    if name.startswith("ant"):
        assert environment._start.tolist() == [0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]


def by_mujoco(environment, state: np.ndarray, control: np.ndarray) -> tuple[mujoco.MjData, np.ndarray]:
    """One control step by ``mj_step``: the end state, and the data of the state before the last substep."""
    model, full = environment.model, mujoco.mjtState.mjSTATE_FULLPHYSICS
    data = mujoco.MjData(model)
    mujoco.mj_setState(model, data, state, full)
    data.ctrl[:] = control
    for _ in range(4):
        mujoco.mj_step(model, data)
    before = mujoco.MjData(model)
    for what in (full, mujoco.mjtState.mjSTATE_CTRL, mujoco.mjtState.mjSTATE_WARMSTART):
        size = mujoco.mj_stateSize(model, what)
        copied = np.empty(size)
        mujoco.mj_getState(model, data, copied, what)
        mujoco.mj_setState(model, before, copied, what)
    mujoco.mj_forward(model, before)
    mujoco.mj_subtreeVel(model, before)
    mujoco.mj_rnePostConstraint(model, before)
    mujoco.mj_step(model, data)
    end = np.empty(len(state))
    mujoco.mj_getState(model, data, end, full)
    return before, end


@pytest.mark.parametrize("name", ROBOTS)
def test_a_step_is_mujocos_and_its_reward_the_authors(name: str) -> None:
    environment = make_environment(name)
    generator = seeded()
    goals = environment.sample_goals(3, generator)
    environment.reset(goals, 2, generator)
    contacts = 0
    for _ in range(25):
        states, actions = environment._states.copy(), drawn(environment, generator)
        alive = environment.alive.clone()
        step = environment.step(actions)
        for task in range(3):
            for episode in range(2):
                if not alive[task, episode]:
                    assert step.rewards[task, episode] == 0
                    continue
                control = actions[task, episode].double().numpy()
                data, end = by_mujoco(environment, states[2 * task + episode], control)
                observation = step.observations[task, episode].numpy()
                nq, nv = environment.model.nq, environment.model.nv
                qpos, qvel = end[1 : 1 + nq], end[1 + nq : 1 + nq + nv]
                com, velocity = data.subtree_com[1], data.subtree_linvel[1, 0]
                force = np.clip(data.cfrc_ext, -1, 1)
                goal = goals[task].double().numpy()
                if name.startswith("cheetah"):
                    expected = np.concatenate([qpos[1:], qvel, com])
                    cost = 0.05 * (control**2).sum()
                    gain = velocity * (-1 if goal < 1 else 1) if name.endswith("direction") else -abs(velocity - goal)
                else:
                    contacts += data.ncon
                    expected = np.concatenate([qpos, qvel, force.ravel(), data.xmat[1], com])
                    cost = 0.005 * (control**2).sum() + 0.0005 * (force**2).sum() - 0.05
                    gain = {
                        "ant-direction": velocity * (-1 if goal[0] < 1.5 else 1),
                        "ant-velocity": 1 - abs(velocity - goal[0]),
                        "ant-goal": 4 - abs(com[:2] - goal).sum() if len(goal) == 2 else 0,
                    }[name]
                    assert bool(step.done[task, episode]) == (not 0.2 <= qpos[2] <= 1.0)
                np.testing.assert_allclose(observation, expected.astype(np.float32), rtol=1e-4, atol=1e-5)
                assert float(step.rewards[task, episode]) == pytest.approx(float(np.squeeze(gain)) - cost, abs=1e-5)
    assert contacts > 0 or name.startswith("cheetah")


def test_sizes_are_the_authors() -> None:
    sizes = {name: (make_environment(name).observation_size, make_environment(name).action_size) for name in ROBOTS}
    assert sizes == {name: (20, 6) if name.startswith("cheetah") else (125, 8) for name in ROBOTS}


@pytest.mark.parametrize("name", ["cheetah-direction", "ant-goal"])
def test_an_episode_does_not_depend_on_the_others(name: str, monkeypatch) -> None:
    def run(threads: int, tasks: slice) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        environment = make_environment(name)
        environment.reset(goals, 3, seeded(2))
        environment._states = environment._states.reshape(4, 3, -1)[tasks].reshape(-1, environment._states.shape[1])
        environment.goals, environment.alive = goals[tasks], environment.alive[tasks]
        environment._last = environment._last[tasks]
        for step in range(12):
            actions = environment.clip(noise[step][tasks])
            result = environment.step(actions)
        return result.observations, result.rewards

    goals = make_environment(name).sample_goals(4, seeded())
    noise = torch.randn(12, 4, 3, make_environment(name).action_size, generator=seeded(1))
    whole, rewards = run(1, slice(0, 4))
    for threads, tasks in ((2, slice(0, 4)), (3, slice(1, 3))):
        observations, some = run(threads, tasks)
        assert torch.equal(observations, whole[tasks])
        assert torch.equal(some, rewards[tasks])


def test_episodes_of_ants_that_fall_end_and_are_not_simulated(monkeypatch) -> None:
    environment = make_environment("ant-direction")
    environment.reset(torch.tensor([[0.0], [3.0]]), 2, seeded())
    environment._states[1, 3] = 1.5  # the height of the second episode's torso
    rows = []
    simulate = environment._simulate
    monkeypatch.setattr(environment, "_simulate", lambda s, c, n: rows.append(len(s)) or simulate(s, c, n))
    first = environment.step(torch.zeros(2, 2, 8))
    second = environment.step(torch.zeros(2, 2, 8))
    assert first.done.tolist() == [[False, True], [False, False]]
    assert rows == [4, 3]
    assert torch.equal(second.observations[0, 1], first.observations[0, 1])
    assert environment.alive.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("name", list(ENVIRONMENTS))
def test_gymnasium_finds_nothing_wrong_with_a_single_task(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(SingleTask(name))
    for warning in caught:  # as of gymnasium's own robots, whose observations have no bounds either
        assert "infinity" in str(warning.message) or "not having a spec" in str(warning.message)


def test_a_single_task_is_the_batched_environment() -> None:
    view = SingleTask("navigation", goal=torch.tensor([0.2, -0.1]), horizon=3)
    observation, info = view.reset(seed=5)
    assert observation.tolist() == [0, 0]
    assert info["goal"].tolist() == pytest.approx([0.2, -0.1])
    for step in range(3):
        observation, reward, terminated, truncated, _ = view.step(np.array([0.05, 0.05], np.float32))
        assert truncated == (step == 2)
        assert not terminated
    assert observation.tolist() == pytest.approx([0.15, 0.15])
    assert reward == pytest.approx(-((0.05**2 + 0.25**2) ** 0.5))
    assert view.reset(options={"goal": [0.3, 0.3]})[1]["goal"].tolist() == pytest.approx([0.3, 0.3])
    goals = {tuple(SingleTask("ant-goal").reset(seed=seed)[1]["goal"].tolist()) for seed in (1, 1, 2)}
    assert len(goals) == 2


# -- errors ------------------------------------------------------------------------------------------------------


def test_an_action_out_of_range_is_refused_naming_the_task() -> None:
    environment = make_environment("navigation")
    environment.reset(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), 2, seeded())
    actions = torch.zeros(2, 2, 2)
    actions[1, 0, 1] = 0.11
    with pytest.raises(
        ValueError,
        match=r"actions must be in the box of navigation, -0\.1 to 0\.1, got 0\.109\d* in task 1 "
        r"\(goal 0\.3, 0\.4\), episode 0",
    ):
        environment.step(actions)
    actions[1, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="got nan in task 1"):
        environment.step(actions)
    with pytest.raises(ValueError, match=r"actions must be \[2, 2, 2\] for navigation, got \[2, 2\]"):
        environment.step(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["cheetah-direction", "ant-velocity"])
def test_nan_from_the_simulator_names_the_task(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes a log of it
    environment = make_environment(name)
    environment.reset(torch.tensor([[0.5], [1.5]]), 2, seeded())
    environment._states[3, 1 + environment.model.nq] = np.nan
    with pytest.raises(
        FloatingPointError,
        match=rf"the simulator of {name} must return finite numbers, got reward \S+ and observations up to nan in "
        r"task 1 \(goal 1\.5\), episode 1",
    ):
        environment.step(torch.zeros(2, 2, environment.action_size))


def test_bad_goals_and_episodes() -> None:
    environment = make_environment("ant-goal")
    with pytest.raises(ValueError, match=r"goals must be \[tasks, 2\] for ant-goal, got \[3, 1\]"):
        environment.reset(torch.zeros(3, 1), 2, seeded())
    with pytest.raises(ValueError, match="goals must be finite, got inf"):
        environment.reset(torch.tensor([[0.0, torch.inf]]), 2, seeded())
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        environment.reset(torch.zeros(3, 2), 0, seeded())
    with pytest.raises(ValueError, match=r"name must be one of navigation, .*, got 'walker'"):
        make_environment("walker")


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r'mujoco and gymnasium must be installed: pip install "maml-cuda\[rl\]"'
    ):
        make_environment("ant-goal")
    assert make_environment("navigation").name == "navigation"
