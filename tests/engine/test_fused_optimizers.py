"""Inner optimizers in the fused core: the meta-gradient through their states, against torch code unrolled here.

The oracle shares no code with the package: each rule is written again from torch.optim's formulas, and autograd does
the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, optim
from tests.conftest import episode

pytestmark = pytest.mark.usefixtures("machine", "one_thread")

# A case -> the class, its flags, its hyperparameters, and torch's names of its states.
RULES: dict[str, tuple[Any, dict[str, bool], dict[str, float], list[str]]] = {
    "decay": (optim.SGD, {}, {"weight_decay": 0.1}, []),
    "momentum": (optim.SGD, {}, {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1}, ["momentum_buffer"]),
    "nesterov": (optim.SGD, {"nesterov": True}, {"momentum": 0.7, "weight_decay": 0.1}, ["momentum_buffer"]),
    "adam": (
        optim.Adam, {}, {"beta1": 0.8, "beta2": 0.9, "eps": 0.03, "weight_decay": 0.1}, ["exp_avg", "exp_avg_sq"],
    ),
    "adamw": (
        optim.AdamW, {}, {"beta1": 0.8, "beta2": 0.9, "eps": 0.03, "weight_decay": 0.1}, ["exp_avg", "exp_avg_sq"],
    ),
    "adamax": (
        optim.Adamax, {}, {"beta1": 0.8, "beta2": 0.9, "eps": 0.03, "weight_decay": 0.1}, ["exp_avg", "exp_inf"],
    ),
    "rmsprop": (optim.RMSprop, {}, {"alpha": 0.9, "eps": 0.03, "weight_decay": 0.1}, ["square_avg"]),
    "rmsprop momentum": (
        optim.RMSprop, {}, {"alpha": 0.9, "eps": 0.03, "weight_decay": 0.1, "momentum": 0.6},
        ["square_avg", "momentum_buffer"],
    ),
    "rmsprop centered": (
        optim.RMSprop, {"centered": True}, {"alpha": 0.9, "eps": 0.03, "weight_decay": 0.1, "momentum": 0.6},
        ["square_avg", "momentum_buffer", "grad_avg"],
    ),
    "adagrad": (
        optim.Adagrad, {}, {"lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.03},
        ["sum"],
    ),
}  # fmt: skip
FORMS = ("0-d", "per step", "elementwise", "per step and elementwise")


def root(x: Tensor) -> Tensor:
    """Its derivative at 0 is 0, which is the exact one of the steps below."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())


