"""Captures what a model and its loss compute for one signature, as a record of ATen operations.

A deep copy of both runs once on fake tensors, which have shapes and no values, in a thread of its own: there are none
of the caller's modes (autocast, no_grad, inference, devices, compilers, transforms), and the model itself is not
touched. Parameters, buffers and tensor attributes have a fake tensor at every place that holds them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.distributions import Distribution
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from maml_cuda import pytrees
from maml_cuda.capture import generators, outside_state
from maml_cuda.capture.copies import copied, in_place_of, places, tensors_of
from maml_cuda.capture.errors import DoesNotFit, Unfusable, described, first_line
from maml_cuda.capture.outside_state import OutsideState
from maml_cuda.capture.python_state import Change, PythonState, Unread, was_read
from maml_cuda.capture.record import Made, Operand, Record
from maml_cuda.capture.recorder import RANDOM, Recorder, modules_named
from maml_cuda.losses import called
from maml_cuda.process_wide import ProcessWide
from maml_cuda.torch_private import no_saved_tensor_hooks, not_compiling
from maml_cuda.torch_wrappers import uncompiled

LOSS = "the loss"  # in place of the path of a module
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")  # of a module
GLOBAL_BACKWARD_HOOKS = (
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)


@dataclass(frozen=True)
class Like:
    """What is known of a tensor when a model is captured.

    Attributes:
        shape: samples first.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class Captured(NamedTuple):
    """A record, and the attributes of modules that forward changes and nothing in the record depends on."""

    record: Record
    changes: tuple[Change, ...]


