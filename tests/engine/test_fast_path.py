"""The fast path: from the second call on, a meta-step skips torch's dispatcher if nothing can observe it.

Results and errors are the same as without it.
"""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import maml_cuda
from maml_cuda import FusedMAML, torch_private
from maml_cuda.engine import binding, fast_path, ops, problem
from maml_cuda.plan import proof
from tests import conftest


class Own(Tensor):
    """A subclass of Tensor."""


class Watcher(TorchDispatchMode):
    """Counts the calls of maml_cuda's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen += str(function).startswith("maml_cuda.meta_gradient")
        return function(*args, **(kwargs or {}))


def episode(tasks: int = 3) -> list[Tensor]:
    return conftest.episode(tasks=tasks, n=(4, 5), target=(3,))


@pytest.fixture
def maml() -> FusedMAML:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return FusedMAML(model, nn.Parameter(torch.tensor([0.1, 0.2]).double()), 2, loss="mse")


def step(maml: FusedMAML, data: list[Tensor], **given: Any) -> list[Tensor]:
    maml.zero_grad()
    out = maml(*data, **given)
    out.loss.backward()
    return [out.loss.detach(), out.task_losses, out.logits, out.support_losses, *(p.grad for p in maml.parameters())]


def backward(maml: FusedMAML, data: list[Tensor], **given: Any) -> list[Tensor]:
    maml.zero_grad()
    out = maml.backward(*data, **given)
    assert not out.loss.requires_grad
    return [out.loss, out.task_losses, out.logits, out.support_losses, *(p.grad for p in maml.parameters())]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 0.5, 1.0]).double()])
def test_the_same_bits_from_the_second_call_on(maml, weights, plain_device):
    maml.to(plain_device)
    data = [d.to(plain_device) for d in episode()]
    weights = None if weights is None else weights.to(plain_device)
    first = step(maml, data, task_weights=weights)
    with mock.patch.object(ops, "meta_step", wraps=ops.meta_step) as direct:
        assert equal(step(maml, data, task_weights=weights), first)
        assert direct.call_count == 1
        with Watcher() as watcher:
            assert equal(step(maml, data, task_weights=weights), first)
        assert watcher.seen == 1
    maml.first_order = True
    assert not equal(step(maml, data, task_weights=weights), first)
    maml.first_order = False
    assert equal(step(maml, data, task_weights=weights), first)
    with torch.no_grad():
        assert not maml(*data, task_weights=weights).loss.requires_grad
        assert torch.equal(maml(*data, task_weights=weights).logits, first[2])


@pytest.mark.parametrize("loss", ["mse", nn.functional.mse_loss])
@pytest.mark.parametrize(
    ("model", "sample", "target"),
    [
        (nn.Conv2d(2, 3, 2), (2, 4, 3), (3, 3, 2)),
        (nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), (3,), ()),  # as of squeeze(-1)
        (nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1))), (3,), (4, 1)),
    ],
)
def test_predictions_of_any_shape(model, sample, target, loss):
    data = conftest.episode(sample, n=(4, 5), target=target)
    maml = conftest.check_meta_gradient(model.double(), loss, data, 0.1, 2)
    first = step(maml, data)
    assert first[2].shape == data[3].shape
    with mock.patch.object(fast_path, "meta_step", wraps=fast_path.meta_step) as direct:
        assert equal(step(maml, data), first)
        assert direct.call_count == 1


def test_every_check_holds_at_the_second_call(maml):
    data = episode()
    for _ in range(2):
        step(maml, data)
    with pytest.raises(ValueError, match="x_qry must have 3 tasks like x_spt, got 2"):
        maml(*data[:2], *episode(2)[2:])
    with pytest.raises(TypeError, match="y_qry must have the model's dtype"):
        maml(*data[:3], data[3].float())
    learned = data[0].clone().requires_grad_()
    maml(learned, *data[1:]).loss.backward()
    assert learned.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"task_weights must have shape \[3\]"):
        maml(*data, task_weights=torch.ones(2).double())
    with pytest.raises(TypeError, match="x_spt must be a tensor or a pytree of tensors, got list"):
        maml(data[0].tolist(), *data[1:])


def test_what_is_not_dense_or_not_torch_s_own(maml):
    data = episode()
    expected = step(maml, data)
    step(maml, data)
    strided = [d.repeat_interleave(2, dim=1)[:, ::2] for d in data]
    negated = [torch._neg_view(-d) for d in data]
    own = [d.as_subclass(Own) for d in data]
    for other in (strided, negated, own):
        assert equal([t.as_subclass(Tensor) for t in step(maml, other)], expected)


def test_a_change_of_the_model_is_followed(maml):
    data = episode()
    before = [step(maml, data), step(maml, data)][1]
    maml.model[0].weight.data = maml.model[0].weight.data * 2
    changed = step(maml, data)
    assert not equal(changed, before)
    assert equal(step(maml, data), changed)
    maml.model[2].bias.requires_grad_(False)
    maml.zero_grad()
    maml(*data).loss.backward()
    assert maml.model[2].bias.grad is None
    maml.model[1] = nn.ReLU()
    assert not torch.equal(maml(*data).logits, changed[2])


def test_third_order_raises(maml):
    data = episode()
    for _ in range(2):
        loss = maml(*data).loss
        grads = torch.autograd.grad(loss, list(maml.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="third order"):
            (sum(g.square().sum() for g in grads) + sum(p.sum() for p in maml.parameters())).backward()


def test_two_backwards(maml):
    data = episode()
    once = [step(maml, data), step(maml, data)][1][4:]
    once = [g.clone() for g in once]
    maml.zero_grad()
    loss = maml(*data).loss
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([p.grad for p in maml.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 0.5, 1.0]).double()])
def test_backward_is_a_call_and_its_backward(maml, weights):
    data = episode()
    expected = step(maml, data, task_weights=weights)
    assert equal(backward(maml, data, task_weights=weights), expected)
    with mock.patch.object(torch.autograd, "backward", side_effect=AssertionError("the engine")):
        assert equal(backward(maml, data, task_weights=weights), expected)
    for p in maml.parameters():  # the next gradient is added in place, as autograd does
        p.grad, p.before = torch.ones_like(p), p.grad
        p.held = p.grad
    maml.backward(*data, task_weights=weights)
    for p in maml.parameters():
        assert p.grad is p.held
        assert not p.grad.requires_grad
        assert torch.equal(p.grad, 1 + p.before)
    maml.first_order = True
    assert equal(backward(maml, data, task_weights=weights), step(maml, data, task_weights=weights))
    maml.query_weights = [0.5, 0.0, 1.0]
    assert equal(backward(maml, data, task_weights=weights), step(maml, data, task_weights=weights))


def test_backward_on_every_machine(machine):
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    maml = FusedMAML(model, 0.1, 2, loss="mse", backend="fused")
    first, second = ([d.float() for d in episode()] for _ in range(2))
    expected = step(maml, first)
    for _ in range(3):
        found = backward(maml, first)
        backward(maml, second)  # its gradients have their own memory
        assert equal(found, expected)


def test_backward_of_rates_of_another_dtype():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    maml = FusedMAML(model, nn.Parameter(torch.tensor([0.1, 0.2])), 2, loss="mse", backend="fused")
    data = episode()
    expected = step(maml, data)
    for _ in range(2):
        assert equal(backward(maml, data), expected)
    assert maml.inner_lr.grad.dtype == torch.float32


def test_backward_on_the_general_path():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    maml = FusedMAML(model, 0.1, 2, loss="mse", backend="reference")
    data = episode()
    assert equal(backward(maml, data), step(maml, data))
    data[0].requires_grad_()
    maml.backward(*data)
    expected, data[0].grad = data[0].grad, None
    maml(*data).loss.backward()
    assert torch.equal(data[0].grad, expected)


def test_backward_leaves_to_autograd_what_is_more_than_adding(maml):
    data = episode()
    expected = [backward(maml, data), backward(maml, data)][1]
    weight, bias = maml.model[0].weight, maml.model[2].bias
    seen = []
    handles = [
        weight.register_hook(lambda g: 2 * g),
        bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
    ]
    found = dict(zip(maml.state_dict(), backward(maml, data)[4:], strict=True))
    for name, grad in zip(maml.state_dict(), expected[4:], strict=True):
        assert torch.equal(found[name], 2 * grad if name == "model.0.weight" else grad)
    assert len(seen) == 1
    assert torch.equal(seen[0], bias.grad)
    for handle in handles:
        handle.remove()
    maml.model[2].bias.requires_grad_(False)
    maml.backward(*data)
    maml.zero_grad()
    maml.backward(*data)
    assert maml.model[2].bias.grad is None
    assert maml.model[2].weight.grad is not None


def test_backward_keeps_the_layout_of_a_parameter():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 2)).to(memory_format=torch.channels_last)
    maml = FusedMAML(model, 0.1)
    x, y = torch.randn(2, 3, 2, 6, 6), torch.randint(2, (2, 3))
    optimizer = torch.optim.Adam(maml.parameters(), fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        maml.backward(x, y, x, y)
        found = [p.grad for p in maml.parameters()]
        maml.zero_grad()
        maml(x, y, x, y).loss.backward()
        for p, grad in zip(maml.parameters(), found, strict=True):
            assert grad.stride() == p.stride()
            assert torch.equal(grad, p.grad)
        optimizer.step()


def test_backward_refuses(maml):
    data = episode()
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match="backward must have gradients on"):
            maml.backward(*data)
        maml.zero_grad()
        with pytest.raises(ValueError, match="x_qry must have 3 tasks like x_spt, got 2"):
            maml.backward(*data[:2], *episode(2)[2:])
        assert all(p.grad is None for p in maml.parameters())
        maml.backward(*data)


class Recorder:
    """Notes the names of the attributes that are asked of it."""

    def __init__(self, of: Any, names: list[str]) -> None:
        self.of, self.names = of, names

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(self.of, name)


def test_a_warm_call_enters_the_core_twice(maml, machine):
    data = episode()
    for _ in range(3):  # on a GPU the second call captures a graph
        step(maml, data)
    entered: list[str] = []
    for _, each, _ in maml._binding().problems.values():
        each.core = Recorder(each.core, entered)
        for runner in each.runners.values():
            runner._core = Recorder(runner._core, entered)
    recorder = Recorder(maml_cuda._core, entered)
    with mock.patch.object(binding, "_core", recorder), mock.patch.object(problem, "_core", recorder):
        maml(*data).loss.backward()
        maml.backward(*data)
    assert entered in (["signature", "run"] * 2, ["signature", "run_graph"] * 2)


def test_many_shapes_keep_a_bounded_number_of_problems(maml, monkeypatch):
    monkeypatch.setattr(proof, "why_not", lambda *_: "")  # a proof for each shape takes too long here
    for n in range(1, 200):
        x, y = torch.randn(1, n, 3).double(), torch.randn(1, n, 3).double()
        maml(x, y, x, y)
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o) is problem.Problem]  # isinstance asks lazy modules
    assert problem.problem_of.cache_info().currsize == problem.MOST_PROBLEMS
    assert len(maml._binding().problems) == binding.MOST_PROBLEMS
    assert len(kept) <= problem.MOST_PROBLEMS + binding.MOST_PROBLEMS


def test_a_torch_without_one_of_the_probes_has_no_fast_path(maml, monkeypatch):
    data = episode()
    expected = [step(maml, data), step(maml, data)][1]
    probe = torch_private._probe(torch._C, "_a_probe_that_this_torch_lacks")
    monkeypatch.setattr(torch_private, "_profiler", probe)
    assert not torch_private.unobserved()
    with mock.patch.object(fast_path, "meta_step", side_effect=AssertionError("the fast path")):
        assert equal(step(maml, data), expected)
