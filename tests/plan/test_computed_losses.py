"""Losses of the user's own that layers compute: each against plain double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import assert_close, check_meta_gradient
from tests.plan.small_models import computed_is_right

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS, SUPPORT, QUERY, FEATURES = 2, 5, 7, 3
RATE, STEPS = 0.05, 2

Loss = Callable[[Any, Any], Tensor]


def mlp(features: int = FEATURES) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, features)).double()


def data_of(target: Callable[[int], Any], sample: tuple[int, ...] = (4,)) -> list[Any]:
    """Support set and query set, of different sizes."""
    return [part for n in (SUPPORT, QUERY) for part in (torch.randn(TASKS, n, *sample).double(), target(n))]


def labels(n: int) -> Tensor:
    return torch.randint(FEATURES, (TASKS, n))


def values(n: int) -> Tensor:
    return torch.randn(TASKS, n, FEATURES).double()


def bits(n: int) -> Tensor:
    return (values(n) > 0).double()


def both(n: int) -> dict[str, Tensor]:
    return {"class": labels(n), "value": values(n)}


WEIGHTS = torch.tensor([0.3, 1.0, 2.0]).double()


WEIGHTS_32 = WEIGHTS.float()


def weights_like(p: Tensor) -> Tensor:
    return WEIGHTS_32 if p.dtype == torch.float32 else WEIGHTS


def focal(p: Tensor, y: Tensor) -> Tensor:
    right = p.softmax(-1).gather(1, y[:, None]).squeeze(1)
    return ((1 - right) ** 2 * F.cross_entropy(p, y, reduction="none")).mean()


def two_terms(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(p[:, :FEATURES], y["class"]) + F.mse_loss(p[:, FEATURES:], y["value"])


LOSSES: dict[str, tuple[Loss, Callable[[int], Any]]] = {
    "label smoothing": (lambda p, y: F.cross_entropy(p, y, label_smoothing=0.1), labels),
    "weights in a module": (nn.CrossEntropyLoss(weight=WEIGHTS), labels),
    "weights in a closure": (lambda p, y: F.cross_entropy(p, y, weight=weights_like(p)), labels),
    "sum with weights": (lambda p, y: F.cross_entropy(p, y, weight=weights_like(p), reduction="sum"), labels),
    "an ignored class": (lambda p, y: F.cross_entropy(p, y, ignore_index=1), labels),
    "focal": (focal, labels),
    "entropy": (lambda p, y: F.cross_entropy(p, y) + 0.1 * Categorical(logits=p).entropy().mean(), labels),
    "Brier score": (lambda p, y: (p.softmax(-1) - F.one_hot(y, FEATURES)).square().sum(-1).mean(), labels),
    "Huber": (F.huber_loss, values),
    "smooth L1": (F.smooth_l1_loss, values),
    "smooth L1, beta": (lambda p, y: F.smooth_l1_loss(p, y, beta=0.3), values),
    "smooth L1, beta 0": (lambda p, y: F.smooth_l1_loss(p, y, beta=0.0), values),
    "L1": (F.l1_loss, values),
    "Gaussian": (lambda p, y: -Normal(p, 0.5).log_prob(y).mean(), values),
    "cosine similarity": (lambda p, y: 1 - F.cosine_similarity(p, y).mean(), values),
    "log-cosh": (lambda p, y: torch.log(torch.cosh(p - y)).mean(), values),
    "quantile": (lambda p, y: torch.maximum(0.3 * (y - p), -0.7 * (y - p)).mean(), values),
    "the largest error": (lambda p, y: (p - y).abs().max(), values),
    "relative error": (lambda p, y: ((p - y).norm(dim=1) / y.norm(dim=1)).mean(), values),
    "one target": (lambda p, y: (p - y[:, :1]).square().mean() + (p[:, 0] * y[:, 2]).mean() ** 2, values),
    "BCE with logits": (F.binary_cross_entropy_with_logits, bits),
    "BCE with pos_weight": (lambda p, y: F.binary_cross_entropy_with_logits(p, y, pos_weight=weights_like(p)), bits),
    "BCE": (lambda p, y: F.binary_cross_entropy(p.sigmoid(), y), bits),
    "hinge": (lambda p, y: F.relu(1 - p * (2 * y - 1)).mean(), bits),
    "soft margin": (lambda p, y: F.soft_margin_loss(p, 2 * y - 1), bits),
    "two terms": (two_terms, both),
    "a sum over len(p)": (lambda p, y: (p - y).abs().sum() / len(p), values),
    "a sum by its elements": (lambda p, y: (p - y).abs().sum() * (1 / p.numel()), values),
    "a standard error": (lambda p, y: (p - y).abs().sum() / (y.shape[0] - 1) ** 0.5, values),
    "kl_div, batchmean": (lambda p, y: F.kl_div(p.log_softmax(-1), y.softmax(-1), reduction="batchmean"), values),
}
IMAGES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "nll_loss": lambda p, y: F.nll_loss(p.log_softmax(1), y),
    "weights and an ignored class": lambda p, y: F.cross_entropy(p, y, weight=WEIGHTS, ignore_index=1),
    "label smoothing": lambda p, y: F.cross_entropy(p, y, label_smoothing=0.1),
}


def model_of(name: str) -> nn.Module:
    return mlp(2 * FEATURES if name == "two terms" else FEATURES)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_is_computed_by_layers(name: str, first_order: bool) -> None:
    loss, target = LOSSES[name]
    computed_is_right(model_of(name), data_of(target), loss, RATE, first_order)


@pytest.mark.parametrize("name", LOSSES)
def test_in_float32(name: str) -> None:
    """Against the oracle in float64, of the same numbers."""
    loss, target = LOSSES[name]
    data = [single(part) for part in data_of(target)]
    model = model_of(name).float()
    maml = FusedMAML(model, RATE, STEPS, loss=single(loss), backend="fused")
    out = maml(*data)
    out.loss.backward()
    expected, grads = oracle.meta_gradient(model, loss, *data, RATE, STEPS)
    assert "the loss is served by layers" in maml.explain()
    torch.testing.assert_close(out.loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert_close({n: p.grad.double() for n, p in model.named_parameters()}, grads, 1e-5)


def single(given: Any) -> Any:
    """A target in float32; a loss with its weights in float32."""
    if isinstance(given, dict):
        return {key: single(t) for key, t in given.items()}
    if isinstance(given, Tensor):
        return given.float() if given.is_floating_point() else given
    return nn.CrossEntropyLoss(weight=WEIGHTS_32) if isinstance(given, nn.Module) else given


@pytest.mark.parametrize("name", IMAGES)
def test_a_class_for_each_pixel(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, FEATURES, 3, padding=1)).double()
    data = data_of(lambda n: torch.randint(FEATURES, (TASKS, n, 4, 5)), (2, 4, 5))
    computed_is_right(model, data, IMAGES[name], RATE)


@pytest.mark.parametrize(
    "name", ["label smoothing", "weights in a closure", "focal", "Huber", "the largest error", "BCE"]
)
def test_on_each_machine(machine: str, name: str) -> None:
    loss, target = LOSSES[name]
    on = (lambda p, y: F.cross_entropy(p, y, weight=WEIGHTS.to(p.device))) if "closure" in name else loss
    check_meta_gradient(mlp(), on, data_of(target), RATE, STEPS)


# -- labels ---------------------------------------------------------------------------------------------------------


def weighted(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p, y, weight=WEIGHTS)


@pytest.mark.parametrize("ignored", [-100, 17])
def test_an_ignored_label_that_is_no_class(ignored: int) -> None:
    data = data_of(labels)
    data[1][0, 1] = data[3][1, 2] = ignored
    computed_is_right(mlp(), data, lambda p, y: F.cross_entropy(p, y, weight=WEIGHTS, ignore_index=ignored), RATE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_set_whose_labels_are_all_ignored(smoothing: float) -> None:
    """torch's loss of it is NaN, with zeros for a gradient. So the task is not adapted."""
    data, model = data_of(labels), mlp()
    data[1][1] = 1
    loss = nn.CrossEntropyLoss(WEIGHTS, ignore_index=1, label_smoothing=smoothing)
    maml = computed_is_right(model, data, loss, RATE)
    assert maml(*data).support_losses.isnan().tolist() == [[False] * STEPS, [True] * STEPS]


