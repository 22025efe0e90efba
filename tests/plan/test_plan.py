"""What is fused, in every spelling, and what falls back, in words; never a silent wrong answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from maml_cuda import FusedMAML, reference

CLASSES, RATE, STEPS = 4, 0.3, 2
VECTOR, IMAGE = (3,), (2, 7, 6)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """The given parts, and a forward written as a function of (module, x)."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def dense(run: Callable[[Any, Tensor], Tensor], **parts: Any) -> Net:
    """Linear a: 3 -> 5, b: 3 -> 5, c: 5 -> 4, and what else is given."""
    return Net(run, **{"a": nn.Linear(3, 5), "b": nn.Linear(3, 5), "c": nn.Linear(5, CLASSES), **parts})


def between(layer: Callable[[Tensor], Tensor]) -> Net:
    """A function between two linear layers; b joins after it."""
    return dense(lambda m, x: m.c(layer(m.a(x)) + m.b(x)))


def around(layer: nn.Module, features: int = 5) -> nn.Sequential:
    """A module between two linear layers."""
    return nn.Sequential(nn.Linear(3, 5), layer, nn.Linear(features, CLASSES))


def conv(run: Callable[[Any, Tensor], Tensor], features: int, **parts: Any) -> Net:
    """Conv2d a: 2 -> 3 with padding, a head on `features`, and what else is given."""
    return Net(run, **{"a": nn.Conv2d(2, 3, 3, padding=1), "c": nn.Linear(features, CLASSES), **parts})


def pooled(layer: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), layer, nn.Flatten(), nn.Linear(features, CLASSES))


def episode(sample: tuple[int, ...] = VECTOR, target: tuple[int, ...] | None = None, **to: Any) -> list[Tensor]:
    """Two tasks of 5 and 3 samples; labels, or real targets of shape `target`."""
    g = torch.Generator().manual_seed(3)
    data = []
    for n in (5, 3):
        data.append(torch.randn(2, n, *sample, generator=g, dtype=torch.float64))
        if target is None:
            data.append(torch.randint(CLASSES, (2, n), generator=g))
        else:
            data.append(torch.randn(2, n, *target, generator=g, dtype=torch.float64))
    return [t.to(**to) if t.is_floating_point() else t for t in data]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def quiet(model: nn.Module, **given: Any) -> FusedMAML:
    """A FusedMAML on whatever path; falling back is not the point here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return FusedMAML(model, RATE, STEPS, **given)


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, msg=lambda m: f"{what}: {m}")


def right(maml: FusedMAML, data: list[Tensor]) -> None:
    """Whatever runs, loss and gradients are the reference's; an unreached parameter has none."""
    maml.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss, grads = reference.meta_gradient(
            maml.model,
            maml.loss,
            *data,
            maml.inner_lr,
            maml.inner_steps,
            maml.first_order,
            maml._adapt_params,
        )
        out = maml(*data)  # after it: a call moves the vectors of a spectral norm
        out.loss.backward()
    close(out.loss.detach(), loss, "loss")
    for name, p in maml.model.named_parameters():
        assert (p.grad is not None) == (name in grads), name
        if p.grad is not None:
            close(p.grad, grads[name], name)


# -- what is fused -------------------------------------------------------------------------------------------

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
    "celu": [nn.CELU(2.0), lambda h: F.celu(h, 2.0)],  # torch rounds 1 / alpha to float32 in its backward
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
    "channels-last weights": lambda: pooled(nn.Conv2d(3, 2, 3), 40).to(memory_format=torch.channels_last),
}  # fmt: skip


class PlainLinear(nn.Linear):
    """Another name, the same forward."""


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def plus_equals(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(x)
    return m.c(h)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.ELU(), nn.Linear(3, CLASSES))
    model[2].weight = model[0].weight
    return model


