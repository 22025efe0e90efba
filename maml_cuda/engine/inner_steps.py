"""The inner loop of one task on the general path, and its adjoint, one step at a time.

    g_k = dL_spt(phi_k)/dphi_k;   (phi_{k+1}, s_{k+1}) = update(phi_k, g_k, s_k),   k = 0 .. K-1

s is the state of the update. The loop leaves no graph behind, only phi_k and s_k of each step. The adjoint goes back
from v, the cotangent of phi_K. Each step's is that of the update, (v, v_s) -> (v_phi, v_g, v_s), and that of the
gradient, d<g_k, v_g>/dphi_k, by a double backward through the graph of step k alone:

    v_k = v_phi + d<g_k, v_g>/dphi_k

So with K memory grows by parameters and states only. But each step's graph is built twice, which is a third more
arithmetic. So the loop does keep the graphs of its last steps, as many as take GRAPHS bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.batch_norm import at_step
from maml_cuda.capture import generators
from maml_cuda.engine import graphs
from maml_cuda.engine.sums import Leaf, Sums
from maml_cuda.engine.update_adjoint import Tensors, UpdateAdjoint, foreign, pulled, same
from maml_cuda.functional import Functional
from maml_cuda.losses import value_of
from maml_cuda.pytrees import Tree
from maml_cuda.reference import unreached
from maml_cuda.sample_weights import without_padding
from maml_cuda.targets import Target
from maml_cuda.updates import State

GRAPHS = 1 << 30  # bytes of the graphs of inner steps that a call keeps at once


@dataclass
class Loop:
    """What the inner loops of all tasks of a call have in common.

    Attributes:
        model, loss: the loss of a set is loss(model(phi, x), y).
        theta: phi_0, all parameters. Those that are not adapted are leaves where their gradient is wanted.
        update: of the adapted parameters.
        steps: K.
        differentiated: whether the adjoint will follow.
        first_order: the inner gradients are constants.
        first: what the steps before this one add to the parameters is constant.
        budget: bytes of graphs that a task keeps.
        kept_from: the first step whose graph is kept; None: the first step will tell.
    """

    model: Functional
    loss: Callable[..., Tensor]
    theta: Mapping[str, Tensor]
    update: UpdateAdjoint
    steps: int
    differentiated: bool
    first_order: bool
    first: int
    budget: int
    kept_from: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.second_order or not self.budget:
            self.kept_from = self.steps
        elif self.steps - self.first <= 1:
            self.kept_from = self.first

    @property
    def second_order(self) -> bool:
        return self.differentiated and not self.first_order

    def differentiates(self, step: int) -> bool:
        """Whether the gradient of the step is differentiated."""
        return self.second_order and step >= self.first

    def keeps(self, step: int) -> bool:
        return self.differentiates(step) and (self.kept_from is None or step >= self.kept_from)


class Graph:
    """The loss of a set at phi, of which it makes leaves.

    Attributes:
        phi: the adapted parameters, leaves.
        prediction: what the model returns.
        value: the loss.
        g: its gradient in phi, by name, once `differentiate` has been called.
    """

    g: Tensors

    def __init__(self, loop: Loop, phi: Tensors, x: Tree, y: Target) -> None:
        self.phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
        x, y = without_padding(x, y)
        self.prediction = loop.model({**loop.theta, **self.phi}, x)
        self.value = value_of(loop.loss, self.prediction, y)

    def differentiate(self, create_graph: bool) -> None:
        grads = torch.autograd.grad(self.value, list(self.phi.values()), create_graph=create_graph, allow_unused=True)
        self.g = {}
        for name, g in zip(self.phi, grads, strict=True):
            if g is None:
                raise unreached([name])
            self.g[name] = g

    def pulled(self, outputs: list[tuple[Tensor, Tensor]], leaves: Sequence[Leaf], sums: Sums) -> Tensors:
        """The gradient of the sum of <output, cotangent> in phi; in leaves and tensors outside it goes to `sums`."""
        grads = pulled(outputs, list(self.phi.values()), leaves, sums, [self.value])
        return {name: g for name, g in zip(self.phi, grads, strict=True) if g is not None}


class Task:
    """The inner loop of one task.

    Args:
        number: of the task in the call, for the masks of dropout.
        support: inner step -> x and y.
        leaves: on which the support losses depend beside phi.

    Attributes:
        differentiated: whether the adjoint will follow.
        phi: the adapted parameters at phi_0 .. phi_K.
        losses: the support losses at phi_0 .. phi_{K-1}.
        outside: tensors outside of model and loss on which the gradients depend, if `search`.
    """

    def __init__(
        self, loop: Loop, number: int, support: Callable[[int], tuple[Any, Target]], leaves: Sequence[Leaf],
        search: bool = False,
    ) -> None:  # fmt: skip
        self._loop, self._number, self._support, self._leaves = loop, number, support, leaves
        self.differentiated = loop.differentiated
        self.losses: list[Tensor] = []
        self.outside: dict[int, Tensor] = {}
        self._graphs: dict[int, Graph] = {}
        self._g: dict[int, Tensors] = {}
        self._random: dict[int, generators.States] = {}  # before steps that draw random numbers
        self._random_of_updates: dict[int, generators.States] = {}
        updates = loop.update.update.updates
        self.phi: list[Tensors] = [{name: loop.theta[name].detach() for name in updates}]
        with torch.no_grad():
            self._states: list[Mapping[str, State]] = [loop.update.update.start(self.phi[0])]
        for k in range(loop.steps):
            self._step(k, search)

    def _step(self, k: int, search: bool) -> None:
        loop = self._loop
        kept = loop.keeps(k)
        again = loop.differentiates(k) and not (kept and loop.kept_from is not None)  # whether it may be built again
        before = generators.states() if again else None
        graph = self._graph(k)
        graph.differentiate(create_graph=kept)
        if before is not None and generators.states() != before:
            self._random[k] = before
        if search and loop.differentiates(k):
            inputs = list(graph.phi.values())
            self.outside.update({id(t): t for t in foreign([graph.value], inputs, self._leaves)})
        if kept and loop.kept_from is None:
            self._measure(k, graph)
        if loop.keeps(k):
            self._graphs[k] = graph
        g = _detached(graph.g)
        if loop.differentiated and loop.first_order and not loop.update.is_linear:
            self._g[k] = g
        self.losses.append(graph.value.detach())
        phi, state = loop.update.step(self.phi[k], g, self._states[k], k, self._random_of_updates)
        self.phi.append(phi)
        self._states.append(state)

    def _graph(self, k: int) -> Graph:
        """Of the support loss of step k."""
        loop = self._loop
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(at_step(loop.model.module, k))
            stack.enter_context(loop.model.of_pass(self._number, 2 * k))
            if loop.differentiates(k):
                stack.enter_context(loop.model.differentiable_twice())
            return Graph(loop, self.phi[k], *self._support(k))

    def _measure(self, k: int, graph: Graph) -> None:
        """Decides by the first graph how many are kept: at least that of the last one."""
        loop = self._loop
        given = [*graph.phi.values(), *loop.theta.values(), *pytrees.tensors(self._support(k))]
        size = graphs.saved_bytes([graph.value, *graph.g.values()], given)
        loop.kept_from = max(loop.first, loop.steps - max(1, loop.budget // max(size, 1)))

    def query(self, k: int, x: Tree, y: Target) -> Graph:
        """Of the query loss at phi_k. Per-step layers read the slot of step k - 1."""
        loop = self._loop
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(loop.differentiated))
            stack.enter_context(at_step(loop.model.module, max(k - 1, 0)))
            stack.enter_context(loop.model.of_pass(self._number, 2 * k + 1))
            return Graph(loop, self.phi[k], x, y)

    def adjoint(self, v: Tensors, v_of_step: Mapping[int, Tensors], sums: Sums) -> Tensors:
        """The cotangent of phi_0 from those of phi_K, v, and of phi_0 .. phi_{K-1}; one that is missing is zero.

        Gradients in other tensors are added to `sums`.
        """
        loop = self._loop
        state: dict[str, State] = {}
        for k in reversed(range(loop.steps)):
            if k < loop.first:
                state = {}
                v = _sum(v, v_of_step.get(k, {}))
                continue
            graph = self._differentiated(k) if loop.second_order else None
            g = _detached(graph.g) if graph else self._g.get(k, {})
            with generators.at(self._random_of_updates[k]) if k in self._random_of_updates else nullcontext():
                v, v_g, state = loop.update.of_step(self.phi[k : k + 2], g, self._states[k], k, v, state, sums)
            if graph:
                outputs = [(graph.g[name], c) for name, c in v_g.items()]
                v = _sum(v, graph.pulled(outputs, self._leaves, sums))
            v = _sum(v, v_of_step.get(k, {}))
        loop.update.of_start(self.phi[0], state, sums)
        return v

    def _differentiated(self, k: int) -> Graph:
        """The graph of step k with its gradient, which is given away if it was kept and built again otherwise.

        Raises:
            RuntimeError: forward returns something else than before.
        """
        graph = self._graphs.pop(k, None)
        if graph is not None:
            return graph
        if k in self._random:
            with generators.at(self._random[k]):
                graph = self._graph(k)
        else:
            graph = self._graph(k)
        before, now = self.losses[k], graph.value.detach()
        if not same(now, before):
            raise RuntimeError(
                f"the model and the loss must return the same in a second call with the same arguments, got a support "
                f"loss of {float(before)} in the first and {float(now)} in the second: graphs of inner steps that are "
                "not kept are built again, so code must not depend on how often it has been called"
            )
        graph.differentiate(create_graph=True)
        return graph


def _detached(tensors: Tensors) -> Tensors:
    return {name: t.detach() for name, t in tensors.items()}


def _sum(v: Tensors, more: Tensors) -> Tensors:
    """Of cotangents, by name."""
    return {**more, **{name: c + more[name] if name in more else c for name, c in v.items()}} if more else v
