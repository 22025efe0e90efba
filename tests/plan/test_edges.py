"""Regression tests: models that were once fused wrongly without an error."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_cuda import FusedMAML
from tests.plan.small_models import Net, episode, fused_is_right, why_not


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3)])
def test_a_bias_that_broadcasts(shape):
    model = Net(lambda m, x: F.linear(x, m.w, m.b), w=torch.randn(3, 4), b=torch.randn(shape)).double()
    fused_is_right(model, episode((4,), target=(3,)), "mse")


@pytest.mark.parametrize("features", [3, 5])
def test_a_bias_for_each_sample(features):
    """Also where as many samples as features are given."""
    model = Net(lambda m, x: F.linear(x, m.w, m.b), w=torch.randn(features, 4), b=torch.randn(5, features)).double()
    x, y = torch.randn(2, 5, 4).double(), torch.randn(2, 5, features).double()
    fused_is_right(model, [x, y, x + 1, y - 1], "mse")


@pytest.mark.parametrize(
    "layer",
    [
        lambda m, x: F.conv2d(x, m.w, torch.ones(7)),
        lambda m, x: F.linear(x, m.w[:, 0, 0], torch.ones(7)),
        lambda m, x: F.batch_norm(x, None, None, torch.ones(4), None, True),
        lambda m, x: F.conv2d(x, m.w, stride=0),
        lambda m, x: F.conv2d(x, m.w, stride=-1),
        lambda m, x: F.conv2d(x, m.w, padding=-1),
        lambda m, x: F.max_pool2d(F.conv2d(x, m.w), 2, 0),
        lambda m, x: F.avg_pool2d(F.conv2d(x, m.w), 0, 1),
        lambda m, x: F.avg_pool2d(F.conv2d(x, m.w), 2, 1, -1),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
def test_what_torch_refuses_is_an_error(layer, backend, capfd):
    """With torch's own words, without the traceback that torch logs for fake tensors."""
    maml = FusedMAML(Net(layer, w=torch.randn(3, 2, 1, 1)), 0.1, loss="mse", backend=backend)
    x = torch.ones(2, 5, 2, 5, 5)
    with pytest.raises((ValueError, RuntimeError)):
        maml(x, x, x, x)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_without_width_are_not_fused():
    assert "no elements" in why_not(nn.Sequential(nn.Linear(4, 0), nn.Tanh(), nn.Linear(0, 3)), (4,))


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random])
def test_random_numbers_in_forward_are_not_frozen_in_a_plan(draw):
    model = Net(lambda m, x: F.leaky_relu(m.o(x), draw()), o=nn.Linear(3, 4))
    before = torch.get_rng_state(), random.getstate()
    assert "draws random numbers" in why_not(model, (3,))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_frozen_parameters_do_not_move_in_hvp():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].weight.requires_grad_(False)
    x, y = torch.randn(2, 6, 4).double(), torch.randn(2, 6, 3).double()
    products = []
    for backend in ("fused", "reference"):
        maml = FusedMAML(model, 0.1, loss="mse", backend=backend)
        fast = maml.adapt(x, y)
        v = {name: torch.ones_like(p) for name, p in fast.items()}
        products.append(maml.hvp(fast, x, y, v))
    for name, product in products[1].items():
        torch.testing.assert_close(products[0][name], product, rtol=1e-10, atol=1e-12)


def test_loss_and_steps_may_be_changed():
    model = nn.Linear(3, 4).double()
    maml = FusedMAML(model, 0.1, 1)
    x, y = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 4).double()
    maml.loss = "mse"
    maml.inner_steps = 3
    fresh = FusedMAML(model, 0.1, 3, loss="mse")
    torch.testing.assert_close(maml(x, y, x, y).loss, fresh(x, y, x, y).loss, rtol=0, atol=0)
    maml.inner_steps = -1
    with pytest.raises(ValueError, match="inner_steps must be at least 0, got -1"):
        maml(x, y, x, y)


def test_a_prediction_of_four_axes():
    model = Net(lambda m, x: F.batch_norm(x, None, None, m.w, m.b, True), w=torch.ones(5), b=torch.zeros(5)).double()
    x, y = torch.randn(2, 3, 5, 2, 3, 2).double(), torch.randn(2, 3, 5, 2, 3, 2).double()
    maml = FusedMAML(model, 0.1, loss="mse", backend="fused")
    result, expected = maml(x, y, x, y), FusedMAML(model, 0.1, loss="mse", backend="reference")(x, y, x, y)
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda m, x: F.elu(m.f(x), float(m.f(x)[0, 0])), "depends on values of tensors"),
        (lambda m, x: x.shape, "the model returns tuple, not one tensor computed from x"),
        (lambda m, x: m.f(x) * m.f(x).max(1)[1][:, None], "a result of max that no fused layer computes"),
        (lambda m, x: m.w, "the model returns w, not one tensor computed from x"),
        (lambda m, x: x.tanh(), "the model's prediction depends on no parameter"),
    ],
)
def test_sentences_name_no_class_of_ours(function, sentence):
    """For sets of two sizes: those of one size may be fused as wholes."""
    maml = FusedMAML(Net(function, w=torch.randn(3), f=nn.Linear(4, 3)), 0.1, loss="mse", backend="fused")
    x, y = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match="cannot serve this model: ") as caught:
        maml(x, y, x[:, :4], y[:, :4])
    words = str(caught.value)
    assert sentence in words
    assert " object at 0x" not in words


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
@pytest.mark.parametrize(
    "function",
    [lambda b: b.flip(0), lambda b: b.transpose(0, 0), lambda b: F.log_softmax(b, dim=0), lambda b: b.sum(-1)],
)
def test_axis_0_of_a_number(function):
    """torch takes it as if there were one."""
    model = Net(lambda m, x: F.linear(x, m.w) * function(m.b) + m.b, w=torch.randn(3, 4), b=torch.tensor(0.3)).double()
    x, y = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3).double()
    results = [FusedMAML(model, 0.1, 2, loss="mse", backend=backend)(x, y, -x, y) for backend in ("auto", "reference")]
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-12, atol=0)
