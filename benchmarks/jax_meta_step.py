"""A meta-step in JAX, jit(vmap(...)): reverse over reverse, or forward over reverse, which maml_cuda uses.

The inner loop is unrolled instead of scanned, so that XLA can fuse across inner steps; compiling takes longer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda.benchmark.baselines import Step

from .workloads import Tasks, Workload

Array = Any
Theta = dict[str, Array]


def jax_reverse(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    return JaxStep(reverse_over_reverse, workload, model, tasks, first_order)


def jax_forward(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    return JaxStep(forward_over_reverse, workload, model, tasks, first_order)


class JaxStep:
    """A meta-step that waits for its result. `copy_gradient` (not timed) copies it to the model's `.grad`."""

    def __init__(
        self, of_task: Callable, workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool
    ) -> None:
        if importlib.util.find_spec("jax") is None:
            raise ModuleNotFoundError("JAX is not installed")
        # The size of XLA's thread pool, read once; the default is all cores.
        os.environ.setdefault("NPROC", str(torch.get_num_threads()))
        import jax

        jax.config.update("jax_enable_x64", True)  # for verification; float32 arrays stay float32
        from .jax_nets import LOSSES, net

        forward, criterion = net(model), LOSSES[workload.loss]

        def loss(theta: Theta, x: Array, y: Array) -> Array:
            return criterion(forward(theta, x), y)

        self._wait = jax.block_until_ready
        self._model = model
        self._theta = {name: array(p) for name, p in model.named_parameters()}
        self._tasks = [array(t) for t in tasks]
        task = partial(of_task, loss, workload.inner_steps, workload.inner_lr, first_order)
        self._step = jax.jit(mean_over_tasks(task)).lower(self._theta, self._tasks).compile()
        self._grads: Theta = {}

    def __call__(self) -> None:
        self._grads = self._wait(self._step(self._theta, self._tasks))

    def copy_gradient(self) -> None:
        import numpy

        for name, p in self._model.named_parameters():
            p.grad = torch.from_numpy(numpy.array(self._grads[name])).to(p)


def array(t: Tensor) -> Array:
    import jax.numpy

    return jax.numpy.asarray(t.detach().numpy())


def mean_over_tasks(of_task: Callable) -> Callable:
    import jax

    def step(theta: Theta, tasks: list) -> Theta:
        grads = jax.vmap(of_task, in_axes=(None, 0, 0, 0, 0))(theta, *tasks)
        return jax.tree.map(lambda g: g.mean(0), grads)

    return step


def descend(theta: Theta, grads: Theta, rate: float) -> Theta:
    import jax

    return jax.tree.map(lambda p, g: p - rate * g, theta, grads)


def reverse_over_reverse(
    loss: Callable, steps: int, rate: float, first_order: bool,
    theta: Theta, x_spt: Array, y_spt: Array, x_qry: Array, y_qry: Array,
) -> Theta:  # fmt: skip
    """The meta-gradient of one task, by reverse mode through the inner gradients."""
    import jax

    def adapt(start: Theta) -> Theta:
        for _ in range(steps):
            start = descend(start, jax.grad(loss)(start, x_spt, y_spt), rate)
        return start

    if first_order:
        return jax.grad(loss)(adapt(theta), x_qry, y_qry)
    return jax.grad(lambda start: loss(adapt(start), x_qry, y_qry))(theta)


def forward_over_reverse(
    loss: Callable, steps: int, rate: float, first_order: bool,
    theta: Theta, x_spt: Array, y_spt: Array, x_qry: Array, y_qry: Array,
) -> Theta:  # fmt: skip
    """The meta-gradient of one task, by Hessian-vector products: tangents of the inner gradients."""
    import jax

    def inner_gradient(at: Theta) -> Theta:
        return jax.grad(loss)(at, x_spt, y_spt)

    path = [theta]
    for _ in range(steps):
        path.append(descend(path[-1], inner_gradient(path[-1]), rate))
    v = jax.grad(loss)(path.pop(), x_qry, y_qry)
    while path and not first_order:
        v = descend(v, jax.jvp(inner_gradient, (path.pop(),), (v,))[1], rate)
    return v
