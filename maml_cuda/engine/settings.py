"""What a FusedMAML computes, as its parts read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from maml_cuda import reference
from maml_cuda.adapted_parameters import AdaptParams
from maml_cuda.meta_gradients import MetaGradient
from maml_cuda.rates import InnerRates, Rate, read_rates

if TYPE_CHECKING:
    from maml_cuda.engine.binder import Binder
    from maml_cuda.engine.binding import Binding
    from maml_cuda.engine.query_weights import QueryWeights


@dataclass(frozen=True)
class Options:
    """The arguments of FusedMAML that are fixed when it is made; FusedMAML says what they mean.

    recompute: checkpoint="recompute".
    """

    adapt_params: AdaptParams
    backend: str
    precision: str
    cuda_graphs: bool
    task_chunk: int | None
    meta_gradient: MetaGradient
    recompute: bool
    check_labels: bool


class Settings(Protocol):
    """A FusedMAML. Its public attributes may change between calls.

    _binding: the binding that holds now.
    """

    model: nn.Module
    inner_lr: float | Tensor | InnerRates
    inner_steps: int
    loss: str | Callable[..., Tensor]
    first_order: bool
    batch_norm: str

    _options: Options
    _binder: Binder
    _query_weights: QueryWeights

    _modules: dict[str, Any]

    def _binding(self) -> Binding: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def watched(maml: Settings) -> tuple[Any, ...]:
    """The settings that a plan depends on, torch's default dtype among them, in which code may make tensors. The
    registry of modules is read as nn.Module.__getattr__ is slow."""
    return maml._modules["model"], maml.inner_lr, maml.loss, maml.inner_steps, torch.get_default_dtype()


def adapted_names(maml: Settings) -> list[str]:
    """The parameters that the inner loop changes, in the model's order."""
    return reference.adapted_names(maml.model, maml._options.adapt_params)


def inner_rates(maml: Settings) -> dict[str, Rate]:
    """The inner learning rate of each adapted parameter."""
    parameters = dict(maml.model.named_parameters())
    return read_rates(maml.inner_lr, {n: parameters[n].shape for n in adapted_names(maml)}, maml.inner_steps)


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]
