"""Transforms of the inner gradients in the fused core: Scale, Mask, Sign and MetaCurvature, against a loop that is
written out (unrolled_optimizers.py)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, optim
from maml_cuda.capture.errors import Unfusable
from maml_cuda.engine.factors import factors_of
from tests.conftest import episode
from tests.engine import unrolled_optimizers as unrolled
from tests.engine.test_inner_optimizers import compare, plain

pytestmark = pytest.mark.usefixtures("machine", "one_thread")

Gradients = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def images() -> nn.Module:
    """A linear layer behind four positions of three channels, whose columns the core has in another order."""
    parts = nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Conv2d(3, 3, 1, bias=False), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*parts).double()


def wide() -> nn.Module:
    """More rows and columns than a vector has lanes."""
    return nn.Sequential(nn.Linear(3, 19), nn.Tanh(), nn.Linear(19, 18), nn.Tanh(), nn.Linear(18, 4)).double()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (net, (3,)),
    "images": (images, (2, 3, 4)),
    "wide": (wide, (3,)),
}


def curvature(model: nn.Module) -> optim.MetaCurvature:
    transform = optim.MetaCurvature(model)
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return transform


def scaled(kind: Any) -> Callable[[nn.Module], optim.Scale]:
    return lambda model: kind({name: nn.Parameter(torch.randn_like(p)) for name, p in model.named_parameters()})


MADE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Scale": scaled(optim.Scale),
    "Mask": scaled(optim.Mask),
    "Sign": scaled(optim.Sign),
    "MetaCurvature": curvature,
}


def written_out(transform: Any, grads: Gradients) -> Gradients:
    """By the formulas; that of MetaCurvature is equation 9 of Park, Oliva 2019."""
    factors = {name.removeprefix("factors."): t for name, t in transform.state_dict(keep_vars=True).items()}
    found = {}
    for name, g in grads.items():
        if isinstance(transform, optim.MetaCurvature):
            if g.dim() == 1:
                found[name] = factors[f"{name}.0"] * g
                continue
            flat = g.reshape(*g.shape[:2], -1)
            m = [factors[f"{name}.{axis}"] for axis in range(min(g.dim(), 3))] + [torch.ones(1, 1).double()]
            found[name] = torch.einsum("ao,bi,cf,oif->abc", *m[:3], flat).reshape(g.shape)
            continue
        t = factors[name]
        if isinstance(transform, optim.Mask):
            t = (t >= 0).double() + t - t.detach()
        elif isinstance(transform, optim.Sign):
            t = t.detach().sign() + t - t.detach()
        found[name] = t * g
    return found


def compared(maml: FusedMAML, data: list[Tensor], step: Any, **options: Any) -> None:
    transform: Any = maml.inner_transform
    wanted = {f"inner_transform.{name}": p for name, p in transform.named_parameters()}
    compare(maml, data, step, wanted, transform=lambda grads: written_out(transform, grads), **options)
    assert maml.backend != "reference"


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("of", NETS)
@pytest.mark.parametrize("kind", MADE)
def test_descent(kind: str, of: str, first_order: bool) -> None:
    make, sample = NETS[of]
    model = make()
    maml = FusedMAML(model, 0.1, 3, inner_transform=MADE[kind](model), first_order=first_order, backend="fused")
    compared(maml, episode(sample), plain("sgd", 0.1, {}), first_order=first_order)


def of_layer(*layers: nn.Module, features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers), nn.Tanh(), nn.Flatten(), nn.Linear(features, 4)).double()


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (of_layer(nn.Conv1d(2, 3, 3), features=15), (2, 7)),
        (of_layer(nn.Conv3d(2, 3, 2), features=24), (2, 3, 3, 3)),
        (of_layer(nn.Conv2d(4, 6, 3, groups=2), features=24), (4, 4, 4)),
        (of_layer(nn.Conv2d(4, 4, 3, groups=4), features=16), (4, 4, 4)),
        (of_layer(nn.ConvTranspose2d(2, 3, 2), features=27), (2, 2, 2)),
        (of_layer(nn.Conv2d(3, 1, 3), features=4), (3, 4, 4)),
        (of_layer(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1), features=1), (3, 4, 4)),
        (of_layer(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.MaxPool2d(2), features=20), (2, 4, 4)),
        (of_layer(nn.Linear(3, 6), nn.LayerNorm(6), nn.PReLU(), features=6), (3,)),
    ],
    ids=["conv1d", "conv3d", "groups", "depthwise", "transposed", "one row", "one row of taps", "blocks", "norm"],
)
def test_curvature_of_layers(make: Callable[[], nn.Module], sample: tuple[int, ...]) -> None:
    """The core has the elements of a weight in an order of the layer that reads it."""
    model = make()
    maml = FusedMAML(model, 0.1, 2, inner_transform=curvature(model), backend="fused")
    compared(maml, episode(sample), plain("sgd", 0.1, {}))


def test_a_weight_that_is_read_in_another_order() -> None:
    transform = optim.MetaCurvature(net())
    with pytest.raises(
        Unfusable, match=r"0\.weight is read as 2 rows with 1 taps, which the matrices of MetaCurvature"
    ):
        factors_of(transform, "0.weight", torch.zeros(5, 3), 2, 1)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("norm", "value"), [(None, None), (0.3, None), (0.4, 0.06)])
@pytest.mark.parametrize("kind", ["Scale", "Sign", "MetaCurvature"])
def test_before_clipping_and_the_optimizer(
    kind: str, norm: float | None, value: float | None, first_order: bool
) -> None:
    model = images()
    options = {"betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.1}
    maml = FusedMAML(
        model, 0.1, 3, inner_transform=MADE[kind](model), inner_optimizer=optim.Adam(**options), inner_clip_norm=norm,
        inner_clip_value=value, first_order=first_order, backend="fused",
    )  # fmt: skip
    data = episode((2, 3, 4))
    compared(maml, data, plain("adam", 0.1, options), norm=norm, value=value, first_order=first_order)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"checkpoint": "sqrt"}, {}),
        ({"checkpoint": "recompute"}, {}),
        ({"meta_gradient": "truncated", "truncate": 2}, {"truncate": 2}),
        ({"query_weights": [0.0, 0.3, 0.0, 0.5, 0.2]}, {"query_weights": [0.0, 0.3, 0.0, 0.5, 0.2]}),
    ],
    ids=["segments", "recompute", "truncated", "queries"],
)
def test_other_inner_loops(kind: str, options: dict[str, Any], written: dict[str, Any]) -> None:
    model = net()
    maml = FusedMAML(
        model, 0.1, 4, inner_transform=MADE[kind](model), inner_clip_norm=0.5, backend="fused", **options
    )  # fmt: skip
    compared(maml, episode(), plain("sgd", 0.1, {}), norm=0.5, **written)


def test_some_are_learned_and_some_adapted() -> None:
    """A fixed mask of one parameter, and a learned factor of another; the others are not adapted."""
    model = net()
    factors = {"2.weight": (torch.rand(4, 5) > 0.5).double(), "0.weight": nn.Parameter(torch.randn(5, 3).double())}
    maml = FusedMAML(
        model, 0.1, 3, inner_transform=optim.Scale(factors), adapt_params=["0.weight", "2.weight"], backend="fused"
    )
    compared(maml, episode(), plain("sgd", 0.1, {}), adapted=["0.weight", "2.weight"])
    fast = maml.adapt(*episode()[:2])["2.weight"]
    still = factors["2.weight"] == 0
    assert torch.equal(fast[:, still], model[2].weight.detach()[still].expand(len(fast), -1))


@pytest.mark.parametrize("kind", MADE)
def test_gradients_of_data(kind: str) -> None:
    model, data = images(), episode((2, 3, 4))
    transform = MADE[kind](model)
    given = {"x_spt": data[0].requires_grad_(), "x_qry": data[2].requires_grad_()}
    maml = FusedMAML(model, 0.1, 3, inner_transform=transform, backend="fused")
    _, expected, _ = unrolled.meta_gradient(
        model, data, 3, plain("sgd", 0.1, {}), given, transform=lambda grads: written_out(transform, grads)
    )
    maml(*data).loss.backward()
    for name, x in given.items():
        torch.testing.assert_close(x.grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["Mask", "MetaCurvature"])
def test_a_task_does_not_feel_its_neighbours(kind: str, dtype: torch.dtype, tasks: int) -> None:
    model = wide()
    transform = MADE[kind](model)
    maml = FusedMAML(model.to(dtype), 0.1, 2, inner_transform=transform.to(dtype), backend="fused")
    data = episode(tasks=tasks, dtype=dtype)

    def step(data: list[Tensor], weights: Tensor | None = None) -> Gradients:
        maml.zero_grad()
        maml(*data, task_weights=weights).loss.backward()
        return {name: p.grad.clone() for name, p in maml.named_parameters() if p.grad is not None}

    for t in {0, tasks // 2, tasks - 1}:
        own = step([d[t : t + 1] for d in data])
        for name, g in step(data, torch.eye(tasks, dtype=dtype)[t]).items():
            assert torch.equal(g, own[name]), name


def test_the_same_bits_on_any_number_of_threads(machine: str) -> None:
    if machine != "cpu":
        pytest.skip("threads are of the CPU")
    model = nn.Sequential(nn.Conv2d(2, 48, 3), nn.Tanh(), nn.Conv2d(48, 48, 3), nn.Flatten(), nn.Linear(1200, 4))
    transform = optim.MetaCurvature(model)
    maml = FusedMAML(model, 0.1, 2, inner_transform=transform, backend="fused")
    data = episode((2, 9, 9), tasks=1, dtype=torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        maml.zero_grad()
        maml(*data).loss.backward()
        found.append([p.grad for p in maml.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_factors_of_another_dtype() -> None:
    """They are taken in the gradient's, on both paths."""
    model = net()
    transform = optim.Scale({name: nn.Parameter(torch.randn(p.shape)) for name, p in model.named_parameters()})
    data, found = episode(), []
    for backend in ("fused", "reference"):
        maml = FusedMAML(model, 0.1, 2, inner_transform=transform, backend=backend)
        maml.zero_grad()
        maml(*data).loss.backward()
        found.append({name: p.grad.double() for name, p in maml.named_parameters()})
    for name, g in found[0].items():
        torch.testing.assert_close(g, found[1][name], rtol=1e-6, atol=1e-9)


