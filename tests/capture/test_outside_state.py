"""State outside of a model's modules that its forward changes: capture says so, and leaves the state as it was.

Each case is a function of (module, h), called in forward. It has the state of this file, as `start` sets it.
"""

from __future__ import annotations

import array
import contextvars
import gc
import itertools
import random
import sys
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from maml_cuda import FusedMAML, _core
from maml_cuda.capture.capture import Like, capture
from maml_cuda.capture.errors import DoesNotFit, Unfusable
from maml_cuda.capture.guards import guards_of
from maml_cuda.capture.outside_state import OutsideState
from tests import oracle
from tests.capture.planted.settings import seed
from tests.plan.small_models import RATE, STEPS, Net, episode

ROUNDS = 4
X = Like((5, 3), torch.float64)

CALLS, LAST = 0, None
SEEN: list[Any] = []
KEPT: dict[str, Any] = {}
KINDS: set[Any] = set()
RECENT: deque[Any] = deque(maxlen=2)
BYTES, TABLE, NUMBERS = bytearray(b"a"), np.ones(2), array.array("d", [float("nan")])
BY_MODULE: Any = weakref.WeakKeyDictionary()
CONFIG = types.SimpleNamespace(calls=0)
SCALE = torch.ones(2).double()
DRAW, STATE, GENERATOR, TORCH = random.Random(1), np.random.RandomState(1), np.random.default_rng(1), torch.Generator()
COUNTER = itertools.count()
CONTEXT: contextvars.ContextVar[int] = contextvars.ContextVar("context", default=0)
LOCAL = threading.local()
SETTINGS = types.ModuleType("user_settings")
SETTINGS.calls = 0  # type: ignore[attr-defined]


class Slots:
    __slots__ = ("calls", "unused")

    def __init__(self) -> None:
        self.calls = 0


class Plain:
    calls = 0


class Child(Plain):
    pass


SLOTS, PLAIN = Slots(), Plain()


@lru_cache
def cached(n: int) -> Tensor:
    return torch.ones(n).double()


def helped(h: Tensor, kept: list[Any] = []) -> None:  # noqa: B006
    kept.append(h)


# -- what forward does ----------------------------------------------------------------------------------------


def a_number(m: Net, h: Tensor) -> None:
    global CALLS
    CALLS += 1


def a_variable_that_is_only_set(m: Net, h: Tensor) -> None:
    global LAST
    LAST = h


def a_new_variable(m: Net, h: Tensor) -> None:
    global NEW
    NEW = h  # type: ignore[name-defined]


def a_variable_deleted(m: Net, h: Tensor) -> None:
    global LAST
    if "LAST" in globals():
        del LAST


def in_a_closure() -> Callable[[Net, Tensor], None]:
    calls = 0

    def a_closure(m: Net, h: Tensor) -> None:
        nonlocal calls
        calls += 1

    return a_closure


def a_function(m: Net, h: Tensor) -> None:
    helped.last = h  # type: ignore[attr-defined]


def an_attribute_of_a_module(m: Net, h: Tensor) -> None:
    SETTINGS.calls += 1


def a_new_attribute_of_a_module(m: Net, h: Tensor) -> None:
    SETTINGS.last = h  # type: ignore[attr-defined]


def a_class(m: Net, h: Tensor) -> None:
    Plain.calls += 1


def a_new_attribute_of_a_class(m: Net, h: Tensor) -> None:
    Child.last = h  # type: ignore[attr-defined]


def a_base_class(m: Net, h: Tensor) -> None:
    Child.__base__.calls += 1  # type: ignore[union-attr]
    Child()


def an_object(m: Net, h: Tensor) -> None:
    CONFIG.calls += 1


def a_new_attribute_of_an_object(m: Net, h: Tensor) -> None:
    PLAIN.last = h  # type: ignore[attr-defined]


def slots(m: Net, h: Tensor) -> None:
    SLOTS.unused = h


