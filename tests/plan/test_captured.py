"""Models that are fused because of what they run, however it is written: each against plain double backward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.checkpoint import checkpoint

from maml_cuda import FusedMAML, PolicyTarget
from maml_cuda.capture.capture import capture
from maml_cuda.engine import programs
from maml_cuda.policies import log_prob
from tests.conftest import check_meta_gradient, episode, program_of
from tests.plan.small_models import computed_is_right

Forward = Callable[[Any, Tensor], Any]
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}  # name -> how it is made, shape of a sample


def model(*sample: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(made: type[nn.Module]) -> type[nn.Module]:
        MODELS[made.__name__] = made, sample or (3,)
        return made

    return register


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 4)


@model()
class OptionalArgument(Two):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h) if mask is None else h * scale)


@model()
class Counters(Two):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log, self.last = 0, [], None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.last = torch.tanh(self.a(x))
        return self.b(self.last)


@model(2, 6, 6)
class LayersMadeInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.MaxPool2d(2)(nn.ReLU()(self.conv(x)))
        return self.head(nn.Flatten()(h))


@model(2, 6, 6)
class ParametersInAList(nn.Module):
    """As much published code has it: parameters by number, parameters() overridden, an optional list of them."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 2, 3, 3), (3,), (3,), (3,), (4, 48), (4,)]
        self.vars = nn.ParameterList([nn.Parameter(0.3 * torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor, vars: Any = None, bn_training: bool = True) -> Tensor:
        vars = self.vars if vars is None else vars
        h = F.conv2d(x, vars[0], vars[1])
        h = F.batch_norm(h, None, None, vars[2], vars[3], training=bn_training)
        return F.linear(F.relu(h, inplace=True).view(x.size(0), -1), vars[4], vars[5])

    def parameters(self, recurse: bool = True) -> Any:
        return self.vars


@model()
class MetaModule(Two):
    """forward(params=None), by names, as torchmeta has it."""

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        params = OrderedDict(self.named_parameters()) if params is None else params
        h = F.linear(x, params["a.weight"], params["a.bias"]).sigmoid()
        return F.linear(h, params["b.weight"], bias=params.get("b.bias"))


@model(2, 6)
class Views(nn.Module):
    """Axes of size 1 that come and go, spatial axes in one, the batch by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, length = x.shape
        h = self.conv(x.reshape(n, c, length).contiguous()).unsqueeze(2)
        h = F.max_pool2d(h, (1, 2)).squeeze(-2).unsqueeze(-1)
        return self.head(h.permute(0, 1, 2, 3).flatten(2).mean(-1).view(-1, 3))


@model(2, 5, 5)
class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 4, padding="same"), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(F.elu(self.conv(x)), 1).flatten(1))


@model()
class HookedModule(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda module, args, output: torch.tanh(output))
        self.b.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@model()
class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda h: torch.tanh(self.a(h)), x, use_reentrant=False))


@model(2, 6)
class UnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.net = nn.Sequential(self.conv, nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@model()
class BehindALambda(Two):
    def __init__(self) -> None:
        super().__init__()
        self.net = lambda x: self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@model()
class FrozenFeatures(Two):
    """Derivatives stop where no parameter is."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.sin(x.detach() * 2)
        return self.b(torch.tanh(self.a(x)))


@model()
class Arithmetic(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.add(torch.tanh(h) / 3, h - F.silu(h), alpha=0.5))


@model()
class ReturnsLogSoftmax(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.b(torch.tanh(self.a(x))), dim=-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_order", [False, True])
def test_is_fused(machine: str, name: str, first_order: bool) -> None:
    make, sample = MODELS[name]
    maml = check_meta_gradient(make().double(), "cross_entropy", episode(sample), 0.1, 2, first_order=first_order)
    assert maml.backend != "reference"


def test_the_model_is_as_it_was(machine: str) -> None:
    model = Counters().double()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    maml = FusedMAML(model, 0.1, 2, backend="fused")
    maml(*episode()).loss.backward()
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before
    assert "its forward sets self.calls; fused layers do not" in maml.explain()


# -- what the model returns ---------------------------------------------------------------------------------------


class Number(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))[..., :1].squeeze(-1)


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))


