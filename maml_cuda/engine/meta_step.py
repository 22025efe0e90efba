"""One meta-step: a call of FusedMAML, and FusedMAML.backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from maml_cuda import meta_gradients, pytrees, torch_private
from maml_cuda.engine import data_checks, data_gradients, data_parts, fallback, fast_path, support_sets
from maml_cuda.engine.binder import Set, look_at_labels, read
from maml_cuda.engine.binding import Binding, Choice
from maml_cuda.engine.problem import Problem, joined, meta_problem
from maml_cuda.engine.program import Program
from maml_cuda.engine.settings import Settings, adapted_names, inner_tensors, inner_update, trainable_names
from maml_cuda.engine.weighted_sets import not_learned, weights_of_sets
from maml_cuda.masks import Seed
from maml_cuda.policies import mean_of
from maml_cuda.pytrees import Tree
from maml_cuda.targets import Target


@dataclass
class MetaOutput:
    """What a meta-step returns. `loss` is the only differentiable field.

    loss: 0-d, sum over tasks of weight times task loss (the mean without task_weights).
    task_losses: [tasks], query losses after the inner loop.
    logits: [tasks, n_query, ...], predictions on the query sets, after the last step; of a Gaussian policy the means.
        With a loss of your own whatever the model returns, as `predict` puts it together; None where `predict` raises.
    support_losses: [tasks, inner_steps]; column k is the support loss at phi_k.
    residuals: [tasks], of meta_gradient="implicit" where gradients are on: how well the linear system of each task was
        solved, |b - (I + H / lambda) x| / |b| in its last step of conjugate gradients, b the gradient of the query
        loss. None otherwise.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Any
    support_losses: Tensor
    residuals: Tensor | None = None


@dataclass
class Gradient:
    """The meta-gradient of a meta-step.

    flat: all of it in one tensor.
    inputs: the tensors that it is of, in order.
    places: of each of them in `flat`, on the fast path; None elsewhere.
    """

    flat: Tensor
    inputs: list[Tensor]
    places: list[fast_path.Place] | None


def forward(
    maml: Settings, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target, task_weights: Tensor | None,
    spt_weights: Tensor | None, qry_weights: Tensor | None,
) -> MetaOutput:  # fmt: skip
    out, gradient = _computed(maml, x_spt, y_spt, x_qry, y_qry, task_weights, spt_weights, qry_weights)
    if gradient is not None:
        if gradient.places:
            out.loss = fast_path.attached(out.loss, gradient.flat, gradient.inputs, gradient.places)
        else:
            out.loss = torch.ops.maml_cuda.attach(out.loss, gradient.flat, gradient.inputs)
    return out


def backward(
    maml: Settings, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target, task_weights: Tensor | None,
    spt_weights: Tensor | None, qry_weights: Tensor | None,
) -> MetaOutput:  # fmt: skip
    if not torch.is_grad_enabled():
        raise RuntimeError("backward must have gradients on, got them off (no_grad or inference_mode)")
    out, gradient = _computed(maml, x_spt, y_spt, x_qry, y_qry, task_weights, spt_weights, qry_weights)
    assert gradient is not None  # the adapted parameters at least have one
    if gradient.places and all(map(fast_path.only_adds, gradient.inputs)):
        fast_path.add_gradient(gradient.flat, gradient.inputs, gradient.places)
    else:
        torch.ops.maml_cuda.attach(out.loss, gradient.flat, gradient.inputs).backward()
    return out


def check_settings(maml: Settings) -> None:
    """Raises ValueError where the meta-gradient that was chosen cannot be with the other settings as they are now."""
    how = maml._options.meta_gradient
    if how.kind == "unrolled":
        return
    learned = [name for name, t in inner_tensors(maml) if t.requires_grad]
    if isinstance(maml.inner_transform, nn.Module):
        learned += [f"inner_transform.{name}" for name in trainable_names(maml.inner_transform)]
    adapted = set(adapted_names(maml))
    others = [name for name in trainable_names(maml.model) if name not in adapted]
    if isinstance(maml.loss, nn.Module):
        others += [f"loss.{name}" for name in trainable_names(maml.loss)]
    per_step = maml._options.per_step_support or maml._options.support_batch is not None
    meta_gradients.check(how, maml.first_order, maml._query_weights.values, learned, others, per_step)


def program_of(maml: Settings, x_spt: Tree, x_qry: Tree, of_data: tuple[str, ...] = ()) -> Program | None:
    """The program that runs a meta-step on such x, whose sets are in order; None where there is none.

    of_data: the names of those whose gradients are asked for.
    """
    binding = maml._binding()
    sets = support_sets.count(maml, maml.inner_steps)
    support_sets.read_in_order(maml, binding, sets, x_spt)
    read(maml, binding, "x_qry", x_qry)
    data_checks.same_tasks(x_spt, x_qry, sets)
    return maml._binder.program(maml, binding, Set("x_spt", x_spt), Set("x_qry", x_qry), of_data=of_data)


