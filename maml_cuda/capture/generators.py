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
_NUMPY = _access(np.random.get_state, np.random.set_state)

_USES = ("random", "getrandbits", "seed", "setstate", "manual_seed", "set_state")  # methods that change a state


@contextmanager
def restored() -> Iterator[None]:
    """A context that restores the states of the global generators at its end. What other threads draw meanwhile is
    drawn again."""
    before = [(generator, generator.read()) for generator in (_TORCH, _PYTHON, _NUMPY)]
    try:
        yield
    finally:
        for generator, state in before:
            if generator.read() != state:
                generator.put(state)


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
