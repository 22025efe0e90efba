"""The general path of FusedMAML: general_path.py, after the checks that the fused ops make themselves.

Every call runs outside autocast (in the model's dtype, as on the fused path), outside inference mode (the inner loop
needs gradients) and outside torch.compile; compiled parts of the model run uncompiled, as torch.compile has no double
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from maml_cuda import pytrees, targets
from maml_cuda.batch_norm import at_step
from maml_cuda.capture import generators
from maml_cuda.engine import data_checks, general_blocks, general_path
from maml_cuda.functional import Functional
from maml_cuda.losses import Loss, loss_function, objective
from maml_cuda.masks import Seed
from maml_cuda.meta_gradients import MetaGradient
from maml_cuda.policies import mean_of
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import Weighted, with_padding, without_padding
from maml_cuda.targets import Target
from maml_cuda.torch_wrappers import uncompiled
from maml_cuda.updates import InnerUpdate

P = ParamSpec("P")
R = TypeVar("R")


def apart(call: Callable[P, R]) -> Callable[P, R]:
    @wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        gradients = torch.is_grad_enabled()
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(uncompiled())
            stack.enter_context(_generators_put_back_on_error())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.set_grad_enabled(gradients))
            return call(*map(_plain, args), **{name: _plain(a) for name, a in kwargs.items()})

    return torch.compiler.disable(called)  # type: ignore[no-any-return]


@contextmanager
def _generators_put_back_on_error() -> Iterator[None]:
    """A context, for a call that is refused after forward has drawn random numbers."""
    cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except Exception:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus)
        raise


def _plain(argument: Any) -> Any:
    """The argument with ordinary copies of its inference tensors."""
    return pytrees.mapped(lambda t: t.clone() if t.is_inference() else t, argument)


@apart
def meta_step(
    model: nn.Module,
    loss: Loss,
    inner: InnerUpdate,
    parameters: Iterable[Tensor],
    x_spt: Tree,
    y_spt: Target,
    x_qry: Tree,
    y_qry: Target,
    steps: int,
    first_order: bool,
    task_weights: Tensor | None,
    query_weights: Sequence[float] | None,
    seed: Seed,
    how: MetaGradient,
    sets: int,
    recompute: bool,
    segments: bool,
) -> tuple[Tensor, Tensor, Tree | None, Tensor, list[tuple[Tensor, Tensor]]]:
    """loss, task_losses, predictions (None where they cannot be stacked), support_losses, and (tensor, gradient) of
    each of `parameters` and of the data that requires grad and reaches the loss; none where gradients are off.

    sets: support sets of a task, which follow each other in x_spt and y_spt.
    """
    data = pytrees.tensors((x_spt, y_spt, x_qry, y_qry))
    if how.kind == "reptile" and any(t.requires_grad for t in data):
        raise ValueError('data must not require grad with meta_gradient="reptile", got requires_grad=True')
    given = {id(t): t for t in (*parameters, *data)}  # one tensor may be support and query
    wanted = [t for t in given.values() if t.requires_grad and torch.is_grad_enabled()]
    tasks = pytrees.tasks(x_qry)
    weights = [1 / tasks] * tasks if task_weights is None else list(task_weights)
    function = Functional(model, seed)
    criterion = objective(loss, isinstance(y_spt, Weighted))
    uses = {0: ("y_spt", y_spt), steps: ("y_qry", y_qry)}  # without steps, nothing reads y_spt
    checked = _checked(loss, criterion, uses, sets)
    try:
        *outputs, reached = general_path.meta_step(
            function, checked, inner, wanted, x_spt, y_spt, x_qry, y_qry, steps, first_order, weights, query_weights,
            how, sets, recompute, segments,
        )  # fmt: skip
    except Exception:
        _check_query_samples(model, x_spt, x_qry)
        raise
    _keep_buffers(function, criterion)
    return (*outputs, [(t, g.detach()) for t, g in reached])  # type: ignore[return-value]


@apart
def adapt(
    model: nn.Module,
    loss: Loss,
    inner: InnerUpdate,
    x: Tree,
    y: Target,
    steps: int,
    first_order: bool,
    differentiable: bool,
    seed: Seed,
    how: MetaGradient,
    sets: int,
    recompute: bool,
    segments: bool,
) -> dict[str, Tensor]:
    """The adapted parameters, name -> [tasks, *shape]. sets: of a task, which follow each other in x and y."""
    function = Functional(model, seed)
    checked = _checked(loss, loss_function(loss, isinstance(y, Weighted)), {0: ("y_spt", y)}, sets)
    adapted = general_path.adapt(
        function, checked, inner, x, y, steps, first_order, differentiable, how, sets, recompute, segments
    )  # fmt: skip
    if differentiable:
        _keep_buffers(function)
    return adapted


@apart
def predict(
    model: nn.Module, fast: Mapping[str, Tensor], x: Tree, slot: int, seed: Seed, weights: Tensor | None = None
) -> Tree:
    function = Functional(model, seed)
    differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in fast.values())
    with at_step(model, slot), function.differentiable_twice() if differentiable else nullcontext():
        predictions = []
        for t in range(pytrees.tasks(x)):
            own, x_of_task = {n: p[t] for n, p in fast.items()}, pytrees.of_task(x, t)
            if weights is not None:
                x_of_task, _ = without_padding(x_of_task, Weighted(None, weights[t]))
            with function.of_pass(t, 0):
                prediction = function(own, x_of_task)
            predictions.append(prediction if weights is None else with_padding(prediction, weights[t]))
    return pytrees.stacked("the model's output", predictions)


@apart
def loss_and_grad(
    model: nn.Module, loss: Loss, fast: Mapping[str, Tensor], names: list[str], x: Tree, y: Target,
    slot: int, seed: Seed,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    checked = _checked(loss, loss_function(loss, isinstance(y, Weighted)), {0: ("y", y)})
    with at_step(model, slot):
        return general_blocks.loss_and_grad(Functional(model, seed), checked, fast, names, x, y)


@apart
def hvp(
    model: nn.Module,
    loss: Loss,
    fast: Mapping[str, Tensor],
    names: list[str],
    x: Tree,
    y: Target,
    v: Mapping[str, Tensor],
    slot: int,
    seed: Seed,
) -> dict[str, Tensor]:
    checked = _checked(loss, loss_function(loss, isinstance(y, Weighted)), {0: ("y", y)})
    with at_step(model, slot):
        return general_blocks.hvp(Functional(model, seed), checked, fast, names, x, y, v)


@apart
def fisher_vector_product(
    model: nn.Module,
    loss: str,
    inner: InnerUpdate,
    names: list[str],
    x_spt: Tensor,
    y_spt: Target,
    x_qry: Tensor,
    v: Mapping[str, Tensor],
    weights: Tensor | None,
    steps: int,
    first_order: bool,
    seed: Seed,
    sets: int,
) -> dict[str, Tensor]:
    """By `names`. sets: support sets of a task, which follow each other."""
    if weights is None:
        weights = x_qry.new_ones(x_qry.shape[:2])
    data_checks.sample_weights("weights", weights)
    checked = _checked(loss, loss_function(loss), {0: ("y_spt", y_spt)}, sets)
    return general_blocks.fisher_vector_product(
        Functional(model, seed), checked, inner, names, x_spt, y_spt, x_qry, v, targets.shares(weights), steps,
        first_order, sets,
    )  # fmt: skip


@apart
def write_buffers(model: nn.Module, x_spt: Tree) -> None:
    """Moves the buffers of a model as a meta-step on fused layers does: by a forward of the first support set.
    Random generators do not move."""
    function = Functional(model)
    with torch.no_grad(), generators.restored(), at_step(model, 0):
        function(dict(model.named_parameters()), pytrees.of_task(x_spt, 0))
    _keep_buffers(function)


def _keep_buffers(*called: Callable[..., Any]) -> None:
    """After a training step, that is where gradients are on."""
    for each in called:
        if isinstance(each, Functional) and torch.is_grad_enabled():
            each.keep_buffers()


def _checked(
    loss: Loss, function: Callable[..., Tensor], uses: Mapping[int, tuple[str, Target]], sets: int = 1
) -> Callable[..., Tensor]:
    """The function of a loss, with checks of the prediction and of the whole target where a target is first used.

    A forward of its own for these checks would be seen by a model that counts its calls, keeps values for the next one
    or draws random numbers.

    Args:
        uses: the number of the call that is the first with a target -> the target's name, and it [tasks, ...].
        sets: support sets of a task, which follow each other in y_spt.
    """
    if not isinstance(loss, str):
        return function
    numbers = count()

    def checked(prediction: Any, target: Any) -> Tensor:
        if (number := next(numbers)) in uses:
            name, y = uses[number]
            data_checks.prediction(loss, prediction)
            shape = tuple(mean_of(prediction).shape)
            if isinstance(y, Weighted):  # what stands at padding does not matter
                counts = y.weights.detach() > 0
                shape, y = (counts.shape[1], *shape[1:]), y.y
                if loss in data_checks.OF_CLASSES:
                    y = torch.where(counts, y, 0)
            data_checks.target(name, loss, y, shape)
            if sets > 1 and name == "y_spt":
                y = pytrees.mapped(lambda leaf: leaf.unflatten(0, (-1, sets)), y)
            data_checks.target_values(name, y, shape[-1] if loss in data_checks.OF_CLASSES else None)
        return function(prediction, target)

    return checked


@apart
def check_numbers(model: nn.Module, x_name: str, x: Tensor) -> None:
    """Numbers x [tasks, samples] may be samples [samples, features] whose axis of tasks was forgotten: a model that is
    meant for numbers takes one more of them."""
    try:
        _first(model, dict(model.named_parameters()), torch.cat([x[0], x[0, :1]]))
    except Exception as error:
        raise data_checks.lacks_axis(x_name, x, f"; the model does not take {x.shape[1] + 1} numbers") from error


def _check_query_samples(model: nn.Module, x_spt: Tree, x_qry: Tree) -> None:
    """Query samples of another shape than the support samples are for a model that takes both."""
    if isinstance(x_spt, Tensor) and isinstance(x_qry, Tensor) and x_spt.shape[2:] != x_qry.shape[2:]:
        try:
            _first(model, dict(model.named_parameters()), x_qry[0])
        except Exception as error:
            raise data_checks.other_samples(x_spt, x_qry, str(error)) from error


def _first(model: nn.Module, parameters: Mapping[str, Tensor], x: Tree) -> Tree:
    on = next(iter(parameters.values())).device
    with torch.no_grad(), torch.random.fork_rng([on] if on.type == "cuda" else []):
        return Functional(model)(parameters, x)
