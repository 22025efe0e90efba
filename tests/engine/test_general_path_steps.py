"""The general path one inner step at a time: graphs kept and built again, memory, tensors read from outside."""

from __future__ import annotations

import gc
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, optim, reference
from maml_cuda.engine import graphs
from maml_cuda.formulas import DIFFERENTIABLE, Formulas
from tests import conftest

pytestmark = pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")

# How graphs of inner steps are treated: kept, kept of the last step alone, built again, built again in segments.
TREATMENTS = {"kept": (None, None), "last": (None, 1), "recompute": ("recompute", None), "sqrt": ("sqrt", None)}


@pytest.fixture(params=TREATMENTS)
def checkpoint(request, monkeypatch) -> str | None:
    chosen, budget = TREATMENTS[request.param]
    if budget is not None:
        monkeypatch.setattr("maml_cuda.engine.general_path.GRAPHS", budget)
    return chosen


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def episode() -> list[Tensor]:
    return conftest.episode(n=(5, 7), dtype=torch.float64)


def plain(model: nn.Module, data, steps: int, leaves: list[Tensor], forward=None, first_order: bool = False):
    """The gradients of the mean query loss in the leaves, by one graph of the whole inner loop."""
    forward = forward or (lambda phi, x: torch.func.functional_call(model, phi, (x,)))
    losses = []
    for x_spt, y_spt, x_qry, y_qry in zip(*data, strict=True):
        phi = dict(model.named_parameters())
        for _ in range(steps):
            value = F.cross_entropy(forward(phi, x_spt), y_spt)
            grads = torch.autograd.grad(value, list(phi.values()), create_graph=not first_order)
            phi = {n: p - 0.2 * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        losses.append(F.cross_entropy(forward(phi, x_qry), y_qry))
    return torch.autograd.grad(torch.stack(losses).mean(), leaves, retain_graph=True)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_whatever_graphs_are_kept(checkpoint, steps, first_order):
    model, data = net(), episode()
    expected = plain(model, data, steps, list(model.parameters()), first_order=first_order)
    FusedMAML(
        model, 0.2, steps, backend="reference", checkpoint=checkpoint, first_order=first_order
    )(*data).loss.backward()  # fmt: skip
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("transform", [None, lambda grads: {name: g * torch.rand_like(g) for name, g in grads.items()}])
def test_the_same_bits_whatever_graphs_are_kept(monkeypatch, transform, first_order):
    data, gradients = episode(), []
    for treatment, budget in TREATMENTS.values():
        monkeypatch.setattr("maml_cuda.engine.general_path.GRAPHS", budget or 1 << 30)
        model = net()
        rate = nn.Parameter(torch.full((6,), 0.2).double())
        maml = FusedMAML(
            model, rate, 6, backend="reference", checkpoint=treatment, inner_optimizer=optim.Adam(),
            inner_clip_norm=0.5, query_weights=[0.1, 0, 0.3, 0, 1, 0.2, 0.4], inner_transform=transform,
            first_order=first_order,
        )  # fmt: skip
        torch.manual_seed(4)
        maml(*data).loss.backward()
        gradients.append([p.grad for p in maml.parameters()])
    for kept, *others in zip(*gradients, strict=True):
        assert all(torch.equal(kept, other) for other in others)


class Saved:
    """Counts the memory that autograd keeps at once for backward passes, in elements, but for the parameters'."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> Saved:
        counter = self

        class Held:
            def __init__(self, t: Tensor) -> None:
                self.t = t.detach()  # with its graph it would be part of a cycle
                counter.now += t.numel()
                counter.most = max(counter.most, counter.now)

            def __del__(self) -> None:
                counter.now -= self.t.numel()

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("optimizer", [None, optim.Adam()])
@pytest.mark.parametrize("treatment", ["recompute", "last"])
def test_graphs_do_not_grow_with_the_steps(treatment, optimizer, monkeypatch):
    """Of each step, one set of parameters and the state of the optimizer are kept; no graph."""
    chosen, budget = TREATMENTS[treatment]
    monkeypatch.setattr("maml_cuda.engine.general_path.GRAPHS", budget or 1 << 30)
    monkeypatch.setattr("maml_cuda.functional.no_saved_tensor_hooks", _nothing)
    data, most = [t[:1] for t in episode()], []
    for steps in (10, 100, 1000):
        maml = FusedMAML(
            net(), 0.01, steps, backend="reference", checkpoint=chosen, inner_optimizer=optimizer
        )  # fmt: skip
        with Saved() as saved:
            maml.backward(*data)
            gc.collect()
        most.append(saved.most)
        assert saved.now == 0
    assert most[0] == most[1] == most[2] > 0


@pytest.mark.parametrize("options", [{}, {"inner_optimizer": optim.Adam()}, {"meta_gradient": "reptile"}])
def test_sqrt_keeps_the_parameters_of_few_steps(options):
    """At most 2 sqrt(K) of them, and some more that a step computes with; the others keep those of each step."""
    data, most = [t[:1] for t in episode()], {}
    steps = 144

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.most, self.calls = net(), 0, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls % 7 == 0:
                memories = {
                    t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) is Tensor and t.shape == (5, 3)
                }
                self.most = max(self.most, len(memories))
            return self.net(x)

    for checkpoint in ("recompute", "sqrt"):
        model = Counting()
        FusedMAML(model, 0.01, steps, backend="reference", checkpoint=checkpoint, **options).backward(*data)
        most[checkpoint] = model.most
    of_state = 3 if "inner_optimizer" in options else 1
    assert most["recompute"] > of_state * steps * 0.9
    assert most["sqrt"] <= of_state * 2 * 12 + 16


def test_kept_graphs_stay_within_their_budget(monkeypatch):
    monkeypatch.setattr("maml_cuda.functional.no_saved_tensor_hooks", _nothing)
    data, most = [t[:1] for t in episode()], []
    monkeypatch.setattr("maml_cuda.engine.general_path.GRAPHS", 20_000)
    for steps in (50, 100):
        with Saved() as saved:
            FusedMAML(net(), 0.01, steps, backend="reference").backward(*data)
        most.append(saved.most)
    assert most[0] == most[1]


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error) -> None: ...


def test_saved_bytes_are_those_of_saved_tensors():
    x, w = torch.randn(7, 3), torch.randn(5, 3, requires_grad=True)
    y = torch.tanh(x @ w.T)
    assert graphs.saved_bytes([y.sum()], [x, w]) == 4 * 7 * 5
    assert graphs.saved_bytes([y.sum()], []) == 4 * (7 * 5 + 7 * 3)


class Noisy(nn.Module):
    """Adds random numbers of torch, Python and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x)) + random.random()


