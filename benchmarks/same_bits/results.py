"""Everything that users can ask of a FusedMAML on one meta-batch, and a hash of the bits of each tensor of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maml_cuda import FusedMAML

Named = Iterator[tuple[str, Tensor]]


def digest(tensor: Tensor) -> str:
    """Of its type, its shape and its bytes."""
    array = tensor.detach().cpu().contiguous().numpy()
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()


def named(name: str, value: Any) -> Named:
    """The tensors of nested mappings and sequences, each under its path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from named(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from named(f"{name}.{index}", part)


def gradients(maml: FusedMAML) -> dict[str, Tensor]:
    """Under the names of FusedMAML: `model.*` and learned rates, `inner_lr*`."""
    return {n: p.grad for n, p in maml.named_parameters(remove_duplicate=False) if p.grad is not None}


def all_results(maml: FusedMAML, data: Sequence[Any], task_weights: Tensor | None) -> Named:
    """Each tensor under the name of the call that returned it, in the order of the calls; first the inputs."""
    x_spt, y_spt, x_qry, y_qry = data
    yield from named("input", [dict(maml.named_parameters()), *data])

    for call in ("call", "call again"):  # the second one of a signature takes the fast path
        maml.zero_grad()
        out = maml(*data, task_weights=task_weights)
        out.loss.backward()
        yield from named(call, {**vars(out), "gradient": gradients(maml)})
    maml.zero_grad()
    out = maml.backward(*data, task_weights=task_weights)
    yield from named("backward", {**vars(out), "gradient": gradients(maml)})
    with torch.no_grad():
        yield from named("without gradients", vars(maml(*data, task_weights=task_weights)))

    fast = maml.adapt(x_spt, y_spt)
    yield from named("adapt", fast)
    yield from named("predict", maml.predict(fast, x_qry))
    losses, grads = maml.loss_and_grad(fast, x_qry, y_qry)
    yield from named("loss_and_grad", [losses, grads])
    yield from named("hvp", maml.hvp(fast, x_qry, y_qry, grads))

    maml.zero_grad()
    predicted = maml.predict(maml.adapt(x_spt, y_spt, differentiable=True), x_qry)
    torch.stack([t.square().mean() for _, t in named("", predicted)]).sum().backward()
    yield from named("differentiable adapt.gradient", gradients(maml))

    if isinstance(maml.loss, str) and "policy" in maml.loss:
        v = {name: p.detach() for name, p in maml.model.named_parameters() if p.requires_grad}
        yield from named("fisher_vector_product", maml.fisher_vector_product(x_spt, y_spt, x_qry, v))
        yield from named("fisher", maml.fisher(x_spt, y_spt, x_qry)(v))
