"""FusedMAML(inner_transform=...): gradient -> transform -> clip -> optimizer, against a loop that is written out."""

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck, optim
from tests.conftest import assert_close, episode
from tests.engine.test_inner_optimizers import compare, gradients, net, plain

Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _general_path_warns() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="maml_cuda runs this model on the general path")
        yield


class Preconditioner(nn.Module):
    """A learned matrix for each weight, and a learned factor for each bias."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.factors = nn.ParameterList(
            nn.Parameter(torch.eye(p.shape[0]).double() + 0.3 * torch.rand(p.shape[0], p.shape[0]).double())
            for p in model.parameters()
        )

    def forward(self, grads: Gradients) -> Gradients:
        return {name: m @ g for m, (name, g) in zip(self.factors, grads.items(), strict=True)}

    def written_out(self, grads: Gradients) -> Gradients:
        return {
            name: torch.einsum("ij,j...->i...", m, g) for m, (name, g) in zip(self.factors, grads.items(), strict=True)
        }


class StraightThrough(torch.autograd.Function):
    """1 where m >= 0, otherwise 0, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        return (m >= 0).to(m.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Mask(nn.Module):
    """A learned mask of the gradients (sparse-MAML, von Oswald et al. 2021)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scores = nn.ParameterList(nn.Parameter(torch.randn(p.shape).double()) for p in model.parameters())

    def forward(self, grads: Gradients) -> Gradients:
        return {name: StraightThrough.apply(m) * g for m, (name, g) in zip(self.scores, grads.items(), strict=True)}

    def written_out(self, grads: Gradients) -> Gradients:
        return {
            name: ((m >= 0).double() + m - m.detach()) * g
            for m, (name, g) in zip(self.scores, grads.items(), strict=True)
        }


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("made", "norm", "value", "adam"),
    [
        (Preconditioner, None, None, False),
        (Preconditioner, 0.3, 0.1, True),
        (Mask, None, None, False),
        (Mask, 0.3, 0.1, False),  # the loop that is written out has no derivative of the root of zero
    ],
)
def test_learned(
    made: Callable[..., Any], first_order: bool, norm: float | None, value: float | None, adam: bool
) -> None:
    model = net()
    transform = made(model)
    optimizer = optim.Adam(eps=1e-2) if adam else None
    maml = FusedMAML(
        model, 0.1, 3, inner_transform=transform, inner_optimizer=optimizer, inner_clip_norm=norm,
        inner_clip_value=value, first_order=first_order,
    )  # fmt: skip
    wanted = {f"inner_transform.{name}": p for name, p in transform.named_parameters()}
    assert {name for name, _ in maml.named_parameters()} >= set(wanted)
    step = plain("adam", 0.1, {"eps": 1e-2}) if adam else plain("sgd", 0.1, {})
    compare(
        maml, episode(), step, wanted, transform=transform.written_out, norm=norm, value=value, first_order=first_order
    )


def test_a_function() -> None:
    maml = FusedMAML(net(), 0.1, 3, inner_transform=lambda grads: {name: 2 * g * g.abs() for name, g in grads.items()})
    with_two = {"transform": lambda grads: {name: 2 * g * g.abs() for name, g in grads.items()}}
    compare(maml, episode(), plain("sgd", 0.1, {}), **with_two)


def test_explained_and_checked() -> None:
    model = net()
    maml = FusedMAML(model, 0.1, 2, inner_transform=Preconditioner(model), inner_clip_norm=0.5)
    data = episode()
    assert [row.name for row in gradcheck(maml, *data)][-1] == "inner_transform.factors.3"
    maml(*data)
    text = maml.explain()
    assert "because inner gradients pass through inner_transform" in text
    assert "inner gradients: Preconditioner; clipped by norm 0.5" in text


def test_a_change_is_seen() -> None:
    """The transform is replaced, removed, and changed in place between calls."""
    data = episode()
    model = net()
    maml = FusedMAML(model, 0.1, 2)
    without = maml.adapt(*data[:2])
    maml.inner_transform = lambda grads: {name: 0 * g for name, g in grads.items()}
    for name, p in maml.adapt(*data[:2]).items():
        assert torch.equal(p, dict(model.named_parameters())[name].detach().expand_as(p))
    maml.inner_transform = None
    assert_close(maml.adapt(*data[:2]), without, 0)
    maml.inner_transform = Preconditioner(model)
    before = maml.adapt(*data[:2])
    with torch.no_grad():
        maml.inner_transform.factors[0] *= 2
    assert not torch.equal(maml.adapt(*data[:2])["0.weight"], before["0.weight"])


P = nn.Parameter(torch.ones((), dtype=torch.float64))
REFUSED: list[tuple[Callable[[Gradients], Any], type[Exception], str]] = [
    (lambda grads: list(grads.values()), TypeError, "inner_transform must return a dict name -> gradient, got list"),
    (
        lambda grads: {"0.weight": grads["0.weight"]}, ValueError,
        "inner_transform must return gradients of 0.weight, 0.bias, 2.weight, 2.bias, got 0.weight",
    ),
    (
        lambda grads: {**grads, "0.weight": 1.0}, TypeError,
        "inner_transform must return tensors, got float for 0.weight",
    ),
    (
        lambda grads: {**grads, "0.weight": grads["0.weight"].T}, ValueError,
        "inner_transform must return [5, 3] of torch.float64 for 0.weight, got [3, 5] of torch.float64",
    ),
    (
        lambda grads: {**grads, "0.bias": grads["0.bias"].float()}, ValueError,
        "inner_transform must return [5] of torch.float64 for 0.bias, got [5] of torch.float32",
    ),
    (
        lambda grads: {name: P * g for name, g in grads.items()}, ValueError,
        "inner_transform must be an nn.Module that has the tensors that require grad as its parameters, got one that "
        "reads another of shape [] for 0.weight",
    ),
]  # fmt: skip


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("transform", "error", "text"), REFUSED)
def test_refused(transform: Callable[[Gradients], Any], error: type[Exception], text: str, first_order: bool) -> None:
    maml = FusedMAML(net(), 0.1, 2, inner_transform=transform, first_order=first_order)
    with pytest.raises(error, match=re.escape(text)):
        maml(*episode()).loss.backward()
    assert gradients(maml) == {}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (3, "inner_transform must be a function or nn.Module (dict name -> gradient) -> such a dict, got int"),
        (nn.Identity, "inner_transform must be a function or nn.Module (dict name -> gradient) -> such a dict, got the "
                      "class Identity"),
    ],
)  # fmt: skip
def test_refused_by_the_constructor(given: Any, text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        FusedMAML(net(), 0.1, 2, inner_transform=given)


def test_fused_is_refused() -> None:
    text = 'backend="fused" cannot serve this model: inner gradients pass through inner_transform'
    with pytest.raises(ValueError, match=text):
        FusedMAML(net(), 0.1, 2, inner_transform=lambda grads: grads, backend="fused")


class OfConvolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
        self.double()


def curvature(grads: Gradients, factors: Callable[[str], Tensor]) -> Gradients:
    """Equation 9 of Park, Oliva 2019."""
    found = {}
    for name, g in grads.items():
        if name.endswith("bias"):
            found[name] = factors(f"{name}.0") * g
        elif g.dim() == 2:
            found[name] = factors(f"{name}.0") @ g @ factors(f"{name}.1").T
        else:
            flat = g.reshape(g.shape[0], g.shape[1], -1)
            m = [factors(f"{name}.{axis}") for axis in range(3)]
            found[name] = torch.einsum("ao,bi,cf,oif->abc", *m, flat).reshape(g.shape)
    return found


def test_meta_curvature() -> None:
    model = OfConvolutions()
    transform = optim.MetaCurvature(model)
    data = episode((2, 3, 4))
    maml = FusedMAML(model, 0.1, 3, inner_transform=transform)
    assert_close(maml.adapt(*data[:2]), FusedMAML(model, 0.1, 3).adapt(*data[:2]), 1e-12)  # identities at first
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.2 * torch.randn_like(p))
    wanted = {f"inner_transform.{name}": p for name, p in transform.named_parameters()}
    assert [list(p.shape) for p in transform.parameters()] == [[3, 3], [2, 2], [6, 6], [3], [4, 4], [12, 12], [4]]
    factors = dict(transform.named_parameters())
    compare(
        maml, data, plain("sgd", 0.1, {}), wanted,
        transform=lambda grads: curvature(grads, lambda key: factors[f"factors.{key}"]),
    )  # fmt: skip


def test_meta_curvature_of_some_parameters() -> None:
    model = net()
    maml = FusedMAML(model, 0.1, 2, inner_transform=optim.MetaCurvature(model, ["2.weight"]), adapt_params=["2.weight"])
    maml(*episode()).loss.backward()
    assert {name for name in gradients(maml) if "factors" in name} == {
        "inner_transform.factors.2.weight.0", "inner_transform.factors.2.weight.1",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"names must be of parameters that require grad, got 3\.weight"):
        optim.MetaCurvature(model, ["3.weight"])
    other = FusedMAML(model, 0.1, 2, inner_transform=optim.MetaCurvature(model, ["2.weight"]))
    with pytest.raises(ValueError, match=r"MetaCurvature must have been made for 0\.weight, 0\.bias, 2\.bias, got"):
        other(*episode())
