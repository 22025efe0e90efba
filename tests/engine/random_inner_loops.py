"""Random inner loops: any combination of FusedMAML's arguments of the inner loop (inner_loop_cases.py)."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from tests.engine.inner_loop_cases import CLASSES, Case, Factors, Group, Hyper, halved
from tests.engine.random_small_models import Made, random_loss, random_model

STATES = {
    "sgd": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"], "adamw": ["exp_avg", "exp_avg_sq"],
    "adamax": ["exp_avg", "exp_inf"], "rmsprop": ["square_avg", "grad_avg", "momentum_buffer"], "adagrad": ["sum"],
}  # fmt: skip
RANGES = {
    "lr": (0.02, 0.3), "momentum": (0.1, 0.9), "dampening": (0.1, 0.6), "weight_decay": (0.01, 0.3),
    "beta1": (0.3, 0.9), "beta2": (0.5, 0.99), "alpha": (0.3, 0.95), "lr_decay": (0.05, 0.5),
    "initial_accumulator_value": (0.05, 0.5),
}  # fmt: skip
NEEDED = {
    "sgd": [], "adam": ["beta1", "beta2", "eps"], "adamw": ["beta1", "beta2", "eps"],
    "adamax": ["beta1", "beta2", "eps"], "rmsprop": ["alpha", "eps"],
    "adagrad": ["lr_decay", "initial_accumulator_value", "eps"],
}  # fmt: skip


class Draw:
    """Draws the parts of a case."""

    def __init__(self, number: int) -> None:
        self.random, self.generator = Random(number), torch.Generator().manual_seed(number)
        self.learned: list[Tensor] = []  # hyperparameters, which others may share

    def yes(self, p: float) -> bool:
        return self.random.random() < p

    def rand(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def hyper(self, key: str, shapes: dict[str, tuple[int, ...]], steps: int, made: Made, learned: bool) -> Hyper:
        low, high = RANGES[key] if key != "eps" else (made.least_eps, 3 * made.least_eps)

        def tensor(*shape: int) -> Tensor:
            shared = [t for t in self.learned if t.shape == shape]
            if shared and key != "eps" and self.yes(0.2):
                return self.random.choice(shared)
            t = self.rand(*shape, low=low, high=high)
            if key in ("momentum", "dampening", "weight_decay") and self.yes(0.1):
                t.zero_()
            if learned and self.yes(0.6):
                t = nn.Parameter(t) if self.yes(0.8) else t.requires_grad_()
                self.learned += [t] if key != "eps" else []
            return t

        stepwise = key != "initial_accumulator_value" and steps > 0
        form = self.random.choice(["number", "number", "scalar", "dict", *(["steps"] * 2 if stepwise else [])])
        if form == "number":
            return Hyper(low + (high - low) * self.random.random())
        if form == "scalar":
            return Hyper(tensor())
        if form == "steps":
            return Hyper(tensor(steps), True)
        given, per_step = {}, {}
        for name, shape in shapes.items():
            of = self.random.choice(["number", "scalar", "shape", *(["steps", "both"] if stepwise else [])])
            if shape == (steps,) and of in ("steps", "shape"):  # which is refused as ambiguous
                of = "scalar"
            sizes = {"scalar": (), "steps": (steps,), "shape": shape, "both": (steps, *shape)}
            given[name] = low if of == "number" else tensor(*sizes[of])
            per_step[name] = of in ("steps", "both")
        return Hyper(given, per_step)

    def group(self, names: list[str], made: Made, steps: int, learned: bool) -> Group:
        rule = self.random.choice(list(CLASSES))
        shapes = {name: tuple(p.shape) for name, p in made.model.named_parameters() if name in names}

        def hyper(key: str) -> Hyper:
            return self.hyper(key, shapes, steps, made, learned)

        hypers = {key: hyper(key) for key in NEEDED[rule]}
        if self.yes(0.5):
            hypers["weight_decay"] = hyper("weight_decay")
        if rule in ("sgd", "rmsprop") and self.yes(0.6):
            hypers["momentum"] = hyper("momentum")
        flag = rule == "rmsprop" and self.yes(0.3)
        if rule == "sgd" and "momentum" in hypers:
            flag = self.yes(0.4)
            hypers["dampening"] = Hyper(0) if flag else hyper("dampening")
        group = Group(names, rule, hypers, flag)
        if self.yes(0.3):
            group.state = self.state(group, shapes, learned)
            group.taken = self.random.choice([0, 1, 7]) if group.state else 0
        return group

    def state(self, group: Group, shapes: dict[str, tuple[int, ...]], learned: bool) -> dict[str, dict[str, Tensor]]:
        """Second moments are larger than the squares of first ones."""
        keys = [
            key for key in STATES[group.rule]
            if (key != "momentum_buffer" or "momentum" in group.hypers) and (key != "grad_avg" or group.flag)
        ]  # fmt: skip
        found: dict[str, dict[str, Tensor]] = {}
        same_for_all = self.yes(0.7)  # as the number of steps is that of a group
        for name, shape in shapes.items():
            for key in keys:
                if not (same_for_all or key == keys[0]):
                    continue
                low, high = (0.1, 0.4) if key in ("exp_avg_sq", "square_avg", "sum", "exp_inf") else (-0.1, 0.1)
                t = self.rand(*shape, low=low, high=high)
                found.setdefault(name, {})[key] = nn.Parameter(t) if learned and self.yes(0.5) else t
        return found

    def weights(self, *shape: int, least: int) -> Tensor:
        """At least `least` samples of a set count."""
        if self.yes(0.5):
            return self.rand(*shape, low=0.1, high=2)
        w = self.rand(*shape, low=0.1, high=2) if self.yes(0.6) else torch.ones(shape, dtype=torch.float64)
        for row in w.view(-1, shape[-1]):
            count = self.random.randint(min(least, shape[-1]), shape[-1])
            row[torch.randperm(shape[-1], generator=self.generator)[count:]] = 0
        return w


def random_inner_loop(number: int) -> Case:
    """The case of a number: the same on every machine."""
    draw = Draw(number)
    random = draw.random
    steps = random.choice([0, 1, 1, 2, 2, 3, 4, 7] if draw.yes(0.8) else [1, 2])
    made = random_model(draw, number)
    tasks = random.choice([1, 2, 3, 5] if made.large or draw.yes(0.85) else [9, 17])
    kind = random.choice(["unrolled"] * 5 + ["truncated", "implicit", "reptile"])
    kind = "unrolled" if kind == "truncated" and steps == 0 else kind
    special, refusals = kind in ("implicit", "reptile"), []
    adapted = [name for name, p in made.model.named_parameters() if p.requires_grad and name not in made.unreached]
    adapt_params = list(adapted) if made.unreached else None
    if kind != "reptile" and draw.yes(0.4):
        adapted = [name for name in adapted if draw.yes(0.6)] or adapted[:1]
        adapt_params = random.sample(adapted, len(adapted))
    if kind == "reptile":
        for name in made.unreached:
            dict(made.model.named_parameters())[name].requires_grad_(False)
    learned = not special and draw.yes(0.6)
    shapes = {name: tuple(p.shape) for name, p in made.model.named_parameters() if name in adapted}
    rate = draw.hyper("lr", shapes, steps, made, learned)
    optimizer, in_groups = draw.yes(0.7), False
    groups = [Group(list(adapted), "sgd", {})]
    if optimizer:
        in_groups = len(adapted) > 1 and draw.yes(0.4)
        at = random.randint(1, len(adapted) - 1) if in_groups else 0
        mixed = random.sample(adapted, len(adapted))
        parts = [mixed[:at], mixed[at:]] if in_groups else [adapted]
        groups = [draw.group([n for n in adapted if n in part], made, steps, learned) for part in parts]
    per_step = kind != "implicit" and steps > 0 and draw.yes(0.15)
    n, n_qry = random.randint(made.least, made.least + 4), random.randint(made.least, made.least + 4)
    n_qry = n if made.combines and draw.yes(0.6) else n_qry
    support_batch = random.randint(made.least, n) if not per_step and kind != "implicit" and draw.yes(0.12) else None
    loss = random_loss(draw, made, special)
    data = [
        part for axes in ((steps, tasks, n) if per_step else (tasks, n), (tasks, n_qry))
        for part in (made.sample(draw, *axes), loss.target(draw, *axes))
    ]  # fmt: skip
    spt = draw.weights(*data[0].shape[: 3 if per_step else 2], least=made.least) if draw.yes(0.25) else None
    qry = draw.weights(*data[2].shape[:2], least=made.least) if draw.yes(0.25) else None
    if not special:
        spt, qry = (w.requires_grad_() if w is not None and draw.yes(0.3) else w for w in (spt, qry))
        if draw.yes(0.05) and data[0].is_floating_point():
            data[random.choice([0, 2])].requires_grad_()
    support_batch = None if steps == 0 and spt is not None else support_batch
    loss.weighted = spt is not None or qry is not None
    first_order = not special and draw.yes(0.2)
    several = not special and draw.yes(0.2)
    query_weights = [random.choice([0.0, 0.3, 1.0]) for _ in range(steps)] + [0.7] if several else None
    clip_norm = random.choice([1e-3, 0.3, 1.0, 1e6]) if draw.yes(0.3) else None
    transform = random.choice([halved, halved if special else Factors(adapted)]) if draw.yes(0.05) else None
    task_weights = draw.rand(tasks) if draw.yes(0.2) else None
    if task_weights is not None and draw.yes(0.3):
        task_weights[0] = 0
    case = Case(
        number, made, loss, data, steps, adapted, adapt_params, rate, groups, in_groups, optimizer, clip_norm,
        random.choice([1e-3, 0.1, 1e6]) if draw.yes(0.15) else None, transform, kind, first_order,
        random.randint(1, steps) if kind == "truncated" else None, random.choice([0.5, 3.0, 30.0]) if kind == "implicit"
        else None, random.randint(1, 4), random.choice([None, None, "recompute", "sqrt"]), per_step, support_batch,
        query_weights, task_weights, spt, qry, random.choice([0, 1, steps, steps + 2]), refusals,
    )  # fmt: skip
    if draw.yes(0.08):
        spoil(draw, case)
    return case


def spoil(draw: Draw, case: Case) -> None:
    """Makes it one that must be refused, in one of the ways that it allows."""
    tasks, n = case.data[2].shape[:2]
    special = case.kind in ("implicit", "reptile")
    names = [name for name, p in case.model.named_parameters() if p.requires_grad]
    loop = case.kind != "implicit" and case.steps > 0
    learned = Hyper(nn.Parameter(torch.tensor(0.1, dtype=torch.float64)))
    ways: list[tuple[bool, str, str, Any]] = [
        (True, "qry_weights must have a positive sum in every task, got 0 in task", "qry_weights", "empty"),
        (case.spt_weights is not None, "spt_weights must be finite and at least 0, got -", "spt_weights", "negative"),
        (special, "first_order must be False with meta_gradient", "first_order", True),
        (special, "query_weights must be None with meta_gradient", "query_weights", [1.0] * (case.steps + 1)),
        (special, "inner_lr must not require grad", "rate", learned),
        (True, "inner_lr must have shape [] or", "rate", Hyper(torch.ones(case.steps + 1).double())),
        (loop and not case.per_step, "support_batch must be at most", "support_batch", 99),
        (case.steps == 0, "inner_steps must be at least 1 with per_step_support=True, got 0", "per_step", True),
        (case.kind == "truncated", "truncate must be from 1 to inner_steps", "truncate", case.steps + 1),
        (case.kind == "truncated", "truncate must be None unless meta_gradient", "kind", "unrolled"),
        (
            bool(case.made.unreached) and case.kind != "reptile" and case.steps > 0,
            "does not reach",
            "adapt_params",
            names,
        ),
        (True, "inner_clip_norm must be finite and above 0, got 0", "clip_norm", 0.0),
        (True, "task_weights must have shape", "task_weights", torch.ones(tasks + 1).double()),
        (True, "checkpoint must be None", "checkpoint", "square root"),
        (case.made.one_is_too_few, "more than 1 value per channel", "data", [t[:, :1] for t in case.data[2:]]),
    ]
    _, text, at, value = draw.random.choice([way for way in ways if way[0]])
    if value == "empty":
        value = torch.ones(tasks, n).double()
        value[-1] = 0
    elif value == "negative" and case.spt_weights is not None:
        value = -case.spt_weights.detach()
    if at == "data":
        case.qry_weights, value = None, [*case.data[:2], *value]
    if at == "adapt_params":
        case.rate = Hyper(0.1)
        case.optimizer, case.transform = False, None
    if at == "per_step":
        case.support_batch = None
    case.loss.weighted = case.loss.weighted or case.spt_weights is not None or case.qry_weights is not None
    case.refusals.append(text)
    setattr(case, at, value)