def memory_estimate(maml: Settings, x_spt: Tree, x_qry: Tree) -> int:
    x_spt, _, _ = support_sets.in_order(maml, Seed(0), maml.inner_steps, x_spt)
    of_data = data_gradients.names(maml.loss, Set("x_spt", x_spt), Set("x_qry", x_qry))
    program = program_of(maml, x_spt, x_qry, of_data)
    if program is None:
        raise ValueError("memory_estimate must have a fused model, got one on the general path (reference)")
    x_spt, x_qry = program.values(x_spt), program.values(x_qry)
    of_data = data_gradients.reached(maml, of_data, maml.inner_steps)
    text = program.data_text(of_data) if of_data else program.text
    problem = meta_problem(text, x_spt, x_qry, maml.inner_steps, maml.first_order, True, maml._query_weights.steps)
    gradients = len(x_qry) * problem.core.data_places[-1] * x_qry.element_size() if of_data else 0
    return problem.workspace_bytes(x_spt, len(x_qry)) + gradients


def _computed(
    maml: Settings, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target, task_weights: Tensor | None,
    spt_weights: Tensor | None, qry_weights: Tensor | None,
) -> tuple[MetaOutput, Gradient | None]:  # fmt: skip
    """What a call returns, not yet differentiable; and the meta-gradient where gradients are on."""
    seed, sets = Seed(), support_sets.count(maml, maml.inner_steps)
    x_spt, y_spt, spt_weights = support_sets.in_order(maml, seed, maml.inner_steps, x_spt, y_spt, spt_weights)
    unobserved, signature = torch_private.unobserved(), None
    binding = maml._binder.bound if unobserved else None  # torch.compile would take it for a constant
    if binding is not None and not torch.is_autocast_enabled(binding.on):
        signature = binding.signature(maml, (x_spt, y_spt, x_qry, y_qry))
    if binding is None or signature is None:
        binding = maml._binding()
        if torch.is_autocast_enabled(binding.on):
            x_spt, x_qry = binding.in_its_dtype(x_spt), binding.in_its_dtype(x_qry)
        signature = binding.signature(maml, (x_spt, y_spt, x_qry, y_qry)) if unobserved else ()
    key = signature, maml.first_order, torch.is_grad_enabled()
    plain = spt_weights is None and qry_weights is None
    usual = bool(signature) and not maml._query_weights.steps and plain
    known = binding.problems.get(key) if usual else None
    if known is not None:
        warm, problem, choice = known
        parameters, rates = warm.tensors()
        if all(map(fast_path.is_plain, rates)):
            data = x_spt, cast(Tensor, y_spt), x_qry, cast(Tensor, y_qry)
            binding.last = choice
            return _warm(maml, binding, warm, problem, parameters, rates, data, task_weights, seed)
    _check_episode(maml, binding, x_spt, y_spt, x_qry, y_qry, sets)
    if task_weights is not None:
        data_checks.task_weights(task_weights, pytrees.tasks(x_qry), binding.like())
    spt_weights, qry_weights = weights_of_sets(
        maml.loss, binding.like(), ("spt_weights", spt_weights, "x_spt", x_spt, "y_spt", y_spt),
        ("qry_weights", qry_weights, "x_qry", x_qry, "y_qry", y_qry), support_sets=sets,
    )  # fmt: skip
    not_learned(maml, spt_weights=spt_weights, qry_weights=qry_weights)
    support = Set("x_spt", x_spt, "y_spt", y_spt, spt_weights)
    query = Set("x_qry", x_qry, "y_qry", y_qry, qry_weights)
    of_data = data_gradients.names(maml.loss, support, query)
    program = maml._binder.program(maml, binding, support, query, of_data=of_data)
    if program is None:
        result = _on_the_general_path(
            maml, x_spt, support.weighted(), x_qry, query.weighted(), task_weights, seed, sets
        )
        return maml._binder.settled(maml, binding, result)
    check, in_support, in_query = maml._options.check_labels, support.packed(), query.packed()
    support_x = program.input("x_spt", in_support.x, check, sets=sets)
    query_x = program.input("x_qry", in_query.x, check)
    look_at_labels(maml, program, support_x, y_spt=support_sets.by_task(in_support.y, sets), y_qry=in_query.y)
    parameters, rates = program.tensors()
    wanted = torch.is_grad_enabled()
    weights, query_steps = maml._query_weights.tensor(parameters[0]), maml._query_weights.steps
    tensors_of_data = [support_x, in_support.target(program), query_x, in_query.target(program)]
    learned: list[tuple[Tensor, Tensor]] = []  # data, and their gradients
    of_data = data_gradients.reached(maml, of_data, maml.inner_steps)
    of_weights = wanted and in_support.is_learned(maml.loss) and maml.inner_steps > 0 and not maml.first_order
    if of_weights:
        of_data = (*of_data, "spt_weights")
    if of_data:
        loss, task_losses, logits, support_losses, flat, raw = torch.ops.maml_cuda.meta_gradient_of_data(
            parameters, rates, *tensors_of_data, task_weights, program.data_text(of_data), maml.inner_steps,
            maml.first_order, weights, query_steps, program.seed(seed),
        )  # fmt: skip
        problem = meta_problem(
            program.data_text(of_data), support_x, query_x, maml.inner_steps, maml.first_order, True, query_steps,
            in_support.weights is not None,
        )  # fmt: skip
        learned = data_parts.split(problem, raw, tensors_of_data, task_weights, weights, query_steps)
        if of_weights:
            spt_weights = cast(Tensor, in_support.weights)
            slopes = data_parts.slopes(problem, raw, spt_weights.shape[1])
            learned.append((spt_weights, in_support.support_gradient(slopes, task_weights, sets)))
    else:
        loss, task_losses, logits, support_losses, flat = torch.ops.maml_cuda.meta_gradient(
            parameters, rates, *tensors_of_data, task_weights, program.text, maml.inner_steps, maml.first_order,
            wanted, weights, query_steps, program.seed(seed),
        )  # fmt: skip
    if program.written and wanted:
        maml._binder.settled(maml, binding, fallback.write_buffers(maml.model, in_support.first()))
    if usual and binding.plain and program.is_warm:  # the next call with such data has passed every check
        problem = meta_problem(program.text, support_x, query_x, maml.inner_steps, maml.first_order, wanted)
        binding.problems[key] = program, problem, Choice(program, "")
    logits_ = _logits(maml, program.as_returned(in_query.unpacked(logits)))
    out = MetaOutput(loss, task_losses, logits_, *_with_residuals(maml, support_losses))
    if not wanted:
        return out, None
    inputs = program.with_gradient(parameters + rates)
    if in_query.is_learned(maml.loss):
        target = cast(Tensor, in_query.target(program)[0])
        gradient = in_query.query_gradient(cast(str, maml.loss), logits, target, task_weights)
        learned.append((cast(Tensor, in_query.weights), gradient))
    if learned:
        flat, inputs = joined([flat, *(g for _, g in learned)]), [*inputs, *(t for t, _ in learned)]
    return out, Gradient(flat, inputs, None)