def step(
    rule: str, h: dict[str, Any], phi: Tensor, g: Tensor, s: dict[str, Tensor], t: int, first: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """torch.optim's step t, from 1. s: the states; first: there is no momentum buffer yet."""
    rate = h["rate"]
    if rule == "adamw":
        phi = phi - rate * h["weight_decay"] * phi
    else:
        g = g + h["weight_decay"] * phi
    if rule == "decay":
        return phi - rate * g, s
    if rule in ("momentum", "nesterov"):
        b = g if first else h["momentum"] * s["momentum_buffer"] + (1 - h.get("dampening", 0)) * g
        return phi - rate * (g + h["momentum"] * b if rule == "nesterov" else b), {"momentum_buffer": b}
    if rule == "adagrad":
        total = s["sum"] + g.square()
        return phi - rate / (1 + (t - 1) * h["lr_decay"]) * g / (root(total) + h["eps"]), {"sum": total}
    if rule.startswith("rmsprop"):
        new = {"square_avg": h["alpha"] * s["square_avg"] + (1 - h["alpha"]) * g.square()}
        variance = new["square_avg"]
        if rule == "rmsprop centered":
            new["grad_avg"] = h["alpha"] * s["grad_avg"] + (1 - h["alpha"]) * g
            variance = variance - new["grad_avg"].square()
        d = g / (root(variance) + h["eps"])
        if rule != "rmsprop":
            d = new["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + d
        return phi - rate * d, new
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    rate = rate / (1 - h["beta1"] ** t)
    if rule == "adamax":
        u = torch.maximum(h["beta2"] * s["exp_inf"], g.abs() + h["eps"])
        return phi - rate * m / u, {"exp_avg": m, "exp_inf": u}
    v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g.square()
    return phi - rate * m / (root(v / (1 - h["beta2"] ** t)) + h["eps"]), {"exp_avg": m, "exp_avg_sq": v}


@dataclass
class Case:
    """The rule of some parameters.

    Attributes:
        values: of each hyperparameter and the rate: a number, a tensor for all parameters, or name -> tensor.
        per_step: the first axis of the tensors counts steps.
        start: the initial states, name -> state -> tensor.
        taken: the steps behind the initial states.
    """

    rule: str
    values: dict[str, Any]
    per_step: bool = False
    start: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    taken: int = 0

    def optimizer(self) -> Any:
        made, flags, _, _ = RULES[self.rule]
        given = {key: v for key, v in self.values.items() if key != "rate"}
        if "beta1" in given:
            given["betas"] = (given.pop("beta1"), given.pop("beta2"))
        behind = {"step": self.taken} if self.taken else {}
        state = {name: {**part, **behind} for name, part in self.start.items()}
        return made(**given, **flags, state=state or None)

    def at(self, key: str, name: str, k: int) -> Any:
        value = self.values[key]
        value = value[name] if isinstance(value, dict) else value
        return value[k] if self.per_step and isinstance(value, Tensor) and key != "initial_accumulator_value" else value

    def begin(self, name: str, phi: Tensor) -> dict[str, Tensor]:
        start = {key: torch.zeros_like(phi) for key in RULES[self.rule][3]}
        if self.rule == "adagrad":
            start["sum"] = start["sum"] + self.at("initial_accumulator_value", name, 0)
        return start | self.start.get(name, {})


def learned(rule: str, form: str, shapes: dict[str, torch.Size], steps: int) -> Case:
    """The rule with everything learned."""
    values: dict[str, Any] = {}
    for key, value in {"rate": 0.1, **RULES[rule][2]}.items():
        leading = (steps,) if form.startswith("per step") and key != "initial_accumulator_value" else ()

        def parameter(*shape: int, value: float = value) -> nn.Parameter:
            return nn.Parameter(value * (0.8 + 0.3 * torch.rand(shape, dtype=torch.float64)))

        if form.endswith("elementwise"):
            values[key] = {name: parameter(*leading, *shape) for name, shape in shapes.items()}
        else:
            values[key] = parameter(*leading)
    if rule == "nesterov":
        assert "dampening" not in values
    return Case(rule, values, form.startswith("per step"))


def numbers(rule: str) -> Case:
    return Case(rule, {"rate": 0.1, **RULES[rule][2]})


def clipped(grads: list[Tensor], norm: float | None, value: float | None) -> list[Tensor]:
    if norm is not None:
        total = sum(g.square().sum() for g in grads)
        assert isinstance(total, Tensor)
        grads = [g * torch.clamp(norm / (total.sqrt() + 1e-6), max=1.0) for g in grads]
    return grads if value is None else [g.clamp(-value, value) for g in grads]


def paths(
    model: nn.Module, cases: dict[str, Case], data: list[Tensor], steps: int, first_order: bool = False,
    clip: tuple[float | None, float | None] = (None, None), truncate: int | None = None,
) -> list[list[dict[str, Tensor]]]:  # fmt: skip
    """phi_0 .. phi_K of each task, differentiable in the model's parameters and everything learned.

    cases: of each adapted parameter.
    """
    found = []
    for x, y in zip(data[0], data[1], strict=True):
        phi = dict(model.named_parameters())
        states = {name: case.begin(name, phi[name]) for name, case in cases.items()}
        path = [phi]
        for k in range(steps):
            value = nn.functional.mse_loss(torch.func.functional_call(model, phi, (x,)), y)
            grads = torch.autograd.grad(value, [phi[name] for name in cases], create_graph=True)
            grads = clipped([g.detach() if first_order else g for g in grads], *clip)
            phi = dict(phi)
            for (name, case), g in zip(cases.items(), grads, strict=True):
                h = {key: case.at(key, name, k) for key in case.values}
                first = k == 0 and "momentum_buffer" not in case.start.get(name, {})
                phi[name], states[name] = step(case.rule, h, phi[name], g, states[name], case.taken + k + 1, first)
            if truncate is not None and k + 1 == steps - truncate:  # what came before is constant
                theta = path[0]
                phi = {name: theta[name] + (p - theta[name]).detach() for name, p in phi.items()}
                states = {name: {key: t.detach() for key, t in s.items()} for name, s in states.items()}
            path.append(phi)
        found.append(path)
    return found


def wanted(model: nn.Module, cases: dict[str, Case]) -> list[Tensor]:
    """Everything that has a gradient."""
    held: list[Any] = list(model.parameters())
    for case in cases.values():
        for value in case.values.values():
            held += value.values() if isinstance(value, dict) else [value]
        held += [t for part in case.start.values() for t in part.values()]
    return list({id(t): t for t in held if isinstance(t, Tensor) and t.requires_grad}.values())


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    scale = torch.cat([t.flatten() for t in expected]).norm()
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).norm() <= 1e-9 * (right.norm() + 1e-3 * scale)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def conv() -> nn.Module:
    """The bias of the convolution has a gradient of zero."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def fused(model: nn.Module, cases: dict[str, Case], steps: int, **options: Any) -> FusedMAML:
    """The FusedMAML whose adapted parameters have these cases."""
    groups: dict[int, list[str]] = {}
    for name, case in cases.items():
        groups.setdefault(id(case), []).append(name)
    by_id = {id(case): case for case in cases.values()}
    pairs = [(names, by_id[i].optimizer()) for i, names in groups.items()]
    rates = {
        name: case.values["rate"][name] if isinstance(case.values["rate"], dict) else case.values["rate"]
        for name, case in cases.items()
    }
    optimizer = pairs[0][1] if len(pairs) == 1 else optim.Groups(pairs)
    return FusedMAML(
        model, rates, steps, loss="mse", adapt_params=list(cases), backend="fused", inner_optimizer=optimizer, **options
    )


def check(
    model: nn.Module, cases: dict[str, Case], data: list[Tensor], steps: int, first_order: bool = False,
    clip: tuple[float | None, float | None] = (None, None), query_weights: list[float] | None = None,
    truncate: int | None = None, **options: Any,
) -> None:  # fmt: skip
    """The loss, the fast parameters and all gradients."""
    maml = fused(
        model, cases, steps, first_order=first_order, inner_clip_norm=clip[0], inner_clip_value=clip[1],
        query_weights=query_weights, truncate=truncate, **options,
    )  # fmt: skip
    found = paths(model, cases, data, steps, first_order, clip, truncate)
    weights = query_weights or [0.0] * steps + [1.0]
    expected = torch.stack([
        w * nn.functional.mse_loss(torch.func.functional_call(model, path[k], (x,)), y)
        for path, x, y in zip(found, data[2], data[3], strict=True)
        for k, w in enumerate(weights)
        if w
    ]).sum() / len(found)  # fmt: skip
    tensors = wanted(model, cases)
    right = torch.autograd.grad(expected, tensors, allow_unused=True, materialize_grads=True)
    out = maml(*data)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
    grads = []
    for t in tensors:
        assert t.grad is not None
        grads.append(t.grad)
        t.grad = None
    close(grads, list(right))
    fast = maml.adapt(*data[:2])
    for name in cases:
        expected = torch.stack([path[-1][name] for path in found])
        torch.testing.assert_close(fast[name], expected.detach(), rtol=1e-9, atol=1e-11)


def of_all(case: Case, model: nn.Module) -> dict[str, Case]:
    return dict.fromkeys([name for name, _ in model.named_parameters()], case)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_every_hyperparameter_is_learned(rule, form):
    model = mlp()
    check(model, of_all(learned(rule, form, shapes(model), 3), model), episode(target=(4,)), 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_steps_and_orders(rule, steps, first_order):
    model = conv()
    check(model, of_all(numbers(rule), model), episode((2, 5, 4), target=(4,)), steps, first_order)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tasks", [1, 33])
@pytest.mark.parametrize("first_order", [False, True])
def test_tasks(rule, tasks, first_order):
    """33 tasks run in lanes on a CPU."""
    model = mlp()
    case = learned(rule, "0-d", shapes(model), 2)
    check(model, of_all(case, model), episode(target=(4,), tasks=tasks), 2, first_order, clip=(1.0, None))


@pytest.mark.parametrize("rule", [rule for rule, parts in RULES.items() if parts[3]])
@pytest.mark.parametrize("tasks", [3, 33])
@pytest.mark.parametrize("taken", [0, 2])
def test_initial_states_are_learned(rule, tasks, taken):
    model = mlp()
    case = numbers(rule)
    case.taken = taken
    for name, shape in shapes(model).items():
        # Above the square of any average, so that no variance is negative.
        case.start[name] = {
            key: nn.Parameter((0.1 if key == "grad_avg" else 0.5) + 0.2 * torch.rand(shape).double())
            for key in RULES[rule][3]
        }
    check(model, of_all(case, model), episode(target=(4,), tasks=tasks), 3)


@pytest.mark.parametrize("rule", ["decay", "momentum", "adam", "rmsprop centered"])
@pytest.mark.parametrize("clip", [(1.0, None), (None, 0.2), (1.0, 0.2)])
@pytest.mark.parametrize("tasks", [4, 33])
def test_clipping(rule, clip, tasks):
    model = mlp()
    data = episode(target=(4,), tasks=tasks)
    data[1] *= torch.linspace(0.1, 3, tasks).double().reshape(-1, 1, 1)
    case = learned(rule, "0-d", shapes(model), 3)
    norms = []
    for path, x, y in zip(paths(model, of_all(case, model), data, 3, clip=clip), data[0], data[1], strict=True):
        value = nn.functional.mse_loss(torch.func.functional_call(model, path[0], (x,)), y)
        grads = torch.autograd.grad(value, list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    assert min(norms) < 1 < max(norms)
    check(model, of_all(case, model), data, 3, clip=clip)
    check(model, of_all(case, model), data, 3, first_order=True, clip=clip)


def test_clipping_of_plain_descent():
    model = mlp()
    maml = FusedMAML(model, 0.1, 3, loss="mse", backend="fused", inner_clip_norm=0.5)
    data = episode(target=(4,))
    case = Case("decay", {"rate": 0.1, "weight_decay": 0.0})
    found = paths(model, of_all(case, model), data, 3, clip=(0.5, None))
    losses = [
        nn.functional.mse_loss(torch.func.functional_call(model, path[-1], (x,)), y)
        for path, x, y in zip(found, data[2], data[3], strict=True)
    ]
    right = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
    maml(*data).loss.backward()
    close([p.grad for p in model.parameters()], list(right))


@pytest.mark.parametrize("first_order", [False, True])
def test_groups_and_parameters_that_are_not_adapted(first_order):
    model = conv()
    all_shapes = shapes(model)
    cases = {
        "5.weight": learned("adam", "elementwise", {"5.weight": all_shapes["5.weight"]}, 2),
        "5.bias": learned("rmsprop momentum", "per step", all_shapes, 2),
        "0.bias": numbers("momentum"),
        "1.weight": Case("decay", {"rate": 0.1, "weight_decay": 0.0}),
    }
    data = episode((2, 5, 4), target=(4,))
    check(model, cases, data, 2, first_order)
    check(model, cases, data, 2, first_order, clip=(0.3, 0.1))


def test_one_hyperparameter_of_two_optimizers():
    model, eps = mlp(), nn.Parameter(torch.tensor(0.05).double())
    one, other = numbers("adam"), numbers("rmsprop")
    one.values["eps"] = other.values["eps"] = eps
    cases = {"0.weight": one, "0.bias": other, "2.weight": other, "2.bias": one}
    check(model, cases, episode(target=(4,)), 3)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.0, 0.7], [0.1, 0.2, 0.7, 0.0]])
def test_query_weights(rule, weights):
    model = mlp()
    check(model, of_all(learned(rule, "0-d", shapes(model), 3), model), episode(target=(4,)), 3, query_weights=weights)


@pytest.mark.parametrize("options", [{"checkpoint": "recompute"}, {"task_chunk": 2}])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_options(rule, options):
    model = conv()
    case = learned(rule, "0-d", shapes(model), 3)
    check(model, of_all(case, model), episode((2, 5, 4), target=(4,)), 3, clip=(0.5, None), **options)


@pytest.mark.parametrize("rule", ["momentum", "adam", "rmsprop centered"])
@pytest.mark.parametrize("first_order", [False, True])
def test_truncated(rule, first_order):
    """The states are constant, too, where the differentiated steps begin."""
    model = mlp()
    case = learned(rule, "per step", shapes(model), 6)
    options = {"meta_gradient": "truncated", "truncate": 2}
    check(model, of_all(case, model), episode(target=(4,)), 6, first_order, clip=(1.0, None), **options)


def test_many_samples():
    """They run in tiles on a CPU, and on a GPU in chunks."""
    model = mlp()
    check(model, of_all(learned("adam", "0-d", shapes(model), 2), model), episode(target=(4,), n=(150, 140)), 2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("first_order", [False, True])
def test_adapt_is_differentiable(rule, first_order):
    model = mlp()
    case = learned(rule, "0-d", shapes(model), 2)
    cases, data = of_all(case, model), episode(target=(4,))
    maml = fused(model, cases, 2, first_order=first_order)
    tensors = wanted(model, cases)
    fast = maml.adapt(*data[:2], differentiable=True)
    found = paths(model, cases, data, 2, first_order)
    objective = sum((p.sin() * (i + 1)).sum() for i, p in enumerate(fast.values()))
    expected = sum((path[-1][n].sin() * (i + 1)).sum() for path in found for i, n in enumerate(fast))
    close(
        list(torch.autograd.grad(objective, tensors, allow_unused=True, materialize_grads=True)),
        list(torch.autograd.grad(expected, tensors, allow_unused=True, materialize_grads=True)),
    )


@pytest.mark.parametrize("rule", ["decay", "momentum", "adam"])
def test_the_steps_of_an_inner_loop(rule):
    model = mlp()
    cases, data = of_all(learned(rule, "per step", shapes(model), 3), model), episode(target=(4,))
    maml = fused(model, cases, 3, inner_clip_norm=1.0)
    found = paths(model, cases, data, 3, clip=(1.0, None))
    for k, fast in enumerate(maml.inner_loop(*data[:2], 3)):
        for name in cases:
            expected = torch.stack([path[k][name] for path in found]).detach()
            torch.testing.assert_close(fast[name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_a_task_has_the_same_bits_alone(rule):
    model = mlp()
    maml = fused(model, of_all(learned(rule, "0-d", shapes(model), 3), model), 3, inner_clip_norm=1.0)
    data = episode(target=(4,), tasks=17)
    fast = maml.adapt(*data[:2])
    alone = maml.adapt(data[0][4:5], data[1][4:5])
    assert all(torch.equal(fast[name][4:5], alone[name]) for name in fast)


def test_float32_of_many_steps():
    """1 - beta2^t is 0.001 in the first step: computed in float32, it would have an error of 6e-5."""
    model = mlp().float()
    data = episode(target=(4,), dtype=torch.float32)
    grads = []
    for m, d in ((model, data), (mlp(), [t.double() for t in data])):
        m.load_state_dict(model.state_dict())
        maml = FusedMAML(m, 0.01, 4, loss="mse", backend="fused", inner_optimizer=optim.Adam(eps=1e-3))
        maml(*d).loss.backward()
        grads.append(torch.cat([p.grad.flatten().double() for p in m.parameters()]))
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()
