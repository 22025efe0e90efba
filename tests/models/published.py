"""What the list of models says of each model; how its data are drawn; losses of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# What is built: a model of another part is expected on the general path.
#   today: layers of features, signals and images
#   a:     move, windows, map, reduce, contract and softmax, on tensors of any shape
#   b:     recurrence, every convolution, losses of one's own
#   c:     rows of a table, integer inputs
#   never: Fourier transforms and complex numbers; control flow that depends on values or on what earlier calls left
BUILT_PARTS = {"today", "a", "b", "c"}

TASKS = 2
Draw = Callable[[int, Generator], Any]  # (samples, generator) -> [TASKS, samples, ...], or a tree of such tensors


@dataclass(frozen=True)
class Published:
    """A model of the list.

    Attributes:
        name: of its test.
        source: paper and repository.
        make: makes the model, with random parameters.
        x: shape of a sample, or a function that draws inputs.
        y: number of classes, shape of a real target, or a function that draws targets.
        part: of the work that fuses it: "today", "a", "b", "c" or "never".
        loss: of ours by name, or (prediction, target) -> scalar.
        reason: words of the sentence why a model of part "never" is not fused.
        adapted: the parameters that the inner loop changes; None: all of them.
        moves: names of buffers and attributes that one plain training step changes.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    x: tuple[int, ...] | Draw
    y: int | tuple[int, ...] | Draw
    part: str
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy"
    n_support: int = 3
    n_query: int = 2
    inner_lr: float = 0.05
    reason: str = ""
    adapted: tuple[str, ...] | None = None
    moves: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """What is expected to run it now: "fused" or "general"."""
        return "fused" if self.part in BUILT_PARTS else "general"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()

    def data(self) -> list[Any]:
        """x_spt, y_spt, x_qry, y_qry: the same at every call."""
        generator = torch.Generator().manual_seed(1)
        draws = drawn(self.x), labels(self.y) if isinstance(self.y, int) else drawn(self.y)
        return [draw(n, generator) for n in (self.n_support, self.n_query) for draw in draws]


def drawn(what: tuple[int, ...] | Draw) -> Draw:
    return what if callable(what) else normal(*what)


def normal(*shape: int) -> Draw:
    return lambda n, generator: torch.randn(TASKS, n, *shape, generator=generator, dtype=torch.float64)


def labels(classes: int, *shape: int) -> Draw:
    return lambda n, generator: torch.randint(classes, (TASKS, n, *shape), generator=generator)


def both(*draws: Draw) -> Draw:
    return lambda n, generator: tuple(draw(n, generator) for draw in draws)


def ratings(n: int, generator: Generator) -> Tensor:
    """MeLU's rows, with one genre and one director at least."""
    x = torch.randint(2, (TASKS, n, 10), generator=generator)
    x[..., 1] = x[..., 5] = 1
    return x


def acted(actions: Draw) -> Draw:
    """The target of a policy gradient: actions and their advantages."""
    return lambda n, generator: {"actions": actions(n, generator), "advantages": normal()(n, generator)}


# -- losses of one's own ---------------------------------------------------------------------------------------


def reinforce(policy: Any, y: dict[str, Tensor]) -> Tensor:
    return -(policy.log_prob(y["actions"]) * y["advantages"]).mean()


def reinforce_each(policy: Any, y: dict[str, Tensor]) -> Tensor:
    return -(policy.log_prob(y["actions"]).sum(-1) * y["advantages"]).mean()


def negative_log_likelihood(log_probabilities: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(log_probabilities, y)


def pixels(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of [n, classes, height, width]."""
    return F.cross_entropy(logits, y)


def next_token(output: tuple[Tensor, Any], y: Tensor) -> Tensor:
    logits = output[0]
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
