"""What is not fused runs on the reference, and the warning names the module and the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from maml_cuda import FusedMAML
from tests.plan.small_models import (
    CLASSES,
    IMAGE,
    RATE,
    STEPS,
    VECTOR,
    Net,
    around,
    between,
    conv,
    dense,
    episode,
    made,
    pooled,
    right,
    says,
    sentences,
    trained_norm,
    weight,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def hooked(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = around(nn.Tanh())
        getattr(model[0], register)(lambda *arguments: None)
        return model

    return make


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the older functions
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
        return super().forward(x) / 1.5


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
        ("truediv", "a (Scaled)", "no fused layer"),
    ),
    "a subclass of ReLU": (lambda: around(Squared()), VECTOR, ("mul", "1 (Squared)", "the product with a value")),
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
    "multiplied": (lambda: between(lambda h: h * h), VECTOR, ("mul", "the model (Net)", "the product with a value")),
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
    # torch itself cannot differentiate these twice and raises its own error on the general path.
    "the input in place": (
        lambda: dense(lambda m, x: m.c(m.a(x.relu_()) + m.b(x))), VECTOR,
        ("relu_", "the model (Net)", "input in place"),
    ),
    "a view of the input in place": (
        lambda: Net(lambda m, x: m.c(x.flatten(1).relu_()), c=nn.Linear(84, CLASSES)), IMAGE,
        ("relu_", "the model (Net)", "input in place"),
    ),
}  # fmt: skip


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
    (sentence,) = sentences(caught)  # one warning, however many calls follow
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
    maml = FusedMAML(model, RATE, STEPS, backend="reference")  # in pytest a warning is an error
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
