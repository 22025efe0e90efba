"""Layers and expressions that are fused: every spelling gives the gradients of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maml_cuda import FusedMAML
from tests.plan.small_models import (
    CLASSES,
    IMAGE,
    RATE,
    STEPS,
    Net,
    around,
    between,
    conv,
    dense,
    episode,
    fused_is_right,
    made,
    pooled,
    trained_instance_norm,
    trained_norm,
    weight,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS = {
    "relu": [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        lambda h: h.relu(),
        torch.relu_,
        lambda h: h.relu_(),
        F.relu_,
    ],
    "relu6": [nn.ReLU6(), F.relu6, lambda h: F.relu6(h, inplace=True)],
    "leaky_relu": [
        nn.LeakyReLU(0.2),
        lambda h: F.leaky_relu(h, 0.2),
        lambda h: F.leaky_relu(h, inplace=True),
    ],
    "elu": [nn.ELU(0.7), lambda h: F.elu(h, 0.7), lambda h: F.elu(h, alpha=1.3)],
    "selu": [nn.SELU(), F.selu],
    "celu": [nn.CELU(2.0), lambda h: F.celu(h, 2.0)],  # a power of 2: torch rounds 1 / alpha to float32 in its backward
    "silu": [nn.SiLU(), F.silu],
    "gelu": [nn.GELU(), F.gelu],
    "gelu_tanh": [nn.GELU("tanh"), lambda h: F.gelu(h, approximate="tanh")],
    "softplus": [nn.Softplus(2.0, 1.0), lambda h: F.softplus(h, 2.0, 1.0), F.softplus],
    "tanh": [nn.Tanh(), torch.tanh, lambda h: h.tanh(), F.tanh],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda h: h.sigmoid(), F.sigmoid],
    "hardtanh": [nn.Hardtanh(-0.3, 0.6), lambda h: F.hardtanh(h, -0.3, 0.6)],
    "identity": [
        nn.Identity(),
        nn.Dropout(0.0),
        lambda h: F.dropout(h, 0.5, training=False),
        lambda h: h.contiguous(),
    ],
}
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "linear module": lambda: nn.Linear(3, CLASSES),
    "linear without bias": lambda: nn.Linear(3, CLASSES, bias=False),
    "linear functional": lambda: Net(lambda m, x: F.linear(x, m.w, m.d), w=weight(CLASSES, 3), d=weight(CLASSES)),
    "linear subclass": lambda: Net(lambda m, x: m.a(x).tanh() + m.b(x), a=PlainLinear(3, 4), b=nn.Linear(3, 4)),
    "batch norm": lambda: around(nn.BatchNorm1d(5)),
    "batch norm without affine": lambda: around(nn.BatchNorm1d(5, affine=False, momentum=None)),
    "batch norm, large eps": lambda: around(nn.BatchNorm1d(5, eps=0.3)),
    "batch norm, eval, untracked": lambda: around(nn.BatchNorm1d(5, track_running_stats=False).eval()),
    "batch norm, eval": lambda: around(trained_norm().eval()),
    "batch norm, eval, without affine": lambda: around(trained_norm(affine=False).eval()),
    "batch norm functional, eval": lambda: dense(
        lambda m, x: m.c(F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var)) + m.c(m.b(x)),
        n=trained_norm(affine=False),
    ),
    "batch norm functional": lambda: dense(
        lambda m, x: m.c(F.batch_norm(m.a(x), None, None, m.g, m.d, training=True) + m.b(x)),
        g=weight(5),
        d=weight(5),
    ),
    "batch norm functional, bare": lambda: dense(
        lambda m, x: m.c(F.batch_norm(m.a(x), None, None, training=True) + m.b(x))
    ),
    "group norm": lambda: around(nn.GroupNorm(1, 5)),
    "layer norm": lambda: around(nn.LayerNorm(5)),
    "layer norm without bias": lambda: around(nn.LayerNorm((5,), bias=False)),
    "layer norm functional": lambda: dense(lambda m, x: m.c(F.layer_norm(m.a(x), (5,), m.g) + m.b(x)), g=weight(5)),
    "layer norm torch": lambda: dense(lambda m, x: m.c(torch.layer_norm(m.a(x), [5], m.g) + m.b(x)), g=weight(5)),
    "dropout in eval mode": lambda: around(nn.Dropout(0.9).eval()),
    "add operator": lambda: dense(lambda m, x: m.c(m.a(x).tanh() + m.b(x))),
    "add function": lambda: dense(lambda m, x: m.c(torch.add(m.a(x).tanh(), m.b(x)))),
    "add method": lambda: dense(lambda m, x: m.c(m.a(x).tanh().add(m.b(x)))),
    "add in place": lambda: dense(lambda m, x: m.c(m.a(x).add_(m.b(x)).tanh())),
    "add with +=": lambda: dense(plus_equals),
    "a value twice in a sum": lambda: dense(lambda m, x: m.c((lambda h: h + h)(m.a(x).tanh()) + m.b(x))),
    "a value read twice": lambda: dense(lambda m, x: (lambda h: m.c(h.sigmoid() + h) + m.c(m.b(x)))(m.a(x))),
    "a module called twice": lambda: dense(lambda m, x: m.c(m.a(x).tanh()) + m.c(m.b(x))),
    "tied weights": lambda: tied(),
    "nested modules": lambda: nn.Sequential(around(nn.Tanh()), nn.Sequential(nn.ELU(), nn.Linear(4, CLASSES))),
    "module list": lambda: Net(
        lambda m, x: m.parts[1](m.parts[0](x).relu()),
        parts=nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, CLASSES)]),
    ),
    "the input read twice": lambda: Net(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(3, CLASSES), b=nn.Linear(3, CLASSES)),
    "a result nobody reads": lambda: Net(lambda m, x: (m.a(x).exp(), m.a(x))[1], a=nn.Linear(3, CLASSES)),
    "add with alpha": lambda: dense(lambda m, x: m.c(torch.add(m.a(x), m.b(x), alpha=2))),
    "in place, read again": lambda: dense(read_again),
    "buffer as weight": lambda: buffer_as_weight(),
    "a subclass of Linear that divides": lambda: around(Scaled(5, 5)),
    "a forward on the instance": lambda: with_own_forward(),
    "a keyword": lambda: Net(lambda m, x: m.o(input=x), o=nn.Linear(3, CLASSES)),
    "a forward hook": lambda: hooked("register_forward_hook", lambda m, args, out: out * 1.5),
    "a forward pre-hook": lambda: hooked("register_forward_pre_hook", lambda m, args: (args[0] * 1.5,)),
    "hooks that change nothing": lambda: hooked("register_forward_hook", lambda m, args, out: None),
    "a checkpoint": lambda: dense(
        lambda m, x: m.c(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=False) + m.b(x))
    ),
    "a layer made in forward": lambda: dense(lambda m, x: m.c(nn.Tanh()(m.a(x)) + m.b(x))),
    "a list of parameters": lambda: Net(
        lambda m, x: F.linear(x, m.w[0], m.w[1]), w=nn.ParameterList([weight(CLASSES, 3), weight(CLASSES)])
    ),
    "a module under two names": lambda: twins(),
    "__call__ of the model": lambda: Doubled(plain, a=nn.Linear(3, 5), b=nn.Linear(3, 5), c=nn.Linear(5, CLASSES)),
    "__call__ of a layer": lambda: dense(plain, b=DoubledLinear(3, 5)),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "conv module": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(60, CLASSES)),
    "conv stride and padding": lambda: pooled(nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=(1, 0)), 32),
    "conv without bias": lambda: pooled(nn.Conv2d(3, 2, 1, bias=False), 84),
    "conv same": lambda: pooled(nn.Conv2d(3, 2, (2, 4), padding="same"), 84),
    "conv valid": lambda: pooled(nn.Conv2d(3, 2, 3, padding="valid"), 40),
    "conv functional": lambda: conv(
        lambda m, x: m.c(F.conv2d(m.a(x), m.w, m.d, 2, 1).flatten(1)), 24, w=weight(2, 3, 3, 3), d=weight(2)
    ),
    "conv torch": lambda: conv(
        lambda m, x: m.c(torch.conv2d(m.a(x), m.w, padding=(1, 0)).flatten(1)), 56, w=weight(2, 3, 3, 3)
    ),
    "batch norm 2d": lambda: pooled(nn.BatchNorm2d(3), 126),
    "batch norm 2d without affine": lambda: pooled(nn.BatchNorm2d(3, affine=False), 126),
    "group norm of images": lambda: pooled(nn.GroupNorm(3, 3, eps=0.1), 126),
    "group norm functional": lambda: conv(
        lambda m, x: m.c(F.group_norm(m.a(x), 1, m.g).flatten(1)), 126, g=weight(3)
    ),
    "group norm torch": lambda: conv(lambda m, x: m.c(torch.group_norm(m.a(x), 3).flatten(1)), 126),
    "layer norm of images": lambda: pooled(nn.LayerNorm([3, 7, 6]), 126),
    "layer norm of images without affine": lambda: pooled(nn.LayerNorm([3, 7, 6], elementwise_affine=False), 126),
    "instance norm": lambda: pooled(nn.InstanceNorm2d(3), 126),
    "instance norm with affine": lambda: pooled(nn.InstanceNorm2d(3, affine=True), 126),
    "instance norm, eval": lambda: pooled(trained_instance_norm().eval(), 126),
    "instance norm functional": lambda: conv(lambda m, x: m.c(F.instance_norm(m.a(x)).flatten(1)), 126),
    "max pool": lambda: pooled(nn.MaxPool2d(2), 27),
    "max pool, windows overlap": lambda: pooled(nn.MaxPool2d(3, 2, 1), 36),
    "max pool functional": lambda: conv(lambda m, x: m.c(F.max_pool2d(m.a(x), 2).flatten(1)), 27),
    "max pool torch": lambda: conv(lambda m, x: m.c(torch.max_pool2d(m.a(x), (3, 2), (1, 2)).flatten(1)), 45),
    "avg pool": lambda: pooled(nn.AvgPool2d((2, 3)), 18),
    "avg pool, padding not counted": lambda: pooled(nn.AvgPool2d(3, 2, 1, count_include_pad=False), 36),
    "avg pool functional": lambda: conv(lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1).flatten(1)), 36),
    "adaptive avg pool": lambda: pooled(nn.AdaptiveAvgPool2d(1), 3),
    "adaptive avg pool functional": lambda: conv(
        lambda m, x: m.c(F.adaptive_avg_pool2d(m.a(x), (1, 1)).flatten(1)), 3
    ),
    "mean method": lambda: conv(lambda m, x: m.c(m.a(x).mean([2, 3])), 3),
    "mean function": lambda: conv(lambda m, x: m.c(torch.mean(m.a(x), dim=(-1, -2))), 3),
    "mean kept": lambda: conv(lambda m, x: m.c(m.a(x).mean((2, 3), keepdim=True).flatten(1)), 3),
    "flatten function": lambda: conv(lambda m, x: m.c(torch.flatten(m.a(x), 1)), 126),
    "flatten of the input": lambda: Net(lambda m, x: m.c(x.flatten(1)), c=nn.Linear(84, CLASSES)),
    "view": lambda: conv(lambda m, x: m.c(m.a(x).view(x.size(0), -1)), 126),
    "view by shape": lambda: conv(lambda m, x: m.c(m.a(x).view(x.shape[0], -1)), 126),
    "view by sizes": lambda: conv(lambda m, x: m.c(m.a(x).view(x.size()[0], 126)), 126),
    "view of features": lambda: conv(lambda m, x: m.c(m.a(x).contiguous().view(-1, 126)), 126),
    "reshape": lambda: conv(lambda m, x: m.c(m.a(x).reshape((x.shape[0], -1))), 126),
    "residual": lambda: conv(
        lambda m, x: m.c(F.relu(m.a(x) + m.s(x), inplace=True).mean([2, 3])), 3, s=nn.Conv2d(2, 3, 1)
    ),
    "residual from the input": lambda: Net(
        lambda m, x: m.c((m.a(x) + x).flatten(1)), a=nn.Conv2d(2, 2, 3, padding=1), c=nn.Linear(84, CLASSES)
    ),
    "conv, norm, relu, pool": lambda: conv(
        lambda m, x: m.c(F.max_pool2d(F.relu(m.n(m.a(x))), 2).view(x.size(0), -1)), 27, n=nn.BatchNorm2d(3)
    ),
    "a method on the instance": lambda: with_own_convolution(),
    "pool with indices": lambda: conv(
        lambda m, x: m.c(m.p(m.a(x))[0].flatten(1)), 27, p=nn.MaxPool2d(2, return_indices=True)
    ),
    "reshape function": lambda: conv(lambda m, x: m.c(torch.reshape(m.a(x), (x.shape[0], -1))), 126),
    "channels-last weights": lambda: pooled(nn.Conv2d(3, 2, 3), 40).to(memory_format=torch.channels_last),
}  # fmt: skip


class PlainLinear(nn.Linear):
    """A subclass with the same forward."""


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 1.5


class Doubled(Net):
    """Overrides __call__."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class DoubledLinear(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def plain(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.a(x) + m.b(x)))


