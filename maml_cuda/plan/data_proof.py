"""Compares the gradients of data that a plan gives with those of plain autograd, on random data.

plan/proof.py compares what does not differentiate by the data. A plan that takes x for a constant may be right there
and wrong here. So before it gives gradients of data, one meta-step on one task is compared, with one inner step: the
gradients of the query loss by the support and the query set. Parameters and data are random, as in plan/proof.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from maml_cuda import pytrees, reference
from maml_cuda.capture import generators, outside_state
from maml_cuda.capture.copies import copied, places
from maml_cuda.capture.errors import first_line
from maml_cuda.functional import Functional, second_derivatives
from maml_cuda.losses import Loss, loss_function
from maml_cuda.masks import Seed
from maml_cuda.plan import proof
from maml_cuda.plan.graph import Range
from maml_cuda.rates import Rate
from maml_cuda.torch_wrappers import uncompiled
from maml_cuda.updates import InnerUpdate, Update

RATE = 0.3
NAMES = ("x_spt", "y_spt", "x_qry", "y_qry")

# (parameters and buffers by name, data by name) -> the gradients of floating-point data, by name and leaf.
Results = Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


def why_not(
    model: nn.Module, loss: Loss, results: Results, likes: Any, target: Any, adapted: Iterable[str],
    names: Sequence[str], classes: Mapping[int, int], integers: Sequence[Range | None],
) -> str:  # fmt: skip
    """The reason why a plan must not be used for the gradients of `names`, or "".

    Args:
        likes, target: of a set, as in proof.why_not. It is both the support and the query set.
        adapted: the names of the parameters that the inner loop changes.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:  # which has none of the caller's modes
        arguments = model, loss, results, likes, target, list(adapted), names, classes, integers
        return thread.submit(_compare, *arguments).result()


def _compare(
    model: nn.Module, loss: Loss, results: Results, likes: Any, target: Any, adapted: list[str],
    names: Sequence[str], classes: Mapping[int, int], integers: Sequence[Range | None],
) -> str:  # fmt: skip
    generator = Generator().manual_seed(0)
    try:
        in_double = proof._InDouble() if proof._is_single(model) else nullcontext()
        with generators.restored(), uncompiled(), second_derivatives(), in_double:
            model_copy, loss_copy = copied((model, loss), proof._replacements(model, generator))
            fast = {name: place.tensor.detach().clone() for name, place in places(model_copy).items()}
            with outside_state.restored(model_copy, [loss_copy] if callable(loss_copy) else []):
                sets = [proof._random_input(likes, integers, generator) for _ in range(2)]
                with torch.no_grad():
                    prediction = model_copy(pytrees.mapped(Tensor.clone, sets[0]))
                make = partial(proof._target_for, loss, target, classes, 0, generator)
                given = make(prediction), make(prediction)
                data, expected = _expected(model_copy, loss_copy, sets, given, adapted, names)
    except Exception as error:
        return f"gradients of data could not be compared with the model's on random data: {first_line(error)}"
    got = results(fast, data)
    difference = proof._difference({name: got[name] for name in expected}, expected)
    return f"on random data the gradient{difference}, where it is the data's" if difference else ""


def _expected(
    model: nn.Module, loss: Loss, sets: list[Any], targets: Any, adapted: list[str], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The data with an axis of tasks, and the gradients of what `names` has of them."""
    update = InnerUpdate({name: Update(Rate(RATE, False, False)) for name in adapted})
    for form in proof._FORMS:  # a loss may take probabilities alone
        trees = [sets[0], pytrees.mapped(form, targets[0]), sets[1], pytrees.mapped(form, targets[1])]
        trees = pytrees.mapped(lambda t: t.unsqueeze(0).clone(), trees)
        data = dict(zip(NAMES, trees, strict=True))
        leaves = {
            where: t.requires_grad_()
            for name in names
            for where, t in pytrees.named_leaves(name, data[name])
            if isinstance(t, Tensor) and t.is_floating_point()
        }
        try:
            *_, reached = reference.meta_step(
                Functional(model, Seed(proof.SEED)), loss_function(loss), update, list(leaves.values()), trees[0],
                trees[1], trees[2], trees[3], 1, False, [1.0],
            )  # fmt: skip
        except Exception:
            if form is proof._FORMS[-1]:
                raise
        else:
            found = {id(t): g.detach() for t, g in reached}
            grads = {where: found.get(id(t), torch.zeros_like(t)) for where, t in leaves.items()}
            if proof._norm(grads.values()).isfinite():
                break
    return pytrees.mapped(Tensor.detach, data), grads
