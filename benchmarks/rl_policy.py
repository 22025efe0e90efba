"""The meta-step of a policy, with autograd and torch.compile as baselines: `python -m benchmarks.rl_policy`.

As in Finn, Abbeel, Levine (2017), section 5.3: 20 tasks of 2000 samples, a Gaussian policy with two hidden layers of
100 ReLU units, one inner step on the score-function loss, the likelihood-ratio loss in the outer loop. Each
meta-gradient is verified in float64 and then timed in float32, in alternation within one process. `--fisher` adds a
Fisher-vector product by maml_cuda and by double backward through the KL divergence.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from maml_cuda import FusedMAML, PolicyTarget, policies, reference
from maml_cuda.benchmark.timing import interleave, run_block
from maml_cuda.benchmark.verification import FLOAT64_TOLERANCE, WrongGradient, relative_error

from .gaussian_policy import LOSS, RATE, SAMPLES, TASKS, Policy, doubled, episode
from .machine import machine

Step = Callable[[], object]


def fused(model: nn.Module, data: list) -> Step:
    maml = FusedMAML(model, RATE, 1, loss=LOSS, backend="fused")

    def step() -> None:
        maml.zero_grad()
        maml.backward(*data)

    return step


def losses(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The inner loss (score function) and the outer loss (likelihood ratio), written for autograd."""

    def log_prob(params: dict, x: Tensor, actions: Tensor) -> Tensor:
        return policies.log_prob(functional_call(model, params, (x,)), actions)

    def score(params: dict, x: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        return -(advantages * log_prob(params, x, actions)).mean()

    def ratio(params: dict, x: Tensor, actions: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
        return -(advantages * (log_prob(params, x, actions) - old).exp()).mean()

    return score, ratio


def flat(data: list) -> list[Tensor]:
    """The tensors of a meta-batch: x, actions, advantages; x, actions, advantages, old log-probabilities."""
    return [data[0], *data[1][:2], data[2], *data[3][:3]]


def autograd_loop(model: nn.Module, data: list) -> Step:
    """A loop over tasks, with one backward pass per task."""
    score, ratio = losses(model)
    params = dict(model.named_parameters())

    def step() -> None:
        model.zero_grad()
        for x, a, adv, *query in zip(*flat(data), strict=True):
            grads = torch.autograd.grad(score(params, x, a, adv), list(params.values()), create_graph=True)
            fast = {n: p - RATE * g for (n, p), g in zip(params.items(), grads, strict=True)}
            (ratio(fast, *query) / len(data[0])).backward()

    return step


def compiled(model: nn.Module, data: list) -> Step:
    """torch.compile of the whole meta-step of torch.func, vectorised over tasks."""
    score, ratio = losses(model)

    def adapted_loss(params: dict, x: Tensor, a: Tensor, adv: Tensor, *query: Tensor) -> Tensor:
        grads = grad(score)(params, x, a, adv)
        return ratio({n: p - RATE * grads[n] for n, p in params.items()}, *query)

    def mean_gradient(params: dict, *tasks: Tensor) -> dict[str, Tensor]:
        each = vmap(grad(adapted_loss), in_dims=(None, *[0] * len(tasks)))(params, *tasks)
        return {n: g.mean(0) for n, g in each.items()}

    torch._dynamo.reset()
    gradient = torch.compile(mean_gradient, fullgraph=True, dynamic=False)
    params, tasks = {n: p.detach() for n, p in model.named_parameters()}, flat(data)

    def step() -> None:
        found = gradient(params, *tasks)
        for n, p in model.named_parameters():
            p.grad = found[n]

    return step


IMPLEMENTATIONS: dict[str, Callable[[nn.Module, list], Step]] = {
    "maml_cuda": fused, "autograd loop": autograd_loop, "torch.compile": compiled,
}  # fmt: skip


def verified(name: str, model: nn.Module, data: list) -> Step:
    """The float32 step of an implementation, after its float64 gradient has been verified."""
    exact, double = copy.deepcopy(model).double(), doubled(data)
    _, expected = reference.meta_gradient(copy.deepcopy(exact), LOSS, *double, RATE, 1)
    IMPLEMENTATIONS[name](exact, double)()
    error = relative_error(exact, expected)
    if error > FLOAT64_TOLERANCE:
        raise WrongGradient(
            f"{name}: the meta-gradient must be within {FLOAT64_TOLERANCE:g} of the reference, got {error:.1e}"
        )
    step = IMPLEMENTATIONS[name](copy.deepcopy(model), data)
    step()
    return step


def fisher_steps(model: nn.Module, data: list) -> dict[str, Step]:
    """A Fisher-vector product, fused and by double backward, after both have been compared in float64 on two tasks."""
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def product(backend: str, model: nn.Module, data: list, v: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        maml = FusedMAML(model, RATE, 1, loss=LOSS, backend=backend)
        return lambda: maml.fisher_vector_product(*data[:3], v)

    few = [d[:2] if isinstance(d, Tensor) else PolicyTarget(*(None if t is None else t[:2] for t in d)) for d in data]
    exact, double = copy.deepcopy(model).double(), {n: t.double() for n, t in v.items()}
    got, expected = (product(b, exact, doubled(few), double)() for b in ("fused", "reference"))
    error = max(((got[n] - e).norm() / e.norm()).item() for n, e in expected.items())
    if error > 1e-9:
        raise WrongGradient(f"the Fisher-vector product must be within 1e-9 of double backward, got {error:.1e}")
    return {f"Fisher-vector product, {b}": product(b, model, data, v) for b in ("fused", "reference")}


def run(tasks: int, samples: int, seconds: float, names: list[str], fisher: bool) -> dict[str, float]:
    """Median milliseconds of each implementation."""
    torch.manual_seed(0)
    model = Policy()
    data = episode(model, tasks, samples)
    steps = {name: verified(name, model, data) for name in names}
    if fisher:
        steps.update(fisher_steps(model, data))
    once = {name: run_block(step, 0).wall[0] for name, step in steps.items()}
    blocks = {name: lambda s, step=step: run_block(step, s) for name, step in steps.items()}
    return {name: 1e3 * timing.quartiles()[1] for name, timing in interleave(blocks, once, seconds).items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_policy", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="timed seconds per implementation (default: 10)")
    names = list(IMPLEMENTATIONS)
    parser.add_argument("--implementation", nargs="+", choices=names, default=names, help="what to run (default: all)")
    parser.add_argument("--fisher", action="store_true", help="also time Fisher-vector products")
    parser.add_argument("--quick", action="store_true", help="two tasks of 20 samples, to test the benchmark itself")
    options = parser.parse_args(arguments)
    size = (2, 20) if options.quick else (TASKS, SAMPLES)
    found = run(*size, options.seconds, options.implementation, options.fisher)
    record = {"machine": machine(), "tasks": size[0], "samples": size[1], "milliseconds": found}
    if "maml_cuda" in found:
        record["relative time"] = {n: t / found["maml_cuda"] for n, t in found.items() if n in IMPLEMENTATIONS}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
