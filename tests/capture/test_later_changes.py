"""Changes of the model after FusedMAML was made: frozen or replaced parameters, hooks, modes, dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from maml_cuda import FusedMAML, reference
from tests.plan.small_models import CLASSES, RATE, STEPS, around, episode, made, right, sentences, trained_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def hook_later(register: str, answer: Callable[..., Any]) -> Callable[[Any], object]:
    return lambda model: getattr(model[0], register)(answer)


def replaced(model: Any) -> None:
    model[1] = nn.Sigmoid()


def forward_later(model: Any) -> None:
    model[1].forward = lambda h: h * h


def wider(model: Any) -> None:
    model[2].weight = nn.Parameter(torch.ones(CLASSES + 3, 3).double())
    model[2].bias = nn.Parameter(torch.ones(CLASSES + 3).double())


def tied_later(model: Any) -> None:
    model[2] = nn.Linear(3, 3).double()
    model.append(nn.Linear(3, CLASSES).double())
    model[2].weight = model[0].weight


LATER: dict[str, Callable[[Any], object]] = {
    "nothing": lambda model: None,
    "a parameter frozen": lambda model: model[0].weight.requires_grad_(False),
    "a parameter replaced": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(3, 3).double())),
    "a parameter of another shape": wider,
    "weights loaded": lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
    "a forward hook": hook_later("register_forward_hook", lambda m, args, out: out * 1.5),
    "a forward pre-hook": hook_later("register_forward_pre_hook", lambda m, args: (args[0] * 1.5,)),
    "spectral norm": lambda model: parametrizations.spectral_norm(model[0]),
    "weight norm": lambda model: parametrizations.weight_norm(model[2]),
    "a layer replaced": lambda model: setattr(model, "0", nn.Linear(3, 3).double()),
    "an activation replaced": replaced,
    "a layer appended": lambda model: model.append(nn.Tanh()),
    "a forward set on an instance": forward_later,
    "layers added, weights tied": tied_later,
    "a bias removed": lambda model: setattr(model[2], "bias", None),
}


@pytest.mark.parametrize("case", LATER)
def test_a_change_after_construction_is_seen(case: str) -> None:
    maml = FusedMAML(made(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES))), RATE, STEPS)
    maml(*episode())
    LATER[case](maml.model)
    right(maml, episode())


def test_weights_tied_later_are_seen() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, CLASSES)))
    maml = FusedMAML(model, RATE, STEPS)
    maml(*episode())
    model[2].weight = model[0].weight
    right(maml, episode())


def test_a_bias_given_later_is_seen() -> None:
    maml = FusedMAML(made(lambda: nn.Linear(3, CLASSES, bias=False)), RATE, STEPS)
    maml(*episode())
    maml.model.bias = nn.Parameter(torch.ones(CLASSES).double())
    right(maml, episode())


def test_a_hook_that_comes_and_goes() -> None:
    maml = FusedMAML(made(lambda: around(nn.Tanh())), RATE, STEPS)
    right(maml, episode())
    for _ in range(2):
        handle = maml.model[0].register_forward_hook(lambda m, args, out: out * 1.5)
        right(maml, episode())
        assert maml.backend == "cpu"
        handle.remove()
        right(maml, episode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # the second time without a warning
            handle = maml.model[0].register_full_backward_hook(lambda m, into, out: None)
            maml(*episode())
            assert maml.backend == "reference"
            handle.remove()
            maml(*episode())
            assert maml.backend == "cpu"
    (sentence,) = sentences(caught)
    assert "0 (Linear) has backward hooks" in sentence
    right(maml, episode())


@pytest.mark.parametrize(
    ("layer", "attribute", "value"),
    [
        (nn.BatchNorm1d(5), "eps", 0.5), (nn.ELU(), "alpha", 0.3), (nn.LeakyReLU(), "negative_slope", 0.5),
        (nn.Softplus(), "beta", 3.0), (nn.GELU(), "approximate", "tanh"), (nn.Hardtanh(), "max_val", 0.2),
    ],
)  # fmt: skip
def test_an_option_changed_after_construction_is_seen(layer: nn.Module, attribute: str, value: Any) -> None:
    maml = FusedMAML(made(lambda: around(layer)), RATE, STEPS)
    maml(*episode())
    setattr(maml.model[1], attribute, value)
    right(maml, episode())


def test_dropout_turned_up_after_construction_is_seen() -> None:
    maml = FusedMAML(made(lambda: around(nn.Dropout(0.0))), RATE, STEPS)
    maml(*episode()).loss.backward()
    assert maml.model[0].weight.grad.abs().sum() > 0
    maml.zero_grad()
    maml.model[1].p = 1.0  # a product with zeros
    maml(*episode()).loss.backward()
    assert maml.backend == "cpu"
    assert maml.model[0].weight.grad.abs().sum() == 0
    right(maml, episode())
    maml.model[1].p = 0.5
    torch.manual_seed(3)
    expected = reference.meta_gradient(maml.model, "cross_entropy", *episode(), RATE, STEPS)[0]
    torch.manual_seed(3)
    assert abs(maml(*episode()).loss - expected) < 1e-9
    assert maml.backend == "cpu"


def test_eval_and_train_after_construction() -> None:
    maml = FusedMAML(made(lambda: around(trained_norm())), RATE, STEPS)
    data = episode()
    train = maml(*data).loss
    for mode in (False, True, False):
        maml.train(mode)
        assert maml.backend == "cpu"
        right(maml, data)
        assert torch.equal(maml(*data).loss, train) is mode


def test_running_statistics_that_no_batch_has_updated() -> None:
    model = made(lambda: around(nn.BatchNorm1d(5).eval()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maml = FusedMAML(model, RATE, STEPS)
        maml(*episode())
    unused = [str(w.message) for w in caught if "no batch has updated" in str(w.message)]
    assert len(unused) == 1
    assert unused[0].startswith("1 (BatchNorm1d)")
    assert not sentences(caught)
    right(maml, episode())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_take_the_reference(dtype: torch.dtype) -> None:
    maml = FusedMAML(made(lambda: around(nn.Tanh())), RATE, STEPS)
    maml.to(dtype)
    with pytest.warns(UserWarning, match=f"the model is {dtype}"):
        out = maml(*episode(dtype=dtype))
    assert maml.backend == "reference"
    assert out.loss.dtype == dtype
    out.loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in maml.parameters())


def test_float_then_double() -> None:
    maml = FusedMAML(made(lambda: around(nn.Tanh())).float(), RATE, STEPS)
    assert maml(*episode(dtype=torch.float32)).loss.dtype == torch.float32
    maml.double()
    assert maml.backend == "cpu"
    right(maml, episode())


def test_requires_grad_later_and_back() -> None:
    maml = FusedMAML(made(lambda: around(nn.Tanh())), RATE, STEPS)
    body = maml.model[0]
    body.requires_grad_(False)
    right(maml, episode())
    assert body.weight.grad is None
    assert maml.backend == "cpu"
    body.requires_grad_(True)
    right(maml, episode())
    assert body.weight.grad is not None