def _warm(
    maml: Settings,
    binding: Binding,
    program: Program,
    problem: Problem,
    parameters: list[Tensor],
    rates: list[Tensor],
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    task_weights: Tensor | None,
    seed: Seed,
) -> tuple[MetaOutput, Gradient | None]:
    """A call like one that has passed every check, but for the values of labels and weights."""
    if task_weights is not None:
        data_checks.task_weights(task_weights, len(data[2]), binding.like())
    if maml._options.check_labels or program.draws:
        look_at_labels(maml, program, data[0], y_spt=support_sets.by_task(data[1], problem.sets), y_qry=data[3])
    wanted = torch.is_grad_enabled()
    loss, task_losses, logits, support_losses, flat = fast_path.meta_step(
        problem, parameters, rates, data, task_weights, maml.inner_steps, wanted,
        program.seed(seed) if program.draws else None,
    )  # fmt: skip
    if not program.is_plain:
        logits = _logits(maml, program.as_returned(logits))
    out = MetaOutput(loss, task_losses, logits, support_losses)
    if maml._options.meta_gradient.kind == "implicit":
        out.support_losses, out.residuals = _with_residuals(maml, support_losses)
    if not wanted:
        return out, None
    return out, Gradient(flat, program.with_gradient(parameters + rates), program.places)


def _check_episode(
    maml: Settings, binding: Binding, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target, sets: int
) -> None:
    check_settings(maml)  # which may have changed since
    maml._query_weights.check(maml.inner_steps)
    support_sets.read_in_order(maml, binding, sets, x_spt, "y_spt", y_spt)
    read(maml, binding, "x_qry", x_qry, "y_qry", y_qry)
    data_checks.same_tasks(x_spt, x_qry, sets)


def _with_residuals(maml: Settings, losses: Tensor) -> tuple[Tensor, Tensor | None]:
    """support_losses and residuals of a MetaOutput, from those of an op: a further column of an implicit gradient."""
    steps = maml.inner_steps
    return (losses[:, :steps], losses[:, steps]) if losses.shape[1] > steps else (losses, None)


def _logits(maml: Settings, predictions: Any) -> Any:
    """MetaOutput.logits."""
    return mean_of(predictions) if isinstance(maml.loss, str) else predictions


def _on_the_general_path(
    maml: Settings, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target, task_weights: Tensor | None, seed: Seed,
    sets: int,
) -> tuple[MetaOutput, Gradient | None]:  # fmt: skip
    wanted = [*maml.parameters(), *(t for _, t in inner_tensors(maml))]  # which need not be parameters
    loss, task_losses, predictions, support_losses, reached = fallback.meta_step(
        maml.model, maml.loss, inner_update(maml), wanted, x_spt, y_spt, x_qry, y_qry,
        maml.inner_steps, maml.first_order, task_weights, maml._query_weights.values, seed,
        maml._options.meta_gradient, sets, maml._options.recompute, maml._options.segments,
    )  # fmt: skip
    out = MetaOutput(loss, task_losses, _logits(maml, predictions), *_with_residuals(maml, support_losses))
    if not reached:
        return out, None
    return out, Gradient(joined([g for _, g in reached]), [t for t, _ in reached], None)
