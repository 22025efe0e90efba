"""meta_gradient="implicit" (iMAML), against the dense linear system of loops written out here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck, optim, reference
from tests.conftest import assert_close, run
from tests.engine import refusals
from tests.engine.double_backward import make, written_out
from tests.engine.refusals import refuses

TOLERANCE = 1e-9
LAMBDA = 8.0
EXACTLY = {"meta_gradient": "implicit", "proximal": LAMBDA, "cg_steps": 200, "cg_tolerance": 1e-15}


def path_end(maml: FusedMAML, rest, phi0: Tensor, like, x: Tensor, y: Tensor, steps: int, rate: float) -> Tensor:
    """phi_K, flat, by gradient descent on the loss with its proximal term."""
    phi = phi0.detach()
    for k in range(steps):
        at = phi.clone().requires_grad_()
        loss = F.cross_entropy(written_out(maml.model, {**rest, **parts(at, like)}, x, k), y)
        loss = loss + LAMBDA / 2 * ((at - phi0.detach()) ** 2).sum()
        phi = phi - rate * torch.autograd.grad(loss, at)[0]
    return phi


def parts(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = flat.split([t.numel() for t in like.values()])
    return {n: part.view_as(t) for part, (n, t) in zip(found, like.items(), strict=True)}


def implicit(
    maml: FusedMAML, data: list[Tensor], adapted: list[str], steps: int, krylov: int | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Loss, the last path's end, gradients, the tasks' relative residuals. krylov: the best solution from so many
    powers of the matrix times b."""
    theta = {n: p.detach() for n, p in maml.model.named_parameters()}
    like = {n: theta[n] for n in adapted}
    flat = torch.cat([t.flatten() for t in like.values()])
    losses, residuals, total = [], [], {n: torch.zeros_like(p) for n, p in theta.items()}
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        rest = {n: p.clone().requires_grad_() for n, p in theta.items() if n not in like}
        phi = path_end(maml, rest, flat, like, x_s, y_s, steps, 0.1).requires_grad_()

        def support(v: Tensor, rest=rest, x=x_s, y=y_s) -> Tensor:
            return F.cross_entropy(written_out(maml.model, {**rest, **parts(v, like)}, x, steps), y)

        query = F.cross_entropy(written_out(maml.model, {**rest, **parts(phi, like)}, x_q, max(steps - 1, 0)), y_q)
        b, *direct = torch.autograd.grad(query, [phi, *rest.values()], allow_unused=True)
        a = (
            torch.eye(len(phi)).double()
            + torch.autograd.functional.hessian(support, phi.detach(), vectorize=True) / LAMBDA
        )
        if krylov is None:
            x = torch.linalg.solve(a, b)
        else:
            basis = [b / b.norm()]
            for _ in range(krylov - 1):
                q = torch.linalg.qr(torch.stack([*basis, a @ basis[-1]], 1))[0]
                basis.append(q[:, -1])
            q = torch.linalg.qr(torch.stack(basis, 1))[0]
            x = q @ torch.linalg.solve(q.T @ a @ q, q.T @ b)
        slope = torch.autograd.grad(support(phi), phi, create_graph=True)[0]
        mixed = torch.autograd.grad((slope * x).sum(), list(rest.values()), allow_unused=True) if rest else ()
        for n, g, m in zip(rest, direct, mixed, strict=True):
            total[n] += ((0 if g is None else g) - (0 if m is None else m / LAMBDA)) / len(data[0])
        for n, part in parts(x, like).items():
            total[n] += part / len(data[0])
        losses.append(query.detach())
        residuals.append((b - a @ x).norm() / b.norm())
    return torch.stack(losses).mean(), phi.detach(), total, torch.stack(residuals)