@pytest.mark.parametrize("label", [-1, FEATURES])
@pytest.mark.parametrize("of", [1, 3])
def test_other_labels_are_refused_at_every_call(label: int, of: int) -> None:
    data = data_of(labels)
    maml = FusedMAML(mlp(), RATE, STEPS, loss=weighted)
    for _ in range(2):
        maml(*data)
    assert maml.backend == "cpu"
    wrong = [t.clone() for t in data]
    wrong[of][1, 2] = label
    words = rf"{'y_spt' if of == 1 else 'y_qry'} holds labels outside of \[0, 3\)"
    with pytest.warns(UserWarning, match=words), pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        maml(*wrong)
    maml(*data)
    assert maml.backend == "cpu"


# -- tensors that a loss holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_read_at_every_call(dtype: torch.dtype) -> None:
    w = WEIGHTS.to(dtype, copy=True)
    held = nn.CrossEntropyLoss(weight=w)
    data = [t.to(dtype) if t.is_floating_point() else t for t in data_of(labels)]
    model = mlp().to(dtype)
    for loss in (lambda p, y: F.cross_entropy(p, y, weight=w), held):
        maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
        seen = []
        for change in (lambda: None, lambda: w.mul_(WEIGHTS.flip(0)), lambda: w.__setitem__(0, 5.0)):
            change()
            in_double = w.double().clone()
            seen.append(maml(*data).loss.item())
            expected, _ = oracle.meta_gradient(
                model, lambda p, y, w=in_double: F.cross_entropy(p, y, weight=w), *data, RATE, STEPS
            )
            assert seen[-1] == pytest.approx(expected.item(), rel=1e-5 if dtype == torch.float32 else 1e-9)
        assert len(set(seen)) == 3


