"""Parameters of other dtypes beside the adapted ones: frozen ones in half precision or integers, and complex ones.

Every entry point is compared with the oracle.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck
from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.general_path import RATE, STEPS, check_entries, episode, maml_of


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class Frozen(nn.Module):
    """A frozen table in half precision as the first parameter, and integers that select the columns of x."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = frozen((torch.randn(4, 3) / 8).half())
        self.columns = frozen(torch.tensor([2, 0, 1]))
        self.layer, self.head = nn.Linear(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x[:, self.columns]) + (x.half() @ self.table.half().T).to(x.dtype)
        return self.head(torch.tanh(h))


class Waves(nn.Module):
    """Complex weights before real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64) / 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.ifft(x.to(self.w.dtype) @ self.w * (1 + 0.3j))
        return self.head(h.real.sin() + h.imag * h.abs())


class Phases(nn.Module):
    """Complex weights only, and a complex output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.w.dtype) @ self.w
        return h * torch.exp(-h.abs())


def far_off(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().square().mean()


def in_double(model: nn.Module) -> nn.Module:
    return model._apply(oracle.in_double)


def test_frozen_parameters_of_other_dtypes():
    """All parameters are float64, except the table and the column numbers."""
    check_entries(Frozen(torch.float64), episode(3))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_their_dtype_is_no_ones_but_theirs(backend):
    """A float32 model with learned rates and task weights agrees with the float64 oracle to float32 rounding."""
    model, data = Frozen(), tuple(t.float() for t in episode(3))
    rate = nn.Parameter(torch.tensor(RATE))
    maml = FusedMAML(model, rate, STEPS, loss="mse", backend=backend, query_weights=[0.0, 0.0, 1.0])
    value, expected = oracle.meta_gradient(model, "mse", *data, RATE, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got, grads = run(maml, data)
    learned = grads.pop("inner_lr")
    torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=0)
    assert_close({n: g.double() for n, g in grads.items()}, expected, 1e-5)
    maml.zero_grad()
    maml(*data, task_weights=torch.tensor([0.5, 0.5])).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, grads, 1e-6)
    step = 1e-3
    up, down = (oracle.meta_gradient(model, "mse", *data, RATE + d, STEPS)[0] for d in (step, -step))
    torch.testing.assert_close(learned.double(), (up - down) / (2 * step), rtol=1e-4, atol=1e-7)
    assert model.table.dtype == torch.float16
    assert model.columns.dtype == torch.int64


def test_a_frozen_table_is_not_fused_in_words():
    data = tuple(t.float() for t in episode(3))
    with pytest.raises(ValueError, match='backend="fused" cannot serve this model'):
        FusedMAML(Frozen(), RATE, STEPS, loss="mse", backend="fused")(*data)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight = frozen(model[0].weight.detach().half())
    with pytest.raises(ValueError, match=r"0 \(Linear\): 0\.weight is torch\.float16, unlike the model's input"):
        FusedMAML(model, RATE, STEPS, loss="mse", backend="fused")(*data)


def test_complex_parameters():
    check_entries(in_double(Waves()), episode(3))


def test_complex_outputs():
    model, data = in_double(Phases()), episode(3)
    data = data[0], torch.complex(data[1], data[1].flip(0)), data[2], torch.complex(data[3], data[3].flip(0))
    check_entries(model, data, loss=far_off)


def test_complex_parameters_in_single_precision():
    model, data = Waves(), tuple(t.float() for t in episode(3))
    rates = {"w": nn.Parameter(torch.full((3, 4), RATE)), "head.weight": RATE, "head.bias": RATE}
    maml = FusedMAML(model, rates, STEPS, loss="mse", backend="reference")
    _, expected = oracle.meta_gradient(model, "mse", *data, RATE, STEPS)
    _, grads = run(maml, data)
    rate = grads.pop("inner_lr.w")
    assert rate.dtype == torch.float32
    assert grads["w"].dtype == torch.complex64
    assert_close({n: oracle.in_double(g) for n, g in grads.items()}, expected, 1e-5)
    gradcheck(maml, *data)


def test_complex_numbers_where_none_belong():
    data = episode(3)
    with pytest.raises(TypeError, match=r"the model must return real numbers for mse, got torch\.complex128"):
        maml_of(in_double(Phases()))(*data)
    with pytest.raises(TypeError, match=r"the loss must return a real floating-point tensor, got torch\.complex128"):
        maml_of(in_double(Phases()), lambda p, t: (p - t).mean())(*data)
    with pytest.raises(TypeError, match=r"x_spt must have the model's dtype torch\.float32, got torch\.complex128"):
        maml_of(Waves())(data[0].to(torch.complex128), *data[1:])


def test_x_has_a_dtype_of_the_models():
    model, data = Frozen(), tuple(t.float() for t in episode(3))
    maml = maml_of(model)
    with pytest.raises(
        TypeError, match=r"must have the model's dtype torch\.float16 or torch\.float32, got torch\.f.*64"
    ):
        maml(data[0].double(), *data[1:])
    model.layer.double()
    with pytest.raises(
        ValueError, match=r"trainable parameters must have one dtype.*float32 on cpu, torch\.float64 on"
    ):
        maml(*data)