def fused_is_right(model: nn.Module, data: list[Tensor], loss: str = "cross_entropy", **given: Any) -> None:
    """Fused against reference: every output and every gradient, first and second order."""
    fused = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused", **given)
    plain = FusedMAML(model, RATE, STEPS, loss=loss, backend="reference", **given)
    assert (fused.backend, plain.backend) == ("cpu", "reference")
    for first_order in (False, True):
        results = []
        for maml in (fused, plain):
            maml.first_order = first_order
            maml.zero_grad()
            out = maml(*data)
            out.loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append((vars(out), grads))
        for name, value in results[0][0].items():
            close(value.detach(), results[1][0][name].detach(), name)
        for name, g in results[0][1].items():
            assert (g is None) == (results[1][1][name] is None), name
            if g is not None:
                close(g, results[1][1][name], name)


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


def test_the_function_reshape() -> None:
    """As far as torch.fx itself records it: to a size that it has recorded, from torch 2.9 on."""
    model = made(lambda: conv(lambda m, x: m.c(torch.reshape(m.a(x), (x.shape[0], -1))), 126))
    try:
        torch.fx.symbolic_trace(model)
    except TypeError:
        with pytest.raises(ValueError, match=r"cannot be traced by torch.fx .*: reshape\(\): argument 'shape'"):
            FusedMAML(model, RATE, STEPS, backend="fused")
    else:
        fused_is_right(model, episode(IMAGE))


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


# -- what falls back, and in which words ---------------------------------------------------------------------


