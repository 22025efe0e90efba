"""FusedMAML with inner optimizers: the meta-gradient against a loop that is written out (unrolled_optimizers.py)."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, optim
from tests.conftest import assert_close, episode
from tests.engine import unrolled_optimizers as unrolled

TOLERANCE = 1e-9
OURS = {
    "sgd": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW, "adamax": optim.Adamax, "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}  # fmt: skip
# eps is large enough that the meta-gradient is not dominated by elements whose gradient is nearly zero.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("adam", {"eps": 1e-3}),
    ("adam", {"betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.1}),
    ("adamw", {"eps": 1e-3, "weight_decay": 0.3}),
    ("adamax", {"eps": 1e-3, "weight_decay": 0.1}),
    ("rmsprop", {"eps": 1e-3}),
    ("rmsprop", {"alpha": 0.7, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.6, "centered": True}),
    ("adagrad", {"eps": 1e-3}),
    ("adagrad", {"lr_decay": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
]


@pytest.fixture(autouse=True)
def _general_path_may_warn() -> Iterator[None]:
    """Fused layers serve some of these; the others say that they run on the general path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="maml_cuda runs this model on the general path")
        yield


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def gradients(maml: FusedMAML) -> dict[str, Tensor]:
    found = {name.removeprefix("model."): p.grad for name, p in maml.named_parameters()}
    return {name: g for name, g in found.items() if g is not None}


