"""Outer steps: meta-gradient and Fisher-vector product against double backward in float64, on tasks of different
lengths.
"""

import copy

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call

from benchmarks import rl_iteration
from maml_cuda import FusedMAML, PolicyTarget, optim
from maml_cuda.benchmark.verification import WrongGradient
from maml_cuda.rl.inner import MetaSamples, Samples, adapt_policies
from maml_cuda.rl.outer import clipped, conjugate_gradients, dot, trpo, vpg
from maml_cuda.rl.policy import GaussianPolicy

TASKS, WIDTH, CHOICES = 3, 6, 4
RATES = (0.1, 0.07, 0.15)  # of each inner step
LENGTHS = (
    (3, 8, 6),
    (7, 4, 5),
    (6, 9, 2),
    (5, 3, 8),
)  # samples of each task: query, then support sets
DAMPING = 10.0  # eigenvalues reach 20; with little damping conjugate gradients magnify rounding: by 1e7 at 0.01
LOSSES = {"gaussian": "gaussian_policy_gradient", "categorical": "categorical_policy_gradient"}


@pytest.fixture(params=["reference", "fused"])
def backend(request) -> str:
    return request.param


@pytest.fixture(params=LOSSES)
def kind(request) -> str:
    return request.param


def policy(kind: str) -> nn.Module:
    if kind == "categorical":
        return nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CHOICES)).double()
    model = GaussianPolicy(3, 2, WIDTH).double()
    model.log_std.data += torch.tensor([0.2, -0.3], dtype=torch.float64)
    return model


def make(backend: str, kind: str = "gaussian", steps: int = 1, **options) -> FusedMAML:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rates = torch.tensor(RATES[:steps], dtype=torch.float64) if steps > 1 else RATES[0]
        return FusedMAML(policy(kind), rates, steps, loss=LOSSES[kind], backend=backend, **options)