def a_setattr(m: Net, h: Tensor) -> None:
    setattr(PLAIN, "la" + "st", h)


def an_object_of_the_model(m: Net, h: Tensor) -> None:
    m.config.calls += 1


def an_attribute_of_a_parameter(m: Net, h: Tensor) -> None:
    m.o.weight.last = h


CHANGES: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "a number": (a_number, "`CALLS` that a_number reads"),
    "a variable that is only set": (a_variable_that_is_only_set, "`LAST` that a_variable_that_is_only_set sets"),
    "a new variable": (a_new_variable, "`NEW` that a_new_variable sets"),
    "a variable deleted": (a_variable_deleted, "`LAST`"),
    "a list": (lambda m, h: SEEN.append(1), "`SEEN`"),
    "a tensor in a list": (lambda m, h: SEEN.append(h), "`SEEN`"),
    "a dict": (lambda m, h: KEPT.setdefault("mean", h.detach()), "`KEPT`"),
    "a set": (lambda m, h: KINDS.add(type(h).__name__), "`KINDS`"),
    "a deque": (lambda m, h: RECENT.append(h), "`RECENT`"),
    "bytes": (lambda m, h: BYTES.extend(b"b"), "`BYTES`"),
    "an array": (lambda m, h: TABLE.__iadd__(1), "`TABLE`"),
    "an array of Python": (lambda m, h: NUMBERS.append(1.0), "`NUMBERS`"),
    "weak keys": (lambda m, h: BY_MODULE.update({PLAIN: h}), "`BY_MODULE`"),
    "a closure": (in_a_closure(), "`calls` that a_closure reads"),
    "a default argument": (lambda m, h: helped(h), "`helped.__defaults__[0]`"),
    "a function": (a_function, "`helped.last`"),
    "an attribute of a module": (an_attribute_of_a_module, "`user_settings.calls`"),
    "a new attribute of a module": (a_new_attribute_of_a_module, "`user_settings.last`"),
    "a class": (a_class, "`Plain.calls`"),
    "a new attribute of a class": (a_new_attribute_of_a_class, "`Child.last`"),
    "a base class": (a_base_class, "`Plain.calls`"),
    "an object": (an_object, "`CONFIG.calls` that an_object reads"),
    "a new attribute of an object": (a_new_attribute_of_an_object, "`PLAIN.last`"),
    "slots": (slots, "`SLOTS.unused`"),
    "an attribute that code does not name": (a_setattr, "`PLAIN.last`"),
    "an object of the model": (an_object_of_the_model, "`config.calls` of the model"),
    "an attribute of a parameter": (an_attribute_of_a_parameter, "`o.weight.last`"),
    "a cache of a function": (lambda m, h: cached(2), "`cached.cache`"),
}
DRAWS: dict[str, Callable[[Net, Tensor], Any]] = {
    "a generator of Python": lambda m, h: DRAW.random(),
    "a method of a generator": lambda m, h: m.method(),
    "a RandomState": lambda m, h: STATE.rand(),
    "a Generator of numpy": lambda m, h: GENERATOR.random(),
    "a Generator of torch": lambda m, h: TORCH.manual_seed(5),
    "a generator of the model": lambda m, h: m.draw.random(),
    "a numpy generator of the model": lambda m, h: m.rng.random(),
    "a generator in a list of the model": lambda m, h: m.rngs[0].rand(),
}
REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "a tensor": (lambda m, h: SCALE.mul_(2), "mul_? in the model .* changes a tensor outside of the model in place"),
    "a part of a tensor": (lambda m, h: SCALE[1:].zero_(), "changes a tensor outside of the model in place"),
    "an iterator": (lambda m, h: next(COUNTER), "`COUNTER`.* a count, which cannot be put back"),
    "a context variable": (lambda m, h: CONTEXT.set(1), "`CONTEXT`.* a ContextVar, which cannot be put back"),
    "a variable of the thread": (lambda m, h: vars(LOCAL).update(a=1), "`LOCAL`.* a _local, which cannot be put back"),
}


