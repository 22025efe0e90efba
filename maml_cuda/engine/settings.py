"""What a FusedMAML computes, as its parts read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from maml_cuda import reference
from maml_cuda.adapted_parameters import AdaptParams
from maml_cuda.gradient_transforms import GradientTransform
from maml_cuda.meta_gradients import MetaGradient
from maml_cuda.optim import Groups, Optimizer, read
from maml_cuda.rates import InnerRates, tensors
from maml_cuda.updates import InnerUpdate

if TYPE_CHECKING:
    from maml_cuda.engine.binder import Binder
    from maml_cuda.engine.binding import Binding
    from maml_cuda.engine.query_weights import QueryWeights


@dataclass(frozen=True)
class Options:
    """The arguments of FusedMAML that are fixed when it is made; FusedMAML says what they mean.

    recompute: checkpoint="recompute" or "sqrt".
    segments: checkpoint="sqrt".
    """

    adapt_params: AdaptParams
    backend: str
    precision: str
    cuda_graphs: bool
    task_chunk: int | None
    meta_gradient: MetaGradient
    recompute: bool
    segments: bool
    per_step_support: bool
    support_batch: int | None
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
    inner_optimizer: Optimizer | Groups | None
    inner_clip_norm: float | None
    inner_clip_value: float | None
    inner_transform: GradientTransform | None

    _options: Options
    _binder: Binder
    _query_weights: QueryWeights

    _modules: dict[str, Any]

    def _binding(self) -> Binding: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def watched(maml: Settings) -> tuple[Any, ...]:
    """The settings that a plan depends on, torch's default dtype among them, in which code may make tensors. The
    registry of modules is read as nn.Module.__getattr__ is slow."""
    return (
        maml._modules["model"], maml.inner_lr, maml.loss, maml.inner_steps, torch.get_default_dtype(),
        maml.inner_optimizer, maml.inner_clip_norm, maml.inner_clip_value, maml.inner_transform,
    )  # fmt: skip


def adapted_names(maml: Settings) -> list[str]:
    """The parameters that the inner loop changes, in the model's order."""
    return reference.adapted_names(maml.model, maml._options.adapt_params)


def inner_update(maml: Settings) -> InnerUpdate:
    """What an inner step does to the adapted parameters."""
    parameters = dict(maml.model.named_parameters())
    shapes = {name: parameters[name].shape for name in adapted_names(maml)}
    return read(
        maml.inner_lr, shapes, maml.inner_steps, maml.inner_optimizer, maml.inner_clip_norm, maml.inner_clip_value,
        maml.inner_transform,
    )  # fmt: skip


def described_update(maml: Settings) -> str:
    """What an inner step does with the gradient, in words; "" for plain gradient descent."""
    parts = []
    if (transform := maml.inner_transform) is not None:
        parts.append(getattr(transform, "__name__", type(transform).__name__))
    parts += [f"clipped by norm {maml.inner_clip_norm}"] * (maml.inner_clip_norm is not None)
    parts += [f"clipped by value {maml.inner_clip_value}"] * (maml.inner_clip_value is not None)
    if maml.inner_optimizer is not None:
        parts.append(maml.inner_optimizer.described())
    return "; ".join(parts)


def of_inner_update(maml: Settings) -> list[nn.Module]:
    """The modules that an inner step depends on, besides the model."""
    given = (maml.inner_optimizer, maml.inner_transform)
    return [m for module in given if isinstance(module, nn.Module) for m in module.modules()]


def inner_tensors(maml: Settings) -> list[tuple[str, Tensor]]:
    """The rates, hyperparameters and initial states that are tensors, each with its name for error messages."""
    optimizer = maml.inner_optimizer
    return tensors(maml.inner_lr) + ([] if optimizer is None else optimizer.held_tensors())


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]
