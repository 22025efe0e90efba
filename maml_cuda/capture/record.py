"""The operations that a model ran, as torch's dispatcher saw them: operands and operations, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.utils import _pytree as pytree

# What an operand is if no operation has computed it: an input of the model, a part of the target, a tensor of the model
# (a parameter, a buffer or an attribute), or any other tensor.
Source = Literal["x", "y", "model", "other"]


@dataclass(eq=False)
class Operand:
    """A tensor of the record.

    Attributes:
        shape, dtype: of the tensor. The first axis of an input counts samples.
        source: what it is if no operation has computed it.
        name: of a tensor of the model; of an input, its place in the pytree, such as x['mask']; of a part of the
            target, its number among the leaves of the pytree.
        overwritten: the call that has changed its memory in place since; "": its content is valid.
        tensor: the tensor itself, if it is no copy: of a source that is not the model's, such as the weights of classes
            that a loss holds.
        number: the content of a tensor that forward makes of a number.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source | None = None
    name: str = ""
    overwritten: str = ""
    tensor: torch.Tensor | None = None
    number: torch.Tensor | None = None


@dataclass(eq=False)
class Operation:
    """An ATen operation, or a function of torch that is recorded as one.

    Attributes:
        name: without namespace, overload and the underscore of operations in place, for example "addmm".
        args, kwargs: the arguments, with an Operand for each tensor.
        module: the path of the module that makes the call.
        call: describes the call, for error messages and Node.name.
        boundary: the sentence why no derivative passes through it, or "".
        drawn: how many random masks forward has drawn before (masks.py).
        results: what it computes.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    call: str
    boundary: str
    drawn: int = 0
    results: list[Operand] = field(default_factory=list)

    def operands(self) -> Iterator[Operand]:
        """The tensors among its arguments."""
        return operands_of((self.args, self.kwargs))


class Made(NamedTuple):
    """A distribution, in a prediction.

    Attributes:
        kind: its type.
        arguments: by which it is made (pytrees.arguments_of), with an Operand for each tensor.
    """

    kind: type
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What a model and its loss ran for one signature.

    Attributes:
        inputs: the tensors of the model's input x, in the order of the pytree.
        operations: in the order in which they ran.
        prediction: what the model returned, a pytree with an Operand for each tensor and a Made for each distribution.
        loss: what the loss returned; None if it was not called.
        written: the names of the buffers of the model that forward writes.
    """

    inputs: tuple[Operand, ...]
    operations: list[Operation]
    prediction: Any
    loss: Any = None
    written: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.inputs[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes: that of the first floating-point input; without one, that of the first input."""
        return next((x for x in self.inputs if x.dtype.is_floating_point), self.inputs[0]).dtype

    def needed_for(self, results: Any) -> list[Operation]:
        """The operations that a pytree of operands depends on, in order."""
        alive = {id(o) for o in operands_of(results)}
        needed = []
        for operation in reversed(self.operations):
            if any(id(result) in alive for result in operation.results):
                needed.append(operation)
                alive.update(id(o) for o in operation.operands())
        return needed[::-1]


def operands_of(tree: Any) -> Iterator[Operand]:
    """The operands in a pytree."""
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Operand))
