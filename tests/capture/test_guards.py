"""The Python state that a program depends on: each change of it is seen, other changes are not, and what cannot be
watched is named.

Each case runs statements of a user's program in a namespace of its own, then others that change something.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest
from torch import nn

from maml_cuda import _core
from maml_cuda.capture import guards
from maml_cuda.capture.guards import Guards, guards_of

PROGRAM = """
import collections, dataclasses, enum, functools, itertools, logging, math, re, sys, threading, types, typing, warnings
from dataclasses import dataclass, field
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
import user_settings as settings
from user_settings import scaled

FLAG, FACTOR, UNRELATED, RATE, KIND, ACTIVATION, WEIGHT = 1000, 2, 0, 0.25, "relu", torch.relu, torch.ones(3)
SCALES, TABLE, POINTS, SPACE = [0.0, [2.0]], {"a": 1, "b": {"c": [1]}}, (1, [2], {"a": 3}), types.SimpleNamespace(w=4)
PRIOR = torch.distributions.Normal(WEIGHT, WEIGHT)
MODULE = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

class Net(nn.Module):
    def __init__(self, run, **attributes):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.run(self, x)

class Base(nn.Module):
    scale = 2
    sizes = []
    unused = 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.made = UNRELATED

    def helped(self, x):
        return x * self.scale + len(self.sizes)

    @staticmethod
    def shifted(x):
        return x + FACTOR

    @property
    def flag(self):
        return FLAG > 0

    @classmethod
    def rate(cls):
        return RATE

    def forward(self, x):
        return self.helped(self.shifted(x)) * self.rate() if self.flag else x

    def report(self):
        return UNRELATED

class Block(Base):
    def forward(self, x):
        return super().forward(x)

@dataclass
class Config:
    width: int = 4
    sizes: list = field(default_factory=lambda: [1, 2])
    depth = 3

    @property
    def doubled(self):
        return self.width * FACTOR

class Slotted:
    __slots__ = ("__hidden", "width")

    def __init__(self):
        self.width = 4
        self.__hidden = [1]

    def hidden(self):
        return self.__hidden

class Trainer:
    weight, step = 1, 0

    def loss(self, p, y):
        return (p - y).sum() * self.weight

    def __call__(self, p, y):
        return self.loss(p, y)

config, slotted = Config(), Slotted()

def inner_helper(x):
    return x * FACTOR

def helper(x):
    return inner_helper(x) if FLAG else x

def other_helper(x):
    return -x

class Mixed(collections.UserDict):
    pass

chosen, mixed = helper, Mixed(a=1)

def closing(value):
    def run(*arguments):
        return arguments, value
    def change(to):
        nonlocal value
        value = to
    return run, change

closed, change = closing(2)
losses = []
"""

SETTINGS = """
scale, names, unused, kind = 1.5, ["a"], 0, "a"

def scaled(x):
    return x * scale
