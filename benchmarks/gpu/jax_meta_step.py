"""A meta-step in JAX, jit(vmap(grad)), for networks of Linear layers and ReLU. It runs in one process with torch.

Convolutions are not implemented: vmap over tasks turns them into grouped convolutions, which are slow in XLA.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..meta_steps import Builder
from ..workloads import Tasks, Workload

MATMUL = {"float32": "highest", "tf32": "tensorfloat32"}


def builder(precision: str) -> Builder:
    return lambda *case: JaxStep(precision, *case)


class JaxStep:
    """An asynchronous meta-step. `wait` waits for its result; `copy_gradient` (not timed) copies it to the model."""

    def __init__(self, precision: str, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> None:
        if importlib.util.find_spec("jax") is None:
            raise ModuleNotFoundError("JAX is not installed")
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not (isinstance(model, nn.Sequential) and all(isinstance(m, (nn.Linear, nn.ReLU)) for m in model)):
            raise NotImplementedError("the JAX baseline supports only networks of Linear layers and ReLU")
        if workload.loss != "mse":
            raise NotImplementedError("the JAX baseline supports only the squared error")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for torch
        import jax

        on_gpu = tasks.x_spt.is_cuda
        if on_gpu and jax.default_backend() != "gpu":
            raise RuntimeError(f"JAX finds no GPU; its backend is {jax.default_backend()}")
        self._jax = jax
        self._parameters = [p for m in linears for p in (m.weight, m.bias)]
        self._theta = [array(p) for p in self._parameters]
        self._tasks = [array(t) for t in tasks]
        with jax.default_matmul_precision(MATMUL[precision]):
            step = meta_gradient(workload.inner_steps, workload.inner_lr, first_order)
            self._step = jax.jit(step).lower(self._theta, self._tasks).compile()
        self._grads: Any = None

    def __call__(self) -> None:
        self._grads = self._step(self._theta, self._tasks)

    def wait(self) -> None:
        self._jax.block_until_ready(self._grads)

    def copy_gradient(self) -> None:
        import numpy

        for p, g in zip(self._parameters, self._grads, strict=True):
            p.grad = torch.from_numpy(numpy.array(g)).to(p)

    def peak(self) -> int | None:
        """Peak bytes of the process; None if JAX does not report them."""
        stats = self._jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")


def array(t: Tensor) -> Any:
    import jax.numpy

    return jax.numpy.asarray(t.detach().cpu().numpy())


def meta_gradient(steps: int, rate: float, first_order: bool) -> Any:
    """(theta, tasks) -> the mean meta-gradient; theta is weight, bias, weight, ..."""
    import jax

    def loss(theta: list, x: Any, y: Any) -> Any:
        for i in range(0, len(theta), 2):
            x = x @ theta[i].T + theta[i + 1]
            if i + 2 < len(theta):
                x = jax.nn.relu(x)
        return ((x - y) ** 2).mean()

    def adapt(theta: list, x: Any, y: Any) -> list:
        for _ in range(steps):
            grads = jax.grad(loss)(theta, x, y)
            theta = [p - rate * g for p, g in zip(theta, grads, strict=True)]
        return theta

    def of_task(theta: list, x_spt: Any, y_spt: Any, x_qry: Any, y_qry: Any) -> list:
        if first_order:
            return jax.grad(loss)(adapt(theta, x_spt, y_spt), x_qry, y_qry)
        return jax.grad(lambda start: loss(adapt(start, x_spt, y_spt), x_qry, y_qry))(theta)

    def step(theta: list, tasks: list) -> list:
        grads = jax.vmap(of_task, in_axes=(None, 0, 0, 0, 0))(theta, *tasks)
        return [g.mean(0) for g in grads]

    return step