def hooked(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = around(nn.Tanh())
        getattr(model[0], register)(lambda *arguments: None)
        return model

    return make


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old spellings are deprecated
            return nn.Sequential(norm(nn.Linear(3, 5).double()), nn.Tanh(), nn.Linear(5, CLASSES))

    return make


def own_forward() -> nn.Module:
    model = around(nn.Tanh())
    model[1].forward = lambda h: torch.sigmoid(h) * 2
    return model


def buffer_as_weight() -> nn.Module:
    model = dense(lambda m, x: m.c(F.linear(x, m.w) + m.a(x) + m.b(x)))
    model.register_buffer("w", torch.ones(5, 3))
    return model


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Squared(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def read_again(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(F.relu(h, inplace=True) + h + m.b(x))


def flat_view_read_again(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    flat = h.flatten(1)
    h.relu_()
    return m.c(flat)


def branches(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) + m.b(x)) if x.sum() > 0 else m.c(m.a(x)) + m.c(m.b(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "groups": (lambda: pooled(nn.Conv2d(3, 6, 3, groups=3), 120), IMAGE, ("2 (Conv2d)", "groups=3")),
    "dilation": (
        lambda: pooled(nn.Conv2d(3, 2, 2, dilation=2), 40), IMAGE, ("2 (Conv2d)", "dilation=(2, 2)"),
    ),
    "padding mode": (
        lambda: pooled(nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), 84), IMAGE,
        ("2 (Conv2d)", "padding_mode='reflect'"),
    ),
    "ceil mode": (lambda: pooled(nn.MaxPool2d(2, ceil_mode=True), 36), IMAGE, ("2 (MaxPool2d)", "ceil_mode")),
    "avg ceil mode": (
        lambda: pooled(nn.AvgPool2d(2, ceil_mode=True), 36), IMAGE, ("2 (AvgPool2d)", "ceil_mode"),
    ),
    "functional ceil mode": (
        lambda: conv(lambda m, x: m.c(F.max_pool2d(m.a(x), 2, ceil_mode=True).flatten(1)), 36), IMAGE,
        ("max_pool2d", "the model (Net)", "ceil_mode"),
    ),
    "pool dilation": (lambda: pooled(nn.MaxPool2d(2, dilation=2), 18), IMAGE, ("2 (MaxPool2d)", "dilation")),
    "return indices": (
        lambda: conv(lambda m, x: m.c(m.p(m.a(x))[0].flatten(1)), 27, p=nn.MaxPool2d(2, return_indices=True)),
        IMAGE,
        ("p (MaxPool2d)", "return_indices"),
    ),
    "divisor": (
        lambda: pooled(nn.AvgPool2d(2, divisor_override=3), 27), IMAGE, ("2 (AvgPool2d)", "divisor_override")
    ),
    "adaptive to 2": (
        lambda: pooled(nn.AdaptiveAvgPool2d(2), 12), IMAGE, ("2 (AdaptiveAvgPool2d)", "output size 2"),
    ),
    "mean over channels": (
        lambda: conv(lambda m, x: m.c(m.a(x).mean(1).flatten(1)), 42), IMAGE,
        ("mean", "the model (Net)", "over 1"),
    ),
    "conv transposed": (
        lambda: pooled(nn.ConvTranspose2d(3, 2, 1), 84), IMAGE,
        ("2 (ConvTranspose2d)", "no fused layer serves it"),
    ),
    "conv 3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(), nn.Linear(12, CLASSES)), (2, 2, 3, 3),
        ("0 (Conv3d)",),
    ),
    "conv transposed 1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(), nn.Linear(18, CLASSES)), (2, 5),
        ("0 (ConvTranspose1d)", "no fused layer serves it"),
    ),
    "mean over all axes": (
        lambda: conv(lambda m, x: m.c(m.a(x).mean((1, 2, 3)).view(-1, 1)), 1), IMAGE, ("mean", "over (1, 2, 3)"),
    ),
    "instance norm 3d": (
        lambda: nn.Sequential(nn.InstanceNorm3d(2), nn.Flatten(), nn.Linear(36, CLASSES)), (2, 2, 3, 3),
        ("0 (InstanceNorm3d)", "no fused layer"),
    ),
    "instance norm that tracks": (
        lambda: pooled(nn.InstanceNorm2d(3, track_running_stats=True), 126), IMAGE,
        ("2 (InstanceNorm2d)", "running statistics in train mode"),
    ),
    "rms norm": (lambda: around(nn.RMSNorm(5)), VECTOR, ("1 (RMSNorm)", "no fused layer")),
    "softmax": (lambda: around(nn.Softmax(1)), VECTOR, ("1 (Softmax)", "no fused layer")),
    "prelu": (lambda: around(nn.PReLU()), VECTOR, ("1 (PReLU)", "no fused layer")),
    "functional batch norm of an odd variance": (
        lambda: dense(
            lambda m, x: m.c(F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var + 1)) + m.c(m.b(x)),
            n=nn.BatchNorm1d(5, affine=False),
        ), VECTOR, ("the model (Net)",),
    ),
    "dropout": (lambda: around(nn.Dropout(0.5)), VECTOR, ("1 (Dropout)", "p=0.5", "train mode")),
    "dropout functional": (
        lambda: between(lambda h: F.dropout(h, 0.25)), VECTOR,
        ("dropout", "the model (Net)", "p=0.25", "train mode"),
    ),
    "alpha dropout": (lambda: around(nn.AlphaDropout(0.5)), VECTOR, ("1 (AlphaDropout)", "train mode")),
    "forward hook": (hooked("register_forward_hook"), VECTOR, ("0 (Linear)", "hooks")),
    "forward pre-hook": (hooked("register_forward_pre_hook"), VECTOR, ("0 (Linear)", "hooks")),
    "backward hook": (hooked("register_full_backward_hook"), VECTOR, ("0 (Linear)", "hooks")),
    "backward pre-hook": (hooked("register_full_backward_pre_hook"), VECTOR, ("0 (Linear)", "hooks")),
    "spectral norm": (
        normed(parametrizations.spectral_norm), VECTOR, ("0 (ParametrizedLinear)", "parametrizations"),
    ),
    "weight norm": (
        normed(parametrizations.weight_norm), VECTOR, ("0 (ParametrizedLinear)", "parametrizations"),
    ),
    "orthogonal": (
        normed(parametrizations.orthogonal), VECTOR, ("0 (ParametrizedLinear)", "parametrizations"),
    ),
    "old spectral norm": (normed(nn.utils.spectral_norm), VECTOR, ("0 (Linear)", "hooks")),
    "old weight norm": (normed(nn.utils.weight_norm), VECTOR, ("0 (Linear)", "hooks")),
    "a forward on the instance": (own_forward, VECTOR, ("1 (Tanh)", "forward of its own")),
    "a subclass of Linear": (
        lambda: Net(lambda m, x: m.b(m.a(x)), a=Scaled(3, 5), b=nn.Linear(5, CLASSES)), VECTOR,
        ("mul", "a (Scaled)", "no fused layer"),
    ),
    "a subclass of ReLU": (lambda: around(Squared()), VECTOR, ("mul", "1 (Squared)", "no fused layer")),
    "control flow": (lambda: dense(branches), VECTOR, ("the model (Net)", "torch.fx", "control flow")),
    "the length of a tensor": (
        lambda: dense(lambda m, x: m.c(m.a(x) + m.b(x)) * len(x)), VECTOR, ("the model (Net)", "torch.fx")
    ),
    "lstm": (Recurrent, (4, 3), ("cell (LSTM)", "no fused layer")),
    "in place, read again": (
        lambda: dense(read_again), VECTOR, ("add", "the model (Net)", "relu", "in place"),
    ),
    "in place, a view read again": (
        lambda: conv(flat_view_read_again, 126), IMAGE, ("c (Linear)", "relu_", "in place"),
    ),
    "scalar added": (lambda: between(lambda h: h + 1), VECTOR, ("add", "the model (Net)", "a number")),
    "parameter added": (
        lambda: dense(lambda m, x: m.c(m.a(x) + m.d + m.b(x)), d=weight(5)), VECTOR,
        ("add", "the model (Net)", "parameter"),
    ),
    "added with alpha": (
        lambda: dense(lambda m, x: m.c(torch.add(m.a(x), m.b(x), alpha=2))), VECTOR,
        ("add", "the model (Net)", "alpha=2"),
    ),
    "multiplied": (lambda: between(lambda h: h * 2), VECTOR, ("mul", "the model (Net)", "no fused layer")),
    "transposed weight": (
        lambda: dense(lambda m, x: m.c(F.linear(x, m.w.t()) + m.a(x) + m.b(x)), w=weight(3, 5)), VECTOR,
        ("t in the model (Net)", "no fused layer"),
    ),
    "buffer as weight": (buffer_as_weight, VECTOR, ("linear", "weight is not a parameter")),
    "detach": (
        lambda: dense(lambda m, x: m.c(m.a(x) + m.b(x)) + m.c(m.a(x)).detach()), VECTOR,
        ("detach", "no fused"),
    ),
    "permute": (
        lambda: conv(lambda m, x: m.c(m.a(x).permute(0, 2, 3, 1).flatten(1)), 126), IMAGE,
        ("permute", "no fused layer"),
    ),
}  # fmt: skip
LATE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    # Refused at the first call, when the shape of a sample is known.
    "broadcasting add": (
        lambda: dense(lambda m, x: m.c(m.a(x) + m.b(x) + m.s(x)), s=nn.Linear(3, 1)), VECTOR,
        ("add", "the model (Net)", "[5]", "[1]"),
    ),
    "broadcasting add of images": (
        lambda: conv(lambda m, x: m.c((m.a(x) + m.p(m.a(x))).flatten(1)), 126, p=nn.AdaptiveAvgPool2d(1)),
        IMAGE,
        ("add", "the model (Net)", "[3, 7, 6]", "[3, 1, 1]"),
    ),
    "linear on rows": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, CLASSES)), (2, 3),
        ("0 (Linear)", "[n, features]"),
    ),
    "layer norm over the width of images": (
        lambda: pooled(nn.LayerNorm(6), 126), IMAGE, ("2 (LayerNorm)", "[n, features]", "[3, 7, 6]"),
    ),
    "mean over the width of images": (
        lambda: conv(lambda m, x: m.c(m.a(x).mean(-1).flatten(1)), 21), IMAGE, ("mean", "[n, channels, length]"),
    ),
}  # fmt: skip

