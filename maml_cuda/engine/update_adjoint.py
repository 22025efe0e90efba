"""The adjoint of what an inner step does with the gradient: (phi_{k+1}, s_{k+1}) = update(phi_k, g_k, s_k)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from maml_cuda.capture import generators
from maml_cuda.engine import graphs
from maml_cuda.engine.sums import Leaf, Sums
from maml_cuda.torch_private import gradients
from maml_cuda.updates import InnerUpdate, State

Tensors = dict[str, Tensor]
States = Mapping[str, State]


def is_linear(update: InnerUpdate) -> bool:
    """Whether the adjoint needs cotangents alone: phi - alpha g, with rates that are not differentiated."""
    changed = update.transform is not None or update.clip_norm is not None or update.clip_value is not None
    updates = update.updates.values()
    return not changed and all(u.is_plain and not any(t.requires_grad for t in u.tensors()) for u in updates)


class UpdateAdjoint:
    """Args:
    update: its tensors are leaves where their gradient is wanted.
    leaves: of these tensors.
    """

    def __init__(self, update: InnerUpdate, leaves: Sequence[Leaf]) -> None:
        self.update, self.leaves, self.is_linear = update, leaves, is_linear(update)
        rates = {u.rate.value if isinstance(u.rate.value, float) else None for u in update.updates.values()}
        self._rate = rates.pop() if self.is_linear and len(rates) == 1 else None  # if it is one number

    def step(
        self, phi: Tensors, g: Tensors, state: States, k: int, random: dict[int, generators.States]
    ) -> tuple[Tensors, States]:
        """phi_{k+1} and s_{k+1}, without a graph. `random` gets the states from which a transform draws numbers."""
        with torch.no_grad():
            if self.update.transform is not None:
                before = generators.states()
                new = self.update.step(phi, g, state, k)
                if generators.states() != before:
                    random[k] = before
                return new
            if self._rate is None:
                return self.update.step(phi, g, state, k)
            moved = torch._foreach_add([phi[name] for name in g], list(g.values()), alpha=-self._rate)
            return dict(zip(g, moved, strict=True)), state

    def of_linear_step(self, k: int, v: Tensors) -> tuple[Tensors, Tensors]:
        """`of_step` where the adjoint is linear: from the cotangent of phi_{k+1}, those of phi_k and g_k."""
        if self._rate is None or not v:
            return v, {name: self._of_gradient(name, c, k) for name, c in v.items()}
        return v, dict(zip(v, torch._foreach_mul(list(v.values()), -self._rate), strict=True))

    def of_step(
        self,
        path: Sequence[Tensors],
        g: Tensors,
        state: States,
        k: int,
        v: Tensors,
        v_state: dict[str, State],
        sums: Sums,
    ) -> tuple[Tensors, Tensors, dict[str, State]]:
        """From the cotangents of phi_{k+1} and s_{k+1}, v and v_state, those of phi_k, g_k and s_k.

        A cotangent that is missing is zero. Those of the update's own tensors are added to `sums`, as are those of
        tensors that a transform reads from outside.

        Args:
            path: phi_k and phi_{k+1}.
            g, state: of step k.

        Raises:
            RuntimeError: a transform returns something else than before.
        """
        phi, g = _leaves(path[0]), _leaves(g)
        state = {name: _leaves(part) for name, part in state.items()}
        with torch.enable_grad():
            new, after = self.update.step(phi, g, state, k)
        if self.update.transform is not None and not all(same(new[name], path[1][name]) for name in phi):
            raise RuntimeError(
                "inner_transform must return the same in a second call with the same gradients, got other values: it "
                "is called again for the meta-gradient"
            )
        outputs = [(new[name], c) for name, c in v.items()]
        outputs += [(after[name][key], c) for name, part in v_state.items() for key, c in part.items()]
        places = [(name, key) for name, part in state.items() for key in part]
        inputs = [*phi.values(), *g.values(), *(state[name][key] for name, key in places)]
        rest = iter(pulled(outputs, inputs, self.leaves, sums, self._outside(new, inputs)))
        v = {name: c for name in phi if (c := next(rest)) is not None}
        v_g = {name: c for name in g if (c := next(rest)) is not None}
        before: dict[str, State] = {}
        for name, key in places:
            if (c := next(rest)) is not None:
                before.setdefault(name, {})[key] = c
        return v, v_g, before

    def of_start(self, phi: Tensors, v_state: States, sums: Sums) -> None:
        """Adds the gradients that the initial state has from its cotangent."""
        if any(v_state.values()):
            with torch.enable_grad():
                state = self.update.start(phi)
            outputs = [(state[name][key], c) for name, part in v_state.items() for key, c in part.items()]
            pulled(outputs, [], self.leaves, sums)

    def _outside(self, new: Tensors, inputs: Sequence[Tensor]) -> list[Leaf]:
        """What a transform reads from outside."""
        if self.update.transform is None:
            return []
        known = {id(t) for t in inputs} | {id(leaf.tensor) for leaf in self.leaves}
        found = graphs.leaves([new[name] for name in self.update.updates])
        return [Leaf.of_itself(t) for t in found if id(t) not in known]

    def _of_gradient(self, name: str, c: Tensor, k: int) -> Tensor:
        alpha = self.update.updates[name].rate.at(k)
        return c * (-alpha.to(c.dtype.to_real()) if isinstance(alpha, Tensor) else -alpha)


def pulled(
    outputs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], leaves: Sequence[Leaf], sums: Sums,
    outside: Sequence[Leaf] = (),
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the sum of <output, cotangent> in the inputs; None for what does not reach it.

    Those in the leaves are added to the sums.

    Args:
        outside: more leaves, which other graphs share.
    """
    outputs = [(o, c) for o, c in outputs if o.requires_grad]
    if not outputs:
        return [None] * len(inputs)
    values, cotangents = zip(*outputs, strict=True)
    wanted = [*inputs, *(leaf.tensor for leaf in (*leaves, *outside))]
    if not wanted:
        return []
    with graphs.without_hooks(leaf.tensor for leaf in outside):
        # What the user's code has computed from a tensor outside is needed by other steps and tasks.
        grads = gradients(values, wanted, cotangents, retain_graph=bool(outside))
    for leaf, g in zip([*leaves, *outside], grads[len(inputs) :], strict=True):
        sums.add(leaf, g)
    return list(grads[: len(inputs)])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two values are the same but for rounding."""
    return torch.allclose(a.detach(), b, rtol=torch.finfo(b.dtype).eps ** 0.5, atol=1e-30, equal_nan=True)


def _leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}
