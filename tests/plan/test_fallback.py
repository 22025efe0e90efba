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
    normed,
    pooled,
    right,
    says,
    sentences,
    trained_norm,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def hooked(register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = around(nn.Tanh())
        getattr(model[0], register)(lambda *arguments: None)
        return model

    return make


class Squared(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, batch_first=True, proj_size=2)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def flat_view_read_again(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    flat = h.flatten(1)
    h.relu_()
    return m.c(flat)


def branches(m: Any, x: Tensor) -> Tensor:
    return m.c(m.a(x) + m.b(x)) if x.sum() > 0 else m.c(m.a(x)) + m.c(m.b(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "instance norm that tracks": (
        lambda: pooled(nn.InstanceNorm2d(3, track_running_stats=True), 126), IMAGE,
        ("2 (InstanceNorm2d)", "running statistics in train mode"),
    ),
    "functional batch norm of a computed variance": (
        lambda: dense(
            lambda m, x: m.c(F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var + 1)) + m.c(m.b(x)),
            n=nn.BatchNorm1d(5, affine=False),
        ), VECTOR, ("batch_norm", "the model (Net)", "not a parameter or a buffer of the model"),
    ),
    "random slopes": (lambda: around(nn.RReLU()), VECTOR, ("1 (RReLU)", "draws random numbers")),
    "noise": (
        lambda: between(lambda h: h + torch.randn_like(h)), VECTOR,
        ("randn_like", "the model (Net)", "draws random numbers"),
    ),
    "backward hook": (hooked("register_full_backward_hook"), VECTOR, ("0 (Linear)", "backward hooks")),
    "backward pre-hook": (hooked("register_full_backward_pre_hook"), VECTOR, ("0 (Linear)", "backward hooks")),
    "orthogonal": (
        normed(parametrizations.orthogonal), VECTOR,
        ("0.parametrizations.weight.0 (_Orthogonal)", "no fused layer serves it (linalg_householder_product)"),
    ),
    "control flow": (lambda: dense(branches), VECTOR, ("bool in the model (Net)", "control flow")),
    "lstm": (Recurrent, (4, 3), ("cell (LSTM)", "proj_size is not fused")),
    "in place, a view read again": (
        lambda: conv(flat_view_read_again, 126), IMAGE, ("c (Linear)", "relu_", "in place"),
    ),
}  # fmt: skip
# Functions of [n, 5] between two linear layers.
EXPRESSIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "integer division": (
        lambda h: h + h.detach() // 2, "floordiv in the model (Net): no fused layer serves it (floor_divide)",
    ),
    "division to an integer": (
        lambda h: torch.div(h, 2, rounding_mode="floor"),
        "div in the model (Net): a quotient with rounding_mode='floor' is not fused",
    ),
    "remainder": (lambda h: h % 2, "remainder in the model (Net): no fused layer serves it (remainder)"),
    "round": (lambda h: h.round(), "round in the model (Net): no fused layer serves it (round)"),
    "logarithms of sums so far": (
        lambda h: h.logcumsumexp(1), "logcumsumexp in the model (Net): no fused layer serves it (logcumsumexp)",
    ),
    "product of samples": (lambda h: h * h.prod(0), "prod in the model (Net): it takes a part of the samples"),
    "Fourier transform": (lambda h: torch.fft.fft(h).real, "fft_fft in the model (Net): no fused layer serves it"),
    "samples sorted": (lambda h: h.sort(0)[0], "sort in the model (Net): it selects among the samples"),
    "samples by positions": (lambda h: h[[*range(len(h))]], "getitem in the model (Net): it selects among the samples"),
    "the median": (lambda h: h.median(1)[0][:, None], "median in the model (Net): no fused layer serves it (median)"),
    "3-norm": (lambda h: h.norm(3, 1, keepdim=True) * h, "those of order 1, 2 and infinity are"),
    "another dtype": (lambda h: h.float().double(), "it computes in torch.float32, where the model's input"),
    "random numbers": (lambda h: h + torch.rand(5), "rand in the model (Net): its forward draws random numbers"),
    "samples backwards": (lambda h: h.flip(0), "flip in the model (Net): it takes a part of the samples"),
    "samples rolled": (lambda h: h.roll(1, 0), "roll in the model (Net): it takes a part of the samples"),
    "samples chosen": (lambda h: h + h[0], "getitem in the model (Net): it takes a part of the samples"),
    "samples in parts": (lambda h: torch.cat(h.chunk(2)), "chunk in the model (Net): it takes a part of the samples"),
    "samples joined": (lambda h: torch.cat([h, h])[: len(h)], "cat in the model (Net): it joins or pads the samples"),
    "samples padded": (lambda h: F.pad(h, (0, 0, 1, 0))[1:], "pad in the model (Net): it joins or pads the samples"),
    "softmax of samples": (lambda h: h.softmax(0), "softmax in the model (Net): it is taken over the samples"),
    "samples mixed by a view": (
        lambda h: h.t().reshape(-1, 5), "add in the model (Net): it combines the samples with another axis",
    ),
    "samples by samples": (
        lambda h: (h @ h.t()) @ h, "matmul in the model (Net): it combines the samples with themselves",
    ),
}  # fmt: skip
REFUSED |= {
    name: (lambda function=function: between(function), VECTOR, (words,))
    for name, (function, words) in EXPRESSIONS.items()
}
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


@pytest.mark.parametrize("case", REFUSED)
def test_falls_back_in_words(case: str) -> None:
    make, sample, pieces = REFUSED[case]
    model, data = made(make), episode(sample)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maml = FusedMAML(model, RATE, STEPS)
        assert not caught
        maml(*data)
        maml(*data)
    (sentence,) = sentences(caught)  # one warning, however many calls follow
    says(sentence, pieces)
    assert maml.backend == "reference"
    says(maml.explain(), ("backend: reference, because", *pieces))
    if "random numbers" not in sentence:
        right(maml, data)


@pytest.mark.parametrize("case", [*REFUSED, *IN_PLACE])
def test_backend_fused_refuses_in_the_same_words(case: str) -> None:
    make, sample, pieces = (REFUSED | IN_PLACE)[case]
    maml = FusedMAML(made(make), RATE, STEPS, backend="fused")
    with pytest.raises(ValueError, match='backend="fused" cannot serve this model') as caught:
        maml(*episode(sample))
    says(str(caught.value), pieces)


def test_backend_reference_does_not_warn() -> None:
    model = made(REFUSED["instance norm that tracks"][0])
    maml = FusedMAML(model, RATE, STEPS, backend="reference")  # in pytest a warning is an error
    right(maml, episode(IMAGE))
    assert maml.backend == "reference"


def test_an_embedding_with_an_option_that_is_not_fused() -> None:
    embedding = nn.Embedding(7, 3, scale_grad_by_freq=True)
    model = made(lambda: nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, CLASSES)))
    _, y_spt, _, y_qry = episode()
    x_spt, x_qry = torch.randint(7, (2, 5, 4)), torch.randint(7, (2, 3, 4))
    maml = FusedMAML(model, RATE, STEPS)
    with pytest.warns(UserWarning, match=r"general path.*0 \(Embedding\): an embedding with scale_grad_by_freq=True"):
        maml(x_spt, y_spt, x_qry, y_qry)


