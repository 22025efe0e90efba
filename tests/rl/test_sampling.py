"""Sampled episodes, packing, baselines and advantages, against plain loops over single episodes."""

import numpy as np
import pytest
import torch
from torch import Generator

from maml_cuda import FusedMAML, policies
from maml_cuda.rl import make_environment
from maml_cuda.rl.advantages import advantages, baseline_features, baseline_values, discounted_sums, samples
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.policy import GaussianPolicy, act
from maml_cuda.rl.sampling import Episodes, sample_episodes


def ragged(tasks: int = 3, episodes: int = 4, steps: int = 9, size: int = 2, seed: int = 0) -> Episodes:
    generator = Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (tasks, episodes), generator=generator)
    lengths[0, 0] = steps
    alive = (torch.arange(steps) < lengths.unsqueeze(-1)).float()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(tasks, episodes, steps, *shape, generator=generator)

    padded = alive.unsqueeze(-1)
    return Episodes(draw(size) * 4 * padded, draw(2) * padded, draw() * alive, draw() * alive, alive)


def parts(episodes: Episodes, task: int):
    """(observations, rewards) of each episode of a task, without padding, as float64 arrays."""
    for episode in range(episodes.alive.shape[1]):
        length = int(episodes.alive[task, episode].sum())
        yield (
            episodes.observations[task, episode, :length].double().numpy(),
            episodes.rewards[task, episode, :length].double().numpy(),
        )


def discounted(values: np.ndarray, discount: float) -> np.ndarray:
    out, running = np.zeros(len(values)), 0.0
    for t in reversed(range(len(values))):
        out[t] = running = values[t] + discount * running
    return out


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_discounted_sums(discount: float) -> None:
    values = torch.randn(2, 3, 7, dtype=torch.float64, generator=Generator().manual_seed(0))
    found = discounted_sums(values, discount)
    for row, expected in zip(found.view(-1, 7), values.view(-1, 7), strict=True):
        np.testing.assert_allclose(row, discounted(expected.numpy(), discount), rtol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.95, 1.0])
def test_advantages_are_rllabs(gae_lambda: float) -> None:
    """The baseline by least squares on a task's own samples, GAE, normalisation: one episode at a time."""
    episodes = ragged()
    found = advantages(episodes, 0.99, gae_lambda)
    values = baseline_values(episodes, discounted_sums(episodes.rewards.double(), 0.99))
    for task in range(3):
        rows, targets = [], []
        for observations, rewards in parts(episodes, task):
            o = np.clip(observations, -10, 10)
            t = np.arange(len(o))[:, None] / 100
            rows.append(np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], 1))
            targets.append(discounted(rewards, 0.99))
        x, y = np.concatenate(rows), np.concatenate(targets)
        weights = np.linalg.solve(x.T @ x + 1e-5 * np.eye(x.shape[1]), x.T @ y)
        raw = []
        for episode, (features, (_, rewards)) in enumerate(zip(rows, parts(episodes, task), strict=True)):
            value = np.append(features @ weights, 0)
            np.testing.assert_allclose(values[task, episode, : len(rewards)], value[:-1], rtol=1e-6, atol=1e-6)
            raw.append(discounted(rewards + 0.99 * value[1:] - value[:-1], 0.99 * gae_lambda))
        everything = np.concatenate(raw)
        for episode, one in enumerate(raw):
            expected = (one - everything.mean()) / (everything.std() + 1e-8)
            np.testing.assert_allclose(found[task, episode, : len(one)], expected, rtol=1e-4, atol=1e-5)
            assert not found[task, episode, len(one) :].any()


def test_features_are_clipped() -> None:
    features = baseline_features(torch.full((1, 1, 2, 1), 50.0))
    np.testing.assert_allclose(features[0, 0], [[10, 100, 0, 0, 0, 1], [10, 100, 0.01, 1e-4, 1e-6, 1]], rtol=1e-12)


