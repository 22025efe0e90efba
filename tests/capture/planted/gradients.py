"""Faults: the value is right and a derivative is not: derivatives that are cut, autograd inside forward, hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.capture.planted.settings import add, fault

# -- derivatives that are cut -------------------------------------------------------------------------------------

CUT = "cut derivatives"


@fault(CUT, "mlp", "detach")
def half_of_it_detached(self: Any, h: Tensor) -> Tensor:
    return h + h.detach()


@fault(CUT, "nested", "data")
def through_data(self: Any, h: Tensor) -> Tensor:
    return h * h.data


@fault(CUT, "conv4", "no_grad|gradients")
def a_region_without_gradients(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = h.sigmoid()
    return h * gate


@fault(CUT, "layer norm", "no_grad|gradients")
def set_grad_enabled(self: Any, h: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    gate = h * 2
    torch.set_grad_enabled(before)
    return h + gate


@fault(CUT, "group norm", "inference|gradients")
def inference_mode(self: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        gate = h.tanh()
    return h + gate.clone()


@torch.no_grad()
def gate_of(h: Tensor) -> Tensor:
    return h.tanh()


@fault(CUT, "resnet", "no_grad|gradients")
def a_helper_without_gradients(self: Any, h: Tensor) -> Tensor:
    return h + gate_of(h)


@fault(CUT, "policy", "detach")
def a_weight_detached(self: Any, h: Tensor) -> Tensor:
    return h + F.linear(h, self.head.mean.weight.detach()).sum(-1, keepdim=True)


@fault(CUT, "conv1d", "round|detach")
def rounded_with_a_straight_gradient(self: Any, h: Tensor) -> Tensor:
    return h + (h.round() - h).detach()


@fault(CUT, "regression", "numpy")
def through_numpy(self: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(h.detach().numpy())


@fault(CUT, "shared", "tolist|tensor")
def through_a_list(self: Any, h: Tensor) -> Tensor:
    return h + torch.tensor(h.tolist(), dtype=h.dtype)


@fault(CUT, "mlp", "copy_|empty|detach")
def copied_without_its_graph(self: Any, h: Tensor) -> Tensor:
    return h * torch.empty_like(h).copy_(h.detach())


@fault(CUT, "layer norm", "detach|norm")
def divided_by_a_detached_norm(self: Any, h: Tensor) -> Tensor:
    return h / h.detach().norm(dim=-1, keepdim=True)


@fault(CUT, "nested", "no_grad|gradients")
def gradients_on_inside_gradients_off(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = h * 3
    return a + b


@fault(CUT, "mlp", "detach_|in place")
def detached_in_place(self: Any, h: Tensor) -> Tensor:
    gate = h * 1
    gate.detach_()
    return h * gate


@fault(CUT, "policy", "tolist|tensor|depends")
def a_weight_through_a_list(self: Any, h: Tensor) -> Tensor:
    return h + torch.tensor(self.head.mean.weight.tolist()).double().sum(0)


@fault(CUT, "shared", "detach|checkpoint|mul")
def a_checkpoint_of_a_detached_value(self: Any, h: Tensor) -> Tensor:
    return checkpoint(lambda h: h * h.detach(), h, use_reentrant=False)


# -- autograd inside forward --------------------------------------------------------------------------------------

INSIDE = "autograd inside forward"


def energy(h: Tensor) -> Tensor:
    return (h.tanh() * h).sum()


@fault(INSIDE, "mlp", "grad")
def a_gradient_without_its_graph(self: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.grad(energy(h), h, retain_graph=True)[0]


@fault(INSIDE, "regression", "grad")
def a_gradient_with_its_graph(self: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.grad(energy(h), h, create_graph=True)[0]


@fault(INSIDE, "nested", "grad")
def a_gradient_of_a_leaf(self: Any, h: Tensor) -> Tensor:
    leaf = h.detach().requires_grad_()
    return h + torch.autograd.grad(energy(leaf), leaf)[0]


@fault(INSIDE, "conv1d", "grad|backward")
def a_backward(self: Any, h: Tensor) -> Tensor:
    leaf = h.detach().requires_grad_()
    energy(leaf).backward()
    return h * leaf.grad


@fault(INSIDE, "layer norm", "grad|func")
def a_functional_gradient(self: Any, h: Tensor) -> Tensor:
    return h + torch.func.grad(energy)(h)


@fault(INSIDE, "policy", "grad|jacobian|vjp")
def a_vector_jacobian_product(self: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.functional.vjp(torch.sin, h, torch.ones_like(h))[1]


@fault(INSIDE, "shared", "grad")
def a_gradient_of_the_input(self: Any, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    out = self.head(self.body(x))
    return out * torch.autograd.grad(out.sum(), x, create_graph=True)[0].sum(-1, keepdim=True)


@fault(INSIDE, "shared", "copy")
def a_copy_of_a_layer(self: Any, h: Tensor) -> Tensor:
    return h + sum(p.sum() for p in copy.copy(self.head).parameters())


# -- hooks --------------------------------------------------------------------------------------------------------

HOOKS = "hooks"
WORDS = "hook"


def on(register: str, answer: Any, path: str = "body") -> Any:
    return lambda model: getattr(model.get_submodule(path), register)(answer)


add("a forward hook", HOOKS, "mlp", WORDS, plant=on("register_forward_hook", lambda m, x, out: out * 1.5))
add(
    "a forward pre-hook",
    HOOKS,
    "conv4",
    WORDS,
    plant=on("register_forward_pre_hook", lambda m, x: (x[0] * 1.5,), "head"),
)
add("a hook of the model", HOOKS, "nested", WORDS, plant=on("register_forward_hook", lambda m, x, out: out * 1.5, ""))
add(
    "a backward hook", HOOKS, "layer norm", WORDS,
    plant=on("register_full_backward_hook", lambda m, grad_in, grad_out: (grad_in[0] * 2,), "head"),
)  # fmt: skip
add(
    "a backward pre-hook", HOOKS, "group norm", WORDS,
    plant=on("register_full_backward_pre_hook", lambda m, grad_out: (grad_out[0] * 2,), "body.1"),
)  # fmt: skip
add(
    "a hook added between calls", HOOKS, "resnet", WORDS,
    between=on("register_forward_hook", lambda m, x, out: out * 1.5),
)  # fmt: skip


def with_removable_hook(model: Any) -> None:
    model.handles = [model.body.register_forward_hook(lambda m, x, out: out * 1.5)]


add("a hook removed between calls", HOOKS, "conv1d", WORDS, plant=with_removable_hook,
    between=lambda m: m.handles[0].remove())  # fmt: skip


def with_changing_hook(model: Any) -> None:
    model.scale = [1.0]
    model.body.register_forward_hook(lambda m, x, out: out * model.scale[0])


add(
    "a hook that changes",
    HOOKS,
    "mlp",
    WORDS,
    plant=with_changing_hook,
    between=lambda m: m.scale.append(m.scale.pop() + 1),
)


@fault(HOOKS, "shared", WORDS)
def a_hook_of_a_value(self: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g * 2)
    return h


@fault(HOOKS, "policy", WORDS)
def a_hook_of_a_value_that_cuts(self: Any, h: Tensor) -> Tensor:
    """The gradient is right, and its derivative is not."""
    h = h * h
    h.register_hook(lambda g: g.detach())
    return h


@fault(HOOKS, "regression", WORDS)
def a_hook_of_a_graph_node(self: Any, h: Tensor) -> Tensor:
    h = h * 1.5
    if h.grad_fn is not None:
        h.grad_fn.register_hook(lambda grad_in, grad_out: tuple(g if g is None else g * 2 for g in grad_in))
    return h


@fault(HOOKS, "nested", WORDS)
def a_hook_of_one_of_two_values(self: Any, h: Tensor) -> Tensor:
    a, b = h * 1, h * 2
    a.register_hook(torch.sign)
    return a + b


add("a hook of a parameter", HOOKS, "mlp", WORDS, plant=lambda m: m.head.weight.register_hook(lambda g: g * 2))
add(
    "a hook of a parameter between calls", HOOKS, "conv1d", WORDS,
    between=lambda m: m.body[0].weight.register_hook(lambda g: g * 2),
)  # fmt: skip
