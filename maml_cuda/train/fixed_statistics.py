"""An adapted net in which BatchNorm normalises by fixed statistics, so that each picture is classified by itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda.batch_norm import PerStepBatchNorm, PerStepBatchNorm1d

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, PerStepBatchNorm)  # the normalisation layers of the nets


@torch.no_grad()
def with_fixed_statistics(
    model: nn.Module, parameters: Mapping[str, Tensor], slot: int, support: Tensor | None = None
) -> nn.Module:
    """A copy of a net at adapted parameters, in eval mode, of plain torch modules.

    Args:
        model: the net; its normalisation layers are ``NORMS``.
        parameters: those of one task, name -> tensor.
        slot: the inner step whose per-step BatchNorm is taken.
        support: ``[n, channels, height, width]``: each BatchNorm normalises by the mean and the biased variance that
            its input has on these pictures, at ``parameters``. So the predictions on them are those with batch
            statistics. None: by the running statistics, which the model must have.

    Returns:
        The copy, whose parameters do not require grad.
    """
    net = copy.deepcopy(model)
    for name, p in net.named_parameters():
        p.copy_(parameters[name])
    layers = []
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, NORMS):
                parent._modules[name] = _plain(child, slot)
                layers.append(parent._modules[name])
    net.eval().requires_grad_(False)
    if support is not None:
        hooks = [layer.register_forward_pre_hook(_take_statistics) for layer in layers if layer is not None]
        net(support)
        for hook in hooks:
            hook.remove()
    return net


def _plain(layer: Any, slot: int) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """The values of a slot of a per-step layer, or those of a plain one, as BatchNorm1d or BatchNorm2d."""
    at: Any = min(slot, layer.steps - 1) if isinstance(layer, PerStepBatchNorm) else ...
    kind = nn.BatchNorm1d if isinstance(layer, nn.BatchNorm1d | PerStepBatchNorm1d) else nn.BatchNorm2d
    like = layer.weight
    plain = kind(layer.num_features, layer.eps, device=like.device, dtype=like.dtype)
    plain.weight.copy_(like[at])
    plain.bias.copy_(layer.bias[at])
    if layer.running_mean is not None:
        assert plain.running_mean is not None
        assert plain.running_var is not None
        plain.running_mean.copy_(layer.running_mean[at])
        plain.running_var.copy_(layer.running_var[at])
    return plain


def _take_statistics(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    """Before a layer runs in eval mode: its running statistics become those of its input."""
    (x,) = inputs
    axes = [axis for axis in range(x.dim()) if axis != 1]
    layer.running_mean.copy_(x.mean(axes))
    layer.running_var.copy_(x.var(axes, correction=0))