def test_the_ridge_grows_for_states_that_hardly_vary() -> None:
    """Rounding makes such a matrix indefinite: 60 features of nearly the same large value."""
    episodes = ragged(steps=40, size=30)
    episodes.observations = (9 + 1e-9 * episodes.observations) * episodes.alive.unsqueeze(-1)
    returns = discounted_sums(1e6 * episodes.rewards.double(), 0.99)
    assert baseline_values(episodes, returns).isfinite().all()
    assert advantages(episodes, 0.99, 1.0).isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_baseline_of_an_ants_many_features(threads: int) -> None:
    """torch's batched LU of such matrices fails with more than one thread; Cholesky does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        episodes = ragged(tasks=20, episodes=6, steps=60, size=125)
        assert baseline_values(episodes, discounted_sums(episodes.rewards.double(), 0.99)).isfinite().all()
    finally:
        torch.set_num_threads(before)


def test_packing_keeps_every_sample_in_order() -> None:
    episodes = ragged(seed=3)
    x, y = samples(episodes, 0.99, 1.0, ratio=True)
    counts = episodes.alive.sum((1, 2)).int()
    assert x.shape == (3, counts.max(), 2)
    gains = advantages(episodes, 0.99, 1.0)
    for task, count in enumerate(counts.tolist()):
        alive = episodes.alive[task].bool()
        assert torch.equal(x[task, :count], episodes.observations[task][alive])
        assert torch.equal(y.actions[task, :count], episodes.actions[task][alive])
        assert torch.equal(y.advantages[task, :count], gains[task][alive])
        assert torch.equal(y.old_log_probs[task, :count], episodes.log_probs[task][alive])
        assert y.weights[task].tolist() == [1.0] * count + [0.0] * (len(x[task]) - count)
    assert samples(episodes, 0.99, 1.0, ratio=False)[1].old_log_probs is None


def test_a_task_without_a_step_is_named() -> None:
    episodes = ragged()
    episodes.alive[2] = 0
    with pytest.raises(ValueError, match="episodes must have at least one step in each task, got none in task 2"):
        samples(episodes, 0.99, 1.0, ratio=False)


def test_observations_that_are_not_finite_name_the_task() -> None:
    episodes = ragged()
    episodes.observations[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="observations must be finite, got NaN or infinity in task 1"):
        samples(episodes, 0.99, 1.0, ratio=False)


def policy(size: int = 2, actions: int = 2) -> FusedMAML:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FusedMAML(GaussianPolicy(size, actions, 7), 0.1, loss="gaussian_policy_gradient", backend="reference")


def spread(maml: FusedMAML, tasks: int) -> dict[str, torch.Tensor]:
    generator = Generator().manual_seed(4)
    return {
        name: p.detach() + 0.3 * torch.randn(tasks, *p.shape, generator=generator)
        for name, p in maml.model.named_parameters()
    }


def test_act_equals_predict() -> None:
    maml = policy()
    fast = spread(maml, 3)
    x = torch.randn(3, 5, 2, generator=Generator().manual_seed(1))
    mean, log_std = act(fast, x)
    expected, expected_log_std = maml.predict(fast, x)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(log_std, expected_log_std.view_as(log_std))


def test_sampled_episodes_are_what_the_environment_and_the_policy_did() -> None:
    maml, environment = policy(), make_environment("navigation")
    fast = spread(maml, 3)
    goals = torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.4, 0.4]])
    clock = Clock()
    found = sample_episodes(environment, goals, fast, 400, 30, Generator().manual_seed(0), clock)
    assert found.observations.shape[:3] == found.alive.shape
    lengths = found.alive.sum(-1)
    assert lengths.min() < lengths.max() <= 30  # some points hit the goal by chance
    x = found.observations.flatten(1, 2)
    expected = policies.log_prob(maml.predict(fast, x), found.actions.flatten(1, 2)).view_as(found.log_probs)
    torch.testing.assert_close(found.log_probs, expected * found.alive, rtol=1e-4, atol=1e-4)
    moved = found.observations[..., :-1, :] + 0.1 * found.actions[..., :-1, :].clamp(-1, 1)
    stays = found.alive[..., 1:].bool()
    torch.testing.assert_close(found.observations[..., 1:, :][stays], moved[stays])
    away = (moved - goals[:, None, None]).norm(dim=-1)
    torch.testing.assert_close(found.rewards[..., :-1], -away * found.alive[..., :-1])
    torch.testing.assert_close(found.returns, found.rewards.sum(-1))
    assert all(seconds > 0 for what, seconds in clock.seconds.items() if what != "gradient")
    assert sum(clock.shares().values()) == pytest.approx(1)


def test_the_oracle_observes_the_goal() -> None:
    environment = make_environment("navigation")
    maml = policy(size=4)
    goals = torch.tensor([[0.1, 0.2], [-0.3, 0.4]])
    found = sample_episodes(
        environment, goals, spread(maml, 2), 3, 5, Generator().manual_seed(0), Clock(), tell_goal=True
    )
    assert torch.equal(found.observations[..., 2:], goals[:, None, None].expand(2, 3, 5, 2))


def test_torch_has_one_thread_while_episodes_are_sampled(monkeypatch) -> None:
    environment, seen = make_environment("navigation"), []
    step = environment._step
    monkeypatch.setattr(torch, "get_num_threads", lambda: seen[-1] if seen else 3)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    within = []

    def watched(actions):
        within.append((seen[-1], environment.threads))
        if len(within) == 2:
            raise ValueError("broken off")
        return step(actions)

    monkeypatch.setattr(environment, "_step", watched)
    with pytest.raises(ValueError, match="broken off"):
        sample_episodes(
            environment, torch.zeros(1, 2) + 0.4, spread(policy(), 1), 2, 5, Generator().manual_seed(0), Clock()
        )
    assert within == [(1, 3)] * 2
    assert seen == [1, 3]
    assert environment.threads is None