IN_PLACE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    # torch itself cannot differentiate these twice: its own error follows.
    "the input in place": (
        lambda: dense(lambda m, x: m.c(m.a(x.relu_()) + m.b(x))), VECTOR,
        ("relu_", "the model (Net)", "input in place"),
    ),
    "a view of the input in place": (
        lambda: Net(lambda m, x: m.c(x.flatten(1).relu_()), c=nn.Linear(84, CLASSES)), IMAGE,
        ("relu_", "the model (Net)", "input in place"),
    ),
}  # fmt: skip


def trained_norm(affine: bool = True) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(5, affine=affine)
    norm(torch.randn(9, 5) * 3 + 1)
    return norm


def trained_instance_norm() -> nn.InstanceNorm2d:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    norm(torch.randn(9, 3, 2, 2) * 3 + 1)
    return norm


def sentences(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "general path" in str(w.message)]


def says(text: str, pieces: tuple[str, ...]) -> None:
    for piece in pieces:
        assert piece in text, f"{piece!r} is not in: {text}"


@pytest.mark.parametrize("case", [*REFUSED, *LATE])
def test_falls_back_in_words(case: str) -> None:
    make, sample, pieces = (REFUSED | LATE)[case]
    model, data = made(make), episode(sample)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maml = FusedMAML(model, RATE, STEPS)
        if case in LATE:
            assert maml.backend == "cpu"
            assert not caught
        maml(*data)
        maml(*data)
    (sentence,) = sentences(caught)  # once, whatever is called afterwards
    says(sentence, pieces)
    assert maml.backend == "reference"
    says(maml.explain(), ("backend: reference, because", *pieces))
    if "dropout" not in case:
        right(maml, data)


