"""gradcheck: compares the meta-gradient of the user's own model with plain autograd and with finite differences."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from maml_cuda import pytrees, reference
from maml_cuda.engine import checks
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates
from maml_cuda.targets import Target


@dataclass
class GradcheckRow:
    """The result for one parameter or learned rate.

    Attributes:
        name: of the parameter; `inner_lr` or `inner_lr.<name>` of a learned rate; `loss.<name>` of a loss module,
            `inner_optimizer.<name>` and `inner_transform.<name>` of those.
        norm: of its meta-gradient.
        autograd_error: the error against `reference.meta_gradient`, relative to the norm of the whole meta-gradient.
        finite_difference_error: the same against finite differences; NaN at first order, and where meta_gradient is not
            "unrolled".
    """

    name: str
    norm: float
    autograd_error: float
    finite_difference_error: float


class GradcheckTable(list[GradcheckRow]):
    """The rows that gradcheck returns; `print` shows them as a table."""

    def __str__(self) -> str:
        width = max(len(row.name) for row in self)
        lines = [f"{'parameter'.ljust(width)}  {'norm':>9}  {'autograd':>9}  {'finite differences':>18}"]
        lines += [
            f"{r.name.ljust(width)}  {r.norm:9.2e}  {r.autograd_error:9.1e}  {r.finite_difference_error:18.1e}"
            for r in self
        ]
        return "\n".join(lines)


def gradcheck(
    maml: FusedMAML,
    x_spt: Tree,
    y_spt: Target,
    x_qry: Tree,
    y_qry: Target,
    *,
    tolerance: float = 1e-8,
    finite_difference_tolerance: float = 1e-4,
) -> GradcheckTable:
    """Checks the meta-gradient on a float64 copy of `maml`; the original is not changed.

    Each parameter and learned rate is compared with two other computations.

    - `reference.meta_gradient`: plain autograd, by double backward.
    - Central differences of the meta-loss, along the parameter's own gradient and along one random direction. They are
      left out if `maml.first_order` or another meta-gradient than "unrolled": what these give is not the derivative
      of the meta-loss.

    Errors are relative to the norm of the whole meta-gradient.

    Args:
        maml: what to check.
        x_spt, y_spt: support sets, `[tasks, n_support, ...]`.
        x_qry, y_qry: query sets, `[tasks, n_query, ...]`.
        tolerance: the largest error against autograd.
        finite_difference_tolerance: the largest error against finite differences.

    Returns:
        A list of GradcheckRow (name, norm, autograd_error, finite_difference_error); `print` shows it as a table.

    Raises:
        RuntimeError: an error is larger than its tolerance; the message has the table.
        ValueError, TypeError: a tolerance is not a number above 0, or the data do not fit, as in a call of `maml`.
    """
    checks.tolerance(tolerance, "tolerance")
    checks.tolerance(finite_difference_tolerance, "finite_difference_tolerance")
    maml = copy.deepcopy(maml)._apply(_in_double)  # type: ignore[no-untyped-call]
    x_spt, y_spt, x_qry, y_qry = data = pytrees.mapped(_in_double, (x_spt, y_spt, x_qry, y_qry))
    buffers = [b.clone() for b in maml.buffers()]
    maml.zero_grad()
    with _masks_repeated():
        maml(*data).loss.backward()
    for b, before in zip(maml.buffers(), buffers, strict=True):
        if not torch.equal(b, before):
            b.copy_(before)  # so that every call here evaluates the same function
    rate = maml.inner_lr
    with _masks_repeated():
        _, truth = reference.meta_gradient(
            maml.model, maml.loss, x_spt, y_spt, x_qry, y_qry, rate, maml.inner_steps, maml.first_order,
            maml._adapt_params, maml.query_weights, meta_gradient=maml.meta_gradient,
            truncate=maml._options.meta_gradient.truncate, proximal=maml._options.meta_gradient.proximal,
            inner_optimizer=maml.inner_optimizer, inner_clip_norm=maml.inner_clip_norm,
            inner_clip_value=maml.inner_clip_value, inner_transform=maml.inner_transform,
            per_step_support=maml._options.per_step_support, support_batch=maml._options.support_batch,
        )  # fmt: skip
    learned: dict[str, Tensor] = dict(maml.model.named_parameters())
    if isinstance(rate, Tensor):
        learned["inner_lr"] = rate
    elif isinstance(rate, InnerRates):
        learned.update({f"inner_lr.{n}": r for n, r in rate.items() if isinstance(r, Tensor)})
    for owner in ("loss", "inner_optimizer", "inner_transform"):
        module = getattr(maml, owner)
        if isinstance(module, torch.nn.Module):
            learned.update({f"{owner}.{n}": p for n, p in module.named_parameters()})
    scale = torch.stack([g.norm() for g in truth.values()]).norm().item() or 1.0
    generator = torch.Generator().manual_seed(0)
    table = GradcheckTable()
    for name, expected in truth.items():
        p = learned[name]
        got = torch.zeros_like(p) if p.grad is None else p.grad
        difference = float("nan")
        if not maml.first_order and maml.meta_gradient == "unrolled":
            difference = max(
                _finite_difference_error(maml, data, p, got, direction) / scale
                for direction in (
                    got,
                    torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device),
                )
            )
        table.append(GradcheckRow(name, got.norm().item(), (got - expected).norm().item() / scale, difference))
    bad = [
        r.name for r in table
        if not r.autograd_error <= tolerance or r.finite_difference_error > finite_difference_tolerance
    ]  # fmt: skip
    if bad:
        raise RuntimeError(f"the meta-gradient of {', '.join(bad)} is wrong\n{table}")
    return table


@contextmanager
def _masks_repeated() -> Iterator[None]:
    """A context whose calls draw the same masks of dropout. Torch's generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _in_double(t: Tensor) -> Tensor:
    return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t


def _finite_difference_error(
    maml: FusedMAML, data: tuple[Tree, ...], p: Tensor, grad: Tensor, direction: Tensor
) -> float:
    """The difference between two derivatives of the meta-loss along `direction`, scaled to norm 1, at the parameter p.

    One is the central difference, the other the inner product of `grad` with the direction.
    """
    norm = direction.norm()
    if norm == 0:
        return 0.0
    unit = direction / norm
    step = 1e-6 * max(1.0, p.detach().abs().max().item())
    with torch.no_grad():
        p += step * unit
        with _masks_repeated():
            up = maml(*data).loss
        p -= 2 * step * unit
        with _masks_repeated():
            down = maml(*data).loss
        p += step * unit
    difference: float = ((up - down) / (2 * step) - (grad.conj() * unit).real.sum()).item()
    return abs(difference)
