"""stem: the first convolution with its BatchNorm, activation and max-pool, and models where they are not fused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.conftest import assert_close


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(),
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(-0.3),
        nn.SiLU(),
        nn.GELU(),
        nn.ELU(),
        nn.Softplus(),
        nn.Softplus(1.0, 0.5),
        nn.Hardtanh(),
    ],
)
def test_a_pool_behind_any_function(check_passes, function):
    # The pool may move before a function that never decreases; before the others it may not.
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, eps=0.1), function, nn.MaxPool2d(2), nn.Conv2d(6, 2, 1)
    )  # fmt: skip
    check_passes(model, (2, 8, 9), 4)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.AvgPool2d(2)])
def test_other_pools(check_passes, pool):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), pool, nn.Conv2d(6, 2, 1))
    check_passes(model, (2, 8, 9), 4)


def test_a_pool_without_a_function(check_passes):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    check_passes(model, (1, 7, 8), 5)


@pytest.mark.parametrize("features", [3, 27, 28])
def test_features(check_passes, features):
    model = nn.Sequential(nn.Linear(features, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 2))
    check_passes(model, (features,), 40)


def test_nothing_affine_and_no_bias(check_passes):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.Tanh(), nn.Conv2d(8, 2, 1)
    )  # fmt: skip
    check_passes(model, (3, 6, 6), 4)


class TwoReaders(nn.Module):
    """Two branches read the input; their convolutions share a weight and their BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.right.weight = self.left.weight
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.left(x))) + torch.tanh(self.norm(self.right(x))))


def test_shared_parameters(check_passes):
    check_passes(TwoReaders(), (2, 5, 6), 3)


def net(filters: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.Tanh(), nn.MaxPool2d(2),
        nn.Conv2d(filters, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3),
    )  # fmt: skip


def episode(scale: float = 1, shift: float = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x = [shift + scale * torch.rand(2, n, 2, 10, 11, generator=generator, dtype=dtype) for n in (6, 9)]
    y = [torch.arange(n).remainder(3).repeat(2, 1) for n in (6, 9)]
    return x[0], y[0], x[1], y[1]


def gradients(model: nn.Module, backend: str, tasks: tuple[Tensor, ...], **options: object) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    out = FusedMAML(model, 0.3, 3, backend=backend, **options)(*tasks)
    out.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **named}


ADAPTED = {
    "all": lambda name: True,
    "not the first layer": lambda name: not name.startswith(("0.", "1.")),
    "not its weights": lambda name: name not in {"0.weight", "0.bias"},
    "not its affine map": lambda name: not name.startswith("1."),
    "only its shift": lambda name: name == "1.bias" or name.startswith("8."),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_whoever_is_adapted(machine, adapted, first_order):
    torch.manual_seed(0)
    model = net().double()
    options = {"adapt_params": [n for n, _ in model.named_parameters() if ADAPTED[adapted](n)]}
    tasks = episode()
    options["first_order"] = first_order
    assert_close(gradients(model, "fused", tasks, **options), gradients(model, "reference", tasks, **options))


def test_frozen_layers_before_it(machine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), *net()).double()
    model[2] = nn.Conv2d(3, 6, 3, padding=1).double()
    model[0].requires_grad_(False)
    assert_close(gradients(model, "fused", episode()), gradients(model, "reference", episode()))


def test_the_bias_before_a_norm_has_a_gradient_of_zero(machine):
    model = net().double()
    assert torch.equal(gradients(model, "fused", episode())["0.bias"], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (255, 0), (1e-3, 0.5), (1, -100), (0, 0), (0, 3)])
def test_float32_as_exact_as_autograd(machine, scale, shift):
    """Large, almost constant and constant images; filters of mean zero, so that a variance is a small difference."""
    torch.manual_seed(0)
    model = net()
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean((1, 2, 3), keepdim=True)
    exact = gradients(model.double(), "reference", episode(scale, shift))
    model = model.float()
    tasks = tuple(x.float() if x.is_floating_point() else x for x in episode(scale, shift))

    def error(backend: str) -> float:
        got = gradients(model, backend, tasks)
        norm = torch.cat([exact[n].flatten() for n in got if n[0].isdigit()]).norm()
        apart = torch.cat([(got[n].double() - exact[n]).flatten() for n in got if n[0].isdigit()]).norm()
        return (apart / norm).item()

    assert error("fused") <= 2 * error("reference") + 2e-6


def test_ties_and_nan_as_in_torch(machine):
    """Of equal values in a window the first one receives the gradient."""
    torch.manual_seed(0)
    model = net().double()
    tasks = tuple(x.round() if x.is_floating_point() else x for x in episode(3))
    tasks[0][:, :, :, 2:6] = 1
    assert_close(gradients(model, "fused", tasks), gradients(model, "reference", tasks))
    tasks[2][0, 0, 0, 4, 4] = torch.nan
    assert gradients(model, "fused", tasks)["logits"][0].isnan().all()


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def test_errors_name_the_module(machine):
    model = net().double()
    maml = FusedMAML(model, 0.1, 1)
    x = torch.zeros(1, 2, 3, 10, 11).double()
    y = torch.zeros(1, 2).long()
    assert "0 (Conv2d): Given groups=1, weight of size [6, 2, 3, 3]" in message_of(lambda: maml(x, y, x, y))
    small = FusedMAML(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)).double(), 0.1)
    x = torch.zeros(1, 2, 2, 3, 5).double()
    assert "3 (MaxPool2d): Given input size: (3x1x3)" in message_of(lambda: small(x, y, x, y))
