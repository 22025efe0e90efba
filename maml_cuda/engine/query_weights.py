"""The weights of the query losses after each inner step."""

from __future__ import annotations

import torch
from torch import Tensor


class QueryWeights:
    """values: one for each of phi_0 .. phi_K; None: the query loss after the last step alone.
    steps: the k whose query loss counts, ascending; none where values is None.
    """

    def __init__(self, values: tuple[float, ...] | None, like: Tensor) -> None:
        self.values = values
        self.steps = [k for k, weight in enumerate(values or ()) if weight]
        self._tensor = self._made(like)  # kept, as a copy to a GPU could not be recorded in a CUDA graph

    def tensor(self, like: Tensor) -> Tensor | None:
        """As the ops take them."""
        if self.values is None:
            return None
        if self._tensor.dtype != like.dtype or self._tensor.device != like.device:
            self._tensor = self._made(like)
        return self._tensor

    def _made(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values or (), dtype=like.dtype, device=like.device)
