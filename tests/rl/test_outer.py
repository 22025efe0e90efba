"""Meta-gradient, Fisher-vector product and whole outer steps against double backward in float64, on ragged tasks."""

import copy

import pytest
import torch
from torch import Generator, Tensor
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call

from maml_cuda import FusedMAML, PolicyTarget
from maml_cuda.rl.outer import MetaSamples, clipped, conjugate_gradients, dot, trpo, vpg
from maml_cuda.rl.policy import GaussianPolicy

TASKS, WIDTH, RATE = 3, 6, 0.1
LENGTHS = ((7, 4, 5), (3, 8, 6))  # samples of each task, support and query


@pytest.fixture(params=["reference", "fused"])
def backend(request) -> str:
    return request.param


def make(backend: str, steps: int = 1, first_order: bool = False) -> FusedMAML:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = GaussianPolicy(3, 2, WIDTH).double()
        model.log_std.data += torch.tensor([0.2, -0.3], dtype=torch.float64)
        return FusedMAML(model, RATE, steps, loss="gaussian_policy_gradient", first_order=first_order, backend=backend)


def draw(lengths: tuple[int, ...], seed: int, ratio: bool) -> tuple[Tensor, PolicyTarget]:
    generator = Generator().manual_seed(seed)
    most = max(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(TASKS, most, *shape, dtype=torch.float64, generator=generator)

    weights = (torch.arange(most) < torch.tensor(lengths).unsqueeze(1)).double()
    return normal(3), PolicyTarget(normal(2), normal() * weights, normal() - 2.5 if ratio else None, weights)


def batch() -> MetaSamples:
    return MetaSamples(*draw(LENGTHS[0], 0, False), *draw(LENGTHS[1], 1, True))


def one(y: PolicyTarget, task: int, length: int) -> PolicyTarget:
    return PolicyTarget(*(None if part is None else part[task, :length] for part in y))


class Oracle:
    """The same by plain autograd: one task at a time, no padding, the graph of the inner loop kept."""

    def __init__(self, maml: FusedMAML, samples: MetaSamples) -> None:
        self.model, self.samples = copy.deepcopy(maml.model), samples
        self.steps, self.first_order = maml.inner_steps, maml.first_order
        self.theta = dict(self.model.named_parameters())

    def distribution(self, parameters: dict[str, Tensor], x: Tensor) -> Independent:
        mean, log_std = functional_call(self.model, parameters, (x,))
        return Independent(Normal(mean, log_std.exp()), 1)

    def adapted(self, task: int) -> dict[str, Tensor]:
        x, y = self.samples.x_spt[task, : LENGTHS[0][task]], one(self.samples.y_spt, task, LENGTHS[0][task])
        phi = dict(self.theta)
        for _ in range(self.steps):
            loss = -(self.distribution(phi, x).log_prob(y.actions) * y.advantages).mean()
            gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=not self.first_order)
            phi = {name: phi[name] - RATE * g for name, g in zip(phi, gradients, strict=True)}
        return phi

    def policies(self) -> list[Independent]:
        return [self.distribution(self.adapted(t), self.samples.x_qry[t, : LENGTHS[1][t]]) for t in range(TASKS)]

    def surrogate(self) -> Tensor:
        losses = []
        for task, policy in enumerate(self.policies()):
            y = one(self.samples.y_qry, task, LENGTHS[1][task])
            losses.append(-((policy.log_prob(y.actions) - y.old_log_probs).exp() * y.advantages).mean())
        return torch.stack(losses).mean()

    def kl(self, old: list[Independent]) -> Tensor:
        pairs = zip(old, self.policies(), strict=True)
        return torch.stack([kl_divergence(before, after).mean() for before, after in pairs]).mean()

    def detached(self) -> list[Independent]:
        return [Independent(Normal(p.mean.detach(), p.stddev.detach()), 1) for p in self.policies()]

    def flat(self, values) -> Tensor:
        return torch.cat([value.reshape(-1) for value in values])

    def gradient(self) -> Tensor:
        return self.flat(torch.autograd.grad(self.surrogate(), list(self.theta.values()))).detach()

    def fisher(self, old: list[Independent], v: Tensor) -> Tensor:
        theta = list(self.theta.values())
        g = self.flat(torch.autograd.grad(self.kl(old), theta, create_graph=True))
        return self.flat(torch.autograd.grad(g @ v, theta)).detach()

    def add(self, v: Tensor) -> None:
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(self.theta.values()).detach() + v, self.theta.values()
        )

    def trpo(self, max_kl: float, damping: float) -> tuple[float, float, float]:
        """Before, after, KL; the parameters are changed."""
        before, g, old = float(self.surrogate().detach()), self.gradient(), self.detached()
        x, r = torch.zeros_like(g), g.clone()
        p = r
        for _ in range(10):
            if r @ r <= 1e-10:
                break
            image = self.fisher(old, p) + damping * p
            alpha = (r @ r) / (p @ image)
            x, rest = x + alpha * p, r - alpha * image
            p = rest + (rest @ rest) / (r @ r) * p
            r = rest
        step = x * (2 * max_kl / (x @ (self.fisher(old, x) + damping * x))).sqrt()
        for attempt in range(15):
            self.add(-(0.8**attempt) * step)
            after, kl = float(self.surrogate().detach()), float(self.kl(old).detach())
            if after < before and kl <= max_kl:
                return before, after, kl
            self.add(0.8**attempt * step)
        return before, before, 0.0


