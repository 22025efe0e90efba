"""Gradients of data beside inner optimizers, clipping and weights of samples. The oracles are plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maml_cuda import FusedMAML, optim
from tests.conftest import assert_close
from tests.engine.unrolled import mlp
from tests.engine.unrolled_optimizers import RULES, meta_gradient

NAMES = ("x_spt", "y_spt", "x_qry", "y_qry")
RATE, STEPS = 0.07, 3
MAKERS = {
    "sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW, "adamax": optim.Adamax, "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}  # fmt: skip


def soft(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def episode(tasks: int = 3, n: int = 5, n_qry: int = 4) -> list[Tensor]:
    """Features, and probabilities of 4 classes, all of which require grad."""
    data = []
    for count in (n, n_qry):
        data.append(torch.randn(tasks, count, 3).double())
        data.append(torch.randn(tasks, count, 4).double().softmax(-1))
    return [d.requires_grad_() for d in data]


def gradients(maml: FusedMAML, data: list[Tensor], **given: Any) -> dict[str, Tensor]:
    leaves = {n: t for n, t in [*maml.model.named_parameters(), *zip(NAMES, data, strict=True)] if t.requires_grad}
    grads = torch.autograd.grad(maml(*data, **given).loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize(
    ("rule", "h", "options", "oracle"),
    [
        ("sgd", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, {}, {}),
        ("adam", {}, {}, {}),
        ("adamw", {"weight_decay": 0.1}, {"checkpoint": "recompute"}, {}),
        ("adamax", {}, {"checkpoint": "sqrt"}, {}),
        ("rmsprop", {"momentum": 0.5, "centered": True}, {}, {}),
        ("adagrad", {"lr_decay": 0.1}, {}, {}),
        ("sgd", {}, {"inner_clip_norm": 0.2}, {"norm": 0.2}),
        ("sgd", {}, {"inner_clip_value": 0.02}, {"value": 0.02}),
        ("adam", {}, {"inner_clip_norm": 0.2, "inner_clip_value": 0.05}, {"norm": 0.2, "value": 0.05}),
        ("adam", {}, {"meta_gradient": "truncated", "truncate": 2}, {"truncate": 2}),
        ("adam", {}, {"query_weights": [0.1, 0.0, 0.5, 0.4]}, {"query_weights": [0.1, 0.0, 0.5, 0.4]}),
        ("adam", {}, {"first_order": True}, {"first_order": True}),
        ("adam", {}, {"adapt_params": ["2.weight", "2.bias"]}, {"adapted": ["2.weight", "2.bias"]}),
    ],
)  # fmt: skip
def test_optimizers_and_clipping(machine, rule, h, options, oracle):
    model, data = mlp(3, 7, 4), episode()
    _, expected, _ = meta_gradient(
        model, data, STEPS, lambda name, p, g, state, k: RULES[rule](p, g, state, k + 1, RATE, h),
        dict(zip(NAMES, data, strict=True)), **oracle,
    )  # fmt: skip
    maml = FusedMAML(model, RATE, STEPS, loss=soft, backend="fused", inner_optimizer=MAKERS[rule](**h), **options)
    assert_close(gradients(maml, data), expected, 1e-9)


def test_many_tasks_with_learned_rates(machine):
    """More tasks than there are lanes."""
    model, data = mlp(3, 7, 4), episode(tasks=9)
    rate = nn.Parameter(torch.tensor(RATE).double())
    _, expected, _ = meta_gradient(
        model, data, STEPS, lambda name, p, g, state, k: RULES["adam"](p, g, state, k + 1, rate, {}),
        dict(zip(NAMES, data, strict=True)),
    )  # fmt: skip
    maml = FusedMAML(model, rate, STEPS, loss=soft, backend="fused", inner_optimizer=optim.Adam())
    assert_close(gradients(maml, data), expected, 1e-9)


# -- weights of samples -------------------------------------------------------------------------------------------


OF_SAMPLES = {
    "mse": lambda z, y: ((z - y) ** 2).mean(1),
    "cross_entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
}


def weighted(loss: str, z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (w * OF_SAMPLES[loss](z, y)).sum() / w.sum()


def expected_with_weights(
    model: nn.Module, loss: str, data: list[Tensor], weights: list[Tensor], rule: str, task_weights: Tensor
) -> dict[str, Tensor]:
    theta = dict(model.named_parameters())
    total = torch.zeros(()).double()
    for t in range(len(task_weights)):
        phi, state = dict(theta), {n: {} for n in theta}
        (xs, xq), (ys, yq) = ([d[t][w[t] > 0] for d, w in zip(data[i::2], weights, strict=True)] for i in (0, 1))
        ws, wq = (w[t][w[t] > 0] for w in weights)
        for k in range(STEPS):
            value = weighted(loss, functional_call(model, phi, (xs,)), ys, ws)
            g = dict(zip(phi, torch.autograd.grad(value, list(phi.values()), create_graph=True), strict=True))
            phi = {n: RULES[rule](p, g[n], state[n], k + 1, RATE, {}) for n, p in phi.items()}
        total = total + task_weights[t] * weighted(loss, functional_call(model, phi, (xq,)), yq, wq)
    leaves = {**theta, **dict(zip(NAMES, data, strict=True)), "w_spt": weights[0], "w_qry": weights[1]}
    leaves = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def padded_weights(tasks: int, learned: bool) -> list[Tensor]:
    """Of 5 and 4 samples; all but the first task have padding, anywhere."""
    found = []
    for n in (5, 4):
        w = 0.3 + torch.rand(tasks, n).double()
        for t in range(1, tasks):
            w[t, t % n] = w[t, (t + 2) % n] = 0
        found.append(w.requires_grad_(learned))
    return found


def with_labels(data: list[Tensor]) -> list[Tensor]:
    return [d.argmax(-1) if i % 2 else d for i, d in enumerate(data)]


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("loss", OF_SAMPLES)
@pytest.mark.parametrize("tasks", [3, 9])
def test_weights_of_samples(machine, loss, rule, tasks):
    model, data = mlp(3, 7, 4), episode(tasks)
    if loss == "cross_entropy":
        data = with_labels(data)
    weights, task_weights = padded_weights(tasks, machine == "cpu"), torch.rand(tasks).double()
    expected = expected_with_weights(model, loss, data, weights, rule, task_weights)
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused", inner_optimizer=MAKERS[rule]())
    leaves = {**dict(model.named_parameters()), **dict(zip(NAMES, data, strict=True))}
    leaves = {n: t for n, t in {**leaves, "w_spt": weights[0], "w_qry": weights[1]}.items() if t.requires_grad}
    out = maml(*data, task_weights=task_weights, spt_weights=weights[0], qry_weights=weights[1])
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    assert_close(dict(zip(leaves, grads, strict=True)), expected, 1e-9)
