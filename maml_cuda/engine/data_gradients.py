"""Meta-gradients of data: x and y of the support and query sets that require grad, as learned (distilled) data do.

Of the query set it is the gradient of the query loss by x and y. Of the support set it is minus the derivative, by x
and y, of the inner product of the inner gradient with the vector of the Hessian-vector product of that step. The core
hands out both without signs, sums over steps and weights of tasks, which are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.engine.data_parts import split
from maml_cuda.engine.problem import meta_problem
from maml_cuda.engine.program import Program
from maml_cuda.engine.settings import Settings
from maml_cuda.engine.signatures import SetLike
from maml_cuda.losses import Loss
from maml_cuda.plan import data_proof
from maml_cuda.plan.data_proof import NAMES
from maml_cuda.plan.proof import SEED
from maml_cuda.plan.schema import Hyperparameter, descent

PLAIN = ("unrolled", "truncated")  # meta-gradients that differentiate the inner loop


def names(loss: Loss, *sets: Any) -> tuple[str, ...]:
    """Which of x_spt, y_spt, x_qry and y_qry have a tensor that requires grad. A loss of the user's own has the weights
    of samples in what it compares. Inside torch.compile none is looked for: the checks of a call refuse it there.

    sets: the support and the query set (binder.Set).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return ()
    data = [tree for given in sets for tree in (given.x, given.y if isinstance(loss, str) else given.weighted())]
    required = (any(t.requires_grad for t in pytrees.tensors(tree)) for tree in data)
    return tuple(name for name, yes in zip(NAMES, required, strict=False) if yes)


def reached(maml: Settings, of: tuple[str, ...], steps: int) -> tuple[str, ...]:
    """Those of them that the meta-gradient depends on: at first order the inner loop is constant."""
    constant = maml.first_order or steps == 0
    return tuple(name for name in of if not (constant and name.endswith("spt")))


def why_not(maml: Settings, program: Program, of: tuple[str, ...], *sets: SetLike) -> str:
    """The reason why fused layers do not give the gradients of these data, or "".

    sets: as the signature has them.
    """
    if maml._options.meta_gradient.kind not in PLAIN:
        return f'gradients of data are fused for other meta-gradients than "{maml._options.meta_gradient.kind}"'
    weighted = program.match is not None and program.match.weighted
    if any(name[0] == "y" for name in of) and (weighted or program.plan.loss not in ("mse", "computed")):
        return f"gradients of targets are fused for losses of x and y, not for {program.plan.loss}"
    for given in sets:
        key = of, given
        if key not in program.data_proofs:
            program.data_proofs[key] = _disproof(maml, program, of, given)
        if reason := program.data_proofs[key]:
            return reason
    return ""


def _disproof(maml: Settings, program: Program, of: tuple[str, ...], given: SetLike) -> str:
    plan = replace(program.plan.of_one_step(), backend="cpu", precision="float32", data_gradient=of, rate_tensors=())
    update = descent(Hyperparameter(data_proof.RATE, None, False, False))
    parameters = tuple(replace(p, update=update if p.role == "adapted" else None) for p in plan.parameters)
    text = replace(plan, parameters=parameters, clip_norm=None, clip_value=None, per_step_support=False).text

    def results(fast: Mapping[str, Tensor], data: Mapping[str, Any]) -> dict[str, Tensor]:
        own = [t[0] for t in program.own({n: t.unsqueeze(0) for n, t in fast.items()}, 1, 0)]
        seed = torch.tensor(SEED) if program.draws else None
        with torch.enable_grad():
            given = pytrees.mapped(_learned, data)
            of_x = [program.input(name, given[name], True, torch.float64) for name in ("x_spt", "x_qry")]
            of_y = [program.target(given[name], torch.float64) for name in ("y_spt", "y_qry")]
            inputs = [of_x[0], of_y[0], of_x[1], of_y[1]]
            *_, raw = torch.ops.maml_cuda.meta_gradient_of_data(own, [], *inputs, None, text, 1, False, seed=seed)
            found = split(meta_problem(text, of_x[0], of_x[1], 1, False, True), raw, inputs, None, None, ())
            named = [pair for name in of for pair in pytrees.named_leaves(name, given[name])]
            leaves = {name: t for name, t in named if isinstance(t, Tensor) and t.requires_grad}
            grads = torch.autograd.grad(
                [t for t, _ in found], list(leaves.values()), [g for _, g in found], materialize_grads=True
            )
        return dict(zip(leaves, grads, strict=True))

    classes = {label.leaf: label.classes for label in program.labels}
    target = None if given.y is None else given.y.tree()
    return data_proof.why_not(
        maml.model, maml.loss, results, given.x.tree(), target, program.adapted, of, classes, program.integers
    )


def _learned(t: Tensor) -> Tensor:
    return t.detach().requires_grad_() if t.is_floating_point() else t
