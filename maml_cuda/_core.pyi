"""The extension module: plans as dicts (binding.py writes them), tensors as addresses. ops.py is its only caller."""

from collections.abc import Mapping, Sequence
from typing import Any

version: str
compiler: str
cuda: str | None
cuda_architectures: tuple[str, ...]

class Unsupported(ValueError):
    """The call is right, but no fused layer serves it."""

class Problem:
    prediction: list[int]
    saved_steps: int
    def __init__(
        self,
        plan: Mapping[str, Any],
        operation: str,
        sample: Sequence[int],
        n_support: int,
        n_query: int,
        steps: int,
        first_order: bool,
        double: bool,
    ) -> None: ...
    def workspace(self, tasks: int, threads: int) -> int: ...
    def run(
        self,
        tasks: int,
        threads: int,
        *,
        workspace: int,
        parameters: Sequence[int],
        parameter_strides: Sequence[int] = ...,
        rates: Sequence[int] = ...,
        data: Sequence[int],
        task_weights: int = ...,
        given: Sequence[int] = ...,
        given_strides: Sequence[int] = ...,
        losses: Sequence[int] = ...,
        logits: int = ...,
        gradient: int = ...,
        per_task: Sequence[int] = ...,
    ) -> None: ...

def instruction_sets() -> list[str]: ...
def cpu_isa() -> str: ...
