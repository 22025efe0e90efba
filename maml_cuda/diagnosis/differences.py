"""Finite differences of the step's own loss, with several step sizes, and what they cannot judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maml_cuda.diagnosis.steps import Step

# Step sizes in the order in which they are tried, relative to the largest element of a parameter (at least 1).
STEPS = {torch.float64: (1e-5, 1e-6, 1e-7, 1e-4, 1e-8), torch.float32: (3e-3, 1e-3, 1e-2, 3e-4, 3e-2)}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of errors, relative to the gradient


@dataclass
class Difference:
    """The derivative of the loss along a random direction of one parameter.

    The direction's elements have variance 1, so an error of the derivative is of the size of the gradient's error.

    Attributes:
        along: from the step's gradient.
        norm: of the step's gradient.
        measured: by central differences.
        uncertainty: of `measured`: what step sizes differ by, and rounding.
        kink: the loss is not differentiable there: one-sided differences do not meet.
    """

    along: float
    norm: float
    measured: float
    uncertainty: float
    kink: bool

    @property
    def size(self) -> float:
        return max(self.norm, abs(self.along), abs(self.measured))


def differences(step: Step, gradients: dict[str, Tensor | None], loss: float) -> dict[str, Difference]:
    """For each parameter, at the loss's value `loss`."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, start in step.borrowed.start.items():
        direction = torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device)
        g = gradients[name]
        along, norm = (0.0, 0.0) if g is None else ((g.conj() * direction).real.sum().item(), g.norm().item())
        found[name] = _difference(step, name, start, direction, along, norm, loss)
    return found


def _difference(
    step: Step, name: str, start: Tensor, direction: Tensor, along: float, norm: float, loss: float
) -> Difference:
    real = start.dtype.to_real() if start.dtype.to_real() in STEPS else torch.float32
    length = direction.norm().item() or 1.0
    size = max(1.0, start.abs().max().item() if start.numel() else 0.0)
    central: list[float] = []
    gaps: list[float] = []  # between the two one-sided differences
    noises: list[float] = []
    best = (float("inf"), 0)
    for i, relative in enumerate(STEPS[real]):
        h = relative * size / length  # so that the parameter moves by relative * size
        up = step.run({name: start + h * direction}).loss
        down = step.run({name: start - h * direction}).loss
        assert up is not None
        assert down is not None
        central.append((up - down) / (2 * h))
        gaps.append((up - 2 * loss + down) / h)
        noises.append(4 * torch.finfo(real).eps * max(abs(loss), 1e-30) / h)
        if i:
            other = abs(central[i] - central[i - 1])
            best = min(best, (max(other, min(noises[i], noises[i - 1])), i))
            if best[0] <= 0.1 * TOLERANCE[real] * max(norm, abs(central[i])):
                break
    spread, i = best
    smaller, larger = sorted((i, i - 1), key=lambda k: STEPS[real][k])
    # A smooth loss has a gap in proportion to the step. Below rounding nothing can be said, nor need it.
    rounding = 4 * noises[smaller]
    kink = abs(gaps[smaller]) > max(0.5 * abs(gaps[larger]), rounding, spread)
    chosen = smaller if noises[smaller] < noises[larger] else larger
    return Difference(along, norm, central[chosen], spread if spread == spread else float("inf"), kink)
