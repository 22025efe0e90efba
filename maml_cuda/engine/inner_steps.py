"""The inner loop of one task on the general path, and its adjoint, one step at a time.

    g_k = dL_spt(phi_k)/dphi_k;   (phi_{k+1}, s_{k+1}) = update(phi_k, g_k, s_k),   k = 0 .. K-1

s is the state of the update. The loop leaves no graph behind, only phi_k and s_k of each step. The adjoint goes back
from v, the cotangent of phi_K. Each step's is that of the update, (v, v_s) -> (v_phi, v_g, v_s), and that of the
gradient, d<g_k, v_g>/dphi_k, by a double backward through the graph of step k alone:

    v_k = v_phi + d<g_k, v_g>/dphi_k

So with K memory grows by parameters and states only. But each step's graph is built twice, which is a third more
arithmetic. So the loop does keep the graphs of its last steps, as many as take GRAPHS bytes.

In segments of ceil(sqrt(K)) steps, phi_k and s_k are kept where a segment begins. The adjoint runs each segment again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.batch_norm import PerStepBatchNorm, at_step
from maml_cuda.capture import generators
from maml_cuda.engine import graphs
from maml_cuda.engine.sums import Leaf, Sums
from maml_cuda.engine.update_adjoint import Tensors, UpdateAdjoint, pulled, same
from maml_cuda.functional import Functional
from maml_cuda.losses import value_of
from maml_cuda.pytrees import Tree
from maml_cuda.reference import unreached
from maml_cuda.sample_weights import without_padding
from maml_cuda.targets import Target
from maml_cuda.updates import State

GRAPHS = 1 << 30  # bytes of the graphs of inner steps that a call keeps at once
_PLACE = "_maml_cuda_place"  # attribute of the leaf of phi_k: its task, k, and its name
_TASKS = itertools.count()


@dataclass
class Loop:
    """What the inner loops of all tasks of a call have in common.

    Attributes:
        model, loss: the loss of a set is loss(model(phi, x), y).
        theta: phi_0, all parameters; leaves where their gradient is wanted.
        of_theta: these leaves.
        update: of the adapted parameters.
        steps: K.
        differentiated: whether the adjoint will follow.
        first_order: the inner gradients are constants.
        first: what the steps before this one add to the parameters is constant.
        budget: bytes of graphs that a task keeps.
        segments: whether phi and the state are kept where segments begin alone; then no graph is kept.
        kept_from: the first step whose graph is kept; None: the first step will tell.
        by_formulas: whether the model is called with formulas (formulas.py), which is slower; None: it is, and the
            first graph will tell.
    """

    model: Functional
    loss: Callable[..., Tensor]
    theta: Mapping[str, Tensor]
    of_theta: Sequence[Leaf]
    update: UpdateAdjoint
    steps: int
    differentiated: bool
    first_order: bool
    first: int
    budget: int
    segments: bool = False
    kept_from: int | None = field(init=False, default=None)
    by_formulas: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.segment = math.isqrt(max(self.steps - 1, 0)) + 1 if self.segments else 1  # steps
        self._stepwise = any(isinstance(m, PerStepBatchNorm) for m in self.model.module.modules())
        self._edges: list[Any] = []
        if not self.second_order or self.first:  # no graph of some passes is looked at
            self.by_formulas = True
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

    @contextmanager
    def of_pass(self, task: int, number: int, slot: int, twice: bool) -> Iterator[None]:
        """Context of one pass through the model."""
        with ExitStack() as stack:
            if self._stepwise:
                stack.enter_context(at_step(self.model.module, slot))
            stack.enter_context(self.model.of_pass(task, number))
            if self.by_formulas is False:
                stack.enter_context(self.model.without_formulas())
            if twice:
                stack.enter_context(self.model.differentiable_twice())
            yield

    def look_at(self, nodes: set[Any]) -> None:
        """Looks at the nodes of a graph for functions that need a formula.

        Raises:
            ValueError: there is one, and the first graph had none.
        """
        if self.by_formulas is None:
            self.by_formulas = self.model.needs_formulas(nodes)
        elif not self.by_formulas and self.model.needs_formulas(nodes):
            raise ValueError(
                "forward must call batch_norm, instance_norm, weight_norm, hardsigmoid and multi_margin_loss in its "
                "first pass too if it calls them, got one of them in a later pass alone: use layers, as nn.BatchNorm2d"
            )

    def edges(self, phi: Tensors) -> list[Any]:
        """The nodes at which graphs reach phi. Those of theta are found once."""
        if not all(p is self.theta[name] for name, p in phi.items()):
            return [graphs.edge(p) for p in phi.values()]
        self._edges = self._edges or [graphs.edge(p) for p in phi.values()]
        return self._edges

    def keeps(self, step: int) -> bool:
        return self.differentiates(step) and (self.kept_from is None or step >= self.kept_from)


class Graph:
    """The loss of a set at phi_k.

    As in a plain loop, phi_0 are the leaves of theta, and phi_k of later steps no leaves.

    Args:
        task: a number that no other task has, in any call.

    Attributes:
        phi: the adapted parameters.
        prediction: what the model returns.
        value: the loss.
        g: its gradient in phi, by name, once `differentiate` has been called; {} before.

    Raises:
        ValueError: forward has registered a hook on a parameter, which in a plain loop would see the sum of gradients
            of several passes.
    """

    def __init__(self, loop: Loop, task: int, k: int, phi: Tensors, x: Tree, y: Target) -> None:
        self._loop, self._task, self._k = loop, task, k
        if loop.differentiated and k == 0:
            self.phi = {name: loop.theta[name] for name in phi}
        else:
            self.phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
        if loop.differentiated and k:
            for name, p in self.phi.items():
                vars(p)[_PLACE] = task, k, name
            self.phi = {name: p.view_as(p) for name, p in self.phi.items()}
        x, y = without_padding(x, y)
        self.prediction = loop.model({**loop.theta, **self.phi}, x)
        self.value = value_of(loop.loss, self.prediction, y)
        self.g: Tensors = {}
        if not loop.by_formulas:
            loop.look_at(self._walked()[1])
        if hooked := [name for name, p in self.phi.items() if p._backward_hooks]:
            raise ValueError(f"forward must register no hook on a parameter, got one on {', '.join(hooked)}")

    def _walked(self) -> tuple[list[Tensor], set[Any]]:
        """The leaves on which the loss and its gradient depend other than by phi, and the nodes of their graphs."""
        return graphs.walked([self.value, *self.g.values()], self._loop.edges(self.phi))

    def differentiate(self, create_graph: bool) -> None:
        grads = torch.autograd.grad(self.value, list(self.phi.values()), create_graph=create_graph, allow_unused=True)
        for name, g in zip(self.phi, grads, strict=True):
            if g is None:
                raise unreached([name])
            self.g[name] = g

    def sign(self) -> Tensor:
        """The loss and the norms of its gradient, by which another pass is known to be the same."""
        norms = torch._foreach_norm([g.detach() for g in self.g.values()])
        return torch.stack([self.value.detach(), *(n.to(self.value.dtype) for n in norms)])

    def pulled(
        self, outputs: list[tuple[Tensor, Tensor]], leaves: Sequence[Leaf], sums: Sums, v: Tensors | None = None
    ) -> Tensors:
        """The gradient of the sum of <output, cotangent> in phi, plus v; in leaves and tensors outside it goes to
        `sums`."""
        outputs = [*outputs, *((self.phi[name], c) for name, c in (v or {}).items())]
        grads = pulled(outputs, list(self.phi.values()), leaves, sums, self.outside(leaves))
        return {name: g for name, g in zip(self.phi, grads, strict=True) if g is not None}

    def outside(self, given: Sequence[Leaf]) -> list[Leaf]:
        """The leaf tensors on which the loss and its gradient depend beside phi and the given leaves: tensors that are
        no parameters, and phi of an earlier pass, of which forward has kept a value with its graph. The gradient alone
        depends on what a hook or the backward of an autograd.Function reads.

        Raises:
            ValueError: such a value is of another task, or of a pass that is not earlier; or the gradient cannot be
                differentiated.
        """
        known = {id(leaf.tensor) for leaf in given} | {id(t) for t in self.phi.values()}
        of_theta, found = {id(leaf.tensor): leaf for leaf in self._loop.of_theta}, []
        leaves, nodes = self._walked()
        for t in leaves:
            place = vars(t).get(_PLACE)
            if id(t) in of_theta:
                leaf = of_theta[id(t)]
            elif place is None:
                if graphs.differentiable_once(nodes):
                    raise ValueError(
                        "the inner gradient must be differentiable at second order, got an autograd.Function whose "
                        "backward is marked @once_differentiable: use first_order=True, or write its backward of "
                        "functions that autograd differentiates"
                    )
                leaf = Leaf.of_itself(t)
            else:
                task, k, name = place
                if (task, k) == (self._task, self._k) and self._is_own(name, t):
                    continue
                if task != self._task or k >= self._k:
                    raise ValueError(
                        "a value that forward keeps with its graph must be read in later inner steps of the same task "
                        f"alone, got one of inner step {k} in inner step {self._k} of {self._loop.steps}"
                    )
                leaf = Leaf(t, t, step=(k, name))
            if id(t) not in known:
                found.append(leaf)
        return found

    def _is_own(self, name: str, t: Tensor) -> bool:
        return self.phi[name]._base is t


class Task:
    """The inner loop of one task.

    Args:
        number: of the task in the call, for the masks of dropout.
        support: inner step -> x and y.
        leaves: on which the support losses depend beside phi.

    Attributes:
        differentiated: whether the adjoint will follow.
        losses: the support losses at phi_0 .. phi_{K-1}.
        outside: tensors outside of model and loss on which the gradients depend, if `search`.
    """

    def __init__(
        self, loop: Loop, number: int, support: Callable[[int], tuple[Any, Target]], leaves: Sequence[Leaf],
        search: bool = False,
    ) -> None:  # fmt: skip
        self._loop, self._number, self._support, self._leaves = loop, number, support, leaves
        self._identity = next(_TASKS)
        self.differentiated = loop.differentiated
        self.losses: list[Tensor] = []
        self.outside: dict[int, Tensor] = {}
        self._graphs: dict[int, Graph] = {}
        self._g: dict[int, Tensors] = {}
        self._random: dict[int, generators.States] = {}  # before steps that draw random numbers
        self._signs: dict[int, Tensor] = {}
        self._random_of_updates: dict[int, generators.States] = {}
        phi = {name: loop.theta[name].detach() for name in loop.update.update.updates}
        with torch.no_grad():
            # phi_k and s_k by k, of the steps that are kept
            self._path: dict[int, tuple[Tensors, Mapping[str, State]]] = {0: (phi, loop.update.update.start(phi))}
        for k in range(loop.steps):
            self._step(k, search)
            self._forget(k)

    def phi(self, k: int) -> Tensors:
        """The adapted parameters phi_k."""
        return self._at(k)[0]

    def _at(self, k: int) -> tuple[Tensors, Mapping[str, State]]:
        """phi_k and s_k. Where they are not kept their segment runs again, and takes the place of another one.

        Raises:
            RuntimeError: forward returns something else than before.
        """
        if k not in self._path:
            for j in [*self._path]:
                self._forget(j)
            start = k - k % self._loop.segment
            for j in range(start, min(start + self._loop.segment, self._loop.steps) - 1):
                self._step_again(j)
        return self._path[k]

    def _forget(self, k: int) -> None:
        """Unless a segment begins there, or the loop ends."""
        if k % self._loop.segment and k != self._loop.steps:
            del self._path[k]

    def _step(self, k: int, search: bool) -> None:
        loop = self._loop
        kept = loop.keeps(k)
        # Whether its graph may be built again: where others are found it is of a node whose backward may run twice.
        again = loop.segments or (loop.differentiates(k) and (search or not kept or loop.kept_from is None))
        before = generators.states() if again else None
        phi, state = self._path[k]
        graph = self._graph(k, phi)
        graph.differentiate(create_graph=kept or (search and loop.differentiates(k)))
        if before is not None:
            self._signs[k] = graph.sign()
            if generators.states() != before:
                self._random[k] = before
        if search and loop.differentiates(k):
            found = [leaf.of for leaf in graph.outside(self._leaves) if leaf.step is None]
            self.outside.update({id(t): t for t in found})
        if kept and loop.kept_from is None:
            self._measure(k, graph)
        if loop.keeps(k):
            self._graphs[k] = graph
        g = graph.g if loop.update.is_linear else _detached(graph.g)
        if loop.differentiated and loop.first_order and not loop.update.is_linear and not loop.segments:
            self._g[k] = g
        self.losses.append(graph.value.detach())
        self._path[k + 1] = loop.update.step(phi, g, state, k, self._random_of_updates)

    def _step_again(self, k: int) -> None:
        """From phi_k to phi_{k+1}."""
        phi, state = self._path[k]
        graph = self._again(k, phi)
        random = self._random_of_updates
        with generators.at(random[k]) if k in random else nullcontext():
            self._path[k + 1] = self._loop.update.step(phi, graph.g, state, k, {})

    def _graph(self, k: int, phi: Tensors) -> Graph:
        """Of the support loss of step k."""
        loop = self._loop
        with torch.enable_grad(), loop.of_pass(self._number, 2 * k, k, loop.differentiates(k)):
            return Graph(loop, self._identity, k, phi, *self._support(k))

    def _measure(self, k: int, graph: Graph) -> None:
        """Decides by the first graph how many are kept: at least that of the last one."""
        loop = self._loop
        given = [*graph.phi.values(), *loop.theta.values(), *pytrees.tensors(self._support(k))]
        size = graphs.saved_bytes([graph.value, *graph.g.values()], given)
        loop.kept_from = max(loop.first, loop.steps - max(1, loop.budget // max(size, 1)))

    def query(self, k: int, x: Tree, y: Target) -> Graph:
        """Of the query loss at phi_k. Per-step layers read the slot of step k - 1."""
        loop, phi = self._loop, self.phi(k)
        with torch.set_grad_enabled(loop.differentiated), loop.of_pass(self._number, 2 * k + 1, max(k - 1, 0), False):
            return Graph(loop, self._identity, k, phi, x, y)

    def adjoint(self, v: Tensors, v_of_step: Mapping[int, Tensors], sums: Sums) -> Tensors:
        """The cotangent of phi_0 from those of phi_K, v, and of phi_0 .. phi_{K-1}; one that is missing is zero.

        Gradients in other tensors are added to `sums`.
        """
        loop = self._loop
        state: dict[str, State] = {}
        for k in reversed(range(loop.steps)):
            if k >= loop.first:
                graph = self._differentiated(k) if loop.second_order else None
                if loop.update.is_linear:
                    v, v_g = loop.update.of_linear_step(k, v)
                else:
                    new, (phi, before) = self.phi(k + 1), self._at(k)
                    g = _detached(graph.g) if graph else self._gradient(k)
                    with generators.at(self._random_of_updates[k]) if k in self._random_of_updates else nullcontext():
                        v, v_g, state = loop.update.of_step((phi, new), g, before, k, v, state, sums)
                if graph:
                    v = graph.pulled([(graph.g[name], c) for name, c in v_g.items()], self._leaves, sums, v)
            else:
                state = {}
            v = _sum(_sum(v, v_of_step.get(k, {})), sums.of_steps.pop(k, {}))
        loop.update.of_start(self.phi(0), state, sums)
        return v

    def _gradient(self, k: int) -> Tensors:
        """g_k, where the graph of step k is not differentiated."""
        return self._g[k] if k in self._g else _detached(self._again(k, self.phi(k)).g)

    def _differentiated(self, k: int) -> Graph:
        """The graph of step k with its gradient, which is given away if it was kept and built again otherwise.

        Raises:
            RuntimeError: forward returns something else than before.
        """
        graph = self._graphs.pop(k, None)
        return self._again(k, self.phi(k), create_graph=True) if graph is None else graph

    def _again(self, k: int, phi: Tensors, create_graph: bool = False) -> Graph:
        with generators.at(self._random[k]) if k in self._random else nullcontext():
            graph = self._graph(k, phi)
        graph.differentiate(create_graph)
        if not same(graph.sign(), self._signs[k]):
            raise RuntimeError(
                f"the model and the loss must return the same in a second call with the same arguments, got another "
                f"value or gradient in inner step {k}: graphs of inner steps that are not kept are built again, so "
                "code must not depend on how often it has been called"
            )
        return graph


def _detached(tensors: Tensors) -> Tensors:
    return {name: t.detach() for name, t in tensors.items()}


def _sum(v: Tensors, more: Tensors) -> Tensors:
    """Of cotangents, by name."""
    return {**more, **{name: c + more[name] if name in more else c for name, c in v.items()}} if more else v