def capture(model: nn.Module, x: Any, loss: Callable[..., Any] | None = None, y: Any = None) -> Captured:
    """Runs a copy of the model on a fake x, and the loss on the prediction and a fake y.

    Args:
        x: the input of one task, a pytree of Like.
        loss: of the user's own; None: it is not called. Where y is Weighted, it gives the losses of the samples.
        y: the target of one task, a pytree of Like.

    Raises:
        Unfusable: there is no complete record; the message is the reason.
        DoesNotFit: the model raises an exception for such data.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        outcome = thread.submit(_outcome, model, x, loss, y).result()
    if isinstance(outcome, Captured):
        return outcome
    raise outcome


def _outcome(*arguments: Any) -> Captured | Unfusable | DoesNotFit:
    """What was captured, or why not: a new exception, because the frames of the one that was raised hold fake tensors,
    which would live as long as an exception that the user keeps."""
    try:
        return _captured(*arguments)
    except (Unfusable, DoesNotFit) as reason:
        return type(reason)(*reason.args)


def _captured(model: nn.Module, x: Any, loss: Callable[..., Any] | None, y: Any) -> Captured:
    _check_modules(model)
    try:
        first, changes = _first_run(model, x, loss, y)
    except DoesNotFit as reason:
        if _takes(model, x, loss, y):
            raise Unfusable(f"{reason} (when its tensors have no values)") from None
        raise
    for change in changes:
        if change.attribute in change.module._parameters:
            raise Unfusable(f"{change}, which a fused layer would not do")
    if changes:  # found again, with the changed attributes in a state that must not be read
        again, _ = _run(model, x, loss, y, unread=changes)
        if _text(again) != _text(first):
            raise Unfusable(f"{changes[0]}, on which a later call depends")
    return Captured(first, tuple(changes))


def _first_run(model: nn.Module, x: Any, loss: Callable[..., Any] | None, y: Any) -> tuple[Record, list[Change]]:
    try:
        return _run(model, x, loss, y)
    except (DoesNotFit, Unfusable) as reason:
        if isinstance(reason.__cause__, Warning):  # warnings are errors, and torch warns once of a kind of call
            return _run(model, x, loss, y)
        raise


def _takes(model: nn.Module, x: Any, loss: Callable[..., Any] | None, y: Any) -> bool:
    """Whether a copy of the model and its loss runs on tensors with values."""
    tensors = tensors_of(model)
    own = {id(t): in_place_of(t, t.detach().clone()) for t in tensors}
    model_copy, loss_copy = copied((model, loss), own)
    on = tensors[0].device
    try:
        with generators.restored(), uncompiled(), outside_state.restored(model_copy, _code(loss_copy)):
            given, target = _made((x, y), partial(torch.zeros, device=on))
            prediction = model_copy(given)
            if loss_copy is not None:
                called(loss_copy, prediction, target)
    except Exception:
        return False
    return True


def _made(likes: Any, make: Callable[..., Tensor]) -> Any:
    """A pytree of Like with a tensor for each."""
    return pytree.tree_map_only(Like, lambda t: make(t.shape, dtype=t.dtype), likes)


def _check_modules(model: nn.Module) -> None:
    """Checks what is invisible when forward runs."""
    for path, module in model.named_modules():
        if any(getattr(module, hooks, None) for hooks in BACKWARD_HOOKS):
            raise Unfusable(f"{described(path, module)} has backward hooks, which a fused layer would not run")
        for p in module._parameters.values():
            if isinstance(p, (UninitializedParameter, UninitializedBuffer)):
                raise Unfusable(f"{described(path, module)} has parameters without a shape yet")
    if any(GLOBAL_BACKWARD_HOOKS):
        raise Unfusable("torch has global backward hooks of modules, which a fused layer would not run")


def _run(
    model: nn.Module, x: Any, loss: Callable[..., Any] | None, y: Any, unread: Sequence[Change] = ()
) -> tuple[Record, list[Change]]:
    """One run of a copy.

    Args:
        unread: attributes that an Unread replaces.

    Returns:
        The record, and the attributes that forward has changed.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        fakes = _fakes(model)
        x_fake, y_fake = _made((x, y), torch.empty)
    own = {id(t): t for t in (*loss.parameters(), *loss.buffers())} if isinstance(loss, nn.Module) else {}
    copies: set[int] = set()
    model_copy, loss_copy = copied((model, loss), {**own, **fakes}, copies)
    for m in model_copy.modules():
        if isinstance(m, _NormBase) and m._buffers.get("num_batches_tracked") is not None:
            m._buffers["num_batches_tracked"] = None  # a count that forward would read as a number
    trained = {id(t): t for t in fakes.values() if t.requires_grad}
    for m in model_copy.modules():
        if not isinstance(m, nn.RNNBase):  # whose lists are kept up to date
            for key, attribute in vars(m).items():
                if key not in ("_parameters", "_buffers", "_modules") and not isinstance(attribute, Tensor):
                    vars(m)[key] = _with_others(attribute, trained)
    recorder = Recorder(model_copy)
    recorder.copies = copies
    for name, place in places(model).items():
        if (t := fakes.get(id(place.tensor))) is not None:
            operand = recorder.know(t, Operand(tuple(t.shape), t.dtype, "model", name))
            if not t.requires_grad:  # code may hold the original in a closure, where the inner loop changes nothing
                recorder.know(place.tensor, operand)
    inputs = [
        recorder.know(t, Operand(tuple(t.shape), t.dtype, "x", name))
        for name, t in pytrees.named_leaves("x", x_fake)
        if t is not None
    ]
    for number, t in enumerate(pytrees.tensors(y_fake)):
        recorder.know(t, Operand(tuple(t.shape), t.dtype, "y", str(number)))
    outside = OutsideState(model_copy, _code(loss_copy))
    stand_ins = [_replace_by_unread(model_copy, change) for change in unread]
    states = PythonState(model_copy), PythonState(model)
    try:
        with ExitStack() as stack:
            stack.enter_context(generators.refused(lambda: recorder.refuse(f"{recorder.call()}: {RANDOM}")))
            contexts = uncompiled(), not_compiling(), _unvalidated(), _unlogged(), no_saved_tensor_hooks(), fake
            for context in contexts:
                stack.enter_context(context)
            stack.enter_context(modules_named(model_copy, recorder))
            stack.enter_context(recorder.running())
            prediction = model_copy(x_fake)
            recorder.stack = [(LOSS, loss_copy)]
            value = None if loss_copy is None else called(loss_copy, prediction, y_fake)
    except Exception as error:
        raise _reason(error, recorder) from error
    finally:
        changed, of_original = states[0].restore(), states[1].restore()
        elsewhere = outside.restore()
    if recorder.reason:
        raise Unfusable(recorder.reason)
    if any(map(was_read, stand_ins)):
        raise Unfusable(f"{unread[0]}, and reads what an earlier call has left there")
    if of_original:
        raise Unfusable(f"{of_original[0]}, which a fused layer would not do")
    if elsewhere:
        raise Unfusable(elsewhere)
    _check_derivatives((prediction, value))
    anew = [change for change in changed if isinstance(change.module._buffers.get(change.attribute), Tensor)]
    written = recorder.written.union(f"{change.path}.{change.attribute}".lstrip(".") for change in anew)
    results = _operands(prediction, recorder), _operands(value, recorder)
    record = Record(tuple(inputs), recorder.operations, *results, tuple(sorted(written)))
    return record, [change for change in changed if change not in anew]