@pytest.mark.parametrize(
    "loss", ["mse", nn.MSELoss(), lambda p, y: 3 * (p - y).square().sum()], ids=["mse", "MSELoss", "sum"]
)
@pytest.mark.parametrize(
    ("make", "sample", "target"), [(OneNumber, (3,), ()), (Number, (3,), ()), (pixels, (2, 4, 5), (2, 4, 5))]
)
def test_predictions_of_other_shapes(machine, make, sample, target, loss) -> None:
    data = episode(sample, target=target)
    maml = check_meta_gradient(make().double(), loss, data, 0.01, 2)
    assert maml(*data).logits.shape == data[3].shape
    fast = maml.adapt(data[0], data[1])
    assert maml.predict(fast, data[2]).shape == data[3].shape


def test_targets_of_another_shape(machine) -> None:
    maml = FusedMAML(OneNumber().double(), 0.1, loss="mse")
    with pytest.raises(ValueError, match=r"must have the prediction's shape \[3, 5\] for mse, got \[3, 5, 1\]"):
        maml(*episode((3,), target=(1,)))


# -- losses of the user's own -------------------------------------------------------------------------------------


def mlp(features: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, features)).double()


class Gaussian(nn.Module):
    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.mean, self.log_std, self.make = mlp(2), nn.Parameter(torch.zeros(2).double()), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.mean(x), self.log_std.clamp(min=-3))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Categorical:
        return Categorical(logits=self.net(x))


def independent(mean: Tensor, log_std: Tensor) -> Independent:
    return Independent(Normal(mean, log_std.exp()), 1)


def labels(n: int) -> Tensor:
    return torch.randint(4, (3, n))


def values(n: int, features: int = 4) -> Tensor:
    return torch.randn(3, n, features).double()


def weights(n: int) -> Tensor:
    return torch.rand(3, n).double() + 0.1


def with_weights(first: Callable[[int], Tensor]) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"of": first(n), "weight": weights(n) - 0.4}


def weighted_cross_entropy(p: Tensor, y: Any) -> Tensor:
    return (y["weight"] * F.cross_entropy(p, y["of"], reduction="none")).sum() / y["weight"].square().sum()


def surrogate(policy: Any, y: Any) -> Tensor:
    return -(policy.log_prob(y["of"]) * y["weight"]).mean()


def surrogate_of_a_pair(policy: Any, y: Any) -> Tensor:
    return -(log_prob(policy, y["of"]) * y["weight"]).mean()


def of_a_policy_target(policy: Any, y: PolicyTarget) -> Tensor:
    return -(log_prob(policy, y.actions) * y.advantages).sum()