def test_random_numbers_of_forward_are_drawn_again(checkpoint):
    """Other than dropout's masks, which follow from a seed."""
    data, gradients = episode(), []
    for treatment in (checkpoint, None):
        model = Noisy()
        torch.manual_seed(5)
        random.seed(5)
        FusedMAML(model, 0.2, 3, backend="reference", checkpoint=treatment)(*data).loss.backward()
        gradients.append(([p.grad for p in model.parameters()], torch.rand(()), random.random()))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * self.calls


def test_code_that_returns_something_else_the_second_time_is_refused():
    maml = FusedMAML(Stateful(), 0.2, 2, backend="reference", checkpoint="recompute")
    with pytest.raises(RuntimeError, match="must return the same in a second call with the same arguments, got a"):
        maml(*episode())
    FusedMAML(Stateful(), 0.2, 2, backend="reference")(*episode()).loss.backward()


def test_a_transform_that_returns_something_else_the_second_time_is_refused():
    calls = []

    def transform(grads):
        calls.append(0)
        return {name: g * len(calls) for name, g in grads.items()}

    maml = FusedMAML(net(), 0.2, 2, backend="reference", inner_transform=transform)
    with pytest.raises(RuntimeError, match="inner_transform must return the same in a second call"):
        maml(*episode())


