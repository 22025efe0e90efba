"""The table that FusedMAML.explain prints."""

from __future__ import annotations

from torch import nn

from maml_cuda.engine import cuda_runner
from maml_cuda.engine.binding import Binding, Choice
from maml_cuda.plan.own_loss import COMPUTED


def table(model: nn.Module, binding: Binding, choice: Choice | None, update: str) -> str:
    """Each module of the model, and the fused layer that serves it.

    Args:
        update: what an inner step does with the gradient, or "".
        choice: what runs the data in question; None: it is not known yet.
    """
    if choice is None and binding.refused:
        choice = Choice(None, binding.why_never)
    program, why_not = choice or Choice(None, "")
    known = choice is not None
    rows = [("module", "type", "served by")]
    for name, module in model.named_modules():
        layers = program.served_by.get(name, []) if program is not None else []
        if layers or not any(True for _ in module.children()):
            by = ", ".join(layers) or ("no layer of its own" if program is not None else "reference" if known else "?")
            rows.append((name or "(the model)", type(module).__name__, by))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    fused = program is not None or not known
    head = f"backend: {cuda_runner.backend_of(binding.like().device) if fused else 'reference'}"
    if why_not:
        head += f", because {why_not}"
    if not known:
        head += " if the model can be fused, which the first call finds out; explain(x, y) looks at your data"
    lines = [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows]
    if update:
        lines.append(f"inner gradients: {update}")
    if program is not None:
        lines += [f"{change}; fused layers do not" for change in program.ignored]
        if program.whole_sets:
            lines.append("the samples of a set are combined with each other: both sets must be of one size")
        if program.written:
            lines.append(
                f"forward writes {', '.join(program.written)}: a training step calls the model itself for that"
            )
        if program.match is not None:
            served = "layers" if program.match == COMPUTED else program.plan.loss
            lines.append(f"the loss is served by {served}{' with weights' * program.match.weighted}")
    if binding.unwatched and fused:
        lines.append(f"captured again from time to time, as changes of {', '.join(binding.unwatched)} are not seen")
    return "\n".join([head, *lines])