OWN = {
    "cross_entropy": (mlp, F.cross_entropy, labels, "cross_entropy"),
    "a sum": (mlp, nn.CrossEntropyLoss(reduction="sum"), labels, "categorical_policy_gradient with weights"),
    "nll_loss": (lambda: ReturnsLogSoftmax().double(), F.nll_loss, labels, "cross_entropy"),
    "by hand": (mlp, lambda p, y: -p.log_softmax(-1).gather(1, y[:, None]).mean(), labels, "cross_entropy"),
    "one_hot": (
        mlp, lambda p, y: -(F.one_hot(y, 4) * p.log_softmax(-1)).sum(1).mean(), labels, "cross_entropy",
    ),
    "weights": (mlp, weighted_cross_entropy, with_weights(labels), "categorical_policy_gradient with weights"),
    "mse_loss": (mlp, F.mse_loss, values, "mse"),
    "squares": (mlp, lambda p, y: ((p - y) ** 2).sum() / p.numel(), values, "mse"),
    "half": (mlp, lambda p, y: 0.5 * (p - y).pow(2).sum(1).mean(), values, "gaussian_policy_gradient with weights"),
    "weighted squares": (
        mlp, lambda p, y: (y["weight"] * (p - y["of"]).square().sum(-1)).mean(), with_weights(values),
        "gaussian_policy_gradient with weights",
    ),
    "Categorical": (Logits, surrogate, with_weights(labels), "categorical_policy_gradient with weights"),
    "Independent": (
        lambda: Gaussian(independent), surrogate, with_weights(lambda n: values(n, 2)),
        "gaussian_policy_gradient with weights",
    ),
    "PolicyTarget": (
        mlp, of_a_policy_target, lambda n: PolicyTarget(labels(n), weights(n)),
        "categorical_policy_gradient with weights",
    ),
    "(mean, log_std)": (
        lambda: Gaussian(lambda mean, log_std: (mean, log_std)), surrogate_of_a_pair,
        with_weights(lambda n: values(n, 2)), "gaussian_policy_gradient with weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_loss_of_ones_own(machine: str, name: str) -> None:
    make, loss, target, served_by = OWN[name]
    data = [episode()[0], target(5), episode()[2], target(3)]
    maml = check_meta_gradient(make(), loss, data, 0.1, 2)
    assert f"the loss is served by {served_by}" in maml.explain()
    reference = FusedMAML(maml.model, 0.1, 2, loss=loss, backend="reference")
    fast = maml.adapt(data[0], data[1])
    for ours, theirs in (
        (maml.loss_and_grad(fast, data[2], data[3]), reference.loss_and_grad(fast, data[2], data[3])),
        (maml.hvp(fast, data[2], data[3], fast), reference.hvp(fast, data[2], data[3], fast)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours, theirs = maml.predict(fast, data[2]), reference.predict(fast, data[2])
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


CLASS_WEIGHTS = torch.rand(4).double()
# No loss of the core, though some agree with one near zero.
OTHER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[int], Tensor]]] = {
    "label smoothing": (lambda p, y: F.cross_entropy(p, y, label_smoothing=0.1), labels),
    "class weights": (lambda p, y: F.cross_entropy(p, y, CLASS_WEIGHTS), labels),
    "a label that is ignored": (lambda p, y: F.cross_entropy(p, y, ignore_index=2), labels),
    "a kink far away": (lambda p, y: F.huber_loss(p, y, delta=100.0), values),
    "a clamp far away": (lambda p, y: F.mse_loss(p.clamp(max=100), y), values),
    "the cube": (lambda p, y: (p - y).pow(2).mean() + 1e-3 * (p - y).pow(3).mean(), values),
    "another last class": (
        lambda p, y: F.cross_entropy(p, y) + F.one_hot(y, 4)[:, 3].mul(p[:, 0]).mean(), labels,
    ),
    "a term that is small near 1": (lambda p, y: (p - y).pow(2).mean() + 1e-9 * (p - y).pow(4).mean(), values),
    "a cut": (lambda p, y: F.mse_loss(p.detach(), y) + 0 * p.mean(), values),
    "weights of elements": (lambda p, y: ((p - y) ** 2 * torch.arange(4, dtype=p.dtype)).mean(), values),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 300])
@pytest.mark.parametrize("name", OTHER)
def test_another_loss(name: str, size: int) -> None:
    """Layers compute it, with predictions and values near 1 and far away."""
    (loss, target), net = OTHER[name], mlp()
    with torch.no_grad():
        net[-1].weight.mul_(size)
    y_spt, y_qry = (t * size if t.is_floating_point() else t for t in (target(5), target(3)))
    data = [episode()[0], y_spt, episode()[2], y_qry]
    if name == "a clamp far away":
        assert bool((net(data[2]) > 100).any()) == (size > 1)
    computed_is_right(net, data, loss, 0.1 / size**2)