def hooked(register: str, hook: Callable[..., Any]) -> nn.Module:
    model = around(nn.Tanh())
    getattr(model[1], register)(hook)
    return model


def with_own_forward() -> nn.Module:
    model = around(nn.Tanh())
    model[1].forward = lambda h: torch.sigmoid(h) * 2
    return model


def with_own_convolution() -> nn.Module:
    model = pooled(nn.Conv2d(3, 2, 1), 84)
    model[2]._conv_forward = lambda x, w, b: F.conv2d(x, w, b).sigmoid()
    return model


def buffer_as_weight() -> nn.Module:
    model = dense(lambda m, x: m.c(F.linear(x, m.w) + m.a(x) + m.b(x)))
    model.register_buffer("w", torch.ones(5, 3))
    return model


def read_again(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(F.relu(h, inplace=True) + h + m.b(x))


def plus_equals(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(x)
    return m.c(h)


def twins() -> nn.Module:
    layer = nn.Linear(3, 3)
    return Net(lambda m, x: m.c(m.b(m.a(x).tanh())), a=layer, b=layer, c=nn.Linear(3, CLASSES))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.ELU(), nn.Linear(3, CLASSES))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(("kind", "spelling"), [(k, i) for k, all_ in ACTIVATIONS.items() for i in range(len(all_))])
def test_activations_are_fused_in_every_spelling(kind: str, spelling: int) -> None:
    layer = ACTIVATIONS[kind][spelling]
    fused_is_right(made(lambda: around(layer) if isinstance(layer, nn.Module) else between(layer)), episode())


@pytest.mark.parametrize("spelling", VECTORS)
def test_fused_on_features(spelling: str) -> None:
    fused_is_right(made(VECTORS[spelling]), episode())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("spelling", IMAGES)
def test_fused_on_images(spelling: str) -> None:
    fused_is_right(made(IMAGES[spelling]), episode(IMAGE))


def test_mse_of_any_shape() -> None:
    fused_is_right(
        made(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))), episode(target=(2,)), "mse"
    )
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2)))
    fused_is_right(model, episode(IMAGE, target=(2, 4, 3)), "mse")


