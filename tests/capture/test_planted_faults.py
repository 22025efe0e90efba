"""Models with one hidden fault each are computed right, or refused in words: never wrong, never another exception.

A fault is what a front end may misread: state that changes between two calls, a derivative that is cut or replaced, a
branch that is taken under tracing only. Each model is called twice. The oracle is a plain double-backward loop in this
file, on a second model of the same kind with the same history, so that both have the same Python state.

The second of two calls may meet what the first one left behind. BatchNorm's running statistics aside (update_statistics
writes them), each forward of a call sees the buffers that the model had before the call. Afterwards they are what the
first forward has left.
"""

from __future__ import annotations

import gc
import importlib
import re
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

from maml_cuda import FusedMAML
from tests import given_masks
from tests.capture.planted.settings import CASES, SETTINGS, TASKS, Fault, seed

NAMES = ("branches", "globals", "constants", "state", "gradients", "functions", "losses")
FILES = [importlib.import_module(f"tests.capture.planted.{name}") for name in NAMES]

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, STEPS = 0.1, 2
TOLERANCE = 1e-8
FAULTS = [name for name in CASES if name not in SETTINGS]
# These must be fused, so that refusing everything does not pass.
FUSED = {
    *SETTINGS,
    "a frozen parameter changed between calls",
    "a hook of a parameter",
    "a parameter replaced between calls",
    "layers tied between calls",
    "one parameter as weight and as bias",
    "one parameter in two layers",
    "statistics changed between calls",
    "statistics of a norm",
    "the training flag",
    "two parameters in one memory",
}
# In a refusal: the class whose forward has the fault, or the sentence of the proof.
NAMED = "Planted|do not compute what forward computes|could not be compared with the model"


@dataclass
class Answer:
    """What a call returned or raised, and what it did to the model.

    before, after: the state of the model (`parts`).
    """

    model: nn.Module
    before: dict[str, Any]
    after: dict[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)
    backend: str = ""
    error: Exception | None = None
    warnings: list[str] = field(default_factory=list)


# -- the oracle ---------------------------------------------------------------------------------------------------


def policy_loss(policy: tuple[Tensor, Tensor], target: Any) -> Tensor:
    mean, log_std = policy
    log_prob = torch.distributions.Normal(mean, log_std.exp().expand_as(mean)).log_prob(target.actions).sum(-1)
    return -(target.advantages * log_prob).mean()


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": lambda prediction, target: ((prediction - target) ** 2).mean(),
    "gaussian_policy_gradient": policy_loss,
}


class Plain:
    """A model and its loss in a plain double-backward loop.

    A loss that reads parameters of the model itself reads its own, before the inner loop, as it does with
    torch.func.functional_call.
    """

    def __init__(self, model: nn.Module, loss: Any) -> None:
        self.model, self.loss = model, LOSSES[loss] if isinstance(loss, str) else loss

    def __call__(self, data: list[Any]) -> Tensor:
        """Adds the meta-gradient to `.grad` where gradients are on, and returns the loss."""
        self.backward = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return self.meta_step(data)

    def meta_step(self, data: list[Any]) -> Tensor:
        theta = dict(self.model.named_parameters())
        self.names = {id(p): name for name, p in theta.items()}
        self.buffers = [(m, key, b) for m in self.model.modules() for key, b in m._buffers.items() if b is not None]
        self.left: list[Tensor | None] | None = None
        self.seed = given_masks.next_seed()
        leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in theta.items()}
        own = [p for p in theta.values() if p.requires_grad]
        wanted = [p for p in leaves.values() if p.requires_grad] + own  # both: a parameter may be read directly too
        losses, gradients = [], [torch.zeros_like(p) for p in wanted]
        for t in range(TASKS):
            x_spt, y_spt, x_qry, y_qry = tree_map_only(Tensor, lambda each, t=t: each[t], data)
            phi = dict(leaves)
            for k in range(STEPS):
                names = [name for name, p in phi.items() if p.requires_grad]
                value = self.loss(self.forward(phi, x_spt, (t, 2 * k)), y_spt)
                grads = torch.autograd.grad(value, [phi[n] for n in names], create_graph=True, materialize_grads=True)
                phi = {**phi, **{n: phi[n] - RATE * g for n, g in zip(names, grads, strict=True)}}
            value = self.loss(self.forward(phi, x_qry, (t, 2 * STEPS + 1)), y_qry)
            losses.append(value.detach())
            made = [p for p in self.model.parameters() if id(p) not in self.names]  # in forward
            grads = torch.autograd.grad(value, wanted + made, materialize_grads=True)
            gradients = [so_far + g / TASKS for so_far, g in zip(gradients, grads, strict=False)]
            for p, g in zip(made, grads[len(wanted) :], strict=True):
                p.grad = g / TASKS if p.grad is None else p.grad + g / TASKS
        if self.backward:
            self.keep_buffers()
            for i, p in enumerate(own):
                torch.autograd.backward(p, gradients[i] + gradients[i + len(own)])
        return torch.stack(losses).mean()

    def forward(self, phi: dict[str, Tensor], x: Tensor, masks: tuple[int, int]) -> Any:
        places = [
            (m._parameters, key, p)
            for m in self.model.modules()
            for key, p in m._parameters.items()
            if id(p) in self.names
        ]
        copies = {id(b): b.clone() for _, _, b in self.buffers}
        for registry, key, p in places:
            registry[key] = phi[self.names[id(p)]]  # type: ignore[assignment]
        for m, key, b in self.buffers:
            m._buffers[key] = copies[id(b)]
        try:
            with given_masks.Given(self.seed, [masks], draws=4):
                return self.model(x.detach())
        finally:
            if self.left is None:
                self.left = [m._buffers.get(key) for m, key, _ in self.buffers]
            for registry, key, p in places:
                registry[key] = p
            for m, key, b in self.buffers:
                m._buffers[key] = b

    @torch.no_grad()
    def keep_buffers(self) -> None:
        for (m, _, b), left in zip(self.buffers, self.left or (), strict=True):
            if m.training and left is not None and not isinstance(m, nn.modules.batchnorm._BatchNorm):
                b.copy_(left)