def test_each_leaf_of_a_target_has_its_program(machine: str) -> None:
    """The labels may be any leaf; what is known of one is not taken for another."""

    def of(second: bool) -> Callable[[Tensor, Any], Tensor]:
        return lambda p, y: F.cross_entropy(p, y["second" if second else "first"])

    model, tasks = mlp(), {"first": labels(5), "second": labels(5)}
    x_spt, x_qry = torch.randn(2, 3, 5, 3).double()
    for second in (False, True):
        maml = FusedMAML(model, 0.1, 2, loss=of(second), backend="fused")
        plain = FusedMAML(model, 0.1, 2, loss=of(second), backend="reference")
        maml(x_spt, tasks, x_qry, tasks)  # the same signature for both sets
        for steps in (1, 3):
            ours, theirs = maml.adapt(x_spt, tasks, steps), plain.adapt(x_spt, tasks, steps)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_another_loss_on_the_query_set() -> None:
    def by_size(p: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(p, y) if len(p) > 4 else F.huber_loss(p, y, delta=100.0)

    with pytest.raises(ValueError, match="callable of yours, which computes different things on the two"):
        FusedMAML(mlp(), 0.1, loss=by_size, backend="fused")(episode()[0], values(5), episode()[2], values(3))


def test_labels_that_the_loss_ignores() -> None:
    """A callable may take labels that the core refuses: torch's -100 for padding."""
    data = episode()
    data[1][0, 1] = -100
    maml = FusedMAML(mlp(), 0.1, 2, loss=F.cross_entropy)
    with pytest.warns(UserWarning, match=r"y_spt holds labels outside of \[0, 4\)"):
        maml(*data)
    assert maml.backend == "reference"


# -- what is known, and when ------------------------------------------------------------------------------------------


def test_before_and_after_the_first_call(machine: str) -> None:
    maml = FusedMAML(mlp(), 0.1)
    assert "which the first call finds out; explain(x, y) looks at your data" in maml.explain()
    x, y, *_ = data = episode()
    assert "0       Linear  linear" in maml.explain(x, y)
    maml(*data)
    assert "0       Linear  linear" in maml.explain()


class AnyShape(nn.Module):
    """Another branch for each number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) if len(x) > 4 else self.a(x)


def test_each_shape_is_captured(machine: str) -> None:
    model = AnyShape().double()
    for n in ((5, 5), (4, 3)):
        check_meta_gradient(model, "cross_entropy", episode(n=n), 0.1, 2)
    with pytest.raises(ValueError, match="other operations on the query set than on the support set"):
        FusedMAML(model, 0.1, backend="fused")(*episode(n=(5, 3)))


def test_equal_programs_are_one(machine: str) -> None:
    maml = FusedMAML(mlp(), 0.1, backend="fused")
    assert program_of(maml, episode(n=(5, 3))) is program_of(maml, episode(n=(4, 6)))


def test_samples_that_do_not_fit_name_the_module() -> None:
    words = r"x_spt must have samples that the model takes, got \[7\], 5 a task: 0 \(Linear\): "
    with pytest.raises(ValueError, match=words):
        FusedMAML(mlp(), 0.1)(*episode((7,)))


class MadeInside(Two):
    """Numbers of the default dtype, which is the model's, and not that of the copy in float64 that is compared."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.a(x), torch.zeros(5), torch.ones(5), training=True)
        return self.b(torch.tanh(h.to(torch.float32).float()))


def test_numbers_made_in_float32(machine: str) -> None:
    assert FusedMAML(MadeInside(), 0.1, backend="fused")(*episode(dtype=torch.float32)).loss > 0


CALLS = [0]


class CountsOutside(Two):
    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("make", [CountsOutside, lambda: nn.Sequential(nn.GRU(3, 4), Last())], ids=["global", "GRU"])
def test_a_call_on_the_general_path_may_change_what_is_watched(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own changes do not bind the model again."""
    captured: list[int] = []
    monkeypatch.setattr(programs, "capture", lambda *a: (captured.append(1), capture(*a))[1])
    maml = FusedMAML(make().double(), 0.1)
    data = episode()
    with pytest.warns(UserWarning, match="general path"):
        maml(*data)
    for _ in range(3):
        maml(*data).loss.backward()
        fast = maml.adapt(data[0], data[1])
        maml.predict(fast, data[2])
        assert maml.backend == "reference"
    assert len(captured) <= 3  # once for each signature: of a meta-step, of adapt, of predict


class Last(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0]
