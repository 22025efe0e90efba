"""Faults: a loss that is nearly one of those that are fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.planted.settings import add, nothing

LOSS = "losses"
Made = Callable[[Any], Any]


def loss(name: str, on: str, words: str, make: Made, **rest: Any) -> None:
    add(name, LOSS, on, f"loss|{words}", loss=make, **rest)


def plain(function: Callable[[Tensor, Any], Tensor]) -> Made:
    """The loss of any model."""
    return lambda model: function


def smoothed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, label_smoothing=0.1)


def summed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, reduction="sum")


def ignoring(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, ignore_index=2)


def focal(prediction: Tensor, target: Tensor) -> Tensor:
    log_p = -F.cross_entropy(prediction, target, reduction="none")
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Half of the squared error, as no error reaches delta."""
    return F.huber_loss(prediction, target, delta=100.0)


def clamped(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction.clamp(-100, 100) * 1.5, target)


def masked(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, reduction="none")[target != 1].mean()


def masked_where_large(prediction: Tensor, target: Tensor) -> Tensor:
    error = (prediction - target) ** 2
    return torch.where(target.abs() > 1, 0.5 * error, error).mean()


def branching(prediction: Tensor, target: Tensor) -> Tensor:
    value = F.cross_entropy(prediction, target)
    return value * 2 if int(target[0]) == 0 else value


def against_itself(prediction: Tensor, target: Tensor) -> Tensor:
    """With targets from the prediction, detached."""
    soft = prediction.detach().softmax(-1)
    return F.cross_entropy(prediction, target) - (soft * prediction.log_softmax(-1)).sum(-1).mean()


def broadcast(prediction: Tensor, target: Tensor) -> Tensor:
    """Every prediction with every target."""
    return (prediction[:, None] - target[None]).square().mean()


def noisy(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target + torch.randn_like(target))


def contrastive(prediction: Tensor, target: Tensor) -> Tensor:
    """Every sample against the others."""
    similar = prediction @ prediction.mT / 4
    return F.cross_entropy(similar, torch.arange(len(similar))) + F.cross_entropy(prediction, target)


def hardest(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, reduction="none").topk(2).values.mean()


def ordered(prediction: Tensor, target: Tensor) -> Tensor:
    return (F.cross_entropy(prediction, target, reduction="none") * torch.linspace(0, 1, len(target))).mean()


def square_root(prediction: Tensor, target: Tensor) -> Tensor:
    """A function of the mean."""
    return F.mse_loss(prediction, target).sqrt()


LARGER = {"sizes": ((4, 3), (6, 5))}


loss("label smoothing", "mlp", "smoothed|label_smoothing", plain(smoothed))
loss("a sum over samples", "conv1d", "summed|sum", plain(summed))
loss("a class that is ignored", "mlp", "ignoring|ignore_index", plain(ignoring))
loss("focal", "layer norm", "focal", plain(focal))
loss("a huber loss with a large delta", "regression", "huber", plain(huber))
loss("logits clamped far away", "conv4", "clamped|clamp", plain(clamped))
loss("samples masked by their label", "resnet", "masked|index|nonzero", plain(masked))
loss("errors weighted by the target", "regression", "masked|where", plain(masked_where_large))
loss("a branch on a label", "nested", "branching", plain(branching))
loss("against itself", "shared", "itself|detach", plain(against_itself))
loss("every prediction with every target", "regression", "broadcast|sample", plain(broadcast))
loss("noise on the target", "regression", "noisy|random", plain(noisy))
loss("every sample against the others", "mlp", "contrastive|sample", plain(contrastive), **LARGER)
loss("the hardest samples", "conv1d", "hardest|topk|sample", plain(hardest))
loss("samples weighted by their order", "nested", "ordered|linspace", plain(ordered), **LARGER)
loss("a function of the mean", "regression", "square_root|sqrt", plain(square_root))
loss(
    "a sum with a burnt-in number", "layer norm", "lambda|sum", plain(lambda p, t: summed(p, t) / len(t) ** 2), **LARGER
)
loss("a partial", "mlp", "partial|smoothing", plain(partial(F.cross_entropy, label_smoothing=0.2)))
loss("a mean by another sum", "regression", "lambda|sum", plain(lambda p, t: ((p - t) ** 2).sum() / len(p)))