def test_a_change_is_seen() -> None:
    model = net()
    transform: Any = MADE["Scale"](model)
    maml = FusedMAML(model, 0.1, 2, inner_transform=transform, backend="fused")
    data = episode()
    compared(maml, data, plain("sgd", 0.1, {}))
    held = transform.factors._modules["2"]
    with torch.no_grad():
        held.weight.mul_(2)
    compared(maml, data, plain("sgd", 0.1, {}))
    held.weight = nn.Parameter(torch.randn(4, 5).double())
    compared(maml, data, plain("sgd", 0.1, {}))
    held.weight.requires_grad_(False)
    maml.zero_grad(set_to_none=True)
    maml(*data).loss.backward()
    assert held.weight.grad is None
    assert held.bias.grad is not None
    maml.inner_transform = None
    maml(*data)
    assert "Scale" not in maml.explain()


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
def test_a_changed_transform_runs_on_the_general_path() -> None:
    model = net()

    class Own(optim.Scale):
        def forward(self, grads: Any) -> Gradients:
            return {name: 3 * g for name, g in grads.items()}

    hooked = MADE["Scale"](model)
    hooked.register_forward_hook(lambda m, args, out: {name: 3 * g for name, g in out.items()})
    for transform in (Own({name: torch.ones_like(p) for name, p in model.named_parameters()}), hooked):
        maml = FusedMAML(model, 0.1, 2, inner_transform=transform)
        maml(*episode())
        assert maml.backend == "reference"


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("factors", "text"),
    [
        (
            {"0.weight": torch.ones(5, 3).double(), "2.bias": torch.ones(4).double()},
            "Mask must have a tensor of each adapted parameter, got none of 0.bias, 2.weight",
        ),
        (
            {
                "0.weight": torch.ones(3).double(), "0.bias": torch.ones(5).double(),
                "2.weight": torch.ones(4, 5).double(), "2.bias": torch.ones(4).double(),
            },
            "Mask's tensor of 0.weight must have the parameter's shape [5, 3], got [3]",
        ),
    ],
)  # fmt: skip
def test_refused(factors: dict[str, Tensor], text: str, backend: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, inner_transform=optim.Mask(factors), backend=backend)
    with pytest.raises(ValueError, match=re.escape(text)):
        maml(*episode())


@pytest.mark.parametrize(
    ("factors", "error", "text"),
    [
        ([torch.ones(2)], TypeError, "Sign must have a dict name -> tensor, got list"),
        ({"w": 1.0}, TypeError, "Sign's tensor of w must be a floating-point tensor, got float"),
        ({"w": torch.ones(2).long()}, TypeError, "Sign's tensor of w must be a floating-point tensor, got torch.int64"),
        ({"w": torch.tensor([1.0, torch.nan])}, ValueError, "Sign's tensor of w must be finite, got [1.0, nan]"),
    ],
)  # fmt: skip
def test_refused_by_the_constructor(factors: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        optim.Sign(factors)
