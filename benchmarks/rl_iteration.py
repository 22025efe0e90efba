"""One iteration of meta-reinforcement learning without simulation: `python -m benchmarks.rl_iteration`.

20 tasks of 2000 samples with the policy and the inner step of Finn, Abbeel, Levine (2017), section 5.3. An iteration
adapts the policies and does the TRPO step of `maml-cuda train`: surrogate loss and meta-gradient, ten iterations of
conjugate gradients and the step length (eleven Fisher-vector products), line search. Rollouts, returns and value
baselines are left out. The code (maml_cuda.rl.outer.trpo) is the same for maml_cuda and for the benchmark's baseline,
which differentiates by torch.autograd. Both steps are compared in float64, then timed in float32 in alternation.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from maml_cuda import FusedMAML, PolicyTarget, policies
from maml_cuda.benchmark.timing import interleave, run_block
from maml_cuda.benchmark.verification import WrongGradient
from maml_cuda.pytrees import of_task
from maml_cuda.rl.inner import MetaSamples
from maml_cuda.rl.outer import OuterStep, trpo
from maml_cuda.rl.settings import RLSettings
from maml_cuda.updates import InnerUpdate

from .gaussian_policy import LOSS, RATE, SAMPLES, TASKS, Policy, doubled, episode
from .machine import machine
from .rl_policy import losses

VERIFIED_TASKS = 3
VERIFIED_DAMPING = 0.1  # with 1e-5, as in training, ten conjugate gradient iterations amplify rounding to 1e-8
TOLERANCE = 1e-9  # relative, of the change of the parameters


class PlainAutograd:
    """The interface of FusedMAML that trpo uses, by torch.autograd, one task at a time.

    The graph of the gradient of the KL divergence is built once. Each Fisher-vector product is one backward pass
    through it, which is the fastest form of double backward that we know.
    """

    inner_steps = 1
    query_weights = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.score, self.ratio = losses(model)

    def _inner_update(self) -> InnerUpdate:
        return InnerUpdate({})  # nothing of it is learned

    def fast(self, x: Tensor, y: PolicyTarget, create_graph: bool) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        with torch.enable_grad():
            loss = self.score(parameters, x, y.actions, y.advantages)
            grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph)
            return {n: p - RATE * g for (n, p), g in zip(parameters.items(), grads, strict=True)}

    def __call__(self, x_spt: Tensor, y_spt: PolicyTarget, x_qry: Tensor, y_qry: PolicyTarget) -> Any:
        task_losses = []
        for t in range(len(x_spt)):
            y: Any = of_task(y_qry, t)
            fast = self.fast(x_spt[t], of_task(y_spt, t), True)
            task_losses.append(self.ratio(fast, x_qry[t], y.actions, y.advantages, y.old_log_probs))
        all_losses = torch.stack(task_losses)
        return SimpleNamespace(loss=all_losses.mean(), task_losses=all_losses.detach())

    def adapt(self, x_spt: Tensor, y_spt: PolicyTarget) -> dict[str, Tensor]:
        each = [self.fast(x_spt[t], of_task(y_spt, t), False) for t in range(len(x_spt))]
        return {n: torch.stack([fast[n].detach() for fast in each]) for n in each[0]}

    def predict(self, fast: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = vmap(lambda parameters, x: functional_call(self.model, parameters, (x,)))(fast, x)
        return mean, log_std.unsqueeze(1)

    def fisher(self, x_spt: Tensor, y_spt: PolicyTarget, x_qry: Tensor, weights: None) -> Callable[..., Any]:
        parameters = dict(self.model.named_parameters())
        divergences = []
        for t in range(len(x_spt)):
            fast = self.fast(x_spt[t], of_task(y_spt, t), True)
            mean, log_std = functional_call(self.model, fast, (x_qry[t],))
            old = mean.detach(), log_std.detach()
            divergences.append(policies.kl_divergence(old, (mean, log_std)).mean())
        at = list(parameters.values())
        gradient = torch.autograd.grad(torch.stack(divergences).mean(), at, create_graph=True)

        def product(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = torch.autograd.grad(gradient, at, [v[n] for n in parameters], retain_graph=True)
            return dict(zip(parameters, found, strict=True))

        return product


def fused(model: nn.Module) -> FusedMAML:
    return FusedMAML(model, RATE, 1, loss=LOSS, backend="fused")


IMPLEMENTATIONS: dict[str, Callable[[nn.Module], Any]] = {"maml_cuda": fused, "autograd": PlainAutograd}


def iterations(model: nn.Module, data: list, damping: float) -> dict[str, Callable[[], tuple[OuterStep, Tensor]]]:
    """By implementation: one iteration from the initial parameters. Returns the step and the change of parameters."""

    def step_of(build: Callable[[nn.Module], Any]) -> Callable[[], tuple[OuterStep, Tensor]]:
        samples = MetaSamples(((data[0], data[1]),), ((data[2], data[3]),))
        own = copy.deepcopy(model)
        maml = build(own)
        start = [p.detach().clone() for p in own.parameters()]

        def step() -> tuple[OuterStep, Tensor]:
            with torch.no_grad():
                for p, value in zip(own.parameters(), start, strict=True):
                    p.copy_(value)
            maml.adapt(*data[:2])
            done = trpo(maml, samples, RLSettings.max_kl, damping)
            return done, torch.cat([(p.detach() - s).flatten() for p, s in zip(own.parameters(), start, strict=True)])

        return step

    return {name: step_of(build) for name, build in IMPLEMENTATIONS.items()}


def verify(model: nn.Module, data: list) -> None:
    """Compares both steps in float64 on a few tasks; raises WrongGradient if they differ."""
    few = [first_tasks(d) for d in doubled(data)]
    both = iterations(copy.deepcopy(model).double(), few, VERIFIED_DAMPING).values()
    (done, change), (expected, expected_change) = (step() for step in both)
    error = float((change - expected_change).norm() / expected_change.norm())
    if not (done.accepted and expected.accepted) or not error <= TOLERANCE:
        raise WrongGradient(
            f"the step must be accepted and within {TOLERANCE:g} of autograd's, got {error:.1e}, {done}"
        )


def first_tasks(d: Any) -> Any:
    if isinstance(d, Tensor):
        return d[:VERIFIED_TASKS]
    return PolicyTarget(*(None if t is None else t[:VERIFIED_TASKS] for t in d))


def run(tasks: int, samples: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of an iteration of each implementation."""
    torch.manual_seed(0)
    model = Policy()
    data = episode(model, tasks, samples)
    verify(model, data)
    steps = iterations(model, data, RLSettings.damping)
    once = {name: run_block(step, 0).wall[0] for name, step in steps.items()}
    blocks = {name: lambda s, step=step: run_block(step, s) for name, step in steps.items()}
    return {name: 1e3 * timing.quartiles()[1] for name, timing in interleave(blocks, once, seconds).items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_iteration", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="timed seconds per implementation (default: 20)")
    parser.add_argument("--quick", action="store_true", help="three tasks of 20 samples, to test the benchmark itself")
    options = parser.parse_args(arguments)
    size = (3, 20) if options.quick else (TASKS, SAMPLES)
    found = run(*size, options.seconds)
    record = {"machine": machine(), "tasks": size[0], "samples": size[1], "milliseconds": found}
    print(json.dumps(record | {"relative time": found["autograd"] / found["maml_cuda"]}, indent=1))


if __name__ == "__main__":
    main()
