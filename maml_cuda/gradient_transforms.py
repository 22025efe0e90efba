"""The argument `inner_transform` of FusedMAML: what the inner gradients pass through before they are clipped and given
to the optimizer, such as a learned preconditioner (Meta-Curvature, Park, Oliva 2019) or a learned mask (sparse-MAML,
von Oswald et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from maml_cuda.functional import Functional, leaves_between

Gradients = Mapping[str, Tensor]
GradientTransform = nn.Module | Callable[[dict[str, Tensor]], Gradients]


@dataclass(frozen=True)
class Transform:
    """A transform with the tensors that it is at.

    Attributes:
        function: gradients -> gradients of the same names, shapes and dtypes; of a module (parameters, gradients) ->
            gradients.
        parameters: of a module, by name; None: it is a plain function.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Tensor] | None = None

    def __call__(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """The transformed gradients.

        Raises:
            TypeError, ValueError: it returns something else, or depends on a tensor that requires grad and is no
                parameter of the module, whose gradient would be lost.
        """
        given = (dict(grads),) if self.parameters is None else (self.parameters, dict(grads))
        result = self.function(*given)
        _check(grads, result)
        _check_leaves([*grads.values(), *(self.parameters or {}).values()], result)
        return {name: result[name] for name in grads}

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Transform:
        """The same at `function` of each of its parameters."""
        if self.parameters is None:
            return self
        return replace(self, parameters={name: function(p) for name, p in self.parameters.items()})


def transform_of(given: GradientTransform | None) -> Transform | None:
    """The transform that an argument stands for."""
    if isinstance(given, nn.Module):
        return Transform(Functional(given), dict(given.named_parameters()))
    return None if given is None else Transform(given)


def _check(grads: Gradients, result: Any) -> None:
    if not isinstance(result, Mapping):
        raise TypeError(f"inner_transform must return a dict name -> gradient, got {type(result).__name__}")
    if set(result) != set(grads):
        raise ValueError(
            f"inner_transform must return gradients of {', '.join(grads)}, got {', '.join(map(str, result)) or 'none'}"
        )
    for name, g in grads.items():
        new = result[name]
        if not isinstance(new, Tensor):
            raise TypeError(f"inner_transform must return tensors, got {type(new).__name__} for {name}")
        if new.shape != g.shape or new.dtype != g.dtype:
            raise ValueError(
                f"inner_transform must return {list(g.shape)} of {g.dtype} for {name}, got {list(new.shape)} of "
                f"{new.dtype}"
            )


def _check_leaves(given: list[Tensor], result: Gradients) -> None:
    """What gradients pass through besides the given tensors."""
    known = set(map(id, given))
    for name, new in result.items():
        for leaf in leaves_between(given, new):
            if id(leaf) not in known:
                raise ValueError(
                    "inner_transform must be an nn.Module that has the tensors that require grad as its parameters, "
                    f"got one that reads another of shape {list(leaf.shape)} for {name}"
                )