def test_weights_that_are_replaced() -> None:
    loss, model, data = nn.CrossEntropyLoss(weight=WEIGHTS), mlp(), data_of(labels)
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
    for w in (WEIGHTS, WEIGHTS.flip(0), WEIGHTS + 1):
        loss.weight = w
        expected, _ = oracle.meta_gradient(model, loss, *data, RATE, STEPS)
        assert maml(*data).loss.item() == pytest.approx(expected.item(), rel=1e-9)


# -- what is refused ------------------------------------------------------------------------------------------------

TWO_SETS = "callable of yours, which computes different things on the two sets"
REFUSED: dict[str, tuple[Loss, Callable[[int], Any], str]] = {
    "a number that follows from n in another way": (
        lambda p, y: (p - y).abs().sum() / (len(p) + 3), values, TWO_SETS,
    ),
}  # fmt: skip


def test_a_loss_that_reads_parameters_of_the_model_is_refused() -> None:
    """It holds them as they were before the inner loop."""
    model = mlp()
    maml = FusedMAML(model, RATE, STEPS, loss=lambda p, y: F.l1_loss(p, y) + model[0].weight.square().sum())
    with pytest.warns(UserWarning, match="the loss reads 0.weight, which it holds as it was before the inner loop"):
        maml(*data_of(values))
    assert maml.backend == "reference"


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_words(name: str) -> None:
    loss, target, words = REFUSED[name]
    data, model = data_of(target), mlp()
    with pytest.raises(ValueError, match=words):
        FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")(*data)
    maml = FusedMAML(model, RATE, STEPS, loss=loss, first_order=True)  # torch has no second derivative of some
    with pytest.warns(UserWarning, match=f"general path.*{words}"):
        out = maml(*data)
    assert maml.backend == "reference"
    expected, _ = oracle.meta_gradient(model, loss, *data, RATE, STEPS, first_order=True)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=0)


# -- kinks ----------------------------------------------------------------------------------------------------------