class Keeps(nn.Module):
    """Keeps a value of one inner step, with its graph, and reads it in a later one."""

    def __init__(self, kept_at: int, read_at: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.calls, self.kept_at, self.read_at = net(), 0, kept_at, read_at

    def forward(self, x: Tensor) -> Tensor:
        k, self.calls = self.calls, self.calls + 1
        if k == self.kept_at:
            self.kept = self.net[0].weight.sum(0).tanh()
        return self.net(x + self.kept if k in self.read_at else x)


@pytest.mark.parametrize("kept_at", [0, 1])
def test_a_value_that_forward_keeps_with_its_graph_for_a_later_step(kept_at):
    """3 inner steps and a query pass of one task."""
    data = [t[:1] for t in episode()]
    model, plain_model = (Keeps(kept_at, (2, 3)) for _ in range(2))
    expected = plain(plain_model, data, 3, list(plain_model.parameters()))
    FusedMAML(model, 0.2, 3, backend="reference")(*data).loss.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-14)


def test_a_value_that_forward_keeps_for_another_task_is_refused():
    maml = FusedMAML(Keeps(1, (5,)), 0.2, 3, backend="reference")
    with pytest.raises(ValueError, match="must be read in later inner steps of the same task alone, got one of inner"):
        maml(*episode())


def test_a_kept_value_is_refused_where_graphs_are_built_again():
    maml = FusedMAML(Keeps(1, (2, 3)), 0.2, 3, backend="reference", checkpoint="recompute")
    with pytest.raises(RuntimeError, match="must return the same in a second call with the same arguments"):
        maml(*[t[:1] for t in episode()])


class HooksItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        if self.net[0].weight.requires_grad:
            self.net[0].weight.register_hook(lambda g: 2 * g)
        return self.net(x)


def test_a_hook_that_forward_registers_on_a_parameter_is_refused():
    maml = FusedMAML(HooksItsWeight(), 0.2, 2, backend="reference")
    with pytest.raises(ValueError, match=r"forward must register no hook on a parameter, got one on net\.0\.weight"):
        maml(*episode())


class Late(nn.Module):
    """Calls a function in some passes alone."""

    def __init__(self, function, passes: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.function, self.passes, self.calls = net(), function, passes, 0

    def forward(self, x: Tensor) -> Tensor:
        k, self.calls = self.calls, self.calls + 1
        hidden = self.net[0](x)
        return self.net[2](self.function(hidden) if k in self.passes else hidden.tanh())


FUNCTIONS = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "hardsigmoid": F.hardsigmoid,
    "weight_norm": lambda x: torch._weight_norm(x, 1.5 + x.detach()[:, :1] ** 2, 0),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_that_needs_a_formula_in_later_passes_alone_is_refused(function):
    data = [t[:1] for t in episode()]
    for passes in ((1,), (2,)):
        maml = FusedMAML(Late(FUNCTIONS[function], passes), 0.2, 2, backend="reference")
        with pytest.raises(ValueError, match="in its first pass too if it calls them, got one of them in a later pass"):
            maml(*data)


class LateLayer(Late):
    def __init__(self) -> None:
        super().__init__(None, (1, 2))
        self.function = nn.Hardsigmoid()


@pytest.mark.parametrize("model", [lambda: Late(F.hardsigmoid, (0,)), lambda: Late(F.hardsigmoid, (0, 1)), LateLayer])
def test_functions_that_need_a_formula(model):
    """torch has no second derivative of hardsigmoid."""

    def forward(phi, x: Tensor) -> Tensor:
        with Formulas(DIFFERENTIABLE):
            return torch.func.functional_call(plain_model, phi, (x,))

    data, plain_model, own = [t[:1] for t in episode()], model(), model()
    expected = plain(plain_model, data, 2, list(plain_model.parameters()), forward)
    FusedMAML(own, 0.2, 2, backend="reference")(*data).loss.backward()
    for p, g in zip(own.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-14)


class Signs(torch.autograd.Function):
    """A backward that is not linear."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01)


class NotLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](Signs.apply(self.net[1](self.net[0](x))))


def test_a_backward_that_is_not_linear(checkpoint):
    """What is clamped is the gradient of one task's loss, without its weight."""
    data, model = episode(), NotLinear()
    _, expected = reference.meta_gradient(model, "cross_entropy", *data, 0.2, 2)
    maml = FusedMAML(model, 0.2, 2, backend="reference", checkpoint=checkpoint)
    maml(*data).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-14)