def test_explain_is_a_table_of_all_leaves() -> None:
    maml = FusedMAML(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(12, CLASSES),
        ).double(), RATE,
    )  # fmt: skip
    leaves = ["0.0", "0.1", "0.2", "1", "2", "3", "4"]
    head, columns, *rows = maml.explain().splitlines()
    assert head.startswith("backend: cpu if the model can be fused, which the first call finds out")
    assert columns.split() == ["module", "type", "served", "by"]
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [(leaf, "?") for leaf in leaves]
    x, y, *_ = episode(IMAGE)
    of_data = maml.explain(x, y)
    assert maml.explain(x) == of_data
    assert maml.explain().startswith(head)  # which tells of calls
    maml.adapt(x, y)
    assert maml.explain() == of_data
    head, columns, *rows = of_data.splitlines()
    assert head == "backend: cpu"
    expected = {
        "0.0": ("Conv2d", "conv2d"), "0.1": ("BatchNorm2d", "batch_norm"), "0.2": ("ReLU", "relu"),
        "1": ("MaxPool2d", "max_pool"), "2": ("Flatten", "flatten"), "3": ("Dropout", "no layer of its own"),
        "4": ("Linear", "linear"),
    }  # fmt: skip
    assert {row.split()[0]: tuple(row.split(maxsplit=2)[1:]) for row in rows} == expected


def test_explain_follows_the_flags() -> None:
    maml = FusedMAML(made(lambda: around(trained_norm())), RATE)
    x, y, *_ = episode()
    assert maml.explain(x, y).startswith("backend: cpu\n")
    assert "running_norm" not in maml.explain(x, y)
    maml.eval()(*episode())
    says(maml.explain(), ("backend: cpu\n", "running_norm"))
    assert "running_norm" not in maml.train().explain(x, y)