class Squares(nn.Module):
    """(W x + b)^2 of integers, so that a difference is exactly 0 or 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, FEATURES)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-3, 4, p.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square()


KINKS: dict[str, Loss] = {
    "L1": F.l1_loss,
    "Huber": F.huber_loss,
    "smooth L1": F.smooth_l1_loss,
    "smooth L1, beta 0": lambda p, y: F.smooth_l1_loss(p, y, beta=0.0),
    "maximum": lambda p, y: torch.maximum(0.3 * (y - p), -0.7 * (y - p)).mean(),
    "minimum": lambda p, y: torch.minimum((p - y) * 2, (p - y) ** 2).mean(),
    "the largest of all": lambda p, y: (p - y).abs().max(),
    "the largest of each": lambda p, y: (p - y).abs().amax(1).mean(),
    "the first largest of each": lambda p, y: (p - y).abs().max(1)[0].mean(),
    "clamp": lambda p, y: ((p - y).clamp(-1, 1) * p).mean(),
    "hinge": lambda p, y: F.relu(1 - (p - y)).mean(),
}


@pytest.mark.parametrize("offset", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("name", KINKS)
def test_at_a_kink(name: str, offset: float) -> None:
    """Where torch takes a derivative of one side, or of both by halves, so do layers."""
    loss, model = KINKS[name], Squares().double()
    x = torch.randint(-3, 4, (1, SUPPORT, 2)).double()
    y = model(x).detach() + offset
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
    fast = {name: p.detach().unsqueeze(0).clone() for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in fast.items()}
    value, gradient = maml.loss_and_grad(fast, x, y)
    product = maml.hvp(fast, x, y, v)
    assert "the loss is served by layers" in maml.explain(x, y)
    parameters = dict(model.named_parameters())
    expected = loss(model(x[0]), y[0])
    first = torch.autograd.grad(expected, list(parameters.values()), create_graph=True)
    slope = sum((g * v[n][0]).sum() for g, n in zip(first, parameters, strict=True))
    second = torch.autograd.grad(slope, list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(value[0], expected.detach(), rtol=1e-12, atol=1e-12)
    for n, g, h in zip(parameters, first, second, strict=True):
        torch.testing.assert_close(gradient[n][0], g.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(product[n][0], torch.zeros_like(g) if h is None else h, rtol=1e-12, atol=1e-12)


# -- the other calls ------------------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = mlp(2), nn.Parameter(torch.zeros(2).double())

    def forward(self, x: Tensor) -> Normal:
        return Normal(self.mean(x), self.log_std.exp())


class Discrete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = mlp()

    def forward(self, x: Tensor) -> Categorical:
        return Categorical(logits=self.logits(x))


class LogProbabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).log_softmax(-1)


def actions(n: int) -> dict[str, Tensor]:
    """Actions, log-probabilities at which they were drawn, and advantages."""
    return {"action": values(n)[..., :2], "before": values(n)[..., 0] - 2, "advantage": values(n)[..., 0]}


def classes(n: int) -> dict[str, Tensor]:
    return {"action": labels(n), "before": values(n)[..., 0] - 1, "advantage": values(n)[..., 0]}


def clipped(policy: Any, y: dict[str, Tensor]) -> Tensor:
    """The clipped surrogate of PPO (Schulman et al. 2017, eq. 7)."""
    log = policy.log_prob(y["action"])
    ratio = ((log if log.dim() == 1 else log.sum(-1)) - y["before"]).exp()
    return -torch.minimum(ratio * y["advantage"], ratio.clamp(0.8, 1.2) * y["advantage"]).mean()


def with_entropy(policy: Any, y: dict[str, Tensor]) -> Tensor:
    return clipped(policy, y) - 0.1 * policy.entropy().mean()


OTHER_MODELS: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[[int], Any]]] = {
    "Normal": (Gaussian, clipped, actions),
    "Normal, with entropy": (Gaussian, with_entropy, actions),
    "Categorical": (Discrete, clipped, classes),
    "Categorical, with entropy": (Discrete, with_entropy, classes),
    "log_softmax, weights": (LogProbabilities, lambda p, y: F.nll_loss(p, y, weight=WEIGHTS), labels),
    "log_softmax, L1": (LogProbabilities, F.l1_loss, values),
    "log_softmax, squares": (LogProbabilities, F.mse_loss, values),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_of_other_predictions(name: str) -> None:
    make, loss, target = OTHER_MODELS[name]
    data = data_of(target)
    maml = computed_is_right(make(), data, loss, RATE)
    plain = FusedMAML(maml.model, RATE, STEPS, loss=loss, backend="reference")
    fast = maml.adapt(data[0], data[1])
    ours, theirs = maml.predict(fast, data[2]), plain.predict(fast, data[2])
    assert type(ours) is type(theirs)
    for field in ("loc", "scale", "logits") if not isinstance(ours, Tensor) else ():
        if hasattr(ours, field):
            torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-10, atol=1e-12)
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["weights in a module", "focal", "Huber", "BCE", "two terms"])
def test_the_parts_of_a_meta_step(name: str) -> None:
    loss, target = LOSSES[name]
    model, data = model_of(name), data_of(target)
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
    plain = FusedMAML(model, RATE, STEPS, loss=loss, backend="reference")
    fast = maml.adapt(data[0], data[1])
    assert_close(fast, oracle.adapt(model, loss, data[0], data[1], RATE, STEPS))
    predictions = torch.stack([p.detach() for p in oracle.predict(model, fast, data[2])])
    torch.testing.assert_close(maml.predict(fast, data[2]), predictions, rtol=1e-10, atol=1e-12)
    v = {n: torch.randn_like(p) for n, p in fast.items()}
    for ours, theirs in (
        (maml.loss_and_grad(fast, data[2], data[3]), plain.loss_and_grad(fast, data[2], data[3])),
        (maml.hvp(fast, data[2], data[3], v), plain.hvp(fast, data[2], data[3], v)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert maml.memory_estimate(data[0], data[2]) > 0


@pytest.mark.parametrize("name", ["weights in a module", "L1", "two terms"])
def test_a_loss_after_each_step(name: str) -> None:
    """Its meta-gradient, and that of weights of tasks, against the losses of the oracle after each number of steps."""
    loss, target = LOSSES[name]
    model, data, weights = model_of(name), data_of(target), [0.2, 0.3, 0.5]
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused", query_weights=weights)
    out = maml(*data)
    out.loss.backward()
    parts = [oracle.meta_gradient(model, loss, *data, RATE, steps) for steps in range(STEPS + 1)]
    expected = {n: sum(w * grads[n] for w, (_, grads) in zip(weights, parts, strict=True)) for n in parts[0][1]}
    value = sum(w * value for w, (value, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(out.loss.detach(), value, rtol=1e-10, atol=1e-12)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected)
