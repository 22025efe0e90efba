"""Meta-training of a policy: algorithm 3 of Finn et al. 2017, as a run of ``maml-cuda train``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from maml_cuda import FusedMAML
from maml_cuda.rl.adaptation import evaluate_returns
from maml_cuda.rl.advantages import samples
from maml_cuda.rl.clock import Clock
from maml_cuda.rl.environments import environment_of
from maml_cuda.rl.inner import MetaSamples, initial_parameters, inner_step
from maml_cuda.rl.outer import OuterStep, clipped, trpo, vpg
from maml_cuda.rl.own_environments import try_episodes
from maml_cuda.rl.policy import CategoricalPolicy, GaussianPolicy
from maml_cuda.rl.sampling import sample_episodes
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train.bests import with_validation
from maml_cuda.train.devices import only_on_cpu
from maml_cuda.train.jobs import make_generator
from maml_cuda.train.loop import Training
from maml_cuda.train.progress import Progress


def make_policy(settings: RLSettings, kind: type[FusedMAML] = FusedMAML) -> FusedMAML:
    """A new policy, initialised from the seed of ``settings``. torch's global generator does not change."""
    environment = environment_of(settings)
    observed = environment.observation_size + settings.tell_goal * environment.goal_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sizes = observed, environment.action_size, settings.width, settings.output_scale
        model: nn.Module
        if environment.discrete:
            model = CategoricalPolicy(*sizes)
        else:
            model = GaussianPolicy(*sizes, settings.start_std)
    rates = [settings.rate(step) for step in range(settings.inner_steps)]
    return kind(
        model,
        torch.tensor(rates) if len(rates) > 1 else settings.inner_lr,
        settings.inner_steps,
        loss="categorical_policy_gradient" if environment.discrete else "gaussian_policy_gradient",
        first_order=settings.first_order,
        backend=settings.backend,
    )


class RLTraining(Training):
    """The state of a run between two meta-iterations.

    One iteration draws tasks and samples episodes of each with the policy. It adapts the policy to each task by a
    policy-gradient step and samples episodes with the adapted policies, once for each inner step. Then it takes an
    outer step on the last episodes, which differentiates through the inner steps.
    """

    columns = ("iteration", "before", "after", "surrogate", "kl", "accepted", "std", "validation")
    settings: RLSettings  # type: ignore[assignment]

    def _build(self) -> None:
        job = self.settings.job
        if self.ranks.count > 1:
            raise ValueError(f"processes must be 1 for {job}, a policy, got {self.ranks.count}")
        only_on_cpu(job, self.device)
        self.environment = environment_of(self.settings)
        if self.settings.spaces:
            try_episodes(self.environment)
        self.module = self.maml = make_policy(self.settings)
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=self.settings.meta_lr, fused=True)
        self.generator = make_generator(self.settings, "train")
        self.clock = Clock()

    @property
    def backend(self) -> str:
        return self.maml.backend

    def _restore(self, info: dict[str, Any]) -> None:
        super()._restore(info)
        self.clock.seconds = info["seconds_of"]

    def _info(self) -> dict[str, Any]:
        return super()._info() | {"seconds_of": self.clock.seconds}

    def _step(self, log: bool) -> dict[str, float]:
        settings, clock = self.settings, self.clock
        goals = self.environment.sample_goals(settings.meta_batch, self.generator)
        fast = initial_parameters(self.maml, len(goals))
        last = settings.inner_steps
        support, query, returns = [], [], []
        for k in range(last + 1):
            episodes = sample_episodes(
                self.environment, goals, fast, settings.episodes, settings.horizon, self.generator, clock,
                tell_goal=settings.tell_goal,
            )  # fmt: skip
            returns.append(float(episodes.returns.mean()))
            with clock.measure("gradient"):
                x, y = samples(episodes, settings.discount, settings.gae_lambda, ratio=True)
                if k == last or (k > 0 and settings.every_step):
                    query.append((x, y))
                if k < last:
                    support.append((x, y._replace(old_log_probs=None)))
                    fast = inner_step(self.maml, fast, *support[-1], dict.fromkeys(fast, settings.rate(k)))
        with clock.measure("gradient"):
            step = self._outer(MetaSamples(tuple(support), tuple(query)))
        row = {
            "before": returns[0],
            "after": returns[-1],
            "surrogate": step.surrogate_after - step.surrogate_before,
            "kl": step.kl,
            "accepted": float(step.accepted),
        }
        if isinstance(self.maml.model, GaussianPolicy):
            row["std"] = float(self.maml.model.log_std.detach().exp().mean())
        return row

    def _outer(self, batch: MetaSamples) -> OuterStep:
        settings = self.settings
        if settings.outer == "trpo":
            return trpo(self.maml, batch, settings.max_kl, settings.damping)
        if settings.outer == "vpg":
            return vpg(self.maml, batch, self.optimizer)
        return clipped(self.maml, batch, self.optimizer, settings.epochs, settings.clip)

    def _log(self, step: dict[str, float], progress: Progress) -> dict[str, float]:
        shares = ", ".join(f"{what} {share:.0%}" for what, share in self.clock.shares().items())
        progress.words = f"return {step['before']:.1f} -> {step['after']:.1f}, {shares}"
        return step

    def _validate(self) -> tuple[float, str]:
        """The mean return over 1 to ``test_steps`` adaptation steps (for a baseline, without adaptation), and a line of
        text with the return after each number of steps. Records the mean if it is the best.

        The tasks are the same each time.
        """
        settings = self.settings
        steps = settings.test_steps if settings.baseline == "none" else 0
        returns = evaluate_returns(
            self.maml, self.environment, settings, make_generator(settings, "validation"), self.clock,
            settings.validation_tasks, steps,
        ).mean(1)  # fmt: skip
        mean = float(returns[min(1, steps) :].mean())
        self.bests = with_validation(self.bests, self.iteration, mean, rising=True)
        found = ", ".join(f"{value:.1f}" for value in returns.tolist())
        return mean, f"iteration {self.iteration}: validation return {found} after 0 to {steps} steps"