def compare(
    maml: FusedMAML,
    data: list[Tensor],
    step: Callable[..., Tensor],
    wanted: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """The meta-step and the adapted parameters against the loop that is written out."""
    steps = maml.inner_steps
    loss, expected, after = unrolled.meta_gradient(maml.model, data, steps, step, wanted or {}, **options)
    maml.zero_grad()
    out = maml(*data)
    out.loss.backward()
    assert abs(out.loss.item() - loss.item()) <= TOLERANCE
    assert_close(gradients(maml), expected, TOLERANCE)
    for fast in (maml.adapt(*data[:2]), list(maml.inner_loop(*data[:2], steps))[-1]):
        assert_close(fast, {n: torch.stack([phi[n] for phi in after]) for n in fast}, TOLERANCE)


def plain(rule: str, lr: float, options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda name, p, g, s, k: unrolled.RULES[rule](p, g, s, k + 1, lr, options)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_meta_gradient(machine: str, backend: str, rule: str, options: dict[str, Any], first_order: bool) -> None:
    maml = FusedMAML(net(), 0.1, 4, inner_optimizer=OURS[rule](**options), first_order=first_order, backend=backend)
    compare(maml, episode(), plain(rule, 0.1, options), first_order=first_order)


@pytest.mark.parametrize(("norm", "value"), [(0.3, None), (None, 0.05), (0.4, 0.06), (50.0, 20.0)])
@pytest.mark.parametrize(("rule", "options"), [CASES[0], CASES[3], CASES[6]])
def test_clipped(
    machine: str, backend: str, rule: str, options: dict[str, Any], norm: float | None, value: float | None
) -> None:
    maml = FusedMAML(
        net(), 0.1, 3, inner_optimizer=OURS[rule](**options), inner_clip_norm=norm, inner_clip_value=value,
        backend=backend,
    )  # fmt: skip
    compare(maml, episode(), plain(rule, 0.1, options), norm=norm, value=value)


@pytest.mark.parametrize("norm", [None, 0.3])
@pytest.mark.parametrize("value", [None, 0.05])
def test_clipped_without_an_optimizer(machine: str, backend: str, norm: float | None, value: float | None) -> None:
    maml = FusedMAML(net(), 0.2, 3, inner_clip_norm=norm, inner_clip_value=value, backend=backend)
    compare(maml, episode(), plain("sgd", 0.2, {}), norm=norm, value=value)


# -- learned hyperparameters and states ---------------------------------------------------------------------------

FORMS = ["number", "0-d", "per step", "elementwise", "per step and element", "mixed"]
STEPS = 3


class Given:
    """A hyperparameter as an argument, and its value for a parameter and step."""

    def __init__(self, form: str, start: float, shapes: dict[str, torch.Size]) -> None:
        leading = (STEPS,) if "per step" in form else ()
        if form == "number":
            self.argument: Any = start
        elif "element" in form:
            self.argument = {name: learned(start, *leading, *shape) for name, shape in shapes.items()}
        elif form == "mixed":
            parts = [lambda shape: start, lambda shape: learned(start), lambda shape: learned(start, STEPS)]
            parts.append(lambda shape: learned(start, STEPS, *shape))
            self.argument = {name: parts[i % 4](shape) for i, (name, shape) in enumerate(shapes.items())}
        else:
            self.argument = learned(start, *leading)

    def at(self, name: str, k: int) -> Any:
        value = self.argument[name] if isinstance(self.argument, dict) else self.argument
        steps = isinstance(value, Tensor) and value.shape[:1] == (STEPS,)
        return value[k] if steps else value

    def learned(self, name: str) -> dict[str, Tensor]:
        held = self.argument.items() if isinstance(self.argument, dict) else [("", self.argument)]
        return {f"{name}.{key}".rstrip("."): t for key, t in held if isinstance(t, Tensor)}


def learned(start: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(start * (0.8 + 0.2 * torch.rand(shape, dtype=torch.float64)))


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


LEARNED: list[tuple[str, dict[str, float], dict[str, bool]]] = [
    ("sgd", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}, {}),
    ("sgd", {"momentum": 0.8, "weight_decay": 0.1}, {"nesterov": True}),
    ("adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-2, "weight_decay": 0.1}, {}),
    ("adamw", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-2, "weight_decay": 0.1}, {}),
    ("adamax", {"beta1": 0.9, "beta2": 0.7, "eps": 1e-2, "weight_decay": 0.1}, {}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-2, "weight_decay": 0.1, "momentum": 0.7}, {"centered": True}),
    ("adagrad", {"lr_decay": 0.3, "eps": 1e-2, "weight_decay": 0.1, "initial_accumulator_value": 0.5}, {}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rule", "options", "flags"), LEARNED)
def test_hyperparameters_of_every_form(
    machine: str, backend: str, rule: str, options: dict[str, float], flags: dict[str, bool], form: str
) -> None:
    model = net()
    shapes = shapes_of(model)
    once = {"per step": "0-d", "per step and element": "elementwise", "mixed": "elementwise"}
    given = {
        name: Given(once.get(form, form) if name == "initial_accumulator_value" else form, value, shapes)
        for name, value in {"lr": 0.1, **options}.items()
    }
    arguments: dict[str, Any] = {name: g.argument for name, g in given.items()}
    rate = arguments.pop("lr")
    if "beta1" in arguments:
        arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
    maml = FusedMAML(model, rate, STEPS, inner_optimizer=OURS[rule](**arguments, **flags), backend=backend)

    def step(name: str, p: Tensor, g: Tensor, s: dict[str, Any], k: int) -> Tensor:
        h = {key: value.at(name, k) for key, value in given.items()}
        if "beta1" in h:
            h["betas"] = (h.pop("beta1"), h.pop("beta2"))
        return unrolled.RULES[rule](p, g, s, k + 1, h.pop("lr"), {**h, **flags})

    wanted = {}
    for name, value in given.items():
        wanted |= value.learned("inner_lr" if name == "lr" else f"inner_optimizer.{name}")
    assert set(dict(maml.named_parameters())) == {f"model.{n}" for n in shapes} | set(wanted)
    compare(maml, episode(), step, wanted)


def test_beyond_the_schedule_the_last_value_repeats(machine: str, backend: str) -> None:
    schedule = torch.tensor([0.9, 0.5], dtype=torch.float64)
    maml = FusedMAML(net(), 0.1, 2, inner_optimizer=optim.SGD(momentum=schedule), backend=backend)
    data = episode()

    def step(name: str, p: Tensor, g: Tensor, s: dict[str, Any], k: int) -> Tensor:
        return unrolled.sgd(p, g, s, k + 1, 0.1, {"momentum": schedule[min(k, 1)]})

    _, _, after = unrolled.meta_gradient(maml.model, data, 5, step, {})
    fast = maml.adapt(*data[:2], steps=5)
    assert_close(fast, {n: torch.stack([phi[n] for phi in after]) for n in fast}, TOLERANCE)


STATES = {
    "sgd": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "adamax": ["exp_avg", "exp_inf"],
    "rmsprop": ["square_avg", "grad_avg", "momentum_buffer"],
    "adagrad": ["sum"],
}


@pytest.mark.parametrize("taken", [0, 4])
@pytest.mark.parametrize(("rule", "options", "flags"), [case for case in LEARNED if case[0] != "adamw"])
def test_initial_states(
    machine: str, backend: str, rule: str, options: dict[str, float], flags: dict[str, bool], taken: int
) -> None:
    """Given for all parameters but one, and learned; with the steps behind it."""
    model = net()
    names = list(shapes_of(model))[:-1]
    state = {
        name: {key: learned(0.3 if "avg" in key and "sq" not in key else 1.0, *shapes_of(model)[name])
               for key in STATES[rule]}
        for name in names
    }  # fmt: skip
    arguments: dict[str, Any] = {name: v for name, v in options.items() if "beta" not in name}
    if "beta1" in options:
        arguments["betas"] = (options["beta1"], options["beta2"])
    given = {name: {**part, "step": torch.tensor(float(taken))} for name, part in state.items()}
    maml = FusedMAML(model, 0.1, STEPS, inner_optimizer=OURS[rule](**arguments, **flags, state=given), backend=backend)

    def step(name: str, p: Tensor, g: Tensor, s: dict[str, Any], k: int) -> Tensor:
        t = k + 1 + (taken if name in names else 0)
        return unrolled.RULES[rule](p, g, s, t, 0.1, {**arguments, **flags})

    wanted = {f"inner_optimizer.state.{name}.{key}": t for name, part in state.items() for key, t in part.items()}
    compare(maml, episode(), step, wanted, states=lambda name: state.get(name, {}))


# -- groups -------------------------------------------------------------------------------------------------------


def test_groups(machine: str, backend: str) -> None:
    momentum = learned(0.8)
    groups = optim.Groups(
        [
            (["2.bias"], optim.Adagrad(eps=1e-2)),
            (lambda name: name.endswith("bias"), optim.SGD(momentum=momentum)),
            (lambda name: True, optim.Adam(eps=1e-2)),
        ]
    )
    maml = FusedMAML(net(), 0.1, 3, inner_optimizer=groups, backend=backend)
    assert "inner_optimizer.1.momentum" in dict(maml.named_parameters())
    chosen = {"2.bias": ("adagrad", {"eps": 1e-2}), "0.bias": ("sgd", {"momentum": momentum})}

    def step(name: str, p: Tensor, g: Tensor, s: dict[str, Any], k: int) -> Tensor:
        rule, options = chosen.get(name, ("adam", {"eps": 1e-2}))
        return unrolled.RULES[rule](p, g, s, k + 1, 0.1, options)

    compare(maml, episode(), step, {"inner_optimizer.1.momentum": momentum})


def test_parameters_that_are_not_adapted(machine: str, backend: str) -> None:
    """They have no state, and no part in the norm of the gradient; they have their exact meta-gradient."""
    adapted = ["2.weight", "2.bias"]
    maml = FusedMAML(
        net(), 0.1, 3, inner_optimizer=optim.Adam(eps=1e-2), inner_clip_norm=0.2, adapt_params=adapted, backend=backend
    )
    compare(maml, episode(), plain("adam", 0.1, {"eps": 1e-2}), adapted=adapted, norm=0.2)


# -- gradients that are zero --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1e-8, 0.5])
@pytest.mark.parametrize(("rule", "options"), [case for case in CASES if case[1].get("weight_decay") is None])
def test_gradients_that_are_always_zero(
    machine: str, backend: str, rule: str, options: dict[str, Any], clip: float | None
) -> None:
    """A column of inputs is zero, so that a column of weights has no gradient. The meta-gradient is finite all the
    same: it is that of the net without this column, and zero in the column."""
    data = episode()
    for x in (data[0], data[2]):
        x[..., 1] = 0
    whole = net()
    part = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    columns = torch.tensor([0, 2])
    part.load_state_dict({**whole.state_dict(), "0.weight": whole[0].weight.detach()[:, columns]})
    maml = FusedMAML(whole, 0.1, 3, inner_optimizer=OURS[rule](**options), inner_clip_norm=clip, backend=backend)
    maml(*data).loss.backward()
    without = [data[0][..., columns], data[1], data[2][..., columns], data[3]]
    _, expected, _ = unrolled.meta_gradient(part, without, 3, plain(rule, 0.1, options), {}, norm=clip)
    found = gradients(maml)
    assert torch.equal(found["0.weight"][:, 1], torch.zeros(5, dtype=torch.float64))
    assert_close({**found, "0.weight": found["0.weight"][:, columns]}, expected, TOLERANCE)


# -- with other variants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("rule", "options"), [CASES[1], CASES[3], CASES[6], CASES[10]])
def test_truncated(machine: str, backend: str, rule: str, options: dict[str, Any], first_order: bool) -> None:
    rate = learned(0.1, 4)
    maml = FusedMAML(
        net(), rate, 4, inner_optimizer=OURS[rule](**options), inner_clip_norm=0.5, meta_gradient="truncated",
        truncate=2, first_order=first_order, backend=backend,
    )  # fmt: skip

    def step(name: str, p: Tensor, g: Tensor, s: dict[str, Any], k: int) -> Tensor:
        return unrolled.RULES[rule](p, g, s, k + 1, rate[k], options)

    compare(maml, episode(), step, {"inner_lr": rate}, norm=0.5, truncate=2, first_order=first_order)


def test_reptile(machine: str, backend: str) -> None:
    """theta - phi_K, whatever the steps are."""
    data = episode()
    maml = FusedMAML(net(), 0.1, 3, inner_optimizer=optim.Adam(eps=1e-2), meta_gradient="reptile", backend=backend)
    maml(*data).loss.backward()
    theta = {name: p.detach() for name, p in maml.model.named_parameters()}
    _, _, after = unrolled.meta_gradient(maml.model, data, 3, plain("adam", 0.1, {"eps": 1e-2}), {})
    expected = {name: p - torch.stack([phi[name] for phi in after]).mean(0) for name, p in theta.items()}
    assert_close(gradients(maml), expected, TOLERANCE)
    text = r"must not require grad with meta_gradient=\"reptile\".*got requires_grad=True of inner_optimizer\.eps"
    with pytest.raises(ValueError, match=text):
        FusedMAML(net(), 0.1, 3, inner_optimizer=optim.Adam(eps=learned(1e-2)), meta_gradient="reptile")


@pytest.mark.parametrize(("rule", "options"), [CASES[4], CASES[6]])
def test_multi_step_loss(machine: str, backend: str, rule: str, options: dict[str, Any]) -> None:
    weights = [0.1, 0.0, 0.3, 0.6]
    maml = FusedMAML(
        net(), 0.1, 3, inner_optimizer=OURS[rule](**options), inner_clip_value=0.2, query_weights=weights,
        backend=backend,
    )  # fmt: skip
    compare(maml, episode(), plain(rule, 0.1, options), value=0.2, query_weights=weights)


def test_padding(machine: str, backend: str) -> None:
    """A task with padding is what it is without."""
    data = episode(n=(5, 5))
    weights = torch.ones(3, 5, dtype=torch.float64)
    weights[:, 3:] = 0
    found = []
    for given, options in ((data, {"spt_weights": weights}), ([t[:, :3] for t in data[:2]] + data[2:], {})):
        torch.manual_seed(0)
        maml = FusedMAML(net(), 0.1, 3, inner_optimizer=optim.Adam(eps=1e-2), inner_clip_norm=0.5, backend=backend)
        maml(*given, **options).loss.backward()
        found.append(gradients(maml))
    assert_close(found[0], found[1], TOLERANCE)


def test_a_support_set_for_each_step(machine: str, backend: str) -> None:
    sets = [episode(seed=k) for k in range(3)]
    maml = FusedMAML(
        net(), 0.1, 3, inner_optimizer=optim.Adam(eps=1e-2), inner_clip_norm=0.5, per_step_support=True, backend=backend
    )
    x_spt, y_spt = (torch.stack([each[i] for each in sets]) for i in range(2))
    maml(x_spt, y_spt, *sets[0][2:]).loss.backward()
    found = gradients(maml)
    total = torch.zeros((), dtype=torch.float64)
    theta = dict(maml.model.named_parameters())
    for t in range(3):
        phi, state = dict(theta), {name: {} for name in theta}
        for k in range(3):
            z = torch.func.functional_call(maml.model, phi, (x_spt[k, t],))
            grads = torch.autograd.grad(
                nn.functional.cross_entropy(z, y_spt[k, t]), list(phi.values()), create_graph=True
            )
            clipped = unrolled.clipped(dict(zip(phi, grads, strict=True)), 0.5, None)
            phi = {n: unrolled.adam(phi[n], clipped[n], state[n], k + 1, 0.1, {"eps": 1e-2}) for n in phi}
        z = torch.func.functional_call(maml.model, phi, (sets[0][2][t],))
        total = total + nn.functional.cross_entropy(z, sets[0][3][t]) / 3
    expected = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    assert_close(found, expected, TOLERANCE)


def test_update_statistics(machine: str, backend: str) -> None:
    """Running statistics are those of the sets at the parameters that the optimizer has reached."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()
    data = episode()
    maml = FusedMAML(model, 0.1, 2, inner_optimizer=optim.Adam(eps=1e-2), backend=backend)
    path = list(maml.inner_loop(*data[:2], 2))
    passes = [(path[k], data[0]) for k in range(2)] + [(path[k + 1], data[2]) for k in range(2)]
    hidden = [torch.einsum("tni,thi->tnh", x, fast["0.weight"]) + fast["0.bias"].unsqueeze(1) for fast, x in passes]
    mean = torch.stack([h.mean(1).mean(0) for h in hidden]).mean(0)
    maml.update_statistics(*data[:3])
    torch.testing.assert_close(model[1].running_mean, 0.1 * mean, rtol=1e-9, atol=1e-12)


# -- another implementation ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["sgd", "adam", "adamax", "rmsprop", "adagrad"])
def test_higher(rule: str) -> None:
    """Its Adam adds eps before it corrects the bias: a schedule of eps gives the same."""
    higher = pytest.importorskip("higher")
    eps = 1e-3
    theirs: Any = {
        "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax,
        "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad,
    }[rule]  # fmt: skip
    options: dict[str, Any] = {"momentum": 0.9} if rule == "sgd" else {"eps": eps}
    mine = {"eps": eps / (1 - 0.999 ** torch.arange(1, 5).double()) ** 0.5} if rule == "adam" else options
    model, data = net(), episode()
    for x_spt, y_spt, x_qry, y_qry in zip(*data, strict=True):
        inner = theirs(model.parameters(), lr=0.125, **options)  # a number of float32, which its Adagrad rounds to
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, steps):
            for _ in range(4):
                steps.step(nn.functional.cross_entropy(fast(x_spt), y_spt))
            (nn.functional.cross_entropy(fast(x_qry), y_qry) / len(data[0])).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    maml = FusedMAML(model, 0.125, 4, inner_optimizer=OURS[rule](**mine))
    maml(*data).loss.backward()
    assert_close(gradients(maml), expected, TOLERANCE)
