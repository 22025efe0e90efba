"""The extension module, which reads the fields of a Plan and the addresses of tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from maml_cuda.plan.schema import Plan

version: str
compiler: str
cuda: str | None
cuda_architectures: str

class Unsupported(ValueError):
    """The call is right, but no fused layer serves it."""

class Call:
    def __init__(
        self,
        tasks: int,
        at_once: int,
        workspace: Tensor,
        parameters: Sequence[Tensor],
        rates: Sequence[Tensor] = ...,
        support: Sequence[Tensor | None] = ...,
        query: Sequence[Tensor | None] = ...,
        task_weights: Tensor | None = ...,
        query_weights: Tensor | None = ...,
        losses: Sequence[Tensor | None] = ...,
        logits: Tensor | None = ...,
        gradient: Tensor | None = ...,
        *,
        parameter_strides: Sequence[int] = ...,
        given: Sequence[Tensor | None] = ...,
        given_strides: Sequence[int] = ...,
        per_task: Sequence[Tensor | None] = ...,
        state: Tensor | None = ...,
        kept: int = ...,
        prepared: bool = ...,
    ) -> None: ...

class Problem:
    prediction: list[int]
    saved_steps: int
    task_size: int
    in_lanes: bool
    def __init__(
        self,
        plan: Plan,
        operation: str,
        sample: Sequence[int],
        n_support: int,
        n_query: int,
        steps: int,
        first_order: bool,
        double: bool,
        query_steps: Sequence[int] = ...,
    ) -> None: ...
    def workspace(self, tasks: int, at_once: int) -> int: ...
    def run(self, call: Call) -> None: ...

class CudaGraph: ...

class CudaRunner:
    executor: str
    def __init__(self, problem: Problem, device: int) -> None: ...
    def workspace(self, tasks: int, at_once: int) -> int: ...
    def run(self, call: Call, stream: int) -> None: ...
    def table_bytes(self, call: Call) -> int: ...
    def capture(self, call: Call, table: int) -> CudaGraph: ...
    def run_graph(self, call: Call, graph: CudaGraph, stream: int) -> None: ...

class Episodes:
    def __init__(
        self,
        *,
        images: int,
        values: int,
        double: bool,
        shape: Sequence[int],
        rotations: int,
        n_way: int,
        k_shot: int,
        n_query: int,
        seed: int,
        first: int,
        tasks: int,
        data: Sequence[int],
    ) -> None: ...
    def draw(self, threads: int) -> None: ...
    def enqueue(self, device: int, stream: int) -> None: ...

def instruction_sets() -> list[str]: ...
def cpu_isa() -> str: ...
def plain_signature(data: tuple[Any, ...], type: type) -> tuple[Any, ...] | None: ...
def same_items(dicts: list[dict[str, Any]], items: list[Any]) -> bool: ...
def same_attributes(objects: list[Any], names: tuple[str, ...], values: list[Any]) -> bool: ...