def layer(function: Callable[[Net, Tensor], Any]) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.o(x)
        function(m, h)
        return h

    model: Any = Net(forward, o=nn.Linear(3, 4)).double()
    model.config, model.draw, model.rng = types.SimpleNamespace(calls=0), random.Random(1), np.random.default_rng(1)
    model.rngs, model.method = [np.random.RandomState(1)], random.Random(1).random
    return model


@pytest.fixture(autouse=True)
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "user_settings", SETTINGS)
    cached.cache_clear()
    yield
    cached.cache_clear()


def state() -> list[Any]:
    """Everything that a case may change, by value."""
    return [
        {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, type(None)))},
        [*SEEN], {**KEPT}, {*KINDS}, [*RECENT], bytes(BYTES), TABLE.tolist(), NUMBERS.tobytes(), dict(BY_MODULE),
        vars(CONFIG), {k: v for k, v in vars(SETTINGS).items() if k != "__builtins__"}, SCALE.tolist(),
        DRAW.getstate(), str(STATE.get_state()), str(GENERATOR.bit_generator.state), TORCH.get_state().tolist(),
        hasattr(SLOTS, "unused"), vars(PLAIN), Plain.calls, hasattr(Child, "last"), "calls" in vars(Child),
        cached.cache_info().currsize, vars(helped), helped.__defaults__, CONTEXT.get(), vars(LOCAL),
        CHANGES["a closure"][0].__closure__[0].cell_contents,  # type: ignore[index, attr-defined]
    ]  # fmt: skip


def fakes() -> set[int]:
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is FakeTensor}


def refused(function: Callable[[Net, Tensor], Any], words: str) -> None:
    """Asserts that capture refuses a model in these words, and that nothing has changed."""
    model, before = layer(function), repr(state())
    guards = guards_of(model)
    watched = _core.watch((), guards.dicts, [], (), lists=guards.lists, places=guards.places)
    with pytest.raises(Unfusable, match=words):
        capture(model, X)
    assert repr(state()) == before
    assert _core.unchanged(watched, ())


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_refused_and_undone(case: str) -> None:
    function, words = CHANGES[case]
    words = words.replace("[", r"\[").replace("]", r"\]")
    refused(function, rf"the model \(Net\): a call changes .*{words}.*, which a fused layer would not do|^{words}")


@pytest.mark.parametrize("case", DRAWS)
def test_a_draw_is_refused_and_undone(case: str) -> None:
    refused(DRAWS[case], r"the model \(Net\): its forward draws random numbers that fused layers do not draw")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_put_back_is_refused(case: str) -> None:
    refused(*REFUSED[case])


def test_changes_are_undone_after_an_error() -> None:
    def fails(m: Net, h: Tensor) -> None:
        SEEN.append(h)
        CONFIG.calls += 1
        h.view(-1, 7)

    before, before_fakes = repr(state()), fakes()
    with pytest.raises(DoesNotFit, match="view") as caught:
        capture(layer(fails), X)
    assert repr(state()) == before
    assert fakes() <= before_fakes, caught  # while the exception is kept


@pytest.mark.parametrize(
    "use",
    [random.random, np.random.rand, lambda: random.seed(5), lambda: np.random.seed(5), lambda: torch.manual_seed(5)],
)
def test_a_use_of_a_global_generator(use: Callable[[], Any]) -> None:
    model = layer(lambda m, h: use())
    seed(0)
    expected = torch.rand(()), random.random(), np.random.rand()
    seed(0)
    with pytest.raises(Unfusable, match="draws random numbers"):
        capture(model, X)
    assert (torch.rand(()), random.random(), np.random.rand()) == expected


def test_what_a_forward_reads_is_no_change() -> None:
    def reads(m: Net, h: Tensor) -> None:
        own = torch.tensor([1.0, 2.0])
        own += len(SEEN) + len(KEPT) + CALLS + CONFIG.calls + SLOTS.calls + Plain.calls + float(TABLE[0])
        own[1:].zero_()
        CONFIG.calls = CONFIG.calls + int("0")

    capture(layer(reads), X)
    cached(2)
    capture(layer(lambda m, h: cached(2)), X)