def test_memory_order_of_the_input_does_not_matter() -> None:
    model = made(IMAGES["conv, norm, relu, pool"])
    data = episode(IMAGE)
    maml = FusedMAML(model, RATE, STEPS)
    expected = maml(*data)
    for i in (0, 2):
        data[i] = data[i].movedim(2, -1).contiguous().movedim(-1, 2)
        assert not data[i].is_contiguous()
    got = maml(*data)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    model = made(lambda: around(nn.Tanh()))
    model.get_parameter(frozen).requires_grad_(False)
    fused_is_right(model, episode())
    assert model.get_parameter(frozen).grad is None


@pytest.mark.parametrize("adapted", [["2.weight", "2.bias"], ["0.weight"], ["2.bias"]])
def test_parameters_that_are_not_adapted_get_theirs(adapted: list[str]) -> None:
    model = made(lambda: around(nn.Tanh()))
    fused_is_right(model, episode(), adapt_params=adapted)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_parameter_whose_gradient_is_zero_has_one() -> None:
    model = made(lambda: pooled(nn.BatchNorm2d(3), 126))
    model[0], model[1] = model[0], nn.Identity()
    FusedMAML(model, RATE, STEPS)(*episode(IMAGE)).loss.backward()
    assert model[0].bias.grad is not None
    assert model[0].bias.grad.abs().max() < 1e-12
