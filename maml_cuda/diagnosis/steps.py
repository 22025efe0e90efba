"""The user's step as a function: the same model, data and random numbers give a loss and gradients, and nothing else
changes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from maml_cuda import pytrees
from maml_cuda.diagnosis.borrowed import Borrowed, Promoting, Randomness, default_dtype, in_double
from maml_cuda.diagnosis.watching import Watch


@dataclass
class Outcome:
    """What one run of a step left.

    Attributes:
        loss: what it returned; None for nothing.
        gradients: name -> `.grad`; None where there is none.
        changed: parameters with other values than before.
        flags: modules with another training flag than before.
        optimizer: steps of a torch.optim optimizer that holds the model's own parameters.
        returned_graph: whether the step left no gradients and its loss was differentiated afterwards.
    """

    loss: float | None
    gradients: dict[str, Tensor | None]
    changed: list[str]
    flags: list[str]
    optimizer: int
    returned_graph: bool

    @property
    def missing(self) -> bool:
        """Whether no parameter has a gradient."""
        return all(g is None for g in self.gradients.values())


@dataclass
class Step:
    """A step and the model that it runs on.

    Attributes:
        call: the user's function.
        model: a copy of the user's, or theirs where the step does not take it as an argument.
        data: what the step gets after the model.
        double: whether it runs in float64.
        promoting: whether data that it holds are raised to float64.
        notes: what the user should know about how it was run.
    """

    call: Callable[..., Any]
    model: nn.Module
    data: tuple[Any, ...]
    takes_model: bool
    double: bool
    promoting: bool
    randomness: Randomness
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.borrowed = Borrowed(self.model, self.double)
        self._states: list[tuple[Optimizer, dict[str, Any]]] = []

    def run(self, values: Mapping[str, Tensor] | None = None, watch: Watch | None = None) -> Outcome:
        """One run from the same state; parameters in `values` have those, and `watch` sees what is called."""
        self.borrowed.reset(values)
        self.randomness.restore()
        own = set(map(id, self.borrowed.parameters.values()))
        of_optimizer: list[dict[str, Tensor | None]] = []

        def before_step(optimizer: Optimizer, *_: Any) -> None:
            if watch is not None:
                watch.optimizer_steps(optimizer)
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                if not any(known is optimizer for known, _ in self._states):
                    self._states.append((optimizer, copy.deepcopy(optimizer.state_dict())))
                of_optimizer.append(self._gradients())

        hook = register_optimizer_step_pre_hook(before_step)
        try:
            with torch.enable_grad(), default_dtype(torch.float64 if self.double else None):
                with Promoting() if self.promoting else nullcontext(), watch or nullcontext():
                    result = self.call(*self.arguments())
                loss = _loss_of(result)
                gradients = self._gradients()
                returned_graph = False
                if all(g is None for g in gradients.values()) and isinstance(loss, Tensor) and loss.requires_grad:
                    if of_optimizer:  # zero_grad() came after the optimizer's step
                        gradients = of_optimizer[-1]
                    else:
                        returned_graph = _backward(loss)
                        gradients = self._gradients()
        finally:
            hook.remove()
        changed, flags = self.borrowed.changed(), self.borrowed.flags_changed()
        value = loss.item() if isinstance(loss, Tensor) else loss
        return Outcome(value, gradients, changed, flags, len(of_optimizer), returned_graph)

    def arguments(self) -> tuple[Any, ...]:
        data = pytrees.mapped(in_double, self.data) if self.double else self.data
        return (self.model, *data) if self.takes_model else data

    def _gradients(self) -> dict[str, Tensor | None]:
        return {
            name: None if p.grad is None else p.grad.detach().to_dense().clone()
            for name, p in self.borrowed.parameters.items()
        }

    def give_back(self) -> None:
        """Model, optimizers and generators are as they were."""
        self.borrowed.give_back()
        for optimizer, state in self._states:
            optimizer.load_state_dict(state)
        self._states.clear()
        self.randomness.restore()


def prepared(step: Callable[..., Any], model: nn.Module, data: tuple[Any, ...]) -> tuple[Step, Outcome]:
    """The step in the form in which it can be run, and a first run.

    It is in float64 on a copy of the model if it can be: where the step takes no model, or uses another than the one
    that it is given, it runs on the model itself, and where it holds data of another precision, in the model's own.
    """
    randomness, notes = Randomness(), list[str]()
    takes_model, arguments = _form(step, model, data)
    lent = model
    if takes_model:
        try:
            lent = copy.deepcopy(model)
        except Exception as error:  # whatever a user's module raises
            notes.append(f"It ran on the model itself, which cannot be copied: {_first_line(error)}")
    original = Borrowed(model, False)
    try:
        found, outcome = _first_run(step, lent, arguments, takes_model, randomness, notes)
        touched = any(p.grad is not before for p, _, _, before, _ in original._leaves)
        if lent is not model and outcome.missing and touched:
            found.give_back()
            original.give_back()
            notes.append("The step does not use the model that it is given, but the one that doctor got; it ran there.")
            found, outcome = _first_run(step, model, arguments, takes_model, randomness, notes)
    finally:
        if lent is not model:
            original.give_back()
        randomness.restore()
    return found, outcome


def _first_run(
    step: Callable[..., Any],
    model: nn.Module,
    data: tuple[Any, ...],
    takes_model: bool,
    randomness: Randomness,
    notes: list[str],
) -> tuple[Step, Outcome]:
    for promoting in (False, True):
        in_float64 = Step(step, model, data, takes_model, True, promoting, randomness, notes)
        try:
            return in_float64, in_float64.run()
        except Exception as error:  # whatever the user's code raises on float64
            reason = _first_line(error)
            in_float64.give_back()
    own = Step(step, model, data, takes_model, False, False, randomness, notes)
    try:
        outcome = own.run()
    except BaseException:
        own.give_back()
        raise
    if all(p.dtype != torch.float64 for p in own.borrowed.parameters.values()):
        notes.append(
            "It ran in the model's own precision, in which finite differences are coarse: give doctor the data, and "
            f"let step take them as arguments. In float64 it raised {reason}"
        )
    return own, outcome


def _form(step: Callable[..., Any], model: nn.Module, data: tuple[Any, ...]) -> tuple[bool, tuple[Any, ...]]:
    """Whether the step takes the model, and its other arguments."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # built in
        return True, data
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    anything = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if data and (required == 1 + len(data) or anything):
        return True, data
    if data and required == 2:
        return True, (data,)
    if required == 1 or (anything and not data):
        return True, ()
    if required == 0:
        return bool(positional) and isinstance(positional[0].default, nn.Module), ()
    if not data:
        raise TypeError(
            f"step must be callable as step(model) or step() without data, got one with {required} arguments: give "
            "doctor x_spt, y_spt, x_qry, y_qry for step(model, x_spt, y_spt, x_qry, y_qry)"
        )
    raise TypeError(
        "step must be callable as step(model, x_spt, y_spt, x_qry, y_qry), step(model, data), step(model) or step(), "
        f"got one with {required} arguments"
    )


def _loss_of(result: Any) -> Tensor | float | None:
    value = getattr(result, "loss", result)
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(f"step must return the meta-loss, one real number, got a tensor {list(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"step must return the meta-loss or None, got {type(value).__name__}")
    return float(value)


def _backward(loss: Tensor) -> bool:
    """loss.backward(), unless the step has done it; then its gradients went elsewhere."""
    try:
        loss.sum().backward()
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        return False
    return True


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
