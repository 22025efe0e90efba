"""What doctor returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maml_cuda.diagnosis.faults import Fault


@dataclass(frozen=True)
class ParameterErrors:
    """The errors of one parameter's meta-gradient.

    Attributes:
        name: of the parameter.
        norm: of its meta-gradient; NaN where the step leaves none.
        finite_difference_error: against finite differences of the step's loss along a random direction, relative to
            this gradient, or to a thousandth of the whole one if that is more; NaN where they cannot judge.
        reference_error: the norm of the difference from `reference.meta_gradient`, relative to the same; NaN without
            `inner_lr`, or where it cannot be compared.
    """

    name: str
    norm: float
    finite_difference_error: float
    reference_error: float


@dataclass(frozen=True)
class Diagnosis:
    """What doctor found. `print` shows it.

    Attributes:
        healthy: True if the meta-gradient is exact and nothing looks wrong, False if something is wrong, None if doctor
            cannot judge.
        verdict: the result in words, with the names of the faults.
        faults: those of the ten that the step looks like, the likeliest first; each has a name, evidence and a mend.
        notes: what was not judged, and how the step was run.
        parameters: the errors, a row for each parameter.
    """

    healthy: bool | None
    verdict: str
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    parameters: tuple[ParameterErrors, ...]

    def __str__(self) -> str:
        lines = [self.verdict]
        for f in self.faults:
            lines += [f"- {f.name}: {f.evidence}.", f"  To mend it: {f.mend}."]
        lines += [f"- {note}" for note in self.notes]
        width = max(len("parameter"), *(len(row.name) for row in self.parameters))
        lines.append(f"{'parameter'.ljust(width)}  {'norm':>9}  {'finite differences':>18}  {'reference':>9}")
        lines += [
            f"{row.name.ljust(width)}  {_number(row.norm, 9)}  {_number(row.finite_difference_error, 18)}  "
            f"{_number(row.reference_error, 9)}"
            for row in self.parameters
        ]
        return "\n".join(lines)


def _number(x: float, width: int) -> str:
    return "-".rjust(width) if math.isnan(x) else f"{x:{width}.1e}"
