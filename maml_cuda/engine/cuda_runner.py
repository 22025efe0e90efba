"""Calls on a CUDA device: the workspace, and CUDA graphs of the calls that repeat.

The kernels of a graph have the addresses of its workspace among their arguments, so that a graph keeps its workspace.
All graphs of a stream share one: it is as large as the largest of them asks for, and is freed with the last of them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from maml_cuda import _core
from maml_cuda.engine.bounded import Bounded

OLDEST = (8, 0)  # compute capability
MOST_GRAPHS = 64  # kept for one problem and device: one for each number of tasks and stream


def why_not(device: torch.device) -> str:
    """The reason why no fused layer runs on this device, or nothing."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"maml_cuda has no fused layers for {device.type}"
    if _core.cuda is None:
        return "this build of maml_cuda has no CUDA kernels (built without nvcc: MAML_CUDA_BUILD=cuda asks for them)"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"
    return ""


def backend_of(device: torch.device) -> str:
    """The backend that serves a device: "cpu" or "cuda"."""
    return "cuda" if device.type == "cuda" else "cpu"


def has_precisions(device: torch.device) -> bool:
    """Whether products of float32 may be computed in another precision on this device."""
    return device.type != "cpu"


def stream_of(device: torch.device) -> int:
    """torch's current stream, as an address."""
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing() -> bool:
    """Whether the user is capturing a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


class Workspace:
    """Device memory that the graphs of one stream use, one after the other."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory


_workspaces: WeakValueDictionary[tuple[torch.device, int, torch.dtype], Workspace] = WeakValueDictionary()


class Graph(NamedTuple):
    core: Any
    table: Tensor  # the addresses of a call's tensors, on the device
    workspace: Workspace


class Runner:
    """A problem on one device. Everything is enqueued on torch's current stream; nothing waits for the device."""

    def __init__(self, core: Any, problem: Any, device: torch.device) -> None:
        self._make_call = core.Call
        self._core = core.CudaRunner(problem, device.index or 0)
        self.executor: str = self._core.executor  # "megakernel", "chunked" or "batched"
        keeps = problem.saved_steps > 1
        self._less = ', and checkpoint="recompute" keeps the states of one inner step' if keeps else ""
        self._graphs: OrderedDict[tuple[int, int, int], Graph | None] = OrderedDict()
        self._workspaces: Bounded[tuple[int, int], int] = Bounded(64)

    def workspace(self, tasks: int, at_once: int) -> int:
        """Elements of workspace that a call takes."""
        size = self._workspaces.get((tasks, at_once))
        if size is None:
            size = self._workspaces[tasks, at_once] = self._core.workspace(tasks, at_once)
        return size

    def run(self, like: Tensor, tasks: int, at_once: int, graphs: bool, *tensors: Any, **more: Any) -> None:
        """Enqueues a call; `graphs`: from its second time on, as the replay of a CUDA graph.

        Raises:
            ValueError: the call has random masks, and the user is capturing a CUDA graph.
        """
        if "seed" in more and is_capturing():
            raise ValueError(
                "a CUDA graph must have no call with dropout in train mode, got one: each replay would have its masks"
            )
        stream = stream_of(like.device)
        key = (stream, tasks, at_once)
        replays = graphs and not is_capturing() and self.executor != "megakernel"
        if not replays or key not in self._graphs:  # a first call loads kernels, and may be the only one
            self._core.run(stream, tasks, at_once, self._allocate(like, tasks, at_once), *tensors, **more)
            if replays:
                self._keep(key, None)
            return
        workspace = self._workspace(like, stream, tasks, at_once)
        call = tasks, at_once, workspace.memory, *tensors
        graph = self._graphs[key]
        if graph is None or graph.workspace is not workspace:
            made = self._make_call(*call, **more)
            table = like.new_empty(self._core.table_bytes(made), dtype=torch.uint8)
            graph = Graph(self._core.capture(made, table.data_ptr()), table, workspace)
        self._keep(key, graph)
        self._core.run_graph(graph.core, stream, *call, **more)

    def _workspace(self, like: Tensor, stream: int, tasks: int, at_once: int) -> Workspace:
        """The stream's workspace, or a larger one in its place: its other graphs are captured again when they run."""
        key = (like.device, stream, like.dtype)
        workspace = _workspaces.get(key)
        if workspace is None or workspace.memory.numel() < self.workspace(tasks, at_once):
            workspace = _workspaces[key] = Workspace(self._allocate(like, tasks, at_once))
        return workspace

    def _keep(self, key: tuple[int, int, int], graph: Graph | None) -> None:
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _allocate(self, like: Tensor, tasks: int, at_once: int) -> Tensor:
        size = self.workspace(tasks, at_once)
        try:
            return like.new_empty(size)
        except torch.OutOfMemoryError as error:
            at_once = min(at_once, tasks)
            smaller = max(1, at_once // 4)
            raise torch.OutOfMemoryError(
                f"maml_cuda wants {_megabytes(size, like)} of workspace on {like.device} for {at_once} tasks at once "
                f"(activations, tangents and parameters of every inner step); task_chunk={smaller} would take "
                f"{_megabytes(self.workspace(tasks, smaller), like)}{self._less}"
            ) from error


def _megabytes(elements: int, like: Tensor) -> str:
    return f"{elements * like.element_size() / 2**20:.0f} MB"