# -- tensors that forward reads from outside of the model ------------------------------------------------------


class Outside(nn.Module):
    """Reads a leaf, and something computed of a leaf, that are not its parameters."""

    def __init__(self, *shared: Tensor) -> None:
        super().__init__()
        self.net, self.shared = net(), shared

    def forward(self, x: Tensor) -> Tensor:
        scale, prompt = self.shared
        return self.net(x + prompt) * scale


def outside() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.tensor(1.3).double().requires_grad_(), torch.randn(3).double().requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "auto"])  # a model that reads such a tensor is not fused
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_tensor_outside_of_the_model_receives_its_gradient(checkpoint, first_order, computed, backend):
    scale, prompt = outside()
    read = (scale, torch.tanh(prompt * 2)) if computed else (scale, prompt)
    model, data = Outside(*read), episode()
    leaves = [*model.parameters(), scale, prompt]
    expected = plain(model, data, 3, leaves, first_order=first_order)
    maml = FusedMAML(model, 0.2, 3, backend=backend, checkpoint=checkpoint, first_order=first_order)
    maml(*data).loss.backward()
    for t, g in zip(leaves, expected, strict=True):
        assert t.grad is not None
        assert g.norm() > 0
        torch.testing.assert_close(t.grad, g, rtol=1e-10, atol=1e-13)


class Scaled(torch.autograd.Function):
    """x, whose gradient is scaled."""

    @staticmethod
    def forward(ctx, x, read):
        ctx.read = read
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.read(), None


class OutsideInBackward(Outside):
    """The gradient of its loss depends on a tensor outside, but not the loss itself."""

    by_hook = False
    function = Scaled

    def forward(self, x: Tensor) -> Tensor:
        scale, prompt = self.shared
        y = self.net(x + prompt)
        if not self.by_hook:
            return self.function.apply(y, lambda: scale)
        if y.requires_grad:
            y.register_hook(lambda g: g * scale)
        return y


