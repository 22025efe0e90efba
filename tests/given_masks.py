"""The masks of dropout, computed with numpy, and given to torch where it would draw its own: shares no code with the
package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter: list[Any], key: list[int]) -> list[Any]:
    """Philox4x32-10 (Salmon et al. 2011), of numbers or arrays uint64."""
    c = [np.asarray(word, np.uint64) for word in counter]
    for r in range(10):
        (h0, l0), (h2, l2) = (np.divmod(np.uint64(m) * c[i], 2**32) for m, i in zip(MULTIPLIERS, (0, 2), strict=True))
        k0, k1 = (np.uint64((k + r * w) % 2**32) for k, w in zip(key, WEYL, strict=True))
        c = [h2 ^ c[1] ^ k0, l2, h0 ^ c[3] ^ k1, l0]
    return c


def mask(seed: int, task: int, step: int, number: int, p: float, shape: tuple[int, ...]) -> Tensor:
    """Ones with probability p. step: 2 k on the support set at phi_k, 2 k + 1 on the query set."""
    count = math.prod(shape)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    words = np.stack(np.broadcast_arrays(*philox([blocks, number, step, task], [seed % 2**32, seed >> 32])), 1)
    return torch.from_numpy(words.flatten()[:count] < p * 2**32).view(shape)


def next_seed() -> int:
    """What the next call draws for its masks. Does not change the state of torch's generator."""
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(2**63 - 1, ()))


class Given(TorchDispatchMode):
    """Puts masks where torch would draw bernoulli numbers.

    Args:
        passes: (task, step) of each forward, in order.
        draws: masks of each forward.
    """

    def __init__(self, seed: int, passes: list[tuple[int, int]], draws: int) -> None:
        super().__init__()
        self.left: Iterator[tuple[int, int, int]] = iter([(*p, i) for p in passes for i in range(draws)])
        self.seed = seed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.bernoulli_.float:
            t, p = args[0], args[1] if len(args) > 1 else 0.5
            return t.copy_(mask(self.seed, *next(self.left), p, tuple(t.shape)))
        if function is torch.ops.aten.bernoulli.p:
            return mask(self.seed, *next(self.left), args[1], tuple(args[0].shape)).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


def passes(tasks: int, steps: int) -> list[tuple[int, int]]:
    """Of a meta-step, task by task: the support set at phi_0, ..., and the query set at phi_K."""
    return [(t, s) for t in range(tasks) for s in (*range(0, 2 * steps, 2), 2 * steps + 1)]
