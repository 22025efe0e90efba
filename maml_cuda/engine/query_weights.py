"""The weights of the query losses after each inner step."""

from __future__ import annotations

import torch
from torch import Tensor

from maml_cuda.engine import checks


class QueryWeights:
    """values: one for each of phi_0 .. phi_K; None: the query loss after the last step alone.
    steps: the k whose query loss counts, ascending; none where values is None.

    Compiled code reads `steps` and the tensor alone: torch.compile guards what is read, and would compile anew for
    other values with the same zeros.
    """

    def __init__(self, values: tuple[float, ...] | None, like: Tensor) -> None:
        self.values = values
        self.steps = [k for k, weight in enumerate(values or ()) if weight]
        self._tensor = self._made(like)  # kept, as a copy to a GPU could not be recorded in a CUDA graph

    def check(self, inner_steps: int) -> None:
        """Raises ValueError where there are not inner_steps + 1 of them."""
        if self.steps and len(self._tensor) != inner_steps + 1:
            checks.query_weights(self.values, inner_steps)

    def tensor(self, like: Tensor) -> Tensor | None:
        """As the ops take them."""
        if not self.steps:
            return None
        if self._tensor.dtype != like.dtype or self._tensor.device != like.device:
            self._tensor = self._made(like)
        return self._tensor

    def _made(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values or (), dtype=like.dtype, device=like.device)
