"""maml_cuda.reference against derivatives worked out by hand and against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from maml_cuda import reference


class Scale(nn.Module):
    """y = w x, whose meta-gradient has a closed form."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x):
        return self.w * x


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_by_hand(first_order, steps):
    """L = mean (w x - t)^2: w' = w - 2 alpha (w s - c) with s = mean x^2, c = mean x t, so dw'/dw = 1 - 2 alpha s."""
    w, alpha = 0.7, 0.05
    x_s, t_s, x_q, t_q = torch.randn(4, 2, 5, 1, dtype=torch.float64)
    rate = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    loss, grads = reference.meta_gradient(Scale(w), "mse", x_s, t_s, x_q, t_q, rate, steps, first_order)
    expected_loss, dw, dalpha = 0.0, 0.0, 0.0
    for task in range(2):
        s, c = (x_s[task] ** 2).mean().item(), (x_s[task] * t_s[task]).mean().item()
        phi, by_alpha = w, 0.0
        for _ in range(steps):
            g = 2 * (phi * s - c)
            by_alpha = by_alpha * (1 if first_order else 1 - 2 * alpha * s) - g
            phi -= alpha * g
        q = (2 * (phi * x_q[task] - t_q[task]) * x_q[task]).mean().item()
        expected_loss += ((phi * x_q[task] - t_q[task]) ** 2).mean().item() / 2
        dw += q * (1 if first_order else (1 - 2 * alpha * s) ** steps) / 2
        dalpha += q * by_alpha / 2
    assert loss.item() == pytest.approx(expected_loss, rel=1e-13)
    assert grads["w"].item() == pytest.approx(dw, rel=1e-12)
    if steps:
        assert grads["inner_lr"].item() == pytest.approx(dalpha, rel=1e-12)


def _nets():
    mlp = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 4))
    conv = nn.Sequential(
        nn.Conv2d(2, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.GELU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 4),
    )  # fmt: skip
    return {"mlp": (mlp.double(), (3,)), "batch norm": (conv.double(), (2, 9, 9))}


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
@pytest.mark.parametrize("adapt", ["all", "head"])
def test_finite_differences(name, adapt):
    """Along the gradient and along a random direction, for all parameters and the learned rates at once."""
    model, sample = _nets()[name]
    names = [n for n, _ in model.named_parameters()]
    adapted = names if adapt == "all" else names[-2:]
    rates = {n: nn.Parameter(torch.rand(2, dtype=torch.float64) * 0.2 + 0.05) for n in adapted}
    data = [torch.randn(2, n, *sample).double() if x else torch.randint(0, 4, (2, n)) for n in (5, 6) for x in (1, 0)]

    def value():
        return reference.meta_gradient(model, "cross_entropy", *data, rates, 2, False, adapted)

    _, grads = value()
    leaves = {**dict(model.named_parameters()), **{f"inner_lr.{n}": r for n, r in rates.items()}}
    assert grads.keys() == leaves.keys()
    for direction in (grads, {n: torch.randn_like(g) for n, g in grads.items()}):
        norm = torch.stack([d.norm() for d in direction.values()]).norm()
        losses = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for n, leaf in leaves.items():
                    leaf += sign * 1e-5 * direction[n] / norm
            losses.append(value()[0].item())
        slope = sum((grads[n] * d).sum().item() for n, d in direction.items()) / norm.item()
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_running_statistics_are_not_touched():
    model, sample = _nets()["batch norm"]
    before = {n: b.clone() for n, b in model.named_buffers()}
    x, y = torch.randn(1, 4, *sample).double(), torch.randint(0, 4, (1, 4))
    reference.meta_gradient(model, "cross_entropy", x, y, x, y, 0.1, 2)
    for n, b in model.named_buffers():
        torch.testing.assert_close(b, before[n], rtol=0, atol=0)


def test_a_fault_of_torch_func_is_not_ours():
    """In torch 2.13, grad(vmap(task).mean()) through F.batch_norm is silently wrong, in the form of PyTorch's own MAML
    example; vmap(grad(task)) and the reference agree. The test fails when torch fixes it."""
    model, sample = _nets()["batch norm"]
    x_s, x_q = torch.randn(2, 2, 5, *sample).double()
    y_s, y_q = torch.randint(0, 4, (2, 2, 5))
    _, truth = reference.meta_gradient(model, "cross_entropy", x_s, y_s, x_q, y_q, 0.3, 1)
    theta = {n: p.detach() for n, p in model.named_parameters()}

    def task(p, xs, ys, xq, yq):
        def loss(p, x, y):
            h = x
            for layer, module in model.named_children():
                if isinstance(module, nn.BatchNorm2d):
                    h = F.batch_norm(h, None, None, p[f"{layer}.weight"], p[f"{layer}.bias"], training=True)
                else:
                    own = {k.removeprefix(f"{layer}."): v for k, v in p.items() if k.startswith(f"{layer}.")}
                    h = functional_call(module, own, (h,))
            return F.cross_entropy(h, y)

        g = grad(loss)(p, xs, ys)
        return loss({n: v - 0.3 * g[n] for n, v in p.items()}, xq, yq)

    right = vmap(grad(task), (None, 0, 0, 0, 0))(theta, x_s, y_s, x_q, y_q)
    for n, g in truth.items():
        torch.testing.assert_close(right[n].mean(0), g, rtol=1e-9, atol=1e-12)
    wrong = grad(lambda p: vmap(task, (None, 0, 0, 0, 0))(p, x_s, y_s, x_q, y_q).mean())(theta)
    assert (wrong["0.weight"] - truth["0.weight"]).norm() > 1e-3 * truth["0.weight"].norm()
