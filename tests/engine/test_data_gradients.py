"""Meta-gradients of data: x and y of both sets that require grad. The oracle is a loop of plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.conftest import assert_close
from tests.engine import policy_models
from tests.engine.unrolled import STEPS, Field, conv_net, mlp, mse, sets, unrolled

NAMES = ("x_spt", "y_spt", "x_qry", "y_qry")
LOSSES = {"mse": mse, "cross_entropy": F.cross_entropy}
ALL = (0, 1, 2, 3)


def check(
    model: nn.Module, loss: Any, data: list[Any], learned: tuple[int, ...] = ALL, function: Any = None,
    per_step: bool = True, task_weights: Tensor | None = None, backend: str = "fused", oracle: Any = None,
    **options: Any,
) -> None:  # fmt: skip
    """Compares the gradients of parameters and data. data: those of per_step_support; else its first set serves all."""
    data = [d.clone().requires_grad_(i in learned) for i, d in enumerate(data)]
    given = data if per_step else [d[0].detach().clone().requires_grad_(d.requires_grad) for d in data[:2]] + data[2:]
    steps = len(data[0])
    seen = data if per_step else [d.expand(steps, *d.shape) for d in given[:2]] + data[2:]
    maml = FusedMAML(model, 0.1, steps, loss=loss, per_step_support=per_step, backend=backend, **options)
    truth, _, _ = unrolled(
        model, function or LOSSES[loss], seen, lambda *_: 0.1, steps, task_weights=task_weights, **(oracle or {})
    )
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named.update({NAMES[i]: given[i] for i in learned})
    grads = torch.autograd.grad(truth, list(named.values()), allow_unused=True)
    expected = dict(zip(named, grads, strict=True))
    for call in (
        lambda: maml(*given, task_weights=task_weights).loss.backward(),
        lambda: maml.backward(*given, task_weights=task_weights),
    ):
        for t in named.values():
            t.grad = None
        call()
        got = {n: p.grad for n, p in named.items()}
        assert {n for n, g in got.items() if g is None} == {n for n, g in expected.items() if g is None}
        assert_close(
            {n: g for n, g in got.items() if g is not None}, {n: g for n, g in expected.items() if g is not None}, 1e-9
        )
    assert maml.backend == ("reference" if backend == "reference" else maml._binder.bound.last.program.plan.backend)


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("tasks", [1, 3, 9])  # 9: tasks in lanes
def test_an_mlp(machine, tasks, per_step):
    check(mlp(3, 7, 2), "mse", sets((3,), (2,), tasks=tasks), per_step=per_step)


@pytest.mark.parametrize("learned", [(0,), (1,), (2,), (3,), (0, 3)])
def test_some_of_the_data(machine, learned):
    check(mlp(3, 7, 2), "mse", sets((3,), (2,), tasks=2), learned)


@pytest.mark.parametrize("per_step", [True, False])
def test_a_convolutional_network(machine, per_step):
    """The first layer gives the images a gradient, and their statistics are no constants."""
    check(conv_net(), "cross_entropy", sets((2, 6, 6), None, steps=2, tasks=2), (0, 2), per_step=per_step)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(1)[:, :2] + x.amax(1)[:, :2]


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


def on_images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2)).double()


FIRST = {  # what reads the data: a model, and the shape of a sample
    "batch_norm": (lambda: nn.Sequential(nn.BatchNorm1d(3), mlp(3, 7, 2)).double(), (3,)),
    "layer_norm": (lambda: nn.Sequential(nn.LayerNorm(3), mlp(3, 7, 2)).double(), (3,)),
    "running_norm": (lambda: nn.Sequential(nn.BatchNorm1d(3).eval(), mlp(3, 7, 2)).double(), (3,)),
    "pointwise": (lambda: nn.Sequential(nn.Softplus(), mlp(3, 7, 2)).double(), (3,)),
    "max_pool": (lambda: on_images(nn.MaxPool2d(3, 2), nn.Conv2d(2, 3, 2), nn.Tanh()), (2, 6, 5)),
    "avg_pool": (lambda: on_images(nn.AvgPool2d(2), nn.GroupNorm(2, 2), nn.Conv2d(2, 3, 2), nn.Tanh()), (2, 5, 6)),
    "depthwise": (lambda: on_images(nn.Conv2d(4, 4, 3, groups=4), nn.Tanh()), (4, 5, 5)),
    "strided": (lambda: on_images(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.SiLU()), (3, 6, 5)),
    "attention": (Attends, (3, 4)),
    "recurrence": (Recurs, (3, 4)),
}


@pytest.mark.parametrize("first", FIRST)
def test_layers_that_read_the_data(machine, first):
    make, sample = FIRST[first]
    model, data = make(), sets(sample, (2,), steps=2, tasks=2)
    with torch.no_grad():
        model(data[2][0])
    if first == "running_norm":
        model[0].num_batches_tracked += 1
    check(model, "mse", data, per_step=False)


def test_values_of_data_alone(machine):
    check(Field(), "mse", sets((3,), (2,), tasks=2), per_step=False, checkpoint="recompute")


def test_many_samples(machine):
    check(mlp(3, 9, 2), "mse", sets((3,), (2,), 2, 2, n=301, n_qry=157), per_step=False)


def test_anil_task_weights_and_a_multi_step_loss(machine):
    head, weights = ["2.weight", "2.bias"], [0.25, 0.0, 0.5, 0.25]
    check(
        mlp(3, 7, 2), "mse", sets((3,), (2,)), adapt_params=head, query_weights=weights,
        task_weights=torch.tensor([0.5, 2.0, 1.0]).double(),
        oracle={"adapted": lambda n: n in head, "weights": weights},
    )  # fmt: skip


def test_at_first_order_the_support_set_has_none(machine):
    check(mlp(3, 7, 2), "mse", sets((3,), (2,)), first_order=True, oracle={"first_order": True})


def test_losses_of_the_users_own(machine):
    def soft(logits: Tensor, target: Tensor) -> Tensor:
        return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()

    def relative(prediction: Tensor, target: Tensor) -> Tensor:
        return (((prediction - target) ** 2 + 0.1).sqrt() / (1 + target**2)).mean()

    for loss in (soft, relative):
        check(mlp(3, 7, 2), loss, sets((3,), (2,), tasks=2), function=loss)


def test_the_general_path():
    check(mlp(3, 7, 2), "mse", sets((3,), (2,)), backend="reference")
    check(mlp(3, 7, 2), "mse", sets((3,), (2,)), backend="reference", per_step=False)
    check(conv_net(), "cross_entropy", sets((2, 6, 6), None, steps=2, tasks=2), (0, 2), backend="reference")


def test_data_of_a_graph_of_its_own_and_leaves_of_a_pytree(machine):
    """Learned images that all tasks share; one leaf of x is learned and another is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(5, 7, 2)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.body(torch.cat([x["a"], x["b"] ** 2], -1))

    model = Net()
    x_spt, y_spt, x_qry, y_qry = sets((3,), (2,))
    prompt = torch.randn(5, 2).double().requires_grad_()
    spt = {"a": x_spt, "b": prompt.tanh().expand(STEPS, 3, 5, 2)}
    qry = {"a": x_qry, "b": prompt[:4].expand(3, 4, 2)}
    joined = [torch.cat([d["a"], d["b"] ** 2], -1) for d in (spt, qry)]
    truth, _, _ = unrolled(model.body, mse, [joined[0], y_spt, joined[1], y_qry], lambda *_: 0.1)
    (expected,) = torch.autograd.grad(truth, prompt, retain_graph=True)
    maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend="fused")
    maml(spt, y_spt, qry, y_qry).loss.backward()
    assert_close({"prompt": prompt.grad}, {"prompt": expected}, 1e-9)