@pytest.mark.parametrize("case", [*REFUSED, *LATE, *IN_PLACE])
def test_backend_fused_refuses_in_the_same_words(case: str) -> None:
    make, sample, pieces = (REFUSED | LATE | IN_PLACE)[case]
    with pytest.raises(ValueError, match='backend="fused" cannot serve this model') as caught:
        FusedMAML(made(make), RATE, STEPS, backend="fused")(*episode(sample))
    says(str(caught.value), pieces)


def test_backend_reference_does_not_warn() -> None:
    model = made(REFUSED["groups"][0])
    maml = FusedMAML(model, RATE, STEPS, backend="reference")  # a warning is an error here
    right(maml, episode(IMAGE))
    assert maml.backend == "reference"


def test_an_embedding_takes_integers() -> None:
    model = made(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, CLASSES)))
    with pytest.warns(UserWarning, match=r"general path.*0 \(Embedding\): no fused layer"):
        maml = FusedMAML(model, RATE, STEPS)
    _, y_spt, _, y_qry = episode()
    g = torch.Generator().manual_seed(0)
    right(
        maml,
        [torch.randint(7, (2, 5, 4), generator=g), y_spt, torch.randint(7, (2, 3, 4), generator=g), y_qry],
    )


def test_explain_is_a_table_of_all_leaves() -> None:
    maml = FusedMAML(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(12, CLASSES),
        ), RATE,
    )  # fmt: skip
    head, columns, *rows, foot = maml.explain().splitlines()
    assert head == "backend: cpu"
    assert "of a shape that these layers are fused on" in foot
    assert columns.split() == ["module", "type", "served", "by"]
    expected = {
        "0.0": ("Conv2d", "conv2d"), "0.1": ("BatchNorm2d", "batch_norm"), "0.2": ("ReLU", "relu"),
        "1": ("MaxPool2d", "max_pool"), "2": ("Flatten", "flatten"), "3": ("Dropout", "no layer of its own"),
        "4": ("Linear", "linear"),
    }  # fmt: skip
    assert {row.split()[0]: tuple(row.split(maxsplit=2)[1:]) for row in rows} == expected


def test_explain_follows_the_flags() -> None:
    maml = FusedMAML(made(lambda: around(trained_norm())), RATE)
    assert maml.explain().startswith("backend: cpu\n")
    assert "running_norm" not in maml.explain()
    maml.eval()(*episode())
    says(maml.explain(), ("backend: cpu\n", "running_norm"))
    assert "running_norm" not in maml.train().explain()


# -- losses of your own --------------------------------------------------------------------------------------


def test_a_callable_loss_is_general() -> None:
    def smooth(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, label_smoothing=0.1)

    model = made(lambda: around(nn.Tanh()))
    with pytest.warns(UserWarning, match="general path.*loss smooth"):
        maml = FusedMAML(model, RATE, STEPS, loss=smooth)
    right(maml, episode())
    plain = FusedMAML(model, RATE, STEPS)
    assert maml(*episode()).loss != plain(*episode()).loss


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * self.scale, target)


