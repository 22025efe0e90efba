"""Products with the Fisher matrix of adapted policies, for trust regions (TRPO, Schulman et al. 2015): what FusedMAML's
methods of the same names do, which say what the arguments mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from maml_cuda import targets
from maml_cuda.engine import checks, data_checks, fallback, support_sets
from maml_cuda.engine.binder import Set, look_at_labels, read
from maml_cuda.engine.building_blocks import every_trainable
from maml_cuda.engine.fisher import FisherProducts
from maml_cuda.engine.program import Program
from maml_cuda.engine.settings import Settings, inner_update
from maml_cuda.masks import Seed
from maml_cuda.targets import PolicyTarget


def fisher_vector_product(
    maml: Settings, x_spt: Tensor, y_spt: PolicyTarget, x_qry: Tensor, v: Mapping[str, Tensor], weights: Tensor | None,
    seed: Seed | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """seed: of the masks of dropout; None: one of its own."""
    seed = seed or Seed()
    program, x_spt, y_spt, x_qry = _read(maml, seed, x_spt, y_spt, x_qry, weights)
    trainable = _trainable(maml)
    data_checks.direction(trainable, v)
    if program is None or not program.plan.is_plain_descent:  # fused are products through plain descent
        return fallback.fisher_vector_product(
            maml.model, str(maml.loss), inner_update(maml), list(trainable), x_spt, y_spt, x_qry, dict(v), weights,
            maml.inner_steps, maml.first_order, seed, support_sets.count(maml, maml.inner_steps),
        )  # fmt: skip
    parameters, rates = program.tensors()
    reached = [n for n in program.names if n in trainable]
    products = torch.ops.maml_cuda.fisher_vector_product(
        parameters, rates, x_spt, targets.tensors(y_spt), x_qry, weights, [v[n].detach() for n in reached],
        program.text, maml.inner_steps, maml.first_order, program.seed(seed),
    )  # fmt: skip
    return every_trainable(list(trainable), dict(zip(reached, products, strict=True)), trainable)


def fisher(
    maml: Settings, x_spt: Tensor, y_spt: PolicyTarget, x_qry: Tensor, weights: Tensor | None, memory: int
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    checks.steps(memory, "memory")
    seed = Seed()  # one matrix
    program, x, y, x_qry = _read(maml, seed, x_spt, y_spt, x_qry, weights)
    slow = program is None or program.plan.backend != "cpu" or maml._options.recompute
    if program is None or slow or not program.plan.is_plain_descent:
        return lambda v: fisher_vector_product(maml, x_spt, y_spt, x_qry, v, weights, seed)
    trainable = _trainable(maml)
    reached = [n for n in program.names if n in trainable]
    parameters, rates = program.tensors()
    products = FisherProducts(
        parameters, rates, x, targets.tensors(y), x_qry, weights, program.text, maml.inner_steps,
        maml.first_order, memory, program.seed(seed),
    )  # fmt: skip

    def product(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        data_checks.direction(trainable, v)
        found = dict(zip(reached, products([v[n].detach() for n in reached]), strict=True))
        return every_trainable(list(trainable), found, trainable)

    return product


def _trainable(maml: Settings) -> dict[str, Tensor]:
    return {n: p for n, p in maml.model.named_parameters() if p.requires_grad}


def _read(
    maml: Settings, seed: Seed, x_spt: Tensor, y_spt: PolicyTarget, x_qry: Tensor, weights: Tensor | None
) -> tuple[Program | None, Tensor, PolicyTarget, Tensor]:
    """The program of a Fisher-vector product on these data, None where there is none; and the data as they are read."""
    checks.policy_loss(maml.loss, "fisher_vector_product")
    if (kind := maml._options.meta_gradient.kind) != "unrolled":
        raise ValueError(f'fisher_vector_product must have meta_gradient="unrolled", got {kind!r}')
    data_checks.one_tensor("x_spt", x_spt, "fisher_vector_product")
    data_checks.one_tensor("x_qry", x_qry, "fisher_vector_product")
    binding = maml._binding()
    sets = support_sets.count(maml, maml.inner_steps)
    x_spt, y_spt, _ = support_sets.in_order(maml, seed, maml.inner_steps, x_spt, y_spt)
    x_spt = support_sets.read_in_order(maml, binding, sets, x_spt, "y_spt", y_spt)
    x_qry = read(maml, binding, "x_qry", x_qry)
    data_checks.same_tasks(x_spt, x_qry, sets)
    if weights is not None:
        data_checks.query_sample_weights(weights, x_qry, binding.like())
    program = maml._binder.program(maml, binding, Set("x_spt", x_spt, "y_spt", y_spt), Set("x_qry", x_qry))
    if program is not None and any(slots is not None for slots in program.slots):
        maml._binder.fall_back(maml, "a Fisher-vector product takes no parameters with a slot for each step")
        program = None
    if program is not None:
        check = maml._options.check_labels
        x_spt, x_qry = program.input("x_spt", x_spt, check, sets=sets), program.input("x_qry", x_qry, check)
        look_at_labels(maml, program, x_spt, y_spt=support_sets.by_task(y_spt, sets))
        if maml._options.check_labels and weights is not None:
            data_checks.sample_weights("weights", weights)
    return program, x_spt, y_spt, x_qry
