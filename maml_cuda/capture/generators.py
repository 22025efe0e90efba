"""Random generators of torch, Python and numpy: the global ones, and those that are objects."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class Access(NamedTuple):
    """How the state of a generator is read and set, as bytes."""

    read: Callable[[], bytes]
    put: Callable[[bytes], object]


def _access(get: Callable[[], Any], put: Callable[[Any], object]) -> Access:
    return Access(lambda: pickle.dumps(get()), lambda state: put(pickle.loads(state)))


def access_to(generator: Any) -> Access | None:
    """How the state of an object is read and set; None if it is no generator, or one without a state."""
    if isinstance(generator, torch.Generator):  # as an array, because a tensor is pickled with its address
        return _access(lambda: generator.get_state().numpy(), lambda s: generator.set_state(torch.from_numpy(s)))
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return _access(generator.getstate, generator.setstate)
    if isinstance(generator, np.random.RandomState):
        return _access(generator.get_state, generator.set_state)
    if isinstance(generator, np.random.Generator):
        generator = generator.bit_generator
    if isinstance(generator, np.random.BitGenerator):
        return _access(lambda: generator.state, lambda state: setattr(generator, "state", state))
    return None


_TORCH = _access(lambda: torch.get_rng_state().numpy(), lambda state: torch.set_rng_state(torch.from_numpy(state)))
_PYTHON = _access(random.getstate, random.setstate)
_GPUS = _access(
    lambda: [state.numpy() for state in torch.cuda.get_rng_state_all()],
    lambda states: torch.cuda.set_rng_state_all([torch.from_numpy(s) for s in states]),
)
_NUMPY = _access(np.random.get_state, np.random.set_state)
_GLOBAL = (_TORCH, _PYTHON, _NUMPY)

_USES = ("random", "getrandbits", "seed", "setstate", "manual_seed", "set_state")  # methods that change a state


States = list[bytes]


def states() -> States:
    """Of the global generators, those of GPUs among them where CUDA is in use."""
    return [generator.read() for generator in (*_GLOBAL, *_gpus())]


@contextmanager
def at(states: States) -> Iterator[None]:
    """A context in which the global generators start from these states, and which leaves theirs as they were."""
    generators = (*_GLOBAL, *_gpus())
    before = [generator.read() for generator in generators]
    try:
        _put(generators, states)
        yield
    finally:
        _put(generators, before)


@contextmanager
def restored() -> Iterator[None]:
    """A context that restores the states of the global generators at its end. What other threads draw meanwhile is
    drawn again."""
    before = [generator.read() for generator in _GLOBAL]
    try:
        yield
    finally:
        _put(_GLOBAL, before)


def _put(generators: tuple[Access, ...], states: States) -> None:
    for generator, state in zip(generators, states, strict=True):
        if generator.read() != state:
            generator.put(state)


def _gpus() -> tuple[Access, ...]:
    return (_GPUS,) if torch.cuda.is_initialized() else ()


@contextmanager
def refused(refuse: Callable[[], object]) -> Iterator[None]:
    """A context that calls `refuse` before this thread draws a number from a generator of Python's module `random`, or
    sets the state of one or of torch's, and after it has used the global generator of numpy, which is then put back.

    The profile function that it sets sees calls of this thread alone. It does not see those of numpy. Draws from
    torch's generators are operations.
    """

    def check(frame: Any, event: str, called: Any) -> None:
        uses = event == "c_call" and called.__name__ in _USES
        if uses and isinstance(called.__self__, (random.Random, torch.Generator)):
            refuse()

    before, profiler = _NUMPY.read(), sys.getprofile()
    sys.setprofile(check)
    try:
        yield
    finally:
        sys.setprofile(profiler)
        if _NUMPY.read() != before:
            _NUMPY.put(before)
            refuse()