def values(maml: FusedMAML) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in maml.model.parameters()])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_gradient_and_fisher_product(backend: str, steps: int, first_order: bool) -> None:
    maml, samples = make(backend, steps, first_order), batch()
    oracle = Oracle(maml, samples)
    loss = maml(*samples).loss
    gradients = torch.autograd.grad(loss, list(maml.model.parameters()))
    assert float(loss.detach()) == pytest.approx(float(oracle.surrogate().detach()), rel=1e-10)
    assert relative(torch.cat([g.reshape(-1) for g in gradients]), oracle.gradient()) < 1e-9
    generator = Generator().manual_seed(2)
    v = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in maml.model.named_parameters()}
    found = maml.fisher_vector_product(samples.x_spt, samples.y_spt, samples.x_qry, v, weights=samples.y_qry.weights)
    expected = oracle.fisher(oracle.detached(), oracle.flat(v.values()))
    assert relative(oracle.flat(found.values()), expected) < 1e-9


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("max_kl", [1e-2, 1.0])
def test_a_whole_trpo_step(backend: str, steps: int, first_order: bool, max_kl: float) -> None:
    maml, samples = make(backend, steps, first_order), batch()
    oracle, start = Oracle(maml, samples), values(maml)
    # So few samples leave most of the Fisher matrix zero, and without damping conjugate gradients magnify rounding.
    step = trpo(maml, samples, max_kl, 1e-2)
    before, after, kl = oracle.trpo(max_kl, 1e-2)
    moved = torch.cat([p.detach().reshape(-1) for p in oracle.theta.values()]) - start
    assert step.accepted
    assert step.surrogate_after < step.surrogate_before
    assert 0 < step.kl <= max_kl
    assert relative(values(maml) - start, moved) < 1e-9
    assert (step.surrogate_before, step.surrogate_after, step.kl) == pytest.approx((before, after, kl), rel=1e-9)


def test_a_step_that_nothing_accepts_leaves_the_policy_as_it_was(backend: str) -> None:
    maml, samples = make(backend), batch()
    start = values(maml)
    y = samples.y_qry._replace(advantages=torch.zeros_like(samples.y_qry.advantages))
    step = trpo(maml, samples._replace(y_qry=y), 0.01, 1e-5)  # no advantage, no gradient
    assert not step.accepted
    assert step.kl == 0
    assert torch.equal(values(maml), start)


def test_what_is_not_finite_is_refused_naming_the_task(backend: str) -> None:
    maml, samples = make(backend), batch()
    start, advantages = values(maml), samples.y_qry.advantages.clone()
    advantages[1, 0] = float("inf")
    broken = samples._replace(y_qry=samples.y_qry._replace(advantages=advantages))
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    for step in (lambda: trpo(maml, broken, 0.01, 1e-5), lambda: vpg(maml, broken, optimizer)):
        with pytest.raises(ValueError, match=r"the surrogate must be finite, got -?(inf|nan) in task 1"):
            step()
    assert torch.equal(values(maml), start)


def test_vpg_is_adam_on_the_meta_gradient(backend: str) -> None:
    maml, samples = make(backend), batch()
    oracle, start = Oracle(maml, samples), values(maml)
    step = vpg(maml, samples, torch.optim.Adam(maml.parameters(), lr=1e-3))
    assert step.surrogate_after < step.surrogate_before
    g = oracle.gradient()
    torch.testing.assert_close(values(maml) - start, -1e-3 * g / (g.abs() + 1e-8), rtol=1e-6, atol=1e-12)


def test_clipped_steps_follow_ppos_own_loss(backend: str) -> None:
    maml, samples = make(backend), batch()
    oracle, optimizer = Oracle(maml, samples), torch.optim.SGD(maml.parameters(), lr=0.5)
    clipped(maml, samples, optimizer, epochs=3, clip=0.2)
    theta = list(oracle.theta.values())
    for _ in range(3):
        losses = []
        for task, policy in enumerate(oracle.policies()):
            y = one(samples.y_qry, task, LENGTHS[1][task])
            r = (policy.log_prob(y.actions) - y.old_log_probs).exp()
            losses.append(-torch.minimum(r * y.advantages, r.clamp(0.8, 1.2) * y.advantages).mean())
        gradients = torch.autograd.grad(torch.stack(losses).mean(), theta)
        for p, g in zip(theta, gradients, strict=True):
            p.data -= 0.5 * g
    assert relative(values(maml), torch.cat([p.detach().reshape(-1) for p in theta])) < 1e-9


def test_conjugate_gradients_solve() -> None:
    generator = Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    matrix = root @ root.T + torch.eye(5, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64, generator=generator)
    found = conjugate_gradients(lambda v: {"p": matrix @ v["p"]}, {"p": b})
    torch.testing.assert_close(found["p"], torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-5)
    assert dot({"p": b}, {"p": b}) == pytest.approx(float(b @ b))
    assert not conjugate_gradients(lambda v: v, {"p": torch.zeros(3)})["p"].any()
