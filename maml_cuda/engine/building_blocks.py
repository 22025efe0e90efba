"""What FusedMAML's methods of the same names do, which say what the arguments mean: adapt, inner_loop, and the building
blocks of training code of one's own, predict, loss_and_grad and hvp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import pytrees
from maml_cuda.engine import checks, data_checks, data_gradients, fallback, support_sets
from maml_cuda.engine.binder import Set, look_at_labels, read
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.settings import Settings, inner_update, trainable_names
from maml_cuda.engine.weighted_sets import weights_of_sets
from maml_cuda.masks import Seed
from maml_cuda.pytrees import Tree
from maml_cuda.targets import Target


def adapt(
    maml: Settings, x_spt: Tree, y_spt: Target, steps: int, differentiable: bool, spt_weights: Tensor | None = None,
    seed: Seed | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """seed: of the masks of dropout and of minibatches; None: one of its own."""
    checks.steps(steps, "steps")
    sets = support_sets.count(maml, steps)
    seed = seed or Seed()
    x_spt, y_spt, spt_weights = support_sets.in_order(maml, seed, steps, x_spt, y_spt, spt_weights)
    return _adapt(maml, x_spt, y_spt, spt_weights, steps, sets, differentiable, seed)


def _adapt(
    maml: Settings, x_spt: Tree, y_spt: Target, spt_weights: Tensor | None, steps: int, sets: int,
    differentiable: bool, seed: Seed,
) -> dict[str, Tensor]:  # fmt: skip
    """On so many support sets a task, in order."""
    binding = _able_to_take(maml, steps)
    how = maml._options.meta_gradient
    if differentiable and how.kind not in ("unrolled", "truncated"):
        raise ValueError(f'differentiable must be False with meta_gradient="{how.kind}", got True')
    x_spt = support_sets.read_in_order(maml, binding, sets, x_spt, "y_spt", y_spt)
    differentiable = differentiable and torch.is_grad_enabled()
    support = _with_weights(maml, binding, Set("x_spt", x_spt, "y_spt", y_spt), "spt_weights", spt_weights, sets)
    if support.weights is not None and not differentiable:
        support = support._replace(weights=support.weights.detach())
    of_data = data_gradients.names(maml.loss, support) if differentiable else ()
    program = maml._binder.program(maml, binding, support, None, of_data=of_data, steps=steps)
    if program is None:
        adapted = fallback.adapt(
            maml.model, maml.loss, inner_update(maml), x_spt, support.weighted(), steps, maml.first_order,
            differentiable, seed, how, sets, maml._options.recompute, maml._options.segments,
        )  # fmt: skip
        maml._binder.settled(maml, binding, adapted)
        return _every_parameter(maml.model, adapted, pytrees.tasks(x_spt) // sets, differentiable)
    packed = support.packed()
    numbers = program.input("x_spt", packed.x, maml._options.check_labels, sets=sets)
    look_at_labels(maml, program, numbers, y_spt=support_sets.by_task(packed.y, sets))
    parameters, rates = program.tensors()
    if differentiable:
        if program.written:  # the backward needs the buffers as they are now
            parameters = [t if t.requires_grad else t.clone() for t in parameters]
        of_data = data_gradients.reached(maml, of_data, steps)
        if packed.is_learned(maml.loss) and steps and not maml.first_order:
            of_data = (*of_data, "spt_weights")
        after, _ = torch.ops.maml_cuda.adapt(
            parameters, rates, numbers, packed.target(program), program.data_text(of_data), steps, maml.first_order,
            program.seed(seed),
        )  # fmt: skip
        if program.written:
            maml._binder.settled(maml, binding, fallback.write_buffers(maml.model, packed.first()))
    else:
        after, _ = torch.ops.maml_cuda.adapt_forward(
            parameters, rates, numbers, packed.target(program), program.text, steps, program.seed(seed)
        )
    adapted = dict(zip(program.adapted, after, strict=True))
    return _every_parameter(maml.model, adapted, len(numbers) // sets, differentiable)


def inner_loop(
    maml: Settings, x_spt: Tree, y_spt: Target, steps: int, spt_weights: Tensor | None = None,
    seed: Seed | None = None,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    binding = _able_to_take(maml, steps)
    seed, sets = seed or Seed(), support_sets.count(maml, steps)
    x_spt, y_spt, spt_weights = support_sets.in_order(maml, seed, steps, x_spt, y_spt, spt_weights)
    x_spt = support_sets.read_in_order(maml, binding, sets, x_spt, "y_spt", y_spt)
    tasks = pytrees.tasks(x_spt) // sets
    x, y, weights = support_sets.part((x_spt, y_spt, spt_weights), sets, 0, 1)
    fast = _adapt(maml, x, y, weights, 0, 1, differentiable=False, seed=seed)
    yield fast
    for k in range(steps):
        x, y, weights = support_sets.part((x_spt, y_spt, spt_weights), sets, k, k + 1)
        support = _with_weights(maml, binding, Set("x_spt", x, "y_spt", y), "spt_weights", weights)
        program = maml._binder.program(maml, binding, support, None)
        alone = program is not None and not program.plan.keeps_state and not maml._options.meta_gradient.proximal
        if program is not None and alone and program.plan.backend == "cpu":
            own = [t.detach() for t in program.own(fast, tasks, k)]
            rates = [t.detach() for t in program.rates_at(k)]
            packed = support.packed()
            numbers = program.input("x_spt", packed.x, maml._options.check_labels)
            after = torch.ops.maml_cuda.inner_step(
                own, rates, numbers, packed.target(program), program.step_text(), k, program.seed(seed)
            )
            fast = {**fast, **dict(zip(program.adapted, after, strict=True))}
        else:
            many = k + 1 if sets > 1 else 1
            x, y, weights = support_sets.part((x_spt, y_spt, spt_weights), sets, 0, many)
            fast = _adapt(maml, x, y, weights, k + 1, many, differentiable=False, seed=seed)
        yield fast


def predict(
    maml: Settings, fast: Mapping[str, Tensor], x: Tree, slot: int | None, weights: Tensor | None = None
) -> Any:
    slot = checks.slot(slot)
    binding, x = _checked(maml, fast, x, None)
    if pytrees.tensors(x)[0].shape[1:2] == (1,):
        maml._binder.warn_of_single_queries(maml.model)
    if weights is not None:
        data_checks.no_graph("predict", weights=weights)
    given = _with_weights(maml, binding, Set("x", x), "weights", weights)
    program = maml._binder.program(maml, binding, None, given)
    if program is None:
        prediction = fallback.predict(maml.model, dict(fast), x, slot, Seed(), given.weights)
        return maml._binder.settled(maml, binding, prediction)
    packed = given.packed()
    x = program.input("x", packed.x, maml._options.check_labels)
    own, seed = program.own(fast, len(x), slot), program.seed(Seed())
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in own)
    op = torch.ops.maml_cuda.predict if differentiable else torch.ops.maml_cuda.predict_forward
    return program.as_returned(packed.unpacked(op(own, x, program.text, seed, packed.counts)))


def loss_and_grad(
    maml: Settings, fast: Mapping[str, Tensor], x: Tree, y: Target, slot: int | None, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    slot = checks.slot(slot)
    data_checks.no_graph("loss_and_grad", fast=fast, x=x, y=y, weights=weights)
    binding, x = _checked(maml, fast, x, y)
    names = trainable_names(maml.model)
    given = _with_weights(maml, binding, Set("x", x, "y", y), "weights", weights)
    program = maml._binder.program(maml, binding, given, None)
    if program is None:
        y = given.weighted()
        return maml._binder.settled(
            maml, binding, fallback.loss_and_grad(maml.model, maml.loss, dict(fast), names, x, y, slot, Seed())
        )
    packed = given.packed()
    x = program.input("x", packed.x, maml._options.check_labels)
    look_at_labels(maml, program, x, y=packed.y)
    own = [t.detach() for t in program.own(fast, len(x), slot)]
    losses, grads = torch.ops.maml_cuda.loss_and_grad(
        own, x, packed.target(program), program.text, program.seed(Seed())
    )
    return losses, every_trainable(names, program.whole(grads, fast, slot), fast)


def hvp(
    maml: Settings, fast: Mapping[str, Tensor], x: Tree, y: Target, v: Mapping[str, Tensor], slot: int | None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    slot = checks.slot(slot)
    data_checks.no_graph("hvp", fast=fast, x=x, y=y, v=v, weights=weights)
    binding, x = _checked(maml, fast, x, y)
    data_checks.fast(dict(maml.model.named_parameters()), v, pytrees.tasks(x), "v", all_names=False)
    names = trainable_names(maml.model)
    given = _with_weights(maml, binding, Set("x", x, "y", y), "weights", weights)
    program = maml._binder.program(maml, binding, given, None, second_order=True)
    if program is None:
        y = given.weighted()
        return maml._binder.settled(
            maml, binding, fallback.hvp(maml.model, maml.loss, dict(fast), names, x, y, dict(v), slot, Seed())
        )
    packed = given.packed()
    x = program.input("x", packed.x, maml._options.check_labels)
    look_at_labels(maml, program, x, y=packed.y)
    at = [t.detach() for t in program.own(fast, len(x), slot)]
    moving = {n: v[n].detach() if n in v and n in names else torch.zeros_like(p) for n, p in fast.items()}
    directions = program.directions(moving, len(x), slot)
    products = torch.ops.maml_cuda.hvp(at, x, packed.target(program), directions, program.text, program.seed(Seed()))
    return every_trainable(names, program.whole(products, fast, slot), fast)


def _checked(maml: Settings, fast: Mapping[str, Tensor], x: Tree, y: Target | None) -> tuple[Binding, Tree]:
    """The binding, and x as it is read, once `fast`, x and y have passed their checks."""
    binding = maml._binding()
    x = read(maml, binding, "x", x, None if y is None else "y", y)
    data_checks.fast(dict(maml.model.named_parameters()), fast, pytrees.tasks(x), "fast", all_names=True)
    return binding, x


def _with_weights(
    maml: Settings, binding: Binding, given: Set, name: str, weights: Tensor | None, sets: int = 1
) -> Set:
    """The set with the weights of its samples, once these have passed their checks. sets: of a task, in order."""
    part = name, weights, given.x_name, given.x, given.y_name, given.y
    return given._replace(weights=weights_of_sets(maml.loss, binding.like(), part, support_sets=sets)[0])


def _able_to_take(maml: Settings, steps: int) -> Binding:
    """The binding, if it can take so many inner steps."""
    checks.steps(steps, "steps")
    binding = maml._binding()
    if steps and (name := binding.without_steps):
        raise ValueError(f"{name} must hold a value for {steps} steps, got one of shape [0]")
    return binding


def _every_parameter(
    model: nn.Module, adapted: Mapping[str, Tensor], tasks: int, differentiable: bool
) -> dict[str, Tensor]:
    """By name: the adapted parameters, and expanded views of the others."""
    fast = {}
    for name, p in model.named_parameters():
        theta = p if differentiable else p.detach()
        fast[name] = adapted[name] if name in adapted else theta.unsqueeze(0).expand(tasks, *p.shape)
    return fast


def every_trainable(names: list[str], found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name: what is found, and zeros for a parameter that the prediction does not depend on."""
    return {n: found[n] if n in found else torch.zeros_like(like[n]) for n in names}