def draw(kind: str, index: int, ratio: bool) -> Samples:
    generator, lengths = Generator().manual_seed(index), LENGTHS[index]
    most = max(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(TASKS, most, *shape, dtype=torch.float64, generator=generator)

    weights = (torch.arange(most) < torch.tensor(lengths).unsqueeze(1)).double()
    actions = normal(2) if kind == "gaussian" else torch.randint(CHOICES, (TASKS, most), generator=generator)
    old = normal() - 2.5 if ratio else None
    return normal(3), PolicyTarget(actions, normal() * weights, old, weights)


def batch(kind: str = "gaussian", steps: int = 1, every_step: bool = False) -> MetaSamples:
    """With ``every_step``, the samples after each inner step are query sets, otherwise only the last ones are."""
    support = [draw(kind, 1 + k, False) for k in range(steps)]
    between = [draw(kind, 1 + k, True) for k in range(1, steps)] if every_step else []
    return MetaSamples(tuple(support), (*between, draw(kind, 0, True)))


def one(samples: Samples, task: int, index: int) -> Samples:
    """A task's samples without padding."""
    length = LENGTHS[index][task]
    x, y = samples
    return x[task, :length], PolicyTarget(*(None if part is None else part[task, :length] for part in y))


class Oracle:
    """The same by plain autograd: one task at a time, no padding, the graph of the inner loop kept."""

    def __init__(self, maml: FusedMAML, samples: MetaSamples) -> None:
        self.model, self.samples = copy.deepcopy(maml.model), samples
        self.first_order = maml.first_order
        self.theta = dict(self.model.named_parameters())
        self.moving = set(maml._adapted())

    def distribution(self, parameters: dict[str, Tensor], x: Tensor) -> Distribution:
        prediction = functional_call(self.model, parameters, (x,))
        if isinstance(prediction, Tensor):
            return Categorical(logits=prediction, validate_args=False)
        return Independent(Normal(prediction[0], prediction[1].exp(), False), 1, False)

    def adapted(self, task: int, steps: int) -> dict[str, Tensor]:
        phi = dict(self.theta)
        for k, samples in enumerate(self.samples.support[:steps]):
            x, y = one(samples, task, 1 + k)
            loss = -(self.distribution(phi, x).log_prob(y.actions) * y.advantages).mean()
            names = [name for name in phi if name in self.moving]
            gradients = torch.autograd.grad(loss, [phi[n] for n in names], create_graph=not self.first_order)
            phi |= {name: phi[name] - RATES[k] * g for name, g in zip(names, gradients, strict=True)}
        return phi

    def queries(self) -> list[tuple[Distribution, PolicyTarget]]:
        """Policy and target on each task's own samples, of each query set in turn."""
        found, count, steps = [], len(self.samples.query), len(self.samples.support)
        for back, samples in zip(reversed(range(count)), self.samples.query, strict=True):
            for task in range(TASKS):
                x, y = one(samples, task, 0 if back == 0 else 1 + steps - back)
                found.append((self.distribution(self.adapted(task, steps - back), x), y))
        return found

    def policies(self) -> list[Distribution]:
        return [policy for policy, _ in self.queries()]

    def surrogate(self) -> Tensor:
        ratios = [((policy.log_prob(y.actions) - y.old_log_probs).exp(), y) for policy, y in self.queries()]
        return -torch.stack([(ratio * y.advantages).mean() for ratio, y in ratios]).mean()

    def kl(self, old: list[Distribution]) -> Tensor:
        pairs = zip(old, self.policies(), strict=True)
        return torch.stack([kl_divergence(before, after).mean() for before, after in pairs]).mean()

    def detached(self) -> list[Distribution]:
        def one(p) -> Distribution:
            if isinstance(p, Categorical):
                return Categorical(logits=p.logits.detach())
            return Independent(Normal(p.mean.detach(), p.stddev.detach()), 1)

        return [one(p) for p in self.policies()]

    def flat(self, values) -> Tensor:
        return torch.cat([value.reshape(-1) for value in values])

    def gradient(self) -> Tensor:
        return self.flat(torch.autograd.grad(self.surrogate(), list(self.theta.values()))).detach()

    def fisher(self, old: list[Distribution], v: Tensor) -> Tensor:
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


STEPS = pytest.mark.parametrize("steps", [0, 1, 2, 3])
FIRST_ORDER = pytest.mark.parametrize("first_order", [False, True])


def check_gradient_and_fisher_product(maml: FusedMAML, samples: MetaSamples) -> None:
    oracle, now = Oracle(maml, samples), adapt_policies(maml, samples)
    losses, gradient = now.surrogate_and_gradient([y for _, y in samples.query])
    assert float(losses.mean()) == pytest.approx(float(oracle.surrogate().detach()), rel=1e-10)
    assert relative(oracle.flat(gradient.values()), oracle.gradient()) < 1e-9
    generator, product = Generator().manual_seed(2), now.fisher()
    for _ in range(2):
        v = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in maml.model.named_parameters()}
        expected = oracle.fisher(oracle.detached(), oracle.flat(v.values()))
        assert relative(oracle.flat(product(v).values()), expected) < 1e-9


@FIRST_ORDER
@STEPS
def test_gradient_and_fisher_product(backend: str, kind: str, steps: int, first_order: bool) -> None:
    check_gradient_and_fisher_product(make(backend, kind, steps, first_order=first_order), batch(kind, steps))


@FIRST_ORDER
@pytest.mark.parametrize("steps", [2, 3])
def test_an_objective_after_every_step(backend: str, kind: str, steps: int, first_order: bool) -> None:
    check_gradient_and_fisher_product(make(backend, kind, steps, first_order=first_order), batch(kind, steps, True))