def _with_others(attribute: Any, trained: Mapping[int, Tensor]) -> Any:
    """A container in which another tensor takes the place of each trained parameter of the model: in a container the
    inner loop does not change it."""
    if id(attribute) in trained:
        return attribute.detach().clone()
    if type(attribute) not in (dict, list, tuple, set):
        return attribute
    items = list(attribute.items() if type(attribute) is dict else enumerate(attribute))
    made = {key: _with_others(item, trained) for key, item in items}
    if all(made[key] is item for key, item in items):
        return attribute
    return made if type(attribute) is dict else type(attribute)(made.values())


def _code(loss: Callable[..., Any] | None) -> list[Callable[..., Any]]:
    return [] if loss is None else [loss]


def _fakes(model: nn.Module) -> dict[int, Tensor]:
    """id of a tensor of the model -> a fake tensor on the CPU. Sparse tensors have none."""
    return {
        id(t): in_place_of(t, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
        for t in tensors_of(model)
        if t.layout is torch.strided
    }


def _replace_by_unread(model: nn.Module, change: Change) -> Unread:
    """Sets an attribute to an Unread, past nn.Module.__setattr__."""
    module, value = model.get_submodule(change.path), Unread(change)
    for registry in (module._parameters, module._buffers, module._modules):
        registry.pop(change.attribute, None)
    vars(module)[change.attribute] = value
    return value


def _operands(tree: Any, recorder: Recorder) -> Any:
    """A result with an Operand for each tensor, and a Made for each distribution."""

    def operands(leaf: Any) -> Any:
        if not isinstance(leaf, Distribution):
            return recorder.operands(leaf)
        try:
            arguments = pytrees.arguments_of("the prediction", leaf)
        except TypeError as error:
            raise Unfusable(str(error)) from None
        return Made(type(leaf), {name: operands(value) for name, value in arguments.items()})

    return pytree.tree_map(operands, tree)


def _reason(error: Exception, recorder: Recorder) -> Exception:
    """Why a model could not run on fake tensors."""
    if isinstance(error, Unfusable):
        return error
    inside = described(*recorder.stack[-1])
    if recorder.left is not None and recorder.left[0] is error:
        inside = recorder.left[1]
    if recorder.failed is not None and recorder.failed[0] is error:
        inside = recorder.failed[1]
        if not isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            return DoesNotFit(f"{inside}: {first_line(error)}", in_loss=recorder.stack[0][0] == LOSS)
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return Unfusable(
            f"{inside}: what it computes depends on values of tensors (control flow, or a number of a tensor)"
        )
    return Unfusable(f"{inside} cannot be captured: {first_line(error)}")


def _check_derivatives(results: Any) -> None:
    """Refuses an autograd.Function of the user's own between parameters and results."""
    pending = [t.grad_fn for t in pytrees.tensors(results)]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            raise Unfusable(f"{name} is an autograd.Function of its own, with derivatives that no fused layer has")
        pending += [before for before, _ in node.next_functions]


@contextmanager
def _unvalidated_by_all() -> Iterator[None]:
    before = Distribution._validate_args
    Distribution._validate_args = False
    try:
        yield
    finally:
        Distribution._validate_args = before


# A context in which distributions do not look at the values of their arguments, as fake tensors have none.
_unvalidated = ProcessWide(_unvalidated_by_all)


@contextmanager
def _unlogged() -> Iterator[None]:
    """A context in which torch does not log exceptions of this thread's calls on fake tensors, which are handled."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def of_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(of_another_thread)
    try:
        yield
    finally:
        logger.removeFilter(of_another_thread)


def _text(record: Record) -> str:
    """The record as text, in which equal records are equal."""
    numbers: dict[int, str] = {}

    def named(operand: Operand) -> str:
        what = operand.source or operand.overwritten
        return numbers.setdefault(id(operand), f"{what}{operand.name}{operand.shape}#{len(numbers)}")

    def text(tree: Any) -> str:
        return str(pytree.tree_map_only(Operand, named, tree))

    lines = [
        f"{o.name} {text((o.args, o.kwargs))} {text(o.results)}"
        for o in record.needed_for((record.prediction, record.loss))
    ]
    return "\n".join([*lines, text((record.prediction, record.loss))])
