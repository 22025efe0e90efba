"""From what was measured and seen to faults: which of the ten does a step look like?"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from maml_cuda.diagnosis import faults, variants
from maml_cuda.diagnosis.faults import Fault, fault
from maml_cuda.diagnosis.steps import Outcome
from maml_cuda.diagnosis.variants import Setting, Variant
from maml_cuda.diagnosis.watching import Watch


@dataclass
class Match:
    """The variant whose numbers a step has.

    Attributes:
        factor: of the variant's gradient.
        by_loss: the losses are equal; the gradients are not, or there are none.
        ambiguous: the factor is that of a sum over tasks, and also that of a sum over a query set.
    """

    variant: Variant
    factor: float
    by_loss: bool = False
    ambiguous: bool = False


def closest(setting: Setting, outcome: Outcome, tolerance: float) -> Match | None:
    """The variant with the fewest deviations that has the step's gradient, or else its loss."""
    by_loss: Match | None = None
    got = {name: g for name, g in outcome.gradients.items() if g is not None}
    for variant in variants.candidates(setting):
        if variant.deviations() > 4:
            break
        loss, gradient = variants.computed(setting, variant)
        if got:
            factor = _proportion(outcome.gradients, gradient, tolerance)
            for allowed in (1.0, float(setting.tasks)):
                if factor is not None and abs(factor / allowed - 1) <= tolerance:
                    ambiguous = allowed != 1 and allowed in setting.factors(setting.data[3])
                    return Match(variant, allowed, ambiguous=ambiguous)
        if by_loss is None and outcome.loss is not None and not variant.first_order:
            for allowed in (1.0, float(setting.tasks)):
                if abs(outcome.loss - allowed * loss) <= tolerance * abs(loss):
                    by_loss = by_loss or Match(variant, allowed, by_loss=True)
    return by_loss


def _proportion(got: dict[str, Tensor | None], of: dict[str, Tensor], tolerance: float) -> float | None:
    """c, if got is c times the other gradient."""
    pairs = [(of[name] * 0 if g is None else g.to(of[name].dtype), of[name]) for name, g in got.items()]
    inner = sum((g.conj() * e).real.sum().item() for g, e in pairs)
    square = sum((e.abs() ** 2).sum().item() for _, e in pairs)
    size = sum((g.abs() ** 2).sum().item() for g, _ in pairs) ** 0.5
    if not square or not size:
        return None
    c = inner / square
    error = sum(((g - c * e).abs() ** 2).sum().item() for g, e in pairs) ** 0.5
    return float(c) if error <= tolerance * size else None


def of_match(match: Match, setting: Setting) -> list[Fault]:
    """The faults of a variant, but for those of the graph (graph_lost)."""
    variant, found = match.variant, []
    what = "loss" if match.by_loss else "gradient"
    if variant.sets in (variants.TOGETHER, variants.QUERY_TOGETHER):
        found.append(fault(faults.LEAKING_STATISTICS, f"the {what} is that of {variant.sets}"))
    elif variant.sets == variants.SUPPORT_STATISTICS:
        evidence = f"the {what} is that of {variant.sets}"
        found.append(fault(faults.WRONG_MODE, evidence))
        found.append(fault(faults.LEAKING_STATISTICS, evidence))
    elif variant.sets != variants.AS_GIVEN:
        found.append(fault(faults.WRONG_MODE, f"the {what} is that of {variant.sets}, and the model came in the other"))
    for which, factor in (("support", variant.inner_factor), ("query", variant.query_factor)):
        if factor != 1:
            found.append(fault(faults.SUMMED, f"the {what} is that of {factor:g} times the mean {which} loss"))
    if variant.chained:
        found.append(
            fault(faults.WEIGHTS_LEFT, f"the {what} is that of tasks which each start where the one before ended")
        )
    return found