@pytest.mark.parametrize("part", [["log_std"], ["layers.4.weight", "layers.4.bias"]], ids=str)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_policy_that_is_partly_adapted(backend: str, steps: int, part: list[str]) -> None:
    check_gradient_and_fisher_product(make(backend, steps=steps, adapt_params=part), batch(steps=steps))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_policy_that_is_partly_frozen(backend: str, steps: int) -> None:
    maml, samples = make(backend, steps=steps), batch(steps=steps)
    maml.model.layers[2].weight.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in maml.model.named_parameters()}
    assert trpo(maml, samples, 0.01, DAMPING).accepted
    moved = {name for name, p in maml.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(start) - {"layers.2.weight"}


def test_steps_on_one_set_are_the_fused_inner_loop(backend: str, kind: str) -> None:
    """If every step uses the same set, the result is what FusedMAML computes in one pass."""
    maml, samples = make(backend, kind, 3), batch(kind, 1)
    now = adapt_policies(maml, samples._replace(support=3 * samples.support))
    _, gradient = now.surrogate_and_gradient([y for _, y in samples.query])
    maml(*samples.support[0], *samples.query[0]).loss.backward()
    assert all(relative(gradient[name], p.grad) < 1e-10 for name, p in maml.model.named_parameters())
    v = {name: torch.ones_like(p) for name, p in maml.model.named_parameters()}
    expected = maml.fisher(*samples.support[0], samples.query[0][0], weights=samples.query[0][1].weights)(v)
    assert all(relative(product, expected[name]) < 1e-10 for name, product in now.fisher()(v).items())


@pytest.mark.parametrize(
    ("steps", "first_order", "max_kl", "every_step"),
    [
        (0, False, 1e-2, False),
        (1, False, 1e-2, False),
        (1, True, 1e-2, False),
        (1, False, 1.0, False),
        (2, False, 1e-2, True),
        (3, False, 1e-2, False),
    ],
)
def test_a_whole_trpo_step(
    backend: str, kind: str, steps: int, first_order: bool, max_kl: float, every_step: bool
) -> None:
    maml, samples = make(backend, kind, steps, first_order=first_order), batch(kind, steps, every_step)
    oracle, start = Oracle(maml, samples), values(maml)
    step = trpo(maml, samples, max_kl, DAMPING)
    before, after, kl = oracle.trpo(max_kl, DAMPING)
    moved = torch.cat([p.detach().reshape(-1) for p in oracle.theta.values()]) - start
    assert step.accepted
    assert step.surrogate_after < step.surrogate_before
    assert 0 < step.kl <= max_kl
    assert relative(values(maml) - start, moved) < 1e-9
    assert (step.surrogate_before, step.surrogate_after, step.kl) == pytest.approx((before, after, kl), rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "given", "words"),
    [
        (2, {}, "support must hold 2 sets, one for each inner step, got 1"),
        (1, {"query_weights": [0.5, 0.5]}, "query_weights must be None in the outer step of a policy, got weights"),
        (1, {"inner_lr": nn.Parameter(torch.tensor(0.1).double())}, "inner_lr must be fixed in the outer step"),
    ],
    ids=["support", "query_weights", "inner_lr"],
)
def test_terms_that_an_outer_step_does_not_compute_are_refused(
    backend: str, steps: int, given: dict, words: str
) -> None:
    options = {"inner_lr": 0.1, "loss": LOSSES["gaussian"], "backend": backend} | given
    maml = FusedMAML(policy("gaussian"), inner_steps=steps, **options)
    start = values(maml)
    with pytest.raises(ValueError, match=words):
        trpo(maml, batch(), 0.01, 1e-5)
    with pytest.raises(ValueError, match="query must hold 1 to 1 sets, at most one for each inner step, got 2"):
        trpo(make(backend), batch()._replace(query=2 * batch().query), 0.01, 1e-5)
    assert torch.equal(values(maml), start)


def test_per_step_batch_norm_is_refused_with_a_set_for_each_step() -> None:
    layers = nn.Linear(3, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CHOICES)
    maml = FusedMAML(nn.Sequential(*layers).double(), 0.1, 2, loss=LOSSES["categorical"], batch_norm="per_step")
    with pytest.raises(ValueError, match="batch_norm must not be per_step if each inner step has its own support set"):
        trpo(maml, batch("categorical", 2), 0.01, 1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"inner_optimizer": optim.Adam()}, "inner_optimizer and inner_transform must be None if .*, got Adam"),
        ({"inner_transform": lambda grads: grads}, "inner_optimizer and inner_transform must be None if .*, got funct"),
        ({"inner_clip_norm": 1.0}, "inner_clip_norm and inner_clip_value must be None if .*, got 1.0 and None"),
    ],
)
@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
def test_other_inner_steps_are_refused_with_a_set_for_each(given: dict, words: str) -> None:
    maml = FusedMAML(policy("gaussian"), 0.1, 2, loss=LOSSES["gaussian"], **given)
    with pytest.raises(ValueError, match=words):
        trpo(maml, batch("gaussian", 2), 0.01, 1e-5)


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
def test_one_step_of_an_optimizer() -> None:
    """Its first step with momentum is a plain one; an optimizer with a learned hyperparameter is refused."""
    found = []
    for optimizer in (None, optim.SGD(momentum=0.5)):
        torch.manual_seed(0)
        maml = FusedMAML(policy("gaussian"), 0.1, 1, loss=LOSSES["gaussian"], inner_optimizer=optimizer)
        trpo(maml, batch(), 0.01, 1e-5)
        found.append(values(maml))
    assert relative(*found) < 1e-9
    learned = optim.SGD(momentum=nn.Parameter(torch.tensor(0.5).double()))
    maml = FusedMAML(policy("gaussian"), 0.1, 1, loss=LOSSES["gaussian"], inner_optimizer=learned)
    with pytest.raises(ValueError, match="inner_lr must be fixed in the outer step of a policy, got learned rates"):
        trpo(maml, batch(), 0.01, 1e-5)


