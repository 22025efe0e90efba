"""Meta-Curvature (Park, Oliva 2019): a learned preconditioner of the inner gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from maml_cuda.rates import InnerRates


class MetaCurvature(nn.Module):
    """`FusedMAML(model, ..., inner_transform=MetaCurvature(model))`: learned matrices along each axis of a gradient.

    A gradient G of a convolution, `[outputs, inputs, *kernel]`, becomes G x_1 M_o x_2 M_i x_3 M_f, where x_n multiplies
    axis n by a matrix, and the axes of the kernel count as one (Park, Oliva 2019, equation 9); that of a linear layer,
    `[outputs, inputs]`, becomes M_o G M_i^T. One with a single axis, of a bias or a norm, is multiplied by a learned
    vector. All begin as identities.

    Args:
        model: whose parameters.
        names: of the adapted parameters; None: of all that require grad.

    Raises:
        ValueError: a name is no parameter of the model that requires grad.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        super().__init__()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(parameters if names is None else names)
        if unknown := [str(name) for name in self.names if name not in parameters]:
            raise ValueError(f"names must be of parameters that require grad, got {', '.join(unknown)}")
        self.factors = InnerRates(
            {
                f"{name}.{axis}": nn.Parameter(identity)
                for name in self.names
                for axis, identity in enumerate(_identities(parameters[name]))
            }
        )

    def forward(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The preconditioned gradients, by name.

        Raises:
            ValueError: an adapted parameter is not among `names`.
        """
        self.check(grads)
        return {name: self._transformed(name, g) for name, g in grads.items()}

    def check(self, names: Iterable[str]) -> None:
        """Raises ValueError where one is not among `self.names`."""
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f"MetaCurvature must have been made for {', '.join(unknown)}, got other names")

    def of(self, name: str) -> list[Tensor]:
        """The vector or the matrices of a parameter, one for each axis."""
        return [t for key, t in self.factors.items() if key.rpartition(".")[0] == name and isinstance(t, Tensor)]

    def _transformed(self, name: str, g: Tensor) -> Tensor:
        factors = [t.to(g.dtype) for t in self.of(name)]
        if g.dim() < 2:
            return factors[0] * g
        result = _as_matrices(g)
        for axis, matrix in enumerate(factors):
            result = torch.tensordot(matrix, result, ([1], [axis])).movedim(0, axis)
        return result.reshape(g.shape)


def _as_matrices(g: Tensor) -> Tensor:
    """With the axes of a kernel as one."""
    return g.flatten(2) if g.dim() > 2 else g


def _identities(p: Tensor) -> list[Tensor]:
    if p.dim() < 2:
        return [torch.ones_like(p)]
    return [torch.eye(n, dtype=p.dtype, device=p.device) for n in _as_matrices(p).shape]
