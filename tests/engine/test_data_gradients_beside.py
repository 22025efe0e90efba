"""Gradients of data beside inner optimizers, clipping and weights of samples. The oracles are plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maml_cuda import FusedMAML, optim
from tests.conftest import assert_close
from tests.engine.unrolled import conv_net, mlp
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
    model: nn.Module, loss: str, data: list[Tensor], weights: list[Tensor], rule: str, task_weights: Tensor,
    of_loss: Sequence[Tensor] = (),
) -> dict[str, Tensor]:  # fmt: skip
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
    leaves.update({f"of the loss {i}": t for i, t in enumerate(of_loss)})
    leaves = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def padded_weights(tasks: int) -> list[Tensor]:
    """Of 5 and 4 samples; all but the first task have padding, anywhere."""
    found = []
    for n in (5, 4):
        w = 0.3 + torch.rand(tasks, n).double()
        for t in range(1, tasks):
            w[t, t % n] = w[t, (t + 2) % n] = 0
        found.append(w.requires_grad_())
    return found


def with_labels(data: list[Tensor]) -> list[Tensor]:
    return [d.argmax(-1) if i % 2 else d for i, d in enumerate(data)]


def check_weights(
    model: nn.Module, loss: str, data: list[Tensor], weights: list[Tensor], task_weights: Tensor, rule: str = "sgd"
) -> None:
    expected = expected_with_weights(model, loss, data, weights, rule, task_weights)
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused", inner_optimizer=MAKERS[rule]())
    leaves = {**dict(model.named_parameters()), **dict(zip(NAMES, data, strict=True))}
    leaves = {n: t for n, t in {**leaves, "w_spt": weights[0], "w_qry": weights[1]}.items() if t.requires_grad}
    out = maml(*data, task_weights=task_weights, spt_weights=weights[0], qry_weights=weights[1])
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    assert_close(dict(zip(leaves, grads, strict=True)), expected, 1e-9)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("loss", OF_SAMPLES)
@pytest.mark.parametrize("tasks", [3, 9])
def test_weights_of_samples(machine, loss, rule, tasks):
    data = episode(tasks)
    if loss == "cross_entropy":
        data = with_labels(data)
    check_weights(mlp(3, 7, 4), loss, data, padded_weights(tasks), torch.rand(tasks).double(), rule)


def test_padding_in_batch_norm(machine):
    """The images and their weights receive gradients through statistics that leave out padding."""
    data = with_labels(episode())
    data[0], data[2] = (torch.randn(*d.shape[:2], 2, 6, 6).double().requires_grad_() for d in (data[0], data[2]))
    check_weights(conv_net(), "cross_entropy", data, padded_weights(3), torch.rand(3).double())


# -- losses of the user's own, which return one value a sample ------------------------------------------------------


class Learned(nn.Module):
    """With a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(1.3).double())

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y) ** 2 + 0.1).pow(self.power).mean(1)


def margins(z: Tensor, y: Tensor) -> Tensor:
    """Of labels, each sample beside the others of its set."""
    losses = F.cross_entropy(z, y, reduction="none", label_smoothing=0.1)
    return losses + (losses - losses.mean()) ** 2


OWN = {
    "huber": lambda z, y: F.huber_loss(z, y, reduction="none").sum(1),
    "soft": lambda z, y: F.cross_entropy(z, y.softmax(-1), reduction="none"),
    "as ours": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "margins": margins,
    "learned": Learned(),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("padded", [False, True])
def test_losses_of_the_users_own(machine, name, padded):
    loss, data, model = OWN[name], episode(), mlp(3, 7, 4)
    if name in ("as ours", "margins"):
        data = with_labels(data)
    weights = padded_weights(3)
    if not padded:
        weights = [(w.detach() + 0.2).requires_grad_() for w in weights]
    of_loss = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OF_SAMPLES, "own", loss)
        task_weights = torch.rand(3).double()
        expected = expected_with_weights(model, "own", data, weights, "sgd", task_weights, of_loss)
    maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="fused")
    leaves = [*model.parameters(), *(t for t in data if t.requires_grad), *weights, *of_loss]

    def call() -> Tensor:
        return maml(*data, task_weights=task_weights, spt_weights=weights[0], qry_weights=weights[1]).loss

    if padded:
        with pytest.raises(ValueError, match="a loss of your own does not leave out padding"):
            call()
        maml = FusedMAML(model, RATE, STEPS, loss=loss, backend="reference")
    grads = torch.autograd.grad(call(), leaves)
    assert_close(dict(zip(expected, grads, strict=True)), expected, 1e-9)


