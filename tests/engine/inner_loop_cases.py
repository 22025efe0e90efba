"""A combination of FusedMAML's arguments of the inner loop, with a small model, episodes and a loss.

It has everything twice: as FusedMAML is given it, and as the oracle (inner_loop_oracle.py) reads it. It also knows by
the documented rules whether it is refused, and which path runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import optim
from tests.engine.random_small_models import Made, OwnLoss

PADDING = -100  # a label that no class has
CLASSES: dict[str, Any] = {
    "sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW, "adamax": optim.Adamax, "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}  # fmt: skip
FLAGS = {"sgd": "nesterov", "rmsprop": "centered"}


@dataclass
class Hyper:
    """given: as FusedMAML takes it. per_step: whether the first axis of a tensor counts steps; of a dict, by name."""

    given: Any
    per_step: Any = False

    def at(self, name: str, k: int) -> Any:
        value, per_step = self.given, self.per_step
        if isinstance(value, dict):
            value, per_step = value[name], per_step[name]
        return value[min(k, len(value) - 1)] if per_step else value

    def tensors(self) -> list[Tensor]:
        values = self.given.values() if isinstance(self.given, dict) else [self.given]
        return [v for v in values if isinstance(v, Tensor)]


@dataclass
class Group:
    """An optimizer of some parameters. hypers: those that take part. flag: nesterov or centered."""

    names: list[str]
    rule: str
    hypers: dict[str, Hyper]
    flag: bool = False
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    taken: int = 0

    def made(self) -> Any:
        given = {key: hyper.given for key, hyper in self.hypers.items()}
        if "beta1" in given:
            given["betas"] = given.pop("beta1"), given.pop("beta2")
        if self.rule == "adamw":
            given.setdefault("weight_decay", 0)
        flags = {FLAGS[self.rule]: self.flag} if self.rule in FLAGS else {}
        behind = {"step": self.taken} if self.taken else {}
        state = {name: {**part, **behind} for name, part in self.state.items()}
        return CLASSES[self.rule](**given, **flags, state=state or None)


class Factors(nn.Module):
    """A learned factor for the gradients of each parameter."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.factors = names, nn.Parameter(torch.linspace(0.5, 1.5, len(names)).double())

    def forward(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: f * grads[name] for f, name in zip(self.factors, self.names, strict=True)}


def halved(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g / 2 + g.tanh() for name, g in grads.items()}


@dataclass
class Case:
    """kind: the meta-gradient. data: x_spt, y_spt, x_qry, y_qry as the oracle reads them. refusals: pieces of the
    errors of which one must come, if there are any."""

    number: int
    made: Made
    loss: OwnLoss
    data: list[Tensor]
    steps: int
    adapted: list[str]
    adapt_params: list[str] | None
    rate: Hyper
    groups: list[Group]
    in_groups: bool
    optimizer: bool
    clip_norm: float | None
    clip_value: float | None
    transform: Any
    kind: str
    first_order: bool
    truncate: int | None
    proximal: float | None
    cg_steps: int
    checkpoint: str | None
    per_step: bool
    support_batch: int | None
    query_weights: list[float] | None
    task_weights: Tensor | None
    spt_weights: Tensor | None
    qry_weights: Tensor | None
    adapt_steps: int
    refusals: list[str] = field(default_factory=list)
    backwards: bool = False  # whether the oracle adds up samples in the other order

    @property
    def model(self) -> nn.Module:
        return self.made.model

    def transformed(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return grads if self.transform is None else self.transform(grads)

    def wanted(self) -> list[Tensor]:
        """Everything that requires grad, each once."""
        found = [*self.model.parameters(), *self.rate.tensors(), *self.data]
        for group in self.groups:
            found += [t for hyper in group.hypers.values() for t in hyper.tensors()]
            found += [t for part in group.state.values() for t in part.values()]
        found += [t for t in (self.spt_weights, self.qry_weights) if t is not None]
        found += [p for m in (self.loss.given, self.transform) if isinstance(m, nn.Module) for p in m.parameters()]
        return list({id(t): t for t in found if t.requires_grad}.values())

    def options(self) -> dict[str, Any]:
        """The arguments of FusedMAML but for the model and the backend."""
        made = [group.made() for group in self.groups] if self.optimizer else []
        optimizer: Any = made[0] if made else None
        if made and self.in_groups:
            chosen = [group.names for group in self.groups[:-1]]
            optimizer = optim.Groups([*zip(chosen, made, strict=False), (lambda _: True, made[-1])])
        implicit = {"proximal": self.proximal, "cg_steps": self.cg_steps} if self.kind == "implicit" else {}
        return {
            "inner_lr": self.rate.given, "inner_steps": self.steps, "loss": self.loss.made(),
            "first_order": self.first_order, "adapt_params": self.adapt_params, "checkpoint": self.checkpoint,
            "query_weights": self.query_weights, "meta_gradient": self.kind, "truncate": self.truncate,
            "inner_optimizer": optimizer, "inner_clip_norm": self.clip_norm, "inner_clip_value": self.clip_value,
            "inner_transform": self.transform, "per_step_support": self.per_step,
            "support_batch": self.support_batch, **implicit,
        }  # fmt: skip

    def poisoned(self) -> list[Tensor]:
        """The data with NaN and a label that no class has at padding, where they are constant."""
        given = [t if t.requires_grad else t.clone() for t in self.data]
        of = (self.spt_weights, self.spt_weights, self.qry_weights, self.qry_weights)
        for t, w in zip(given, of, strict=True):
            if w is not None and not t.requires_grad:
                t[w == 0] = torch.nan if t.is_floating_point() else PADDING
        return given

    def call(self) -> dict[str, Any]:
        return {"task_weights": self.task_weights, "spt_weights": self.spt_weights, "qry_weights": self.qry_weights}

    def path(self, machine: str) -> str:
        """What runs it, by the documentation: "fused", "general", or "" where that says nothing."""
        weights = [w for w in (self.spt_weights, self.qry_weights) if w is not None]
        padded = any(bool((w == 0).any()) for w in weights)
        learned = self.qry_weights is not None and self.qry_weights.requires_grad
        several = self.query_weights is not None and sum(w != 0 for w in self.query_weights) > 1
        if callable(self.transform) and not isinstance(self.transform, nn.Module):
            return "general"
        own = not isinstance(self.loss.given, str)
        if (padded and (own or self.made.combines)) or (learned and several and not own):
            return "general"
        if weights and own:
            return ""
        if isinstance(self.transform, nn.Module) or self.made.combines or any(t.requires_grad for t in self.data):
            return ""
        if self.query_weights is not None and learned:
            return ""
        on_a_gpu = padded or (self.spt_weights is not None and self.spt_weights.requires_grad)
        return "" if machine != "cpu" and on_a_gpu else "fused"

    def __str__(self) -> str:
        shown = {
            **self.options(), "data": [list(t.shape) for t in self.data], "adapted": self.adapted, **self.call(),
            "groups": self.groups, "refusals": self.refusals, "adapt_steps": self.adapt_steps,
        }  # fmt: skip
        return f"case {self.number}: {self.model}\n" + "\n".join(
            f"{k}={v!r}" for k, v in shown.items() if v is not None
        )
