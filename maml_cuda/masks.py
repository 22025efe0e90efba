"""Random masks of dropout: `bernoulli` numbers that follow from the seed of a call and from where they are drawn.

    word(e) = Philox4x32-10(key = seed, counter = (e / 4, number of the mask, pass, task))[e mod 4]
    mask(e) = word(e) < p 2^32

(Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".) Here e is the number of an element of
the mask in torch's order. Masks are numbered in the order in which forward draws them. The pass is 2 k on the support
set at phi_k, and 2 k + 1 on the query set. So a mask is the same in the gradient and in the Hessian-vector product of
an inner step, and does not depend on threads, chunks of tasks or backends. The twin in the core is
csrc/layers/philox.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_LOW = 0xFFFFFFFF  # of 32 bits


class Seed:
    """The seed of a call: drawn from torch's default generator at its first use, and not at all by a model that draws
    no masks.

    Args:
        given: a seed that is not drawn.
    """

    def __init__(self, given: int | None = None) -> None:
        self._drawn = None if given is None else torch.tensor(given)

    def __call__(self) -> Tensor:
        """0-d, int64, on the CPU."""
        if self._drawn is None:
            self._drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        return self._drawn


def threshold(p: float) -> int:
    """The number below which a random number of 32 bits makes a one."""
    return round(p * 2**32)


def mask(p: float, shape: tuple[int, ...], seed: int, task: int, step: int, number: int) -> Tensor:
    """A mask of ones with probability p, of dtype bool, on the CPU.

    Args:
        shape: of the mask.
        seed: of the call, from 0 to 2^64 - 1.
        task: its number in the call.
        step: the pass.
        number: of the masks that this pass draws.
    """
    count = math.prod(shape)
    block = torch.arange(-(-count // 4), dtype=torch.int64, device="cpu")
    words = philox([block & _LOW, number, step, task], seed)
    return (torch.stack(words, 1).flatten()[:count] < threshold(p)).view(shape)


def philox(counter: list[Any], seed: int) -> list[Tensor]:
    """The four words of each block: int64 tensors of the shape to which the words of the counter are broadcast.

    Args:
        counter: its four words, numbers or int64 tensors.
        seed: the key, from 0 to 2^64 - 1.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64, device="cpu") for word in counter)
    key0, key1 = seed & _LOW, seed >> 32
    for _ in range(10):
        (high0, low0), (high2, low2) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of 32-bit numbers, which int64 may not hold."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def number_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The probability of the ones, if this ATen operation draws bernoulli numbers of a fixed one from torch's default
    generator; otherwise None."""
    if function not in (aten.bernoulli_.float, aten.bernoulli.p) or kwargs.get("generator") is not None:
        return None
    return float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))


class Masks(TorchDispatchMode):
    """A context in which forward draws masks of a pass, where it would draw bernoulli numbers of a fixed probability.

    On a CPU, torch takes every dropout apart into these. On a GPU it has an operation for it.
    """

    def __init__(self, seed: Seed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.drawn = 0  # masks of this pass
        self._task = self._step = 0

    @contextmanager
    def of_pass(self, task: int, step: int) -> Iterator[None]:
        """A context in which forward draws the masks of this task and pass."""
        before = self._task, self._step
        self._task, self._step = task, step
        try:
            yield
        finally:
            self._task, self._step = before

    def __enter__(self) -> Any:
        self.drawn = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (p := number_of(function, args, kwargs)) is not None:
            ones = self._next(p, args[0])
            return args[0].copy_(ones) if function is aten.bernoulli_.float else ones.to(args[0].dtype)
        if function is aten.native_dropout.default and args[2] is not False and 0 < args[1] < 1:
            ones = self._next(1 - args[1], args[0])
            return args[0] * (ones.to(args[0].dtype) / (1 - args[1])), ones
        return function(*args, **kwargs)

    def _next(self, p: float, like: Tensor) -> Tensor:
        ones = mask(p, tuple(like.shape), int(self.seed()), self._task, self._step, self.drawn)
        self.drawn += 1
        return ones.to(like.device)
