"""doctor: runs a user's own training step, and says whether its meta-gradient is the exact one."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import optim, pytrees, reference
from maml_cuda.diagnosis import faults, judgement
from maml_cuda.diagnosis.borrowed import in_double
from maml_cuda.diagnosis.differences import TOLERANCE, Difference, differences
from maml_cuda.diagnosis.faults import Fault
from maml_cuda.diagnosis.judgement import Match, Modes
from maml_cuda.diagnosis.report import Diagnosis, ParameterErrors
from maml_cuda.diagnosis.steps import Outcome, Step, prepared
from maml_cuda.diagnosis.variants import Setting
from maml_cuda.diagnosis.watching import Watch
from maml_cuda.engine import checks
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.losses import Loss, objective
from maml_cuda.optim import Groups, Optimizer
from maml_cuda.pytrees import Tree
from maml_cuda.rates import Value
from maml_cuda.targets import Target

AGAINST_REFERENCE = {True: 1e-7, False: 1e-3}  # the tolerance of errors, in float64 or not


def doctor(
    step: Callable[..., Any],
    model: nn.Module,
    x_spt: Tree | None = None,
    y_spt: Target | None = None,
    x_qry: Tree | None = None,
    y_qry: Target | None = None,
    *,
    inner_lr: Value | None = None,
    inner_steps: int = 1,
    loss: Loss = "cross_entropy",
    adapt_params: Callable[[str], bool] | Iterable[str] | None = None,
    inner_optimizer: Optimizer | Groups | None = None,
) -> Diagnosis:
    """Says whether the meta-gradient of a training step is exact, and if not, which common fault it looks like.

    The step may use any library or none. It is judged in two ways.

    - By finite differences of the loss that it returns. They show whether its gradients are the derivative of that
      loss, whatever it is.
    - If `inner_lr` is given, by `reference.meta_gradient`. It shows whether the loss is the one that is meant.

    The step runs some dozens of times, in float64 and on a copy of the model where it takes the model as an argument.
    Each run starts from the same parameters, buffers and random numbers. Afterwards `model`, its `.grad` and training
    flags, optimizers that hold its parameters, and the generators of torch, numpy and Python are as before.

    Args:
        step: `step(model, x_spt, y_spt, x_qry, y_qry)` or `step(model, data)` if data are given, `step(model)`, or
            `step()`, which uses `model` itself. It computes the meta-loss, and returns it or leaves gradients in
            `.grad` of the model's parameters, or both. It may return an object with a `loss`.
        model: any module, with the training flags that the step should have.
        x_spt, y_spt, x_qry, y_qry: a few tasks, `[tasks, samples, ...]`; small ones, and a small model, are enough.
        inner_lr, inner_steps, loss, adapt_params, inner_optimizer: the inner loop that is meant, as of FusedMAML. They
            need the data. inner_lr=None: only finite differences judge.

    Returns:
        A Diagnosis; `print` shows it. Its `healthy` is None where doctor cannot judge, for example because two runs of
        the step differ.

    Raises:
        TypeError, ValueError: an argument does not fit, or the step returns something else than a loss. Errors of the
            step itself are not caught.
    """
    data = _checked(step, model, (x_spt, y_spt, x_qry, y_qry), inner_lr, inner_steps, loss)
    modes = Modes.of(model)
    setting = None
    if inner_lr is not None:
        setting = _setting(model, data, inner_lr, inner_steps, loss, adapt_params, inner_optimizer)
        _, exact = reference.meta_gradient(
            setting.model, loss, *setting.data, inner_lr, inner_steps, False, adapt_params,
            inner_optimizer=inner_optimizer,
        )  # fmt: skip
    own, outcome = prepared(step, model, data)
    try:
        again = own.run()
        watch = _watched(own)
        repeats = _same(outcome, again, own.double)
        found = {}
        if repeats and outcome.loss is not None and math.isfinite(outcome.loss):
            found = differences(own, outcome.gradients, outcome.loss)
    finally:
        own.give_back()
    notes = own.notes
    if setting is not None and True in modes.dropout:
        notes.append("Dropout is on, so the reference, which has other masks, was not compared.")
        setting = None
    return _Judge(own.double, outcome, repeats, found, setting, exact if setting else {}, watch, modes, notes, data)()


def _checked(
    step: Any, model: Any, data: tuple[Any, ...], inner_lr: Any, inner_steps: Any, loss: Any
) -> tuple[Any, ...]:
    if not callable(step):
        raise TypeError(f"step must be callable, got {type(step).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have parameters that require grad, got none")
    given = sum(part is not None for part in data)
    if given not in (0, 4):
        raise ValueError(f"x_spt, y_spt, x_qry and y_qry must be given together, got {given} of them")
    checks.steps(inner_steps, "inner_steps")
    checks.loss(loss)
    if inner_lr is not None:
        if not given:
            raise ValueError("x_spt, y_spt, x_qry and y_qry must be given with inner_lr, got none of them")
        if isinstance(model, FusedMAML):
            raise TypeError("model must be the model itself with inner_lr, got a FusedMAML: its `model` is meant")
        counts = [pytrees.tasks(part) for part in data]
        if len(set(counts)) != 1:
            raise ValueError(f"x_spt, y_spt, x_qry and y_qry must have the same number of tasks, got {counts}")
    return data if given else ()


def _setting(
    model: nn.Module, data: tuple[Any, ...], inner_lr: Any, steps: int, loss: Any, adapt_params: Any, optimizer: Any
) -> Setting:
    double = copy.deepcopy(model)._apply(in_double)
    adapted = reference.adapted_names(double, adapt_params)
    parameters = dict(double.named_parameters())
    inner = optim.read(inner_lr, {name: parameters[name].shape for name in adapted}, steps, optimizer)
    x_spt, y_spt, x_qry, y_qry = pytrees.mapped(in_double, data)
    function = objective(loss)
    if isinstance(loss, nn.Module):
        function = copy.deepcopy(loss)._apply(in_double)
    return Setting(double, function, inner, steps, (x_spt, y_spt, x_qry, y_qry))


def _watched(own: Step) -> Watch | None:
    watch = Watch({p.shape for p in own.borrowed.parameters.values()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own.run(watch=watch)
    except Exception as error:  # code that cannot run under a TorchFunctionMode
        own.notes.append(f"What the step calls could not be watched: {type(error).__name__}.")
        return None
    return watch


def _same(a: Outcome, b: Outcome, double: bool) -> bool:
    """Whether two runs agree, to the rounding of sums in another order."""
    tolerance = 1e-11 if double else 1e-5
    if a.loss is not None and b.loss is not None:
        return abs(a.loss - b.loss) <= tolerance * abs(a.loss) or a.loss != a.loss
    pairs = [(a.gradients[name], b.gradients[name]) for name in a.gradients]
    if any((g is None) != (h is None) for g, h in pairs):
        return False
    kept = [(g, h) for g, h in pairs if g is not None and h is not None]
    return all((g - h).norm() <= 1e3 * tolerance * max(g.norm().item(), 1e-30) for g, h in kept)


class _Judge:
    """Draws the conclusion."""

    def __init__(
        self, double: bool, outcome: Outcome, repeats: bool, found: dict[str, Difference], setting: Setting | None,
        exact: dict[str, Tensor], watch: Watch | None, modes: Modes, notes: list[str], data: tuple[Any, ...],
    ) -> None:  # fmt: skip
        self.double, self.outcome, self.repeats, self.found = double, outcome, repeats, found
        self.setting, self.exact, self.watch, self.modes, self.notes = setting, exact, watch, modes, list(notes)
        self.data = data
        self.tolerance = TOLERANCE[torch.float64 if double else torch.float32]
        sizes = [g.norm().item() for g in exact.values()] or [d.size for d in found.values()]
        self.whole = math.hypot(*sizes) if sizes else 0.0

    def __call__(self) -> Diagnosis:
        rows = [self._row(name) for name in self.outcome.gradients]
        by_differences = self._by_differences(rows)
        by_reference = self._by_reference(rows)
        left, notes = judgement.left_behind(self.outcome, self.watch, self.modes)
        self.notes += notes
        found, healthy, words = self._concluded(by_differences, by_reference)
        found = _once(left + found)
        if left and healthy is not False:
            healthy, words = False, f"{words} But the step does not leave the model as it was."
        if found:
            words += f" It looks like: {'; '.join(f.name for f in found)}."
        elif healthy is False:
            words += " It looks like none of the ten common faults."
        return Diagnosis(healthy, words, tuple(found), tuple(self.notes), tuple(rows))

    # -- errors of each parameter ------------------------------------------------------------------------------

    def _row(self, name: str) -> ParameterErrors:
        g, d = self.outcome.gradients[name], self.found.get(name)
        norm = math.nan if g is None else g.norm().item()
        by_reference = math.nan
        if self.setting is not None:
            e = self.exact.get(name)
            e = torch.zeros_like(self.setting.model.get_parameter(name)) if e is None else e
            error = (e if g is None else g.to(e.dtype) - e).norm().item()
            by_reference = error / (max(e.norm().item(), 1e-3 * self.whole) or 1.0)
        error = math.nan
        if d is not None and not d.kink:
            scale = max(d.size, 1e-3 * self.whole)
            if d.uncertainty <= self.tolerance * scale or not scale:
                error = abs(d.along - d.measured) / (scale or 1.0)
            elif abs(d.along - d.measured) > 10 * d.uncertainty and d.uncertainty < 0.1 * scale:
                error = abs(d.along - d.measured) / scale  # coarse, but the error is larger
        return ParameterErrors(name, norm, error, by_reference)

    def _by_differences(self, rows: list[ParameterErrors]) -> bool | None:
        """Whether the gradient is the derivative of the loss; None where that cannot be judged."""
        if self.outcome.loss is None:
            self.notes.append("The step returned no loss, so finite differences could not judge.")
            return None
        if not math.isfinite(self.outcome.loss):
            self.notes.append(f"The loss is {self.outcome.loss}, so finite differences could not judge.")
            return None
        if not self.repeats:
            self.notes.append(
                "Two runs with the same weights and random numbers gave different losses, so finite differences could "
                "not judge: give the step the same tasks each time, and let it keep nothing from call to call."
            )
            return None
        errors = [row.finite_difference_error for row in rows]
        unknown = [row.name for row in rows if math.isnan(row.finite_difference_error)]
        if unknown:
            some = ", ".join(unknown[:4]) + (", ..." if len(unknown) > 4 else "")
            self.notes.append(
                f"Finite differences cannot judge {some}: the loss has a kink there, as of ReLU at 0, or step sizes "
                "disagree."
            )
        if any(error > self.tolerance for error in errors):
            return self._proportional()
        return None if unknown else True

    def _proportional(self) -> bool:
        """Whether the gradient is a whole multiple of the derivative, or the reverse: a sum over tasks, for a mean."""
        judged = [d for d in self.found.values() if not d.kink and abs(d.measured) > 1e-3 * self.whole]
        ratios = [d.along / d.measured for d in judged]
        if not ratios or min(ratios) <= 0:
            return False
        times, parts = round(ratios[0]), round(1 / ratios[0])
        for whole, factor, words in (
            (times, float(times), f"{times} times"),
            (parts, 1 / max(parts, 1), f"1/{parts} of"),
        ):
            if whole > 1 and all(
                abs(d.along - factor * d.measured) <= 10 * self.tolerance * max(d.size, 1e-3 * self.whole)
                for d in self.found.values()
                if not d.kink
            ):
                self.notes.append(f"The gradient is {words} the derivative of the loss that the step returned.")
                return True
        return False

    def _by_reference(self, rows: list[ParameterErrors]) -> bool | None:
        if self.setting is None:
            return None
        return all(row.reference_error <= AGAINST_REFERENCE[self.double] for row in rows)

    # -- conclusions -------------------------------------------------------------------------------------------

    def _concluded(self, by_differences: bool | None, by_reference: bool | None) -> tuple[list[Fault], Any, str]:
        """Faults, `healthy`, and the verdict's first words."""
        if by_reference is None:
            return self._without_reference(by_differences)
        if by_reference:
            if by_differences is False:
                self.notes.append("The loss that the step returned is not the meta-loss that it differentiated.")
            words = "The meta-gradient is exact: it is that of the reference."
            if self.modes.untrained:
                return judgement.seen(Watch(set()), self.modes, None), None, f"{words} But of a net in another mode."
            return [], True, words
        assert self.setting is not None
        match = judgement.closest(self.setting, self.outcome, AGAINST_REFERENCE[self.double])
        if match is not None and not match.by_loss and not match.variant.deviations():
            times = f"{match.factor:g} times the mean over tasks"
            if match.ambiguous:
                found = judgement.seen(self.watch, self.modes, self._samples())
                summed = [f for f in found if f.name == faults.SUMMED]
                if summed:
                    return summed, False, f"The meta-gradient is {times}."
                return [], None, (
                    f"The meta-gradient is {times}. That is a sum over tasks or one over the query set, which have the "
                    "same size: give doctor another number of tasks."
                )  # fmt: skip
            self.notes.append(f"The gradient is {times}, their sum.")
            return [], True, "The meta-gradient is exact: it is that of the reference, summed over tasks."
        if not self.repeats and match is None:
            return [], None, "Doctor cannot judge: the step gives something else each time."
        return self._faults(match, by_differences), False, self._wrong(by_differences, by_reference)

    def _faults(self, match: Match | None, by_differences: bool | None) -> list[Fault]:
        found = judgement.of_match(match, self.setting) if match and self.setting else []
        first_order = match is not None and match.variant.first_order
        graph = judgement.graph_lost(self.watch, self.outcome, first_order)
        if match is not None and not match.by_loss:
            return (graph if first_order else []) + found
        vmapped = judgement.vmap_batch_norm(self.watch) if by_differences is not True else []
        others = [] if match else judgement.seen(self.watch, self.modes, self._samples())
        if vmapped and not self.outcome.missing:
            return vmapped + found + others
        return (graph if by_differences is not True else []) + found + others

    def _without_reference(self, by_differences: bool | None) -> tuple[list[Fault], Any, str]:
        suspects = judgement.seen(self.watch, self.modes, self._samples())
        if by_differences is False or self.outcome.missing:
            graph = judgement.graph_lost(self.watch, self.outcome, False)
            vmapped = [] if self.outcome.missing else judgement.vmap_batch_norm(self.watch)
            return (vmapped or graph) + suspects, False, self._wrong(by_differences, None)
        if by_differences is None:
            return suspects, None, "Doctor cannot judge this step."
        words = "The gradient is the exact derivative of the loss that the step returns."
        if suspects:
            return suspects, None, f"{words} But that loss may not be the one that you mean."
        if not self.data or self.setting is None:
            self.notes.append(
                "Whether that loss is the one that you mean was not judged: that takes the data, inner_lr, inner_steps "
                "and loss, and no dropout."
            )
        return [], True, words

    def _wrong(self, by_differences: bool | None, by_reference: bool | None) -> str:
        if self.outcome.missing:
            return "The meta-gradient is missing: no parameter of the model has a gradient."
        if by_differences is False:
            worst = "the derivative of the loss that the step returns"
            return f"The meta-gradient is wrong: it is not {worst}."
        if by_differences is True:
            return (
                "The meta-gradient is wrong: it is the exact derivative of a loss, but not of the meta-loss that these "
                "arguments describe."
            )
        return "The meta-gradient is wrong: it is not that of the reference."

    def _samples(self) -> tuple[int, int] | None:
        if not self.data:
            return None
        spt, qry = (pytrees.tensors(self.data[i])[0] for i in (0, 2))
        return (spt.shape[1], qry.shape[1]) if spt.ndim > 1 and qry.ndim > 1 else None


def _once(found: list[Fault]) -> list[Fault]:
    names = dict.fromkeys(f.name for f in found)
    return [next(f for f in found if f.name == name) for name in names]
