"""Sinusoid regression of the MAML paper (Finn et al. 2017, section 5.1): every task is one curve."""

import math

import torch
from torch import Generator, Tensor

from maml_cuda.data.meta_batch import MetaBatch

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


def curve(x: Tensor, amplitude: Tensor, phase: Tensor) -> Tensor:
    """``amplitude * sin(x - phase)``, as in the authors' code; the arguments broadcast."""
    return torch.sin(x - phase) * amplitude


class SinusoidTasks:
    """Curves of uniform amplitude and phase, each with ``k_shot`` support and ``n_query`` query points.

    ``told``: every x is (x, amplitude, phase), which leaves nothing to adapt to: the paper's oracle.
    """

    def __init__(self, k_shot: int, n_query: int, told: bool = False) -> None:
        self.k_shot = k_shot
        self.n_query = n_query
        self.told = told

    def sample(self, num_tasks: int, generator: Generator) -> MetaBatch:
        """Draws ``num_tasks`` tasks; x and y are ``[num_tasks, points, 1]`` float32, x of 3 where it is told."""
        # One draw for everything: at 70,000 meta-iterations each further small op is a second of the run.
        uniform = torch.rand(num_tasks, 2 + self.k_shot + self.n_query, 1, generator=generator)
        amplitude, phase, x = uniform.split([1, 1, self.k_shot + self.n_query], dim=1)
        x = x * (X[1] - X[0]) + X[0]
        amplitude = amplitude * (AMPLITUDE[1] - AMPLITUDE[0]) + AMPLITUDE[0]
        phase = phase * (PHASE[1] - PHASE[0])
        y = curve(x, amplitude, phase)
        if self.told:
            x = torch.cat([x, amplitude.expand_as(x), phase.expand_as(x)], -1)
        return MetaBatch(x[:, : self.k_shot], y[:, : self.k_shot], x[:, self.k_shot :], y[:, self.k_shot :])