def test_the_loss_and_the_hooks_too() -> None:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        CONFIG.calls += 1
        return F.cross_entropy(prediction, target)

    def hook(module: nn.Module, args: Any, result: Any) -> None:
        KEPT["last"] = result

    model, before = layer(lambda m, h: None), repr(state())
    with pytest.raises(Unfusable, match=r"a call changes `CONFIG.* that .*loss reads"):
        capture(model, X, loss, Like((5,), torch.int64))
    for handle in (model.o.register_forward_hook(hook), nn.modules.module.register_module_forward_hook(hook)):
        with handle, pytest.raises(Unfusable, match="a call changes `KEPT`"):
            capture(model, X)
    assert repr(state()) == before


def test_a_change_by_hand_is_found_and_undone() -> None:
    """An object that was replaced by an equal one is put back too."""
    KEPT["pair"] = pair = (1, 2)
    record = OutsideState(layer(lambda m, h: KEPT))
    KEPT["pair"] = tuple(map(int, "12"))
    assert record.restore() == ""
    assert KEPT.pop("pair") is pair


# -- whole calls ----------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def test_no_fake_tensor_survives_a_call() -> None:
    """While the models, what they keep and the exceptions are alive."""
    calls: list[tuple[nn.Module, str]] = [
        (mlp(), "fused"),
        (layer(lambda m, h: setattr(m, "last", h)), "fused"),
        (Net(lambda m, x: m.o(x) * vars(m).setdefault("first", x.mean()), o=nn.Linear(3, 4)).double(), "general path"),
        *((layer(CHANGES[case][0]), "general path") for case in ("a dict", "a closure", "a new attribute of a class")),
        (layer(lambda m, h: h.view(-1, 7)), "ValueError"),
        (layer(lambda m, h: [][1]), "IndexError"),
        (layer(lambda m, h: SEEN.append(h) or [][1]), "IndexError"),
    ]
    before, kept = fakes(), []
    for model, expected in calls:
        outcome = "fused"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                kept.append(FusedMAML(model, RATE, STEPS)(*episode(dtype=torch.float64)))
            except (ValueError, IndexError) as error:
                kept.append(error)
                outcome = type(error).__name__
        if outcome == "fused" and any("general path" in str(warning.message) for warning in caught):
            outcome = "general path"
        assert outcome == expected
    assert fakes() <= before
    assert type(KEPT["mean"]) is Tensor
    KEPT.clear()
    SEEN.clear()
    del Child.last  # type: ignore[attr-defined]


def gaussian() -> nn.Module:
    return layer(lambda m, h: torch.distributions.Normal(h, h.exp()))


def test_first_calls_of_several_threads() -> None:
    """And the settings of the process are as before."""

    def settings() -> list[Any]:
        of_torch = torch.distributions.Distribution._validate_args, torch.compiler.is_compiling()
        return [*of_torch, torch.get_default_dtype(), *warnings.filters]

    def run(number: int) -> None:
        model = (mlp, gaussian)[number % 2]()
        start.wait()
        try:
            loss = FusedMAML(model, RATE, STEPS, backend="fused")(*data).loss
            loss.backward()
            results.append((model, loss.detach()))
        except Exception as error:
            results.append((error, None))

    before, start = settings(), threading.Barrier(4)
    data, results = episode(dtype=torch.float64), list[Any]()
    for _ in range(ROUNDS):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert settings() == before
    assert len(results) == 4 * ROUNDS
    for model, loss in results:
        assert isinstance(model, nn.Module), repr(model)
        expected_loss, expected = oracle.meta_gradient(model, "cross_entropy", *data, RATE, STEPS)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-10, atol=1e-12)
        grads = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(grads, dict(expected), rtol=1e-10, atol=1e-12)
