"""The options of ``maml-cuda benchmark`` as they are checked before anything is imported. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from maml_cuda.train.hints import did_you_mean

LOSSES = ("cross_entropy", "mse")
WAYS = 5  # of cross_entropy, by default


class Shipped(NamedTuple):
    """What a model of this package is measured on by default."""

    input: tuple[int, ...]
    loss: str


SHIPPED = {
    "conv4": Shipped((1, 28, 28), "cross_entropy"),
    "conv4-max-pool": Shipped((3, 84, 84), "cross_entropy"),
    "mlp": Shipped((1,), "mse"),
}


@dataclass(frozen=True)
class Options:
    """The words of the command line. None: the default of the model, or of the loss.

    Attributes:
        model: FILE.py:FUNCTION, MODULE:FUNCTION, or a name in SHIPPED.
        input: the shape of one sample.
        ways: classes of a task, with cross_entropy.
        support, query: samples of a set: for each class with cross_entropy, of a task with mse.
        vocabulary: samples are integers from 0 to vocabulary - 1; None: normal numbers.

    Raises:
        ValueError: one is out of range, or two contradict each other.
    """

    model: str = "conv4"
    input: tuple[int, ...] | None = None
    ways: int | None = None
    support: int = 5
    query: int = 15
    tasks: int = 4
    loss: str | None = None
    inner_steps: int = 5
    inner_lr: float = 0.01
    vocabulary: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ways", "support", "query", "tasks", "inner_steps", "vocabulary"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (math.isfinite(self.inner_lr) and self.inner_lr > 0):
            raise ValueError(f"inner_lr must be finite and above 0, got {self.inner_lr}")
        if self.input is not None and not (self.input and min(self.input) >= 1):
            raise ValueError(f"input must be sizes of at least 1, got {_words(self.input)}")
        if self.model not in SHIPPED and ":" not in self.model:
            kinds = f"FILE.py:FUNCTION, MODULE:FUNCTION or one of {', '.join(SHIPPED)}"
            wanted = f"; did you mean {self.model}:make_net?" if self.model.endswith(".py") else ""
            raise ValueError(f"model must be {kinds}, got {self.model}{wanted or did_you_mean(self.model, SHIPPED)}")
        shipped = SHIPPED.get(self.model)
        if self.input is None and shipped is None:
            raise ValueError("input must be the shape of one sample for a model of your own, like 3,84,84, got none")
        if self.input is not None and shipped is not None and len(self.input) != len(shipped.input):
            raise ValueError(f"input must be like {_words(shipped.input)} for {self.model}, got {_words(self.input)}")
        if shipped is not None and self.vocabulary is not None:
            raise ValueError(f"vocabulary must be left out for {self.model}, got {self.vocabulary}")
        if self.loss not in (None, *LOSSES):
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss}")
        if self.ways is not None and self.loss_name == "mse":
            raise ValueError(f"ways must be left out with mse, which has no classes, got {self.ways}")

    @property
    def loss_name(self) -> str:
        return self.loss or (SHIPPED[self.model].loss if self.model in SHIPPED else "cross_entropy")


def _words(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
