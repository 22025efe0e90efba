"""FusedMAML with inner optimizers: the meta-gradient against a loop that is written out (unrolled_optimizers.py)."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, optim
from tests.conftest import assert_close, episode
from tests.engine import unrolled_optimizers as unrolled

TOLERANCE = 1e-9
OURS = {
    "sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW, "adamax": optim.Adamax, "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}  # fmt: skip
# eps is large enough that the meta-gradient is not dominated by elements whose gradient is nearly zero.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("adam", {"eps": 1e-3}),
    ("adam", {"betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.1}),
    ("adamw", {"eps": 1e-3, "weight_decay": 0.3}),
    ("adamax", {"eps": 1e-3, "weight_decay": 0.1}),
    ("rmsprop", {"eps": 1e-3}),
    ("rmsprop", {"alpha": 0.7, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.6, "centered": True}),
    ("adagrad", {"eps": 1e-3}),
    ("adagrad", {"lr_decay": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
]


@pytest.fixture(autouse=True)
def _general_path_may_warn() -> Iterator[None]:
    """Fused layers serve some of these; the others say that they run on the general path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="maml_cuda runs this model on the general path")
        yield


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def gradients(maml: FusedMAML) -> dict[str, Tensor]:
    found = {name.removeprefix("model."): p.grad for name, p in maml.named_parameters()}
    return {name: g for name, g in found.items() if g is not None}


def compare(
    maml: FusedMAML,
    data: list[Tensor],
    step: Callable[..., Tensor],
    wanted: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """The meta-step and the adapted parameters against the loop that is written out."""
    steps = maml.inner_steps
    loss, expected, after = unrolled.meta_gradient(maml.model, data, steps, step, wanted or {}, **options)
    maml.zero_grad()
    out = maml(*data)
    out.loss.backward()
    assert abs(out.loss.item() - loss.item()) <= TOLERANCE
    assert_close(gradients(maml), expected, TOLERANCE)
    for fast in (maml.adapt(*data[:2]), list(maml.inner_loop(*data[:2], steps))[-1]):
        assert_close(fast, {n: torch.stack([phi[n] for phi in after]) for n in fast}, TOLERANCE)


def plain(rule: str, lr: float, options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda name, p, g, s, k: unrolled.RULES[rule](p, g, s, k + 1, lr, options)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_meta_gradient(machine: str, backend: str, rule: str, options: dict[str, Any], first_order: bool) -> None:
    maml = FusedMAML(net(), 0.1, 4, inner_optimizer=OURS[rule](**options), first_order=first_order, backend=backend)
    compare(maml, episode(), plain(rule, 0.1, options), first_order=first_order)


@pytest.mark.parametrize(("norm", "value"), [(0.3, None), (None, 0.05), (0.4, 0.06), (50.0, 20.0)])
@pytest.mark.parametrize(("rule", "options"), [CASES[0], CASES[3], CASES[6]])
def test_clipped(
    machine: str, backend: str, rule: str, options: dict[str, Any], norm: float | None, value: float | None
) -> None:
    maml = FusedMAML(
        net(), 0.1, 3, inner_optimizer=OURS[rule](**options), inner_clip_norm=norm, inner_clip_value=value,
        backend=backend,
    )  # fmt: skip
    compare(maml, episode(), plain(rule, 0.1, options), norm=norm, value=value)


@pytest.mark.parametrize("norm", [None, 0.3])
@pytest.mark.parametrize("value", [None, 0.05])
def test_clipped_without_an_optimizer(machine: str, backend: str, norm: float | None, value: float | None) -> None:
    maml = FusedMAML(net(), 0.2, 3, inner_clip_norm=norm, inner_clip_value=value, backend=backend)
    compare(maml, episode(), plain("sgd", 0.2, {}), norm=norm, value=value)