def test_dropout(machine):
    model = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.4), nn.Tanh(), nn.Linear(9, 2)).double()
    data = [d.requires_grad_() for d in sets((3,), (2,))]
    found = []
    for backend in ("fused", "reference"):
        maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend=backend)
        torch.manual_seed(3)
        loss = maml(*data).loss
        found.append(dict(zip(NAMES, torch.autograd.grad(loss, data), strict=True)))
    assert_close(*found, 1e-9)


@pytest.mark.parametrize("options", [{"meta_gradient": "truncated", "truncate": 1}, {"query_weights": [0, 1, 0.5, 0]}])
def test_steps_that_have_no_gradient(machine, options):
    """Truncated, and after the last query loss that counts: their sets have gradients of zero."""
    model, data = mlp(3, 7, 2), [d.requires_grad_() for d in sets((3,), (2,))]
    found = []
    for backend in ("fused", "reference"):
        maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True, backend=backend, **options)
        found.append(dict(zip(NAMES, torch.autograd.grad(maml(*data).loss, data), strict=True)))
    assert_close(*found, 1e-9)
    without = slice(0, 2) if "truncate" in options else slice(2, 3)
    assert found[0]["x_spt"][without].abs().sum() == 0
    assert found[0]["x_spt"].abs().sum() > 0


class Detaches(nn.Module):
    """A gradient that x has not: fused layers take x for a constant and would forget the detach."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.detach() + x.sin())


def test_a_model_that_cuts_the_gradient_of_its_input(machine):
    """Fused or not, the gradient is the model's; see plan/data_proof.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maml_cuda.engine.binder.warn", lambda _: None)
        model, data = Detaches(), [d.requires_grad_() for d in sets((3,), (2,), tasks=2)]
        maml = FusedMAML(model, 0.1, STEPS, loss="mse", per_step_support=True)
        grads = torch.autograd.grad(maml(*data).loss, data)
        truth = torch.autograd.grad(unrolled(model, mse, data, lambda *_: 0.1)[0], data)
    assert_close(dict(zip(NAMES, grads, strict=True)), dict(zip(NAMES, truth, strict=True)), 1e-9)


def test_what_is_not_fused_says_so(machine):
    data = policy_models.episode("gaussian")
    data[1].actions.requires_grad_()
    maml = FusedMAML(
        policy_models.policy("gaussian"), 0.1, 2, loss=policy_models.LOSSES["gaussian"], backend="fused"
    )  # fmt: skip
    with pytest.raises(ValueError, match="gradients of targets are fused for losses of x and y, not for gaussian"):
        maml(*data)
    x_spt, y_spt, x_qry, y_qry = sets((3,), (2,), tasks=2)
    maml = FusedMAML(mlp(3, 7, 2), 0.1, STEPS, loss="mse", backend="fused", meta_gradient="reptile")
    with pytest.raises(ValueError, match='are fused for other meta-gradients than "reptile"'):
        maml(x_spt[0], y_spt[0], x_qry.clone().requires_grad_(), y_qry)