# -- two calls ----------------------------------------------------------------------------------------------------


def calls(case: Fault, fused: bool) -> Iterator[Answer]:
    """The answer to each of the two calls, as it is called."""
    model, loss = case.made()
    step: Any = None if fused else Plain(model, loss)
    for i in range(2):
        if i:
            case.between(model)
        seed(i)
        model.zero_grad()
        answer = Answer(model, parts(model))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                step = FusedMAML(model, RATE, STEPS, loss=loss) if step is None else step
                data = case.data(i)
                with case.around() if not i else nullcontext():
                    value = step(*data).loss if fused else step(data)
                    if value.requires_grad:
                        value.backward()
                answer.loss = value.detach()
                answer.backend = step.backend if fused else ""
            except Exception as error:
                answer.error = error
        answer.grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        answer.after = parts(model)
        answer.warnings = [str(w.message) for w in caught]
        yield answer


def difference(got: Answer, expected: Answer) -> float:
    """The largest relative error of the loss and of each gradient; a missing gradient is zero."""
    assert got.loss is not None
    assert expected.loss is not None
    errors = [(got.loss - expected.loss).abs() / expected.loss.abs().clamp(min=1e-3)]
    norm = torch.stack([torch.zeros(()), *(g.norm() for g in expected.grads.values())]).norm()
    for name in {**got.grads, **expected.grads}:
        g, e = got.grads.get(name), expected.grads.get(name)
        if g is None or e is None or g.shape != e.shape:
            g = torch.zeros(()) if g is None else g
            e = torch.zeros(()) if e is None else e
            errors.append((g.norm() - e.norm()).abs() / norm)
        else:
            errors.append((g - e).norm() / e.norm().clamp(min=1e-3 * norm))
    worst = torch.stack(errors)
    return float("inf") if worst.isnan().any() else worst.max().item()