@pytest.mark.parametrize("by_hook", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_tensor_that_only_a_backward_reads_receives_its_gradient(checkpoint, by_hook, adapted):
    scale, prompt = outside()
    model, data = OutsideInBackward(scale, prompt), episode()
    model.by_hook = by_hook
    leaves = [*model.parameters(), scale, prompt]
    expected = plain(model, data, 3, leaves)
    maml = FusedMAML(model, 0.2, 3, backend="reference", checkpoint=checkpoint)
    if adapted:
        fast = maml.adapt(*data[:2], differentiable=True)
        losses = [
            F.cross_entropy(torch.func.functional_call(model, {n: p[t] for n, p in fast.items()}, (x,)), y)
            for t, (x, y) in enumerate(zip(*data[2:], strict=True))
        ]
        torch.stack(losses).mean().backward()
    else:
        maml(*data).loss.backward()
    for t, g in zip(leaves, expected, strict=True):
        assert g.norm() > 0
        torch.testing.assert_close(t.grad, g, rtol=1e-10, atol=1e-13)


class ScaledOnce(Scaled):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.read(), None


@pytest.mark.parametrize("adapted", [False, True])
def test_a_gradient_that_torch_would_leave_out_in_silence_is_refused(checkpoint, adapted):
    model, data = OutsideInBackward(*outside()), episode()
    model.function = ScaledOnce
    maml = FusedMAML(model, 0.2, 3, backend="reference", checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"must be differentiable at second order, got an autograd\.Function"):
        maml.adapt(*data[:2], differentiable=True) if adapted else maml(*data)
    assert all(p.grad is None for p in model.parameters())
    leaves = list(model.parameters())
    expected = plain(model, data, 3, leaves, first_order=True)
    FusedMAML(model, 0.2, 3, backend="reference", first_order=True)(*data).loss.backward()
    for t, g in zip(leaves, expected, strict=True):
        torch.testing.assert_close(t.grad, g, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_hooks_of_a_tensor_outside_see_its_whole_gradient_once(backend):
    gradients = []
    for factor in (1, 2):
        scale, prompt = outside()
        calls: list[Tensor] = []
        scale.register_hook(lambda g, k=factor, calls=calls: calls.append(g) or k * g)
        maml = FusedMAML(Outside(scale, prompt), 0.2, 2, backend=backend)
        maml(*episode()).loss.backward()
        assert len(calls) == 1
        gradients.append(scale.grad)
    torch.testing.assert_close(gradients[1], 2 * gradients[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_adapted_parameters_are_differentiable_in_a_tensor_outside(checkpoint, backend):
    scale, prompt = outside()
    model, data = Outside(scale, prompt), episode()
    leaves = [*model.parameters(), scale, prompt]
    expected = plain(model, data, 2, leaves)
    maml = FusedMAML(model, 0.2, 2, backend=backend, checkpoint=checkpoint)
    fast = maml.adapt(*data[:2], differentiable=True)
    losses = [
        F.cross_entropy(torch.func.functional_call(model, {n: p[t] for n, p in fast.items()}, (x,)), y)
        for t, (x, y) in enumerate(zip(*data[2:], strict=True))
    ]
    torch.stack(losses).mean().backward()
    for t, g in zip(leaves, expected, strict=True):
        torch.testing.assert_close(t.grad, g, rtol=1e-10, atol=1e-13)


# -- adapt ------------------------------------------------------------------------------------------------------


def test_adapt_can_be_differentiated_again_and_again(checkpoint):
    """backward twice with retain_graph, and a backward of the gradient itself."""
    model, (x, y, _, _) = net(), episode()
    maml = FusedMAML(model, 0.2, 2, backend="reference", checkpoint=checkpoint)
    p = next(model.parameters())

    def outer(phi) -> Tensor:
        return sum((q**3).sum() for q in phi.values())

    def unrolled() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x_t, y_t in zip(x, y, strict=True):
            phi = dict(model.named_parameters())
            for _ in range(2):
                value = F.cross_entropy(torch.func.functional_call(model, phi, (x_t,)), y_t)
                grads = torch.autograd.grad(value, list(phi.values()), create_graph=True)
                phi = {n: q - 0.2 * g for (n, q), g in zip(phi.items(), grads, strict=True)}
            total = total + outer(phi)
        return total

    loss, plain_loss = outer(maml.adapt(x, y, differentiable=True)), unrolled()
    (expected,) = torch.autograd.grad(plain_loss, p, retain_graph=True, create_graph=True)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss, p, retain_graph=True)[0], expected, rtol=1e-11, atol=1e-13)
    (got,) = torch.autograd.grad(loss, p, create_graph=True)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    second, expected_second = (torch.autograd.grad((g**2).sum(), p)[0] for g in (got, expected))
    torch.testing.assert_close(second, expected_second, rtol=1e-10, atol=1e-12)


def test_adapt_refuses_parameters_that_have_changed_since(checkpoint):
    model, (x, y, _, _) = net(), episode()
    fast = FusedMAML(model, 0.2, 2, backend="reference", checkpoint=checkpoint).adapt(x, y, differentiable=True)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(p.sum() for p in fast.values()).backward()


def test_rates_and_states_with_a_graph_that_are_no_parameters():
    """As on fused layers, what they are computed from receives its gradient."""
    data, found = episode(), []
    for backend in ("fused", "reference"):
        rate, momentum, buffer = (torch.full((), v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.7, 0.1))
        model = net()
        sgd = optim.SGD(momentum=momentum, state={"2.bias": {"momentum_buffer": buffer * torch.arange(4.0).double()}})
        FusedMAML(model, rate.exp() / 9, 2, inner_optimizer=sgd, backend=backend).backward(*data)
        found.append([rate.grad, momentum.grad, buffer.grad])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)
    assert min(g.abs().item() for g in found[1]) > 1e-6