def test_blocks_of_a_loss_of_the_users_own(machine):
    """Weights in loss_and_grad and hvp, and learned ones in adapt beside a multi-step loss."""
    model, data, w = mlp(3, 7, 4), [d.detach() for d in episode()], padded_weights(3)[0].detach() + 0.1
    found = []
    for backend in ("fused", "reference"):
        maml = FusedMAML(model, RATE, STEPS, loss=OWN["huber"], backend=backend, query_weights=[0, 0.2, 0.3, 0.5])
        own = w.clone().requires_grad_()
        maml(data[0], data[1], data[0], data[1], spt_weights=own, qry_weights=own).loss.backward()
        fast = maml.adapt(data[0], data[1], spt_weights=own, differentiable=True)
        of_adapt = torch.autograd.grad(sum(p.square().sum() for p in fast.values()), own)[0]
        fast = {n: p.detach() for n, p in fast.items()}
        losses, grads = maml.loss_and_grad(fast, data[0], data[1], weights=w)
        products = maml.hvp(fast, data[0], data[1], fast, weights=w)
        found.append({"own": own.grad, "adapt": of_adapt, "losses": losses, **grads})
        found[-1].update({f"product of {n}": p for n, p in products.items()})
    assert_close(*found, 1e-9)


# -- adapt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"inner_optimizer": optim.Adam()}, {"truncate": 2, "meta_gradient": "truncated"}]
)
def test_adapt(machine, per_step, options):
    """The objective is one's own; the inner loop's data and their weights are learned."""
    model = mlp(3, 7, 4)
    x, y, _, _ = episode()
    w = padded_weights(3)[0]
    if per_step:
        x, y = (torch.stack([t.detach().roll(k, 0) for k in range(STEPS)]).requires_grad_() for t in (x, y))
        w = torch.stack([w.detach().roll(k, 1) for k in range(STEPS)]).requires_grad_()
    c = {n: torch.randn(3, *p.shape).double() for n, p in model.named_parameters()}
    rule, theta = ("adam" if "inner_optimizer" in options else "sgd"), dict(model.named_parameters())
    total = torch.zeros(()).double()
    for t in range(3):
        phi, state = dict(theta), {n: {} for n in theta}
        for k in range(STEPS):
            at = (k, t) if per_step else (t,)
            keep = w[at].detach() > 0
            value = weighted("mse", functional_call(model, phi, (x[at][keep],)), y[at][keep], w[at][keep])
            g = dict(zip(phi, torch.autograd.grad(value, list(phi.values()), create_graph=True), strict=True))
            phi = {n: RULES[rule](p, g[n], state[n], k + 1, RATE, {}) for n, p in phi.items()}
            if k < STEPS - options.get("truncate", STEPS):
                phi = {n: theta[n] + (p - theta[n]).detach() for n, p in phi.items()}
        total = total + sum((phi[n] * c[n][t]).sum() for n in phi)
    leaves = {**theta, "x_spt": x, "y_spt": y, "w_spt": w}
    expected = torch.autograd.grad(total, list(leaves.values()))
    maml = FusedMAML(model, RATE, STEPS, loss="mse", backend="fused", per_step_support=per_step, **options)
    fast = maml.adapt(x, y, spt_weights=w, differentiable=True)
    grads = torch.autograd.grad(sum((fast[n] * c[n]).sum() for n in c), list(leaves.values()))
    assert_close(dict(zip(leaves, grads, strict=True)), dict(zip(leaves, expected, strict=True)), 1e-9)


def test_adapt_once_alone(machine):
    """Some of the data; at first order they have no gradient; a second backward is refused."""
    model, data = mlp(3, 7, 4), episode()
    x, y = data[0], data[1].detach()
    maml = FusedMAML(model, RATE, STEPS, loss="mse", backend="fused")
    (g,) = torch.autograd.grad(maml.adapt(x, y, differentiable=True)["0.weight"].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of adapt cannot be differentiated again"):
        g.sum().backward()
    maml.first_order = True
    (g,) = torch.autograd.grad(maml.adapt(x, y, differentiable=True)["0.weight"].sum(), x, allow_unused=True)
    assert g is None
    maml.first_order = False
    with pytest.raises(ValueError, match="x_spt must not require grad"):
        maml.adapt(x, y)
