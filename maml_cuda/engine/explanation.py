"""The table that FusedMAML.explain prints."""

from __future__ import annotations

from torch import nn

from maml_cuda.engine import cuda_runner
from maml_cuda.engine.binding import Binding


def table(model: nn.Module, binding: Binding, why_not: str, of_samples: bool) -> str:
    """Each module of the model, and the fused layer that serves it.

    why_not: the reason why no fused layer serves the model, or nothing.
    of_samples: the table is of samples of a given shape.
    """
    fused = binding.plan is not None and not why_not
    rows = [("module", "type", "served by")]
    for name, module in model.named_modules():
        layers = binding.served_by.get(name, []) if fused else []
        if layers or not any(True for _ in module.children()):
            by = ", ".join(layers) or ("no layer of its own" if fused else "reference")
            rows.append((name or "(the model)", type(module).__name__, by))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    head = f"backend: {cuda_runner.backend_of(binding.like().device) if fused else 'reference'}"
    head += f", because {why_not}" if why_not else ""
    lines = [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in rows]
    foot = ["(for samples of a shape that these layers are fused on: explain(x) looks at yours)"]
    return "\n".join([head, *lines, *(foot if fused and not of_samples else [])])
