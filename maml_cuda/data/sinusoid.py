"""Sinusoid regression (Finn et al. 2017, section 5.1): every task is one curve."""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor

from maml_cuda.data.meta_batch import WHOLE, MetaBatch

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


def curve(x: Tensor, amplitude: Tensor, phase: Tensor) -> Tensor:
    """``amplitude * sin(x - phase)``, as in the authors' code. The arguments broadcast."""
    return torch.sin(x - phase) * amplitude


class SinusoidTasks:
    """Tasks that are sine curves: amplitude uniform on [0.1, 5], phase on [0, pi], x on [-5, 5].

    Args:
        k_shot: support points per task.
        n_query: query points per task.
        oracle: if True, x is ``(x, amplitude, phase)``, so that there is nothing to adapt to. This is the oracle of the
            paper.
    """

    def __init__(self, k_shot: int, n_query: int, oracle: bool = False) -> None:
        self.k_shot = k_shot
        self.n_query = n_query
        self.oracle = oracle
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> SinusoidTasks:
        """The same tasks, on another device."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def sample(self, num_tasks: int, generator: Generator, part: slice = WHOLE) -> MetaBatch:
        """Draws tasks.

        Args:
            num_tasks: the number of tasks.
            generator: the source of random numbers, on the CPU: the draws are the same on every device.
            part: of these tasks the ones to return; all are drawn.

        Returns:
            x float32 ``[num_tasks, points, 1]``, or ``[num_tasks, points, 3]`` if ``oracle``;
                y float32 ``[num_tasks, points, 1]``.
        """
        # One draw for all numbers: in a run of 70,000 iterations, every further small op costs about a second.
        uniform = torch.rand(num_tasks, 2 + self.k_shot + self.n_query, 1, generator=generator)[part].to(self.device)
        amplitude, phase, x = uniform.split([1, 1, self.k_shot + self.n_query], dim=1)
        x = x * (X[1] - X[0]) + X[0]
        amplitude = amplitude * (AMPLITUDE[1] - AMPLITUDE[0]) + AMPLITUDE[0]
        phase = phase * (PHASE[1] - PHASE[0])
        y = curve(x, amplitude, phase)
        if self.oracle:
            x = torch.cat([x, amplitude.expand_as(x), phase.expand_as(x)], -1)
        return MetaBatch(x[:, : self.k_shot], y[:, : self.k_shot], x[:, self.k_shot :], y[:, self.k_shot :])