"""


@pytest.fixture
def user() -> Iterator[dict[str, Any]]:
    """The namespace of a user's program, which has imported another module of the user's."""
    names = ("user_settings", "user_program")
    modules = [types.ModuleType(name) for name in names]
    sys.modules.update(zip(names, modules, strict=True))
    for module, source in zip(modules, (SETTINGS, PROGRAM), strict=True):
        exec(source, vars(module))
    yield vars(modules[1])
    for name in names:
        del sys.modules[name]


def found_in(user: dict[str, Any], statements: str) -> Guards:
    """What is found for the model, or for one with this expression as its forward."""
    statements = dedent(statements)
    exec(statements if "model" in statements else f"model = Net(lambda m, x: {statements})", user)
    return guards_of(user["model"], user["losses"])


def watched(found: Guards) -> tuple[Any, ...]:
    return _core.watch((), found.dicts, [], (), found.lists, found.places)


# What forward returns, or statements that make a model and its losses; then a change of what they depend on.
CHANGES = {
    "an int": ("x * FLAG", "FLAG = 1001"),
    "an int to a bool": ("x * FACTOR", "FACTOR = True"),
    "a float": ("x * RATE", "RATE = 0.5"),
    "the sign of a zero": ("x * SCALES[0]", "SCALES[0] = -0.0"),
    "a str": ("x if KIND == 'relu' else -x", "KIND = 'tanh'"),
    "a global that is deleted": ("x * FLAG", "del FLAG"),
    "a global that is not yet there": ("LATER", "LATER = 1"),
    "a list": ("x * SCALES[0]", "SCALES.append(1)"),
    "a list in a list": ("x * SCALES[0]", "SCALES[1][0] = 3.0"),
    "a dict": ("x * TABLE['a']", "TABLE['a'] = 2"),
    "a list in dicts": ("x * TABLE['a']", "TABLE['b']['c'].append(2)"),
    "a list in a tuple": ("x * POINTS[0]", "POINTS[1].append(2)"),
    "a dict in a tuple": ("x * POINTS[0]", "POINTS[2]['b'] = 4"),
    "a tensor": ("x * WEIGHT", "WEIGHT = torch.ones(3)"),
    "a function of torch": ("ACTIVATION(x)", "ACTIVATION = torch.tanh"),
    "a function": ("chosen(x)", "chosen = other_helper"),
    "a global of a helper": ("helper(x)", "FLAG = 0"),
    "a global of a helper's helper": ("helper(x)", "FACTOR = 3"),
    "a global of a nested function": ("[(lambda: FACTOR)() for _ in x]", "FACTOR = 3"),
    "a cached function": ("x * functools.lru_cache(helper)(2)", "FACTOR = 3"),
    "an attribute": ("x * config.width", "config.width = 5"),
    "an attribute that hides that of the class": ("x * config.depth", "config.depth = 5"),
    "an attribute of the class": ("x * config.depth", "Config.depth = 5"),
    "an attribute that is named at run time": ("x * getattr(config, 'w' + 'idth')", "config.width = 5"),
    "all attributes": ("x * vars(config)['width']", "config.width = 5"),
    "a list in an attribute": ("x * config.sizes[0]", "config.sizes.append(3)"),
    "what a property reads": ("x * config.doubled", "config.width = 5"),
    "a global of a property": ("x * config.doubled", "FACTOR = 3"),
    "a namespace": ("x * SPACE.w", "SPACE.w = 5"),
    "a slot": ("x * slotted.width", "slotted.width = 5"),
    "a slot that is deleted": ("x * slotted.width", "del slotted.width"),
    "a list in a private slot": ("x * slotted.hidden()[0]", "slotted.hidden().append(2)"),
    "an attribute of a module of Python": ("x * settings.scale", "settings.scale = 2.5"),
    "a list of a module of Python": ("x * len(settings.names)", "settings.names.append('b')"),
    "what an imported function reads": ("scaled(x)", "settings.scale = 2.5"),
    "what a function of a module of Python reads": ("settings.scaled(x)", "settings.scale = 2.5"),
    "an import in forward": (
        """
        def run(m, x):
            from user_settings import scale
            return x * scale
        model = Net(run)
        """,
        "settings.scale = 2.5",
    ),
    "a flag of a global module": ("MODULE(x)", "MODULE[1].eval()"),
    "a parameter of a global module": ("MODULE(x)", "MODULE[0].weight = nn.Parameter(torch.ones(3, 3))"),
    "a submodule of a global module": ("MODULE(x)", "MODULE.append(nn.ReLU())"),
    "a hook of a global module": ("MODULE(x)", "MODULE[1].register_forward_hook(print)"),
    "a class attribute": ("model = Block()", "Base.scale = 3"),
    "a class attribute in a derived class": ("model = Block()", "Block.scale = 3"),
    "a class attribute that is deleted": ("model = Block()", "del Base.scale"),
    "a list in a class attribute": ("model = Block()", "Base.sizes.append(1)"),
    "a method": ("model = Block()", "Base.helped = lambda self, x: x"),
    "what super() finds": ("model = Block()", "Base.forward = lambda self, x: x"),
    "a global of a static method": ("model = Block()", "FACTOR = 3"),
    "a global of a module's property": ("model = Block()", "FLAG = 0"),
    "a global of a class method": ("model = Block()", "RATE = 0.5"),
    "a global of what forward makes": ("x * Base().made", "UNRELATED = 1"),
    "a method that is named at run time": (
        """
        class Named(Net):
            def forward(self, x):
                return getattr(self, "go_" + KIND)(x)
            def go_relu(self, x):
                return x * FACTOR
        model = Named(None)
        """,
        "FACTOR = 3",
    ),
    "a global of a special method": (
        """
        class Item:
            def __rmul__(self, other):
                return other * FACTOR
        model = Net(lambda m, x: x * m.item, item=Item())
        """,
        "FACTOR = 3",
    ),
    "a closure": ("model = Net(closed)", "change(3)"),
    "a closure that is emptied": ("model = Net(closed)", "del closed.__closure__[0].cell_contents"),
    "a list in a closure": ("model = Net(closing([])[0])", "model.run.__closure__[0].cell_contents.append(1)"),
    "a closure behind a decorator of torch": ("model = Net(torch.no_grad()(closed))", "change(3)"),
    "an attribute of a decorated function": (
        "helper.scale = 1; run = torch.no_grad()(helper); model = Net(lambda m, x: run(x) * run.scale)",
        "run.scale = 2",
    ),
    "a default": ("model = Net(lambda m, x, sizes=[1]: x)", "model.run.__defaults__[0].append(2)"),
    "a keyword's default": ("model = Net(lambda m, x, *, t={'a': []}: x)", "model.run.__kwdefaults__['t']['a'] += [2]"),
    "a container in an attribute": (
        "model = Net(helper, table={'a': [({'b': [1]},)]})",
        "model.table['a'][0][0]['b'].append(2)",
    ),
    "an object in an attribute": ("model = Net(lambda m, x: m.c.width, c=Config())", "model.c.width = 5"),
    "an object in a list": ("model = Net(lambda m, x: m.c[0].width, c=[Config()])", "model.c[0].width = 5"),
    "a forward that is set on an instance": (
        "model = Net(None); model.layer.forward = types.MethodType(lambda self, x: x * FACTOR, model.layer)",
        "FACTOR = 3",
    ),
    "the closure of a hook": ("model = Block(); model.layer.register_forward_hook(closed)", "change(3)"),
    "another hook": ("model = Block(); model.register_forward_hook(closed)", "model.register_forward_hook(closed)"),
    "an attribute of a parameter": ("model = Block(); model.layer.weight.fast = None", "model.layer.weight.fast = 1"),
    "a function's code": ("helper(x)", "helper.__code__ = other_helper.__code__"),
    "a function's defaults": ("model = Net(lambda m, x, size=1: x)", "model.run.__defaults__ = (2,)"),
    "a global of a method that torch calls": (
        """
        class Conv(nn.Conv2d):
            def _conv_forward(self, x, weight, bias):
                return super()._conv_forward(x, weight * FACTOR, bias)
        model = Conv(3, 3, 3)
        """,
        "FACTOR = 3",
    ),
    "an attribute that a library reads": ("PRIOR.log_prob(x)", "PRIOR.loc = torch.ones(3)"),
    "an attribute that a library's base reads": ("x * mixed['a']", "mixed.data = {'a': 2}"),
    "an attribute of a function": ("helper.scale = 1; model = Net(helper)", "helper.scale = 2"),
    "the closure of a loss": ("model = Block(); losses = [closed]", "change(3)"),
    "a partial's function": ("model = Block(); losses = [functools.partial(helper, 1)]", "FACTOR = 3"),
    "a partial's arguments": (
        "model = Block(); losses = [functools.partial(F.cross_entropy, weight=[1], y=2)]",
        "losses[0].keywords['weight'].append(2)",
    ),
    "a callable object": ("model = Block(); losses = [Trainer()]", "losses[0].weight = 2"),
    "the object of a method": ("model = Block(); losses = [Trainer().loss]", "losses[0].__self__.weight = 2"),
    "an option of a loss": (
        "model = Block(); losses = [nn.CrossEntropyLoss(label_smoothing=0.1)]",
        "losses[0].label_smoothing = 0.2",
    ),
    "the weight of a loss": (
        "model = Block(); losses = [nn.CrossEntropyLoss(WEIGHT)]",
        "losses[0].weight = torch.ones(3)",
    ),
}

UNRELATED = {
    "another global": ("x * FLAG", "UNRELATED = 1; SLOPE = 2"),
    "an equal int": ("x * FLAG", "FLAG = int('1000')"),
    "an equal item of a list": ("x * SCALES[0]", "SCALES[0] = float('0')"),
    "an equal float": ("x * RATE", "RATE = float('0.25')"),
    "an equal str": ("x * (KIND == 'relu')", "KIND = ''.join(['re', 'lu'])"),
    "another variable of a module of Python": ("x * settings.scale", "settings.unused = 1"),
    "another attribute of a class": ("model = Block()", "Base.unused = 2"),
    "a method that no call reaches": ("model = Block()", "Base.report = None"),
    "a global of the constructor": ("model = Block()", "UNRELATED = 1"),
    "the values of a tensor": ("x * WEIGHT", "WEIGHT.add_(1)"),
    "a step of training": ("model = Block()", "model.layer(torch.ones(2, 3)).sum().backward()"),
    "a counter of a trainer": ("model = Block(); losses = [Trainer()]", "losses[0].step += 1"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen(case: str, user: dict[str, Any]) -> None:
    statements, change = CHANGES[case]
    before = watched(found_in(user, statements))
    assert _core.unchanged(before, ())
    exec(change, user)
    assert not _core.unchanged(before, ())


@pytest.mark.parametrize("case", UNRELATED)
def test_other_changes_are_not(case: str, user: dict[str, Any]) -> None:
    statements, change = UNRELATED[case]
    before = watched(found_in(user, statements))
    exec(change, user)
    assert _core.unchanged(before, ())


UNWATCHED = {
    "x * ARRAY": "the array `ARRAY` that <lambda> reads",
    "x * len(SET)": "the set `SET` that <lambda> reads",
    "x * next(COUNT)": "the count `COUNT` that <lambda> reads",
    "x * ITEMS['a'][1][0]": "the deque `ITEMS['a'][1]` that <lambda> reads",
    "x * HOLDER.table": "the array `HOLDER.table` that <lambda> reads",
    "x * eval('FLAG')": "the result of `eval` in <lambda>",
    "x * getattr(settings, KIND)": "the module `settings` that <lambda> reads",
    "x * LONG[0]": "the list `LONG` that <lambda> reads",
    "model = Net(helper, sizes={1})": "the set `sizes` of the model (Net)",
    "model = nn.Sequential(Net(helper, table=[ARRAY]))": "the array `table[0]` of 0 (Net)",
    "model = Net(lambda m, x, sizes={1}: x)": "the set `<lambda>.__defaults__[0]`",
}


@pytest.mark.parametrize("statements", UNWATCHED)
def test_what_cannot_be_watched_is_named(statements: str, user: dict[str, Any]) -> None:
    exec(
        "ARRAY, SET, COUNT = np.ones(3), {1}, itertools.count(); HOLDER = types.SimpleNamespace(table=ARRAY);"
        f"ITEMS = {{'a': [1, collections.deque([2])]}}; LONG = [0] * {guards.MOST_ITEMS + 1}",
        user,
    )
    assert found_in(user, statements).unwatched == [UNWATCHED[statements]]


def test_constants_and_libraries_are_not_reported(user: dict[str, Any]) -> None:
    found = found_in(
        user,
        """
        class Mode(enum.Enum):
            FAST = 1
        LOG, LOCK, LOCAL = logging.getLogger("user"), threading.Lock(), typing.Optional[int]
        CONSTANTS = (1, 2.0, 3j, "a", b"a", None, ..., True, range(3), slice(1), frozenset({1, (2, 3)}), Mode.FAST,
                     torch.float32, torch.device("cpu"), torch.Size([1]), re.compile("a"), np.float32(1))
        def run(m, x):
            with LOCK, warnings.catch_warnings():
                LOG.debug("%s", LOCAL)
            x = F.relu(torch.tanh(x)) * math.pi * np.pi + np.linalg.norm(CONSTANTS[0]) + sys.maxsize
            return functools.reduce(torch.add, itertools.chain([x, x])), F.max_pool2d, nn.Linear(3, 3), Mode.FAST
        model = Net(run)
        """,
    )
    assert found.unwatched == found.dicts == found.lists == []
    names = {"LOCK", "warnings", "LOG", "LOCAL", "F", "torch", "math", "np", "CONSTANTS", "sys", "functools"}
    globals_ = {key for owner, key in found.places if owner is user}
    assert globals_ == names | {"itertools", "nn", "Mode"}


def test_a_cycle_ends(user: dict[str, Any]) -> None:
    found = found_in(user, "loop = [1]; loop.append({'loop': loop}); model = Net(lambda m, x: x * loop[0])")
    assert found.lists == [user["loop"]]
    assert len(found.dicts) == 1


def test_torch_itself_has_no_state() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))
    found = guards_of(model, [nn.functional.cross_entropy, nn.CrossEntropyLoss()])
    assert found.places == found.unwatched == []


def test_a_residual_net_has_few_places(user: dict[str, Any]) -> None:
    found = found_in(
        user,
        """
        class Residual(nn.Module):
            expansion = 1
            def __init__(self, inputs, outputs, rate=0.1):
                super().__init__()
                self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
                self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
                self.shortcut, self.rate = nn.Conv2d(inputs, outputs, 1), rate
            def forward(self, x):
                out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
                out = F.max_pool2d(F.relu(out + self.shortcut(x)), 2)
                return F.dropout(out, self.rate, training=self.training)
        class ResNet(nn.Module):
            def __init__(self, block=Residual, widths=(3, 8, 16, 32, 64), classes=5):
                super().__init__()
                self.blocks = nn.Sequential(*(block(*pair) for pair in zip(widths, widths[1:])))
                self.head = nn.Linear(widths[-1], classes)
                for m in self.modules():
                    if isinstance(m, nn.Conv2d):
                        nn.init.kaiming_normal_(m.weight)
            def forward(self, x, with_features=False):
                features = torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1)
                return (self.head(features), features) if with_features else self.head(features)
        model = ResNet()
        losses = [lambda p, y: F.cross_entropy(p, y)]
        """,
    )
    assert sorted(key for _, key in found.places) == [
        "F",
        *["__code__"] * 3,
        "__defaults__",
        "forward",
        "forward",
        "torch",
    ]
    assert found.dicts == found.lists == found.unwatched == []