def test_a_loss_module_is_meta_learned() -> None:
    model, loss = made(lambda: around(nn.Tanh())), Temperature().double()
    maml = quiet(model, loss=loss)
    assert any(p is loss.scale for p in maml.parameters())
    right(maml, episode())
    _, grads = reference.meta_gradient(model, loss, *episode(), RATE, STEPS)
    assert loss.scale.grad is not None
    close(loss.scale.grad, grads["loss.scale"])
    with torch.no_grad():
        up = _loss_at(maml, loss.scale, 1e-5)
        down = _loss_at(maml, loss.scale, -1e-5)
    torch.testing.assert_close((up - down) / 2e-5, loss.scale.grad, rtol=1e-6, atol=0)


def _loss_at(maml: FusedMAML, p: Tensor, by: float) -> Tensor:
    """The meta-loss with p moved by `by`, and p back in its place."""
    before = p.clone()
    p += by
    loss = maml(*episode()).loss
    p.copy_(before)
    return loss


# -- models that torch.fx shows as something they are not ----------------------------------------------------


def alias_plus_equals(m: Any, x: Tensor) -> Tensor:
    h, b = m.a(x), m.b(x)
    alias = h
    alias += b  # changes h too
    return m.c(torch.tanh(h)) + m.c(b)


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
    return m.c(torch.tanh(h) + m.b(x))


def set_grad(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(not m.training):
        h = m.a(x)
    return m.c(torch.tanh(h) + m.b(x))


class Doubled(Net):
    """A __call__ of its own around forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class DoubledLinear(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def plain(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.a(x) + m.b(x)))


DISGUISED: dict[str, Callable[[], nn.Module]] = {
    "+= through another name": lambda: dense(alias_plus_equals),
    "no_grad around a layer": lambda: dense(without_grad),
    "set_grad_enabled around a layer": lambda: dense(set_grad),
    "__call__ of the model": lambda: Doubled(
        plain, a=nn.Linear(3, 5), b=nn.Linear(3, 5), c=nn.Linear(5, CLASSES)
    ),
    "__call__ of a layer": lambda: dense(plain, b=DoubledLinear(3, 5)),
    "torch.relu_ whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (torch.relu_(h), m.c(h) + m.c(m.b(x)))[1])(m.a(x))
    ),
    "F.relu(h, True) whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (F.relu(h, True), m.c(h) + m.c(m.b(x)))[1])(m.a(x))
    ),
    "h.add_ whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (h.add_(m.b(x)), m.c(h))[1])(m.a(x))
    ),
    "in-place module whose result nobody reads": lambda: dense(
        lambda m, x: (lambda h: (m.r(h), m.c(h) + m.c(m.b(x)))[1])(m.a(x)), r=nn.ReLU(inplace=True)
    ),
    "an item set": lambda: dense(
        lambda m, x: (lambda h: (h.__setitem__(0, 0.0), m.c(h) + m.c(m.b(x)))[1])(m.a(x))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DISGUISED)
def test_never_wrong(case: str) -> None:
    right(quiet(made(DISGUISED[case]), adapt_params=["c.weight", "c.bias"]), episode())


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_every_module_there_is(register: str) -> None:
    def hook(module: nn.Module, *arguments: Any) -> Any:
        if not isinstance(module, nn.Linear):
            return None
        value = arguments[-1]
        return value * 1.5 if isinstance(value, Tensor) else (value[0] * 1.5,)

    handle = getattr(nn.modules.module, register)(hook)
    try:
        right(quiet(made(lambda: dense(plain))), episode())
    finally:
        handle.remove()


# -- what changes after construction -------------------------------------------------------------------------


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
    handle = maml.model[0].register_forward_hook(lambda m, args, out: out * 1.5)
    with pytest.warns(UserWarning, match=r"0 \(Linear\) has hooks"):
        assert maml.backend == "reference"
    assert maml.backend == "reference"  # no second warning: it would be an error here
    handle.remove()
    assert maml.backend == "cpu"
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
    maml.model[1].p = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        maml(*episode()).loss.backward()
    assert maml.backend == "reference"
    assert maml.model[0].weight.grad.abs().sum() == 0


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
