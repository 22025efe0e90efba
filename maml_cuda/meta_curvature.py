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
        if unknown := [name for name in grads if name not in self.names]:
            raise ValueError(f"MetaCurvature must have been made for {', '.join(unknown)}, got other names")
        return {name: self._of(name, g) for name, g in grads.items()}

    def _of(self, name: str, g: Tensor) -> Tensor:
        if g.dim() < 2:
            factor = self.factors[f"{name}.0"]
            return factor * g
        result = _as_matrices(g)
        for axis in range(result.dim()):
            matrix = self.factors[f"{name}.{axis}"]
            assert isinstance(matrix, Tensor)
            result = torch.tensordot(matrix, result, ([1], [axis])).movedim(0, axis)
        return result.reshape(g.shape)


def _as_matrices(g: Tensor) -> Tensor:
    """With the axes of a kernel as one."""
    return g.flatten(2) if g.dim() > 2 else g


def _identities(p: Tensor) -> list[Tensor]:
    if p.dim() < 2:
        return [torch.ones_like(p)]
    return [torch.eye(n, dtype=p.dtype, device=p.device) for n in _as_matrices(p).shape]
