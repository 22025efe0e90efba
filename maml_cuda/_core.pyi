"""The compiled core: types of the extension module (csrc/python).

It reads the fields of a Plan, and of tensors their addresses, shapes and dtypes; it does not depend on torch.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from maml_cuda.plan.schema import Plan

version: str
compiler: str
cuda: str | None  # version of CUDA; None in a build without CUDA
cuda_architectures: str  # separated by spaces

class Unsupported(ValueError):
    """The arguments are valid, but no fused layer computes this."""

class Call:
    """The tensors of one call, tasks first. None: an input that is absent, or an output that is not wanted.

    Attributes:
        tasks: number of tasks.
        at_once: number of tasks that are computed at the same time, each in a part of the workspace.
        support, query: x, then what the loss compares with the prediction: y, scale, old_log_probs.
        losses: loss, task_losses, support_losses.
        parameter_strides, given_strides: elements from one task's tensor to the next; 0: all tasks read the same one.
        given: the cotangents of a backward, or the directions of a Hessian-vector product.
        per_task: adapted parameters, gradients or products, one tensor for each parameter.
        state, kept, prepared: of "kept_fisher": the states of the first `kept` tasks, and whether an earlier call has
            filled them.
        seed, first_step: of random masks: the seed of the call, and the number of its first inner step.
        support_counts, query_counts: int64 [tasks], on the CPU: how many samples of each task are no padding.
    """

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
        seed: int = ...,
        first_step: int = ...,
        support_counts: Tensor | None = ...,
        query_counts: Tensor | None = ...,
        data_gradient: Tensor | None = ...,
    ) -> None: ...

class Problem:
    """A plan for one operation, with the shapes of one call.

    Attributes:
        prediction: shape of one sample's prediction.
        saved_steps: inner steps whose states are kept for Hessian-vector products; 1: states are computed again.
        task_size: elements of the state of one task of "kept_fisher".
        data_places: where the gradients of x_spt, y_spt, x_qry and y_qry start in a task's part of data_gradient, and
            its size.
        support_sets: of a task: one for each inner step, or one.
        in_lanes: whether a CPU may compute several tasks side by side in the lanes of vectors.
        loss_columns: of support_losses: the inner steps and, of an implicit gradient, its residual.
        combines_samples: whether samples depend on each other otherwise than through a normalisation.
    """

    prediction: list[int]
    saved_steps: int
    task_size: int
    support_sets: int
    data_places: tuple[int, int, int, int, int]
    in_lanes: bool
    combines_samples: bool
    loss_columns: int
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
        weighted: bool = ...,
    ) -> None: ...
    def workspace(self, tasks: int, at_once: int) -> int:
        """Elements of workspace that a CPU needs."""

    def run(
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
        seed: int = ...,
        first_step: int = ...,
        support_counts: Tensor | None = ...,
        query_counts: Tensor | None = ...,
        data_gradient: Tensor | None = ...,
    ) -> None:
        """Runs a call on the CPU. The arguments are those of Call."""

class CudaGraph:
    """A captured CUDA graph."""

class CudaRunner:
    """A problem on one CUDA device; every call is enqueued on a stream."""

    executor: str  # "batched" or "megakernel"
    def __init__(self, problem: Problem, device: int) -> None: ...
    def workspace(self, tasks: int, at_once: int) -> int: ...
    def run(
        self,
        stream: int,
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
        seed: int = ...,
        first_step: int = ...,
        support_counts: Tensor | None = ...,
        query_counts: Tensor | None = ...,
        data_gradient: Tensor | None = ...,
    ) -> None:
        """Runs a call. The other arguments are those of Call."""
    def table_bytes(self, call: Call) -> int: ...
    def capture(self, call: Call, table: int) -> CudaGraph: ...
    def run_graph(
        self,
        graph: CudaGraph,
        stream: int,
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
        seed: int = ...,
        first_step: int = ...,
        support_counts: Tensor | None = ...,
        query_counts: Tensor | None = ...,
        data_gradient: Tensor | None = ...,
    ) -> None:
        """Replays a graph for a call like the captured one. The other arguments are those of Call."""

class Episodes:
    """Draws tasks of few-shot classification from an array of images. Tensors are given by their addresses.

    Attributes:
        shape: of the images: classes, samples, channels, height, width.
        first: the number of the first task to draw.
        data: x_spt, y_spt, x_qry, y_qry.
    """

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
    def draw(self, threads: int) -> None:
        """Draws on the CPU."""

    def enqueue(self, device: int, stream: int) -> None:
        """Draws on a GPU."""

def instruction_sets() -> list[str]:
    """The instruction sets in this build, widest first."""

def cpu_isa() -> str:
    """The instruction set in use."""

def watch(
    settings: tuple[Any, ...],
    dicts: list[dict[Any, Any]],
    tensors: list[Tensor],
    names: tuple[str, ...],
    lists: list[list[Any]] = ...,
    places: list[tuple[Any, str]] = ...,
) -> tuple[Any, ...]:
    """The state that a plan was made for, for the two functions below.

    An object stays the same if it is the very same, or an int, float or str of exactly this type with the same value.

    Args:
        settings: objects that must stay the same.
        dicts, lists: their keys and values, or items, must stay the same, in order.
        tensors, names: the tensors' attributes of these names must stay equal.
        places: pairs (owner, key). What is found there must stay the same, or absent: the item of a dict, the content
            of a closure's cell (the key is ignored), what a class or its bases define by this name, the attribute of
            any other object.
    """

def unchanged(watched: tuple[Any, ...], settings: tuple[Any, ...]) -> bool:
    """Whether nothing has changed."""

def signature(
    watched: tuple[Any, ...], settings: tuple[Any, ...], data: tuple[Any, ...], type: type
) -> tuple[Any, ...] | None:
    """None if something has changed. Else shape, dtype and device of each tensor, one after the other; () unless each
    is of exactly the type, does not require grad, and its memory holds its values."""
