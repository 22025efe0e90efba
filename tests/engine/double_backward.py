"""An independent meta-gradient for MAML's variants: layers and inner loop written out, double backward by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, convert_per_step
from tests.conftest import assert_close, run

TOLERANCE = 1e-10


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Softplus(), nn.Linear(5, 3))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def features() -> nn.Sequential:
    """A net that begins and ends with BatchNorm, so that one normalises the input itself."""
    return nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)
    )


NETS = {"mlp": (mlp, (3,)), "conv": (conv, (2, 9, 8)), "features": (features, (3,))}


def written_out(model: nn.Sequential, p: dict[str, Tensor], x: Tensor, slot: int) -> Tensor:
    for name, m in model.named_children():
        w, b = p.get(f"{name}.weight"), p.get(f"{name}.bias")
        if isinstance(m, nn.Linear):
            x = x @ w.T + b
        elif isinstance(m, nn.Conv2d):
            x = F.conv2d(x, w, b, m.stride, m.padding)
        elif "BatchNorm" in type(m).__name__:
            axes = [a for a in range(x.dim()) if a != 1]
            channels = [1, -1] + [1] * (x.dim() - 2)
            mean, var = m.running_mean, m.running_var
            if "PerStep" in type(m).__name__:
                k = min(slot, len(m.weight) - 1)
                w, b, mean, var = w[k], b[k], mean[k], var[k]
            if m.training:
                mean = x.mean(axes)
                var = ((x - mean.view(channels)) ** 2).mean(axes)
            xh = (x - mean.view(channels)) / (var.view(channels) + m.eps) ** 0.5
            x = xh * w.view(channels) + b.view(channels)
        elif isinstance(m, nn.MaxPool2d):
            x = F.max_pool2d(x, m.kernel_size)
        elif isinstance(m, nn.Flatten):
            x = x.reshape(len(x), -1)
        else:
            x = {nn.Tanh: torch.tanh, nn.Softplus: F.softplus, nn.ReLU: torch.relu}[type(m)](x)
    return x


def double_backward(
    maml: FusedMAML, data: list[Tensor], adapted: list[str], rates: dict[str, Tensor], weights: list[float],
    first_order: bool,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss, task losses, logits and gradients by name. rates: name -> [steps, ...], of which the last is repeated."""
    model = maml.model
    theta = dict(model.named_parameters())
    leaves = {**theta, **{f"inner_lr.{n}": r for n, r in rates.items() if r.requires_grad}}
    losses, logits = [], []
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        phi, total = dict(theta), torch.zeros((), dtype=torch.float64)
        for k in range(len(weights)):
            z = written_out(model, phi, x_q, max(k - 1, 0))
            total = total + weights[k] * F.cross_entropy(z, y_q)
            if k == len(weights) - 1:
                break
            support = F.cross_entropy(written_out(model, phi, x_s, k), y_s)
            grads = torch.autograd.grad(support, [phi[n] for n in adapted], create_graph=True)
            for n, g in zip(adapted, grads, strict=True):
                step = rates[n][min(k, len(rates[n]) - 1)] * (g.detach() if first_order else g)
                phi = {**phi, n: phi[n] - step}
        losses.append(total)
        logits.append(z)
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}
    return loss.detach(), torch.stack(losses).detach(), torch.stack(logits).detach(), found


def make(
    net: str, steps: int, *, rates: str = "constant", head: bool = False, weights: list[float] | None = None,
    first_order: bool = False, batch_norm: str = "transductive", seed: int = 0, tasks: int = 3, backend: str = "fused",
    **options: object,
) -> tuple[FusedMAML, list[Tensor], dict]:  # fmt: skip
    """A FusedMAML with further options, its data, and the arguments of double_backward."""
    torch.manual_seed(seed)
    build, sample = NETS[net]
    model = build().double()
    if batch_norm == "per_step" or batch_norm == "per_step running":
        model = convert_per_step(model, max(steps, 1))
        batch_norm = "running" if "running" in batch_norm else batch_norm
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and (t.dim() == 1 or "running" in name or isinstance(t, nn.Parameter)):
                t += 0.3 * torch.rand_like(t)
        for name, t in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                t.fill_(1)
    norms = {n for n, m in model.named_modules() if "PerStep" in type(m).__name__}
    adapted = [n for n, _ in model.named_parameters() if n.rpartition(".")[0] not in norms]
    if head:
        adapted = adapted[-2:] if net != "features" else [n for n in adapted if n.startswith("4.")]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    if rates == "constant":
        inner_lr: object = 0.1
        by_step = {n: torch.full((1,), 0.1, dtype=torch.float64) for n in adapted}
    else:
        shape = {"layer": lambda n: (), "step": lambda n: (max(steps, 1),), "sgd": lambda n: shapes[n]}[rates]
        inner_lr = {n: nn.Parameter(0.05 + 0.1 * torch.rand(shape(n), dtype=torch.float64)) for n in adapted}
        by_step = {n: r if rates == "step" else r[None] for n, r in inner_lr.items()}
    maml = FusedMAML(
        model, inner_lr, steps, first_order=first_order, adapt_params=adapted, backend=backend, batch_norm=batch_norm,
        query_weights=weights, **options,
    )  # fmt: skip
    data = [torch.randn(tasks, n, *sample).double() if x else torch.randint(0, 3, (tasks, n))
            for n in (5, 7) for x in (1, 0)]  # fmt: skip
    last = [0.0] * steps + [1.0]
    return maml, data, {"adapted": adapted, "rates": by_step, "weights": weights or last, "first_order": first_order}


def check(maml: FusedMAML, data: list[Tensor], how: dict) -> None:
    loss, task_losses, logits, expected = double_backward(maml, data, **how)
    _, grads = run(maml, data)
    expected = {n: g.reshape(grads[n].shape) for n, g in expected.items()}
    assert_close(grads, expected, TOLERANCE)
    out = maml(*data)
    for got, value in ((out.loss, loss), (out.task_losses, task_losses), (out.logits, logits)):
        torch.testing.assert_close(got.detach(), value, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(maml(*data).loss, loss, rtol=1e-12, atol=1e-12)


VARIANTS: dict[str, dict] = {
    "ANIL": {"head": True},
    "Meta-SGD": {"rates": "sgd"},
    "rates of layers and steps": {"rates": "step"},
    "multi-step loss": {"weights": [0.0, 0.25, 0.5]},
    "multi-step loss, phi_0 too": {"weights": [0.3, 0.25, 0.5], "rates": "layer"},
    "multi-step loss without the last": {"weights": [0.0, 1.5, 0.0], "rates": "sgd"},
    "multi-step loss, ANIL": {"weights": [0.2, 0.3, 0.4], "head": True, "rates": "step"},
}
NORMS = ("per_step", "running", "per_step running")
