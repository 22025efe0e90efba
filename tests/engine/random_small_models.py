"""Random small models and losses for random inner loops (random_inner_loops.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Made:
    """A random model in float64.

    Attributes:
        sample: (draw, *axes) -> x.
        classes: of its logits [n, classes].
        least: samples of a set.
        one_is_too_few: BatchNorm refuses one sample.
        least_eps: of optimizers. Where rounding noise stands for zero gradients, as of a bias before BatchNorm, eps
            must be much larger than that.
        combines: whether samples depend on each other, but for BatchNorm.
        large: too slow for many tasks.
        unreached: parameters that forward does not read.
    """

    model: nn.Module
    sample: Callable[..., Tensor]
    classes: int
    least: int = 1
    one_is_too_few: bool = False
    least_eps: float = 1e-3
    combines: bool = False
    large: bool = False
    unreached: list[str] = field(default_factory=list)


class Tied(nn.Module):
    """A layer that runs twice, and one whose weight is also read by itself."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, classes, bias=False)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(torch.tanh(self.body(x))))
        return self.again(x) + (self.head.weight**2).mean()


class Scaled(nn.Module):
    """Parameters without axes and of one element, and one that nothing reads."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor([0.2]))
        self.unread = nn.Parameter(torch.ones(2))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.gain * x + self.shift))


class Words(nn.Module):
    """The mean of embeddings, of which most rows are not read by a task."""

    def __init__(self, padding: int | None, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3, padding_idx=padding)
        self.head = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x).mean(1)))


class Attending(nn.Module):
    """One head of attention over the tokens of a sample."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width, eps=0.1), nn.Linear(width, 3 * width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2) / x.shape[-1] ** 0.5).softmax(-1)
        return self.head((x + scores @ v).mean(1))


class Centred(nn.Module):
    """Samples less their mean."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(width, 5), nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        return self.head(x - x.mean(0, keepdim=True))


def random_model(draw: Any, number: int) -> Made:
    random = draw.random
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        made = _made(random.choice(list(MODELS)), random)
        made.model.double()
    if draw.yes(0.15):
        names = [n for n, _ in made.model.named_parameters() if n not in made.unreached]
        if len(names) > 1:
            dict(made.model.named_parameters())[random.choice(names)].requires_grad_(False)
    return made


MODELS = ("mlp", "mlp", "relu", "dead", "tied", "scaled", "bn", "bn eval", "conv bn", "conv gn", "words", "attention",
          "combines")  # fmt: skip


def _made(kind: str, random: Any) -> Made:
    width, hidden, classes = (
        random.choice([1, 2, 3, 7]),
        random.choice([1, 3, 5, 8, 17]),
        random.choice([1, 2, 3, 4, 5]),
    )

    def vectors(draw: Any, *axes: int) -> Tensor:
        return draw.randn(*axes, width)

    def images(draw: Any, *axes: int) -> Tensor:
        return draw.randn(*axes, 2, 5, 4)

    match kind:
        case "mlp":
            layers: list[nn.Module] = []
            into = width
            for _ in range(random.randint(0, 2)):
                act = random.choice([nn.Tanh, nn.Softplus, nn.SiLU])()
                layers += [nn.Linear(into, hidden, bias=random.random() < 0.8), act]
                into = hidden
            model = nn.Sequential(*layers, nn.Linear(into, classes))
            return Made(model, vectors, classes, least_eps=random.choice([1e-8, 1e-3, 0.1]))
        case "relu":
            return Made(
                nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes)), vectors, classes
            )
        case "dead":
            model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
            nn.init.constant_(model[0].bias, -100.0)
            return Made(model, vectors, classes, least_eps=random.choice([1e-8, 1e-3]))
        case "tied":
            return Made(Tied(width, classes), vectors, classes)
        case "scaled":
            return Made(Scaled(width, classes), vectors, classes, unreached=["unread"])
        case "bn":
            model = nn.Sequential(
                nn.Linear(width, hidden), nn.BatchNorm1d(hidden, eps=0.1), nn.Tanh(), nn.Linear(hidden, classes)
            )
            return Made(model, vectors, classes, least=2, one_is_too_few=True, least_eps=0.01)
        case "bn eval":
            model = nn.Sequential(
                nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, classes)
            )
            norm = copy.deepcopy(model[1])
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(3)
            model[1] = norm
            return Made(model.eval(), vectors, classes)
        case "conv bn":
            model = nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, eps=0.1), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(),
                nn.Linear(12, classes),
            )  # fmt: skip
            return Made(model, images, classes, least_eps=0.01, large=True)
        case "conv gn":
            model = nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, eps=0.1), nn.SiLU(), nn.Flatten(), nn.Linear(24, classes)
            )
            return Made(model, images, classes, least_eps=0.01, large=True)
        case "words":
            words = Words(random.choice([None, 0]), classes)

            def tokens(draw: Any, *axes: int) -> Tensor:
                return torch.randint(11, (*axes, 4), generator=draw.generator)

            return Made(words, tokens, classes, least_eps=random.choice([1e-8, 1e-3]))
        case "attention":
            wide = random.choice([2, 3, 5])

            def sequences(draw: Any, *axes: int) -> Tensor:
                return draw.randn(*axes, 3, wide)

            return Made(Attending(wide, classes), sequences, classes, large=True)
        case _:
            return Made(Centred(width, classes), vectors, classes, least=2, combines=True)


@dataclass
class OwnLoss:
    """A loss.

    Attributes:
        given: as FusedMAML takes it.
        each: (prediction, target) -> the loss of each sample; a set has their mean.
        target: (draw, *axes) -> y.
        weighted: whether samples have weights, and a loss of the user's own therefore returns one value for each.
    """

    given: Any
    each: Callable[[Tensor, Tensor], Tensor]
    target: Callable[..., Tensor]
    weighted: bool = False

    def made(self) -> Any:
        if isinstance(self.given, nn.Module):
            self.given.of_each = self.weighted
        return mean_soft if self.given is soft and not self.weighted else self.given


def cross_entropies(z: Tensor, y: Tensor) -> Tensor:
    return z.logsumexp(-1) - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def squares(z: Tensor, y: Tensor) -> Tensor:
    return ((z - y) ** 2).mean(-1)


def soft(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).cosh().log().sum(-1) + 0.1 * (z * y).sum(-1)


def mean_soft(z: Tensor, y: Tensor) -> Tensor:
    return soft(z, y).mean()


class Tempered(nn.Module):
    """A cross-entropy with a learned temperature. of_each: of each sample, not of the set."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.of_each = False

    def each(self, z: Tensor, y: Tensor) -> Tensor:
        return cross_entropies(z * self.temperature.exp(), y)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        each = self.each(z, y)
        return each if self.of_each else each.mean()


def random_loss(draw: Any, made: Made, special: bool) -> OwnLoss:
    """special: the loss has no parameters."""

    def labels(draw: Any, *axes: int) -> Tensor:
        return torch.randint(made.classes, axes, generator=draw.generator)

    def reals(draw: Any, *axes: int) -> Tensor:
        return draw.randn(*axes, made.classes)

    kind = draw.random.choice(
        ["cross_entropy", "cross_entropy", "mse", "mse", "soft", "soft" if special else "learned"]
    )
    if kind == "cross_entropy":
        return OwnLoss(kind, cross_entropies, labels)
    if kind == "mse":
        return OwnLoss(kind, squares, reals)
    if kind == "learned":
        module = Tempered()
        return OwnLoss(module, module.each, labels)
    return OwnLoss(soft, soft, reals)