def test_a_step_that_is_not_accepted_does_not_change_the_policy(backend: str) -> None:
    maml, samples = make(backend), batch()
    start = values(maml)
    ((x, y),) = samples.query
    none = y._replace(advantages=torch.zeros_like(y.advantages))
    step = trpo(maml, samples._replace(query=((x, none),)), 0.01, 1e-5)  # zero advantages give a zero gradient
    assert not step.accepted
    assert step.kl == 0
    assert torch.equal(values(maml), start)


@pytest.mark.parametrize("steps", [1, 2])
def test_what_is_not_finite_is_refused_naming_the_task(backend: str, steps: int) -> None:
    maml, samples = make(backend, steps=steps), batch(steps=steps)
    ((x, y),) = samples.query
    start, advantages = values(maml), y.advantages.clone()
    advantages[1, 0] = float("inf")
    broken = samples._replace(query=((x, y._replace(advantages=advantages)),))
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


@pytest.mark.parametrize("steps", [1, 2])
def test_clipped_steps_follow_ppos_own_loss(backend: str, steps: int) -> None:
    maml, samples = make(backend, steps=steps), batch(steps=steps, every_step=True)
    oracle, optimizer = Oracle(maml, samples), torch.optim.SGD(maml.parameters(), lr=0.5)
    clipped(maml, samples, optimizer, epochs=3, clip=0.2)
    theta = list(oracle.theta.values())
    for _ in range(3):
        losses = []
        for policy, y in oracle.queries():
            r = (policy.log_prob(y.actions) - y.old_log_probs).exp()
            losses.append(-torch.minimum(r * y.advantages, r.clamp(0.8, 1.2) * y.advantages).mean())
        gradients = torch.autograd.grad(torch.stack(losses).mean(), theta)
        for p, g in zip(theta, gradients, strict=True):
            p.data -= 0.5 * g
    assert relative(values(maml), torch.cat([p.detach().reshape(-1) for p in theta])) < 1e-9


def test_a_clipped_step_that_goes_too_far_is_undone(backend: str) -> None:
    maml, samples = make(backend), batch()
    start = values(maml)
    step = clipped(maml, samples, torch.optim.SGD(maml.parameters(), lr=1e3), epochs=1, clip=0.2)
    assert not step.accepted
    assert step.kl == 0
    assert step.surrogate_after == step.surrogate_before
    assert torch.equal(values(maml), start)


def test_conjugate_gradients_solve() -> None:
    generator = Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    matrix = root @ root.T + torch.eye(5, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64, generator=generator)
    found = conjugate_gradients(lambda v: {"p": matrix @ v["p"]}, {"p": b})
    torch.testing.assert_close(found["p"], torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-5)
    assert dot({"p": b}, {"p": b}) == pytest.approx(float(b @ b))
    assert not conjugate_gradients(lambda v: v, {"p": torch.zeros(3)})["p"].any()


def test_the_benchmark_of_an_iteration_proves_before_it_times(monkeypatch):
    assert min(rl_iteration.run(3, 20, 0.01).values()) > 0
    wrong = copy.deepcopy(rl_iteration.IMPLEMENTATIONS)
    wrong["autograd"] = lambda model: FusedMAML(model, 2 * rl_iteration.RATE, 1, loss=rl_iteration.LOSS)
    monkeypatch.setattr(rl_iteration, "IMPLEMENTATIONS", wrong)
    with pytest.raises(WrongGradient, match="within 1e-09 of autograd's"):
        rl_iteration.run(3, 20, 0.01)