def traces(*roots: Any) -> set[str]:
    """Where one of these objects, or a file of this test, holds a fake tensor or a proxy."""
    found, seen, rest = set(), set(), [(type(root).__name__, root) for root in roots]
    rest += [(m.__name__, vars(m)) for m in FILES]
    while rest:
        where, value = rest.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)
        if isinstance(value, Tensor):
            if kind not in (Tensor, nn.Parameter, nn.Buffer) or value.device.type != "cpu":
                found.add(f"{where}: {kind.__name__} on {value.device}")
            rest.append((f"{where}'s attributes", vars(value)))
        elif kind.__module__.startswith("torch.fx") or "Proxy" in kind.__name__:
            found.add(f"{where}: {kind.__name__}")
        elif isinstance(value, dict):
            rest += [(f"{where}[{key!r}]", each) for key, each in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            rest += [(f"{where}[{i}]", each) for i, each in enumerate(value)]
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
            rest += [(f"{where}'s closure", each) for each in [*cells, *(value.__defaults__ or ()), vars(value)]]
        elif isinstance(value, (nn.Module, types.SimpleNamespace)) or kind.__module__.startswith("tests.plan"):
            rest.append((where, getattr(value, "__dict__", {})))
    return found


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def check(name: str) -> list[str]:
    """Asserts that both calls are right or refused. Returns what ran them, or the refusals."""
    case, outcome, sentences = CASES[name], [], []
    words, before = f"{case.words}|{NAMED}", traces()
    expected = list(calls(case, fused=False))
    for plain, answer in zip(expected, calls(case, fused=True), strict=True):
        assert not traces(answer.model, answer.loss, answer.grads) - before
        if answer.error is not None:
            text = str(answer.error)
            as_eager = plain.error is not None and without_numbers(text) == without_numbers(str(plain.error))
            if not as_eager:
                assert type(answer.error) in (ValueError, TypeError), repr(answer.error)
                assert re.search(words, text), text
                assert answer.after == answer.before
                assert not answer.grads
            outcome.append(f"{type(answer.error).__name__}: {text}")
        else:
            assert plain.error is None, f"eager raises {plain.error!r}"
            error = difference(answer, plain)
            assert error <= TOLERANCE, f"call {len(outcome) + 1} on {answer.backend}: off by {error:.1e}"
            assert not changes(answer.after, plain.after), changes(answer.after, plain.after)
            outcome.append(answer.backend)
        sentences += [text for text in answer.warnings if "general path" in text]
        assert {text for text in answer.warnings if "general path" not in text} <= {*plain.warnings}
    assert len(sentences) <= 1
    if "reference" in outcome:
        because = sentences[0].partition("because ")[2]
        assert re.search(words, because), because
    return outcome + sentences


def without_numbers(text: str) -> str:
    """Errors of torch count the writes to a tensor."""
    return re.sub(r"\d+", "", text)


def parts(model: nn.Module) -> dict[str, Any]:
    """The modules with their types and flags, the values of parameters and buffers, and the names of attributes."""
    found: dict[str, Any] = {}
    for path, m in model.named_modules(remove_duplicate=False):
        found[path] = type(m).__name__, m.training
        found |= dict.fromkeys((f"{path}.{key} (attribute)" for key in vars(m)), None)
    return {**found, **{f"{name} (value)": t.tolist() for name, t in model.state_dict().items()}}


def changes(after: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """What a call did to a model and a plain loop does not. It may set fewer attributes."""
    changed = [place for place, value in after.items() if place not in plain or plain[place] != value]
    return changed + [place for place, value in plain.items() if value is not None and place not in after]


@pytest.mark.parametrize("name", FAULTS)
def test_right_or_refused(name: str) -> None:
    outcome = check(name)
    if name in FUSED:
        assert outcome == ["cpu", "cpu"]  # and no warning


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_without_a_fault_is_fused(name: str) -> None:
    assert name in FUSED
    assert check(name) == ["cpu", "cpu"]


@pytest.fixture(scope="module")
def answers_without_a_fault() -> Callable[[Fault], list[Answer]]:
    known: dict[Any, list[Answer]] = {}

    def answers(case: Fault) -> list[Answer]:
        key = case.on, case.sizes
        if key not in known:
            known[key] = list(calls(Fault("none", case.on, sizes=case.sizes), fused=False))
        return known[key]

    return answers


HARMLESS = {"the exact type of a weight"}  # which change nothing, and may be misread as if they did


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_changes_an_answer(name: str, answers_without_a_fault: Callable[[Fault], list[Answer]]) -> None:
    """Otherwise a front end that overlooks it would pass."""
    case = CASES[name]
    both = zip(calls(case, fused=False), answers_without_a_fault(case), strict=True)
    changed = any(a.error is not None or difference(a, b) > 1e-5 for a, b in both)
    assert changed != (name in HARMLESS)


def test_no_fake_tensor_survives() -> None:
    """Not in torch's or this package's own state either, after a value was kept by forward."""
    before = {id(each) for each in gc.get_objects() if type(each) is FakeTensor}
    for name in ("a value that only a log reads", "a value computed once", "an attribute changed in place", "mlp"):
        check(name)
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is FakeTensor and id(each) not in before]