def check(net: str, steps: int, krylov: int | None = None, **options) -> tuple[FusedMAML, list[Tensor]]:
    chosen = EXACTLY if krylov is None else EXACTLY | {"cg_steps": krylov}
    maml, data, how = make(net, steps, **(chosen | options))
    value, end, expected, residuals = implicit(maml, data, how["adapted"], steps, krylov)
    loss, grads = run(maml, data)
    out = maml(*data)
    assert out.support_losses.shape == (len(data[0]), steps)
    torch.testing.assert_close(out.residuals, residuals, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(loss, value, rtol=1e-12, atol=1e-12)
    assert_close(grads, {n: expected[n] for n in grads}, TOLERANCE)
    fast = maml.adapt(*data[:2])
    assert_close({"end": torch.cat([fast[n][-1].flatten() for n in how["adapted"]])}, {"end": end}, TOLERANCE)
    *_, last = maml.inner_loop(*data[:2], steps)
    assert all(torch.equal(p, last[n]) for n, p in fast.items())
    with torch.no_grad():
        out = maml(*data)
    torch.testing.assert_close(out.loss, value, rtol=1e-12, atol=1e-12)
    assert out.residuals is None
    return maml, data


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_implicit(machine, net, steps, head):
    """Also where parameters are not adapted: their gradient has the mixed derivative of the support loss."""
    check(net, steps, head=head)


@pytest.mark.parametrize("tasks", [1, 17])
def test_in_lanes(machine, tasks):
    check("mlp", 2, tasks=tasks, head=True)


def test_batch_norm_of_each_step(machine):
    check("conv", 2, batch_norm="per_step")


@pytest.mark.parametrize("krylov", [1, 2, 4])
def test_few_steps_of_conjugate_gradients(machine, krylov):
    """They give the best solution of their Krylov space."""
    check("mlp", 2, krylov)
    check("conv", 2, krylov, head=True)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_each_task_stops_by_itself(machine, backend):
    """Its gradient is that of the task alone, also where tasks take different numbers of steps."""
    maml, data, _ = make("mlp", 2, tasks=17, backend=backend, **(EXACTLY | {"cg_tolerance": 1e-3, "head": True}))
    data[0][1] *= 30
    one = torch.eye(17).double()
    for t in (0, 1, 16):
        maml.zero_grad()
        maml.backward(*data, task_weights=one[t])
        together = {n: p.grad.clone() for n, p in maml.model.named_parameters() if p.grad is not None}
        maml.zero_grad()
        maml.backward(*[d[t : t + 1] for d in data])
        errors = [(p.grad - together[n]).norm() for n, p in maml.model.named_parameters() if p.grad is not None]
        assert max(errors) <= 1e-12


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_general_path_and_the_reference(net):
    for options in ({}, {"head": True}):
        maml, data = check(net, 2, backend="reference", **options)
        _, expected = reference.meta_gradient(
            maml.model, "cross_entropy", *data, 0.1, 2, adapt_params=maml._adapt_params, meta_gradient="implicit",
            proximal=LAMBDA,
        )  # fmt: skip
        assert_close(run(maml, data)[1], expected, TOLERANCE)
    maml, data, _ = make("mlp", 2, **EXACTLY)
    table = gradcheck(maml, *data)
    assert all(row.autograd_error <= 1e-9 and math.isnan(row.finite_difference_error) for row in table)


def test_the_converged_inner_loop_has_the_exact_gradient():
    """At the minimum the implicit gradient is that through all inner steps of the same loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [torch.randn(2, 6, 3).double(), torch.randint(2, (2, 6)), torch.randn(2, 5, 3).double()]
    data.append(torch.randint(2, (2, 5)))
    maml = FusedMAML(model, 0.1, 400, backend="fused", **EXACTLY)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses = []
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        phi = theta
        for _ in range(400):
            value = F.cross_entropy(torch.func.functional_call(model, phi, (x_s,)), y_s)
            value = value + LAMBDA / 2 * sum(((phi[n] - theta[n]) ** 2).sum() for n in phi)
            grads = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            phi = {n: p - 0.1 * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(model, phi, (x_q,)), y_q))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    assert_close(run(maml, data)[1], dict(zip(theta, grads, strict=True)), 1e-9)


def test_dropout_has_masks_of_its_own_at_the_end(machine):
    """The same on the fused path and in the reference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()
    maml, data, _ = make("mlp", 2, **EXACTLY)
    maml = FusedMAML(model, 0.1, 2, backend="fused", **EXACTLY)
    torch.manual_seed(1)
    _, grads = run(maml, data)
    torch.manual_seed(1)
    _, expected = reference.meta_gradient(
        model, "cross_entropy", *data, 0.1, 2, meta_gradient="implicit", proximal=LAMBDA
    )  # fmt: skip
    assert_close(grads, expected, TOLERANCE)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_optimizers_of_the_inner_loop(machine, clip):
    maml, data, _ = make("mlp", 3, inner_optimizer=optim.Adam(), inner_clip_norm=clip, **EXACTLY)
    _, expected = reference.meta_gradient(
        maml.model, "cross_entropy", *data, 0.1, 3, meta_gradient="implicit", proximal=LAMBDA,
        inner_optimizer=optim.Adam(), inner_clip_norm=clip,
    )  # fmt: skip
    assert_close(run(maml, data)[1], expected, TOLERANCE)


def test_samples_in_tiles():
    """More samples than go through the layers at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 4)).double()
    data = [torch.randn(2, 300, 3).double(), torch.randint(4, (2, 300)), torch.randn(2, 7, 3).double()]
    data.append(torch.randint(4, (2, 7)))
    for checkpoint in (None, "recompute", "sqrt"):
        maml = FusedMAML(model, 0.1, 2, backend="fused", checkpoint=checkpoint, **EXACTLY)
        _, expected = reference.meta_gradient(
            model, "cross_entropy", *data, 0.1, 2, meta_gradient="implicit", proximal=LAMBDA
        )  # fmt: skip
        assert_close(run(maml, data)[1], expected, TOLERANCE)


def test_memory_is_flat_in_the_steps(machine):
    def taken(steps):
        maml, data, _ = make("conv", steps, **EXACTLY)
        return maml.memory_estimate(data[0], data[2])

    assert taken(2) == taken(50)


def test_compiled_code_is_the_same():
    maml, data, _ = make("mlp", 3, **EXACTLY)
    loss, grads = run(maml, data)
    maml.zero_grad()
    again = torch.compile(lambda *d: maml(*d).loss, fullgraph=True, backend="aot_eager")(*data)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert all(torch.equal(p.grad, grads[n]) for n, p in maml.model.named_parameters())


REFUSED = {
    "no proximal": ({"proximal": None}, TypeError, ("proximal must be a number", "got NoneType")),
    "proximal 0": ({"proximal": 0}, ValueError, ("proximal must be finite and above 0", "got 0")),
    "proximal inf": ({"proximal": math.inf}, ValueError, ("proximal must be finite and above 0", "got inf")),
    "proximal of MAML": (
        {"meta_gradient": "unrolled"}, ValueError,
        ('proximal must be None unless meta_gradient is "implicit"', "got 8.0"),
    ),
    "no steps": ({"cg_steps": 0}, ValueError, ("cg_steps must be at least 1", "got 0")),
    "fractional steps": ({"cg_steps": 1.5}, TypeError, ("cg_steps must be an int", "got float")),
    "tolerance": ({"cg_tolerance": 1.0}, ValueError, ("cg_tolerance must be from 0 to less than 1", "got 1.0")),
    "tolerance a string": ({"cg_tolerance": "1e-3"}, TypeError, ("cg_tolerance must be a number", "got str")),
    "first order": (
        {"first_order": True}, ValueError,
        ('first_order must be False with meta_gradient="implicit"', "second order", "got True"),
    ),
    "query weights": (
        {"query_weights": [0.0, 0.5, 1.0]}, ValueError,
        ('query_weights must be None with meta_gradient="implicit"', "got [0.0, 0.5, 1.0]"),
    ),
    "a support set for each step": (
        {"per_step_support": True}, ValueError,
        ("per_step_support and support_batch must not be given", "implicit", "got a set for each step"),
    ),
    "learned rates": (
        {"inner_lr": nn.Parameter(torch.tensor(0.1, dtype=torch.float64))}, ValueError,
        ('inner_lr must not require grad with meta_gradient="implicit"', "got requires_grad=True of inner_lr"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, pieces = REFUSED[case]
    model = refusals.net()
    chosen = {"inner_lr": 0.1, "inner_steps": 2} | EXACTLY | options
    refuses(model, lambda: FusedMAML(model, **chosen), error, *pieces)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused_later(backend):
    maml = FusedMAML(refusals.net(), 0.1, 2, backend=backend, **EXACTLY)
    data = list(refusals.episode().values())
    maml.backward(*data)
    maml.first_order = True
    refuses(maml, lambda: maml(*data), ValueError, "first_order must be False", "implicit")
    maml.first_order = False
    refuses(maml, lambda: maml.adapt(*data[:2], differentiable=True), ValueError, "differentiable must be False")