def graph_lost(watch: Watch | None, outcome: Outcome, first_order: bool) -> list[Fault]:
    """Why the inner loop's graph does not reach the model: what was seen.

    Args:
        first_order: the gradient is known to be that of first order, so there is a reason.
    """
    found = []
    w = watch or Watch(set())
    in_loop = len(w.differentiated) if outcome.returned_graph else len(w.differentiated) - 1
    optimizers = [words for position, words in w.optimizers if position <= in_loop]
    if w.copies and outcome.missing:
        found.append(fault(faults.COPY_INITIAL_WEIGHTS, w.copies[0]))
    if w.first_order:
        found.append(fault(faults.FIRST_ORDER_FLAG, w.first_order[0]))
    if w.data or optimizers:
        found.append(fault(faults.PARAM_DATA, (w.data + optimizers)[0]))
    detached = w.detached + (w.detached_leaves if outcome.missing else [])
    if detached:
        found.append(fault(faults.DETACHED, detached[0]))
    inner = w.differentiated if outcome.returned_graph else w.differentiated[:-1]
    without = [place for create_graph, place in inner if not create_graph]
    if without and len(without) == len(inner) and not w.first_order:
        found.append(fault(faults.NO_CREATE_GRAPH, f"{without[0]}, without create_graph=True"))
    if found:
        return found
    if outcome.missing:
        return [fault(faults.DETACHED, "no gradient reaches the model's parameters")]
    if first_order and without:
        return [fault(faults.NO_CREATE_GRAPH, f"{without[0]}, without create_graph=True")]
    if first_order:
        return [fault(faults.DETACHED, "the gradient is that of first order")]
    return []


@dataclass
class Modes:
    """The training flags of the layers of a model that read them, before a step."""

    batch_norm: set[bool] = field(default_factory=set)
    dropout: set[bool] = field(default_factory=set)
    untrained: bool = False  # a BatchNorm in eval mode whose statistics no batch has updated

    @classmethod
    def of(cls, model: nn.Module) -> Modes:
        modes = cls()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
                modes.batch_norm.add(m.training)
                counted = m.num_batches_tracked
                modes.untrained |= not m.training and counted is not None and not counted.item()
            elif isinstance(m, nn.modules.dropout._DropoutNd) and m.p:
                modes.dropout.add(m.training)
        return modes


def seen(watch: Watch | None, modes: Modes, samples: tuple[int, int] | None) -> list[Fault]:
    """What looks like a fault of the loss itself, which its own finite differences cannot show.

    Args:
        samples: of a support set and of a query set, if they are known.
    """
    found: list[Fault] = []
    if watch is None:
        return found
    moved: set[int] = set()
    leak = wrong = None
    for call in watch.batch_norms:
        if call.own_flags and modes.batch_norm and call.training not in modes.batch_norm:
            wrong = f"BatchNorm was called in {_mode(call.training)} mode, and the model came in the other"
        if call.own_flags and call.statistics is not None:
            if call.training:
                moved.add(call.statistics)
            elif call.statistics in moved:
                leak = "BatchNorm read running statistics that a set of the same step had moved"
        if call.training and samples is not None and call.samples == sum(samples) and not call.batched:
            leak = f"BatchNorm normalised {call.samples} samples together, a support set and a query set"
    for training in watch.dropouts:
        if modes.dropout and training not in modes.dropout:
            wrong = f"dropout was called in {_mode(training)} mode, and the model came in the other"
    if modes.untrained:
        wrong = wrong or "BatchNorm is in eval mode, with running statistics that no batch has updated"
    if wrong:
        found.append(fault(faults.WRONG_MODE, wrong))
    if leak:
        found.append(fault(faults.LEAKING_STATISTICS, leak))
    if watch.sums:
        found.append(fault(faults.SUMMED, watch.sums[0]))
    return found


def vmap_batch_norm(watch: Watch | None) -> list[Fault]:
    if watch is not None and any(call.batched and call.training for call in watch.batch_norms):
        return [fault(faults.VMAP_BATCH_NORM, "batch_norm was called on a batch of tasks inside vmap")]
    return []


def left_behind(outcome: Outcome, watch: Watch | None, modes: Modes) -> tuple[list[Fault], list[str]]:
    """What a run changes in the model for the next one: faults, and notes."""
    found, notes = [], []
    if outcome.changed:
        if outcome.optimizer and (watch is None or _ends_with_optimizer(watch, outcome)):
            notes.append("The step ends with an optimizer's step; the gradient before it was judged.")
        else:
            some = ", ".join(outcome.changed[:3]) + (", ..." if len(outcome.changed) > 3 else "")
            found.append(fault(faults.WEIGHTS_LEFT, f"after the step {some} had other values"))
    if outcome.flags and (modes.batch_norm or modes.dropout):
        found.append(fault(faults.WRONG_MODE, f"after the step the training flag of {outcome.flags[0]} was another"))
    return found, notes


def _ends_with_optimizer(watch: Watch, outcome: Outcome) -> bool:
    """Whether the only step of an optimizer on the model comes after all derivatives: that of the outer loop."""
    last = max((position for position, _ in watch.optimizers), default=-1)
    return outcome.optimizer == 1 and not outcome.returned_graph and last == len(watch.differentiated)


def _mode(training: bool) -> str:
    return "train" if training else "eval"