def penalised(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The penalty is of the model's own parameters, those before the inner loop."""

    def with_penalty(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) + 0.1 * sum(p.square().sum() for p in model.parameters())

    return with_penalty


def of_activations(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def with_activations(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target) + model.last.square().mean()

    return with_activations


def keep(self: Any, h: Tensor) -> Tensor:
    self.last = h
    return h


loss("an L2 penalty", "group norm", "penalty|closure", penalised)
loss("a penalty on activations", "nested", "activations|last", of_activations, methods={"middle": keep})

STRENGTH = 1.0
WEIGHTS = torch.ones(4, dtype=torch.float64)
STATE = SimpleNamespace()


def set_strength(value: float) -> Callable[[Any], None]:
    return lambda model: globals().update(STRENGTH=value)


def annealed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction * STRENGTH, target)


def weighted(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, WEIGHTS)


def weighted_errors(policy: tuple[Tensor, Tensor], target: Any) -> Tensor:
    mean, log_std = policy
    return ((mean - target.actions).square() * (-2 * log_std).exp() + STRENGTH * log_std).mean()


def counting(prediction: Tensor, target: Tensor) -> Tensor:
    STATE.calls += 1
    return F.cross_entropy(prediction, target) * (1 + STATE.calls % 3)


loss(
    "a global temperature", "policy", "weighted_errors|STRENGTH|y_spt",
    plain(weighted_errors),
    plant=set_strength(1.0), between=set_strength(2.5),
)  # fmt: skip
loss("annealed", "mlp", "annealed|STRENGTH", plain(annealed), plant=set_strength(1.0), between=set_strength(2.5))
loss(
    "class weights changed in place", "layer norm", "weighted|WEIGHTS", plain(weighted),
    plant=lambda m: WEIGHTS.fill_(1), between=lambda m: WEIGHTS.copy_(torch.arange(1, 5)),
)  # fmt: skip
loss(
    "a loss that counts its calls",
    "shared",
    "counting|STATE",
    plain(counting),
    plant=lambda m: setattr(STATE, "calls", 0),
)


def module(make: Callable[[], nn.Module]) -> tuple[Made, Callable[[Callable[[Any], Any]], Callable[[Any], None]]]:
    """A loss module, and a function that makes a change of it into a change of its model."""
    made: list[Any] = []

    def of(model: Any) -> nn.Module:
        made[:] = [make().double()]
        return made[0]

    return of, lambda change: lambda model: nothing(change(made[0]))


of_sum, change = module(nn.MSELoss)
loss("a reduction changed between calls", "regression", "MSELoss", of_sum,
     between=change(lambda m: setattr(m, "reduction", "sum")))  # fmt: skip
smooth, change = module(nn.CrossEntropyLoss)
loss("smoothing changed between calls", "conv1d", "CrossEntropyLoss", smooth,
     between=change(lambda m: setattr(m, "label_smoothing", 0.3)))  # fmt: skip
class_weights, change = module(lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 1, 1, 1])))
loss("weights of a loss module", "conv4", "CrossEntropyLoss", class_weights,
     between=change(lambda m: m.weight.copy_(torch.arange(1, 5))))  # fmt: skip


def with_hook() -> nn.Module:
    made = nn.CrossEntropyLoss()
    made.register_forward_hook(lambda m, args, out: out * 1.5)
    return made


loss("a hook of a loss module", "resnet", "CrossEntropyLoss|hook", module(with_hook)[0])
loss("a frozen loss module in eval mode", "group norm", "Dropped", module(lambda: Dropped().eval())[0])


class Dropped(nn.Module):
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        value = F.cross_entropy(prediction, target)
        return value if self.training else 2 * value
