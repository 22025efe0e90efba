"""Minibatches of long support sets: which samples each inner step sees, with FusedMAML(support_batch=b).

Each task goes through its samples in epochs. An epoch is a random permutation of them, and an inner step takes the next
b: n // b steps an epoch, after which the next one begins with another permutation. What n % b leaves over waits for it.
So no step has a sample twice. The permutation of an epoch sorts random numbers:

    number(i) = words 2 (i mod 2) and 2 (i mod 2) + 1 of Philox4x32-10(
        key = seed of the call, counter = (i / 2, 2^32 - 1, epoch, task))

It depends neither on the other tasks nor on the number of steps, and is the same on every backend (masks.py has the
generator, whose masks have other counters).
"""

from __future__ import annotations

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.masks import philox
from maml_cuda.pytrees import Tree

_NUMBER = 0xFFFFFFFF  # in place of that of a mask

LIBRARY = torch.library.Library("maml_cuda_data", "DEF")
LIBRARY.define("minibatches(Tensor seed, SymInt tasks, SymInt samples, int batch, int steps) -> Tensor")


def minibatches(seed: Tensor, tasks: int, samples: int, batch: int, steps: int) -> Tensor:
    """The numbers of the samples that each step sees, [tasks, steps, batch], int64, on the CPU.

    Args:
        seed: of the call, 0-d.
        samples: of a support set.
        batch: from 1 to `samples`.
    """
    each = samples // batch  # steps an epoch
    epochs = -(-steps // each)
    task, epoch = torch.arange(tasks).view(-1, 1, 1), torch.arange(epochs).view(1, -1, 1)
    block = torch.arange(-(-samples // 2)).view(1, 1, -1)
    words = torch.stack(philox([block, _NUMBER, epoch, task], int(seed)), -1)  # [tasks, epochs, blocks, 4]
    pairs = words.view(tasks, epochs, -1, 2)[:, :, :samples]
    numbers = (pairs[..., 0] << 31) | (pairs[..., 1] >> 1)
    order: Tensor = torch.argsort(numbers, dim=-1, stable=True)[..., : each * batch]
    return order.reshape(tasks, epochs * each, batch)[:, :steps].contiguous()


def _fake(seed: Tensor, tasks: int, samples: int, batch: int, steps: int) -> Tensor:
    return seed.new_empty((tasks, steps, batch))


LIBRARY.impl("minibatches", minibatches, "CPU")
torch.library.register_fake("maml_cuda_data::minibatches", _fake, lib=LIBRARY)


def drawn(tree: Tree, chosen: Tensor) -> Tree:
    """The chosen samples of tensors [tasks, n, ...], the sets of a task after each other: [tasks * steps, batch, ...].

    Args:
        chosen: as `minibatches` returns it.
    """
    tasks, steps, batch = chosen.shape

    def of_leaf(t: Tensor) -> Tensor:
        at = chosen.to(t.device)
        of_task = torch.arange(tasks, device=t.device).view(-1, 1, 1)
        return t[of_task, at].reshape(tasks * steps, batch, *t.shape[2:])

    return pytrees.mapped(of_leaf, tree)


def check(batch: int, *sets: tuple[str, Tree]) -> None:
    """Each tensor has an axis of samples, the same number, from which a minibatch can be drawn.

    Args:
        sets: the name and the tree of x, and of what belongs to it.

    Raises:
        ValueError: one has not.
    """
    named = [pair for name, tree in sets for pair in pytrees.named_leaves(name, tree)]
    tensors = [(name, t) for name, t in named if isinstance(t, Tensor)]
    for name, t in tensors:
        first, like = tensors[0]
        if t.dim() < 2:
            raise ValueError(f"{name} must have shape [tasks, samples, ...] with support_batch, got {list(t.shape)}")
        if t.shape[:2] != like.shape[:2]:
            raise ValueError(
                f"{name} must have {like.shape[0]} tasks of {like.shape[1]} samples like {first} with support_batch, "
                f"got shape {list(t.shape)}"
            )
    if tensors and tensors[0][1].shape[1] < batch:
        name, t = tensors[0]
        raise ValueError(f"support_batch must be at most the {t.shape[1]} samples of {name}, got {batch}")
