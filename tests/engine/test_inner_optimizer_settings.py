"""Inner optimizers as arguments: errors in words, changes between calls, copies, state_dict, what FusedMAML says of
them."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, PolicyTarget, gradcheck, optim
from tests.conftest import assert_close, episode, run
from tests.engine.test_inner_optimizers import gradients, learned, net

NAMES = "0.weight, 0.bias, 2.weight, 2.bias"


@pytest.fixture(autouse=True)
def _general_path_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="maml_cuda runs this model on the general path")
        yield


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_all(value: Any, **others: Any) -> dict[str, Any]:
    return dict.fromkeys(NAMES.split(", "), value) | others


# -- errors -------------------------------------------------------------------------------------------------------

NO_OPTIMIZER: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: optim.SGD(momentum=-0.1), ValueError, "SGD's momentum must be at least 0 and finite, got [-0.1"),
    (lambda: optim.SGD(momentum="0.9"), TypeError, "SGD's momentum must be a number, a tensor or a dict, got str"),
    (lambda: optim.SGD(momentum=True), TypeError, "SGD's momentum must be a number, a tensor or a dict, got bool"),
    (lambda: optim.SGD(dampening=float("inf")), ValueError, "SGD's dampening must be a number and finite, got [inf]"),
    (lambda: optim.SGD(nesterov=1), TypeError, "nesterov must be a bool, got int"),
    (
        lambda: optim.SGD(nesterov=True), ValueError,
        "nesterov must have a momentum and no dampening, got momentum=0 and dampening=0",
    ),
    (
        lambda: optim.SGD(momentum=0.9, dampening=0.1, nesterov=True), ValueError,
        "nesterov must have a momentum and no dampening, got momentum=0.9 and dampening=0.1",
    ),
    (lambda: optim.Adam(betas=0.9), ValueError, "betas must be a pair (beta1, beta2), got 0.9"),
    (lambda: optim.Adam(betas=(0.9, 1.0)), ValueError, "Adam's beta2 must be in [0, 1) and finite, got [1.0]"),
    (
        lambda: optim.AdamW(betas=(tensor(0.9, 1.2), 0.9)), ValueError,
        "AdamW's beta1 must be in [0, 1) and finite, got [0.9, 1.2]",
    ),
    (
        lambda: optim.Adamax(eps=torch.tensor(1)), TypeError,
        "Adamax's eps must be a floating-point tensor, got torch.int64",
    ),
    (
        lambda: optim.RMSprop(alpha={"0.weight": -1.0}), ValueError,
        "RMSprop's alpha['0.weight'] must be at least 0 and finite, got [-1.0]",
    ),
    (lambda: optim.RMSprop(centered=None), TypeError, "centered must be a bool, got NoneType"),
    (lambda: optim.Adagrad(lr_decay=-1), ValueError, "Adagrad's lr_decay must be at least 0 and finite, got [-1.0]"),
    (lambda: optim.Adam(state=[]), TypeError, "state must be a dict name -> dict of tensors, got list"),
    (lambda: optim.Adam(state={0: {}}), TypeError, "state must have the names of parameters as keys, got 0"),
    (
        lambda: optim.Adam(state={"0.bias": tensor(1)}), TypeError,
        "Adam's state['0.bias'] must be a dict of tensors, got Tensor",
    ),
    (
        lambda: optim.Adam(state={"0.bias": {"momentum_buffer": tensor(1)}}), ValueError,
        "Adam's state['0.bias'] must hold exp_avg, exp_avg_sq or step, got 'momentum_buffer'",
    ),
    (
        lambda: optim.Adam(state={"0.bias": {"exp_avg": 1.0}}), TypeError,
        "Adam's state['0.bias']['exp_avg'] must be a floating-point tensor, got float",
    ),
    (
        lambda: optim.Adam(state={"0.bias": {"step": 1.5}}), ValueError,
        "Adam's state['0.bias']['step'] must be a whole number from 0, got 1.5",
    ),
    (
        lambda: optim.Adam(state={"0.bias": {"step": "1"}}), TypeError,
        "Adam's state['0.bias']['step'] must be a number, got str",
    ),
    (lambda: optim.Groups([]), ValueError, "groups must hold at least one pair (names, optimizer), got none"),
    (lambda: optim.Groups([optim.Adam()]), TypeError, "groups[0] must be a pair (names, optimizer), got Adam"),
    (
        lambda: optim.Groups([("0.bias", optim.Adam())]), TypeError,
        "groups[0] must begin with names or a function on names, got str",
    ),
    (
        lambda: optim.Groups([(["0.bias"], torch.optim.Adam)]), TypeError,
        "groups[0] must end with a maml_cuda.optim optimizer, got type",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("made", "error", "text"), NO_OPTIMIZER)
def test_an_optimizer_refuses(made: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        made()


NO_ARGUMENT: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"inner_optimizer": torch.optim.Adam([nn.Parameter(tensor(1))])}, TypeError,
        "inner_optimizer must be one of maml_cuda.optim, such as maml_cuda.optim.Adam(), got Adam",
    ),
    (
        {"inner_optimizer": optim.Adam}, TypeError,
        "inner_optimizer must be one of maml_cuda.optim, such as maml_cuda.optim.Adam(), got the class Adam",
    ),
    ({"inner_clip_norm": 0}, ValueError, "inner_clip_norm must be finite and above 0, got 0"),
    ({"inner_clip_norm": True}, TypeError, "inner_clip_norm must be a number or None, got bool"),
    ({"inner_clip_value": float("nan")}, ValueError, "inner_clip_value must be finite and above 0, got nan"),
    ({"inner_clip_value": tensor(1)}, TypeError, "inner_clip_value must be a number or None, got Tensor"),
    (
        {"inner_optimizer": optim.SGD(momentum={"0.weight": 0.9})}, ValueError,
        "inner_optimizer.momentum must have exactly the adapted parameters as keys, got none for 0.bias, 2.weight, 2.b",
    ),
    (
        {"inner_optimizer": optim.SGD(momentum=tensor(0.9, 0.8))}, ValueError,
        "inner_optimizer.momentum must have shape [] or [3] (inner_steps), got [2]",
    ),
    (
        {"inner_optimizer": optim.Adam(eps=of_all(1e-3, **{"0.bias": tensor(1, 1)}))}, ValueError,
        "inner_optimizer.eps['0.bias'] must have shape [], [3] (inner_steps), [5] or [3, 5], got [2]",
    ),
    (
        {"inner_optimizer": optim.Adam(state={"1.weight": {"exp_avg": tensor(1)}})}, ValueError,
        f"inner_optimizer.state must name adapted parameters ({NAMES}), got 1.weight",
    ),
    (
        {"inner_optimizer": optim.Adam(state={"0.bias": {"exp_avg": tensor(1, 2)}})}, ValueError,
        "inner_optimizer.state['0.bias']['exp_avg'] must have the parameter's shape [5], got [2]",
    ),
    (
        {"inner_optimizer": optim.Adam(state={"0.bias": {"exp_avg": tensor(1, 2, 3, 4, float("nan"))}})}, ValueError,
        "inner_optimizer.state['0.bias']['exp_avg'] must be finite, got [1.0, 2.0, 3.0, 4.0, nan]",
    ),
    (
        {"inner_optimizer": optim.SGD(state={"0.bias": {"momentum_buffer": tensor(1, 2, 3, 4, 5)}})}, ValueError,
        "inner_optimizer.state['0.bias'] must hold nothing with these hyperparameters, got momentum_buffer",
    ),
    (
        {"inner_optimizer": optim.RMSprop(state={"0.bias": {"grad_avg": tensor(1, 2, 3, 4, 5)}})}, ValueError,
        "inner_optimizer.state['0.bias'] must hold square_avg with these hyperparameters, got grad_avg",
    ),
    (
        {"inner_optimizer": optim.Adagrad(initial_accumulator_value=tensor(1, 2, 3))}, ValueError,
        "initial_accumulator_value must be one value for all steps, got one for each",
    ),
    (
        {"inner_optimizer": optim.Groups([(["0.bias", "1.bias"], optim.Adam())])}, ValueError,
        f"inner_optimizer: groups[0] must name adapted parameters ({NAMES}), got 1.bias",
    ),
    (
        {"inner_optimizer": optim.Groups([(lambda name: "head" in name, optim.Adam())])}, ValueError,
        "inner_optimizer: groups[0] must choose an adapted parameter, got none",
    ),
    (
        {"inner_optimizer": optim.Groups([(["0.bias", "2.weight"], optim.Adam())])}, ValueError,
        "inner_optimizer must have a group for each adapted parameter, got none for 0.weight, 2.bias",
    ),
    (
        {"inner_optimizer": optim.Groups([(lambda name: True, optim.SGD(momentum=tensor(1, 2)))])}, ValueError,
        "inner_optimizer[0].momentum must have shape [] or [3] (inner_steps), got [2]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "text"), NO_ARGUMENT)
def test_the_constructor_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        FusedMAML(net(), 0.1, 3, **options)


def test_clipping_by_value_of_complex_parameters_is_refused() -> None:
    model = nn.Linear(3, 4, dtype=torch.complex128)
    text = "inner_clip_value must be None for complex parameters, got 0.1"
    with pytest.raises(ValueError, match=text):
        FusedMAML(model, 0.1, 3, loss=lambda z, y: (z - y).abs().square().mean(), inner_clip_value=0.1)


def test_a_schedule_without_steps(backend: str) -> None:
    maml = FusedMAML(net(), 0.1, 0, inner_optimizer=optim.SGD(momentum=tensor()), backend=backend)
    data = episode()
    maml(*data)
    text = "inner_optimizer.momentum must hold a value for 2 steps, got one of shape [0]"
    with pytest.raises(ValueError, match=re.escape(text)):
        maml.adapt(*data[:2], steps=2)


# -- changes between calls ----------------------------------------------------------------------------------------

CHANGES: list[Callable[[FusedMAML], Any]] = [
    lambda maml: setattr(maml.inner_optimizer, "momentum", 0.3),
    lambda maml: setattr(maml.inner_optimizer, "nesterov", True),
    lambda maml: setattr(maml.inner_optimizer, "weight_decay", tensor(0.3)[0]),
    lambda maml: setattr(maml.inner_optimizer, "momentum", tensor(0.3, 0.5, 0.6)),
    lambda maml: setattr(maml.inner_optimizer, "dampening", of_all(0.3)),
    lambda maml: setattr(maml, "inner_optimizer", optim.Adam(eps=1e-2)),
    lambda maml: setattr(maml, "inner_optimizer", None),
    lambda maml: setattr(maml, "inner_clip_norm", 0.1),
    lambda maml: setattr(maml, "inner_clip_value", 0.01),
    lambda maml: setattr(maml, "inner_lr", 0.03),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(machine: str, backend: str, change: Callable[[FusedMAML], Any]) -> None:
    """The next call gives what the reference gives, which is not what it gave before."""
    data = episode()
    maml = FusedMAML(net(), 0.1, 3, inner_optimizer=optim.SGD(momentum=0.9), backend=backend)
    for _ in range(3):  # the third call is like an earlier one
        _, before = run(maml, data)
    change(maml)
    for _ in range(3):
        _, after = run(maml, data)
        fresh = FusedMAML(
            maml.model, maml.inner_lr, 3, inner_optimizer=maml.inner_optimizer, inner_clip_norm=maml.inner_clip_norm,
            inner_clip_value=maml.inner_clip_value, backend="reference",
        )  # fmt: skip
        assert_close(after, run(fresh, data)[1])
    assert any(not torch.allclose(after[name], before[name], rtol=1e-6) for name in before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_a_compiled_call(compiled: Any, change: Callable[[FusedMAML], Any]) -> None:
    data = episode()
    maml = FusedMAML(net(), 0.1, 3, inner_optimizer=optim.SGD(momentum=0.9))
    call = compiled(maml)
    call(*data)
    change(maml)
    assert torch.equal(call(*data).loss, maml(*data).loss)


def test_a_hyperparameter_changes_its_form() -> None:
    optimizer = optim.SGD(momentum=0.9)
    for value, held in [(learned(0.3), {"momentum"}), (0.5, set()), (of_all(learned(0.3)), {"momentum.0.weight"})]:
        optimizer.momentum = value
        assert {name for name, _ in optimizer.named_parameters()} == held
    optimizer.momentum = tensor(0.5)
    assert set(optimizer.state_dict()) == {"momentum"}


def test_a_change_in_place_of_a_learned_hyperparameter_is_seen(machine: str, backend: str) -> None:
    data = episode()
    momentum = learned(0.9)
    maml = FusedMAML(net(), 0.1, 3, inner_optimizer=optim.SGD(momentum=momentum), backend=backend)
    run(maml, data)
    with torch.no_grad():
        momentum.fill_(0.3)
    plain = FusedMAML(maml.model, 0.1, 3, inner_optimizer=optim.SGD(momentum=0.3), backend="reference")
    assert_close(run(maml, data)[1], run(plain, data)[1])


def test_wrong_changes_are_refused(backend: str) -> None:
    data = episode()
    maml = FusedMAML(net(), 0.1, 3, inner_optimizer=optim.SGD(momentum=0.9), backend=backend)
    maml.inner_clip_norm = -1
    with pytest.raises(ValueError, match="inner_clip_norm must be finite and above 0, got -1"):
        maml(*data)
    maml.inner_clip_norm = None
    with pytest.raises(ValueError, match=r"SGD's momentum must be at least 0 and finite, got \[nan\]"):
        maml.inner_optimizer.momentum = float("nan")
    maml.inner_optimizer.momentum = {"0.weight": 0.5}
    with pytest.raises(ValueError, match=r"inner_optimizer\.momentum must have exactly the adapted parameters as keys"):
        maml(*data)
    maml.inner_optimizer.momentum = 0.9
    maml(*data)


# -- as a module --------------------------------------------------------------------------------------------------


def made(backend: str) -> FusedMAML:
    groups = optim.Groups(
        [
            (["0.bias"], optim.SGD(momentum=learned(0.9), state={"0.bias": {"momentum_buffer": learned(1.0, 5)}})),
            (lambda name: True, optim.Adam(betas=(tensor(0.9)[0], learned(0.99, 3)), eps=1e-2)),
        ]
    )
    return FusedMAML(net(), 0.1, 3, inner_optimizer=groups, inner_clip_norm=0.5, backend=backend)


def test_its_tensors_are_those_of_the_module() -> None:
    maml = made("auto")
    of_optimizer = {
        "inner_optimizer.0.momentum", "inner_optimizer.0.state.0.bias.momentum_buffer", "inner_optimizer.1.beta2",
    }  # fmt: skip
    parameters = dict(maml.named_parameters())
    assert {name for name in parameters if name.startswith("inner_optimizer")} == of_optimizer
    assert set(dict(maml.named_buffers())) == {"inner_optimizer.1.beta1"}
    maml.float()
    assert all(t.dtype == torch.float32 for t in (*maml.parameters(), *maml.buffers()))
    maml(*[t.float() if t.is_floating_point() else t for t in episode()]).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in maml.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda maml: pickle.loads(pickle.dumps(maml))])
def test_copies(machine: str, backend: str, copied: Callable[[FusedMAML], FusedMAML]) -> None:
    maml, data = made(backend), episode()
    run(maml, data)
    other = copied(maml)
    assert other.inner_optimizer is not maml.inner_optimizer
    maml.zero_grad()
    for each in (maml, other):
        each(*data).loss.backward()
    assert_close(gradients(other), gradients(maml), 0)
    with torch.no_grad():
        for p in maml.inner_optimizer.parameters():
            p.mul_(0.5)
    other.zero_grad()
    other(*data).loss.backward()
    assert_close(gradients(other), gradients(maml), 0)  # as before


def test_state_dict(machine: str, backend: str) -> None:
    maml, data = made(backend), episode()
    with torch.no_grad():
        for p in maml.parameters():
            p.mul_(0.9)
    file = io.BytesIO()
    torch.save(maml.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    fresh = made(backend)
    run(fresh, data)
    fresh.load_state_dict(torch.load(file))
    fresh.zero_grad()
    for each in (maml, fresh):
        each(*data).loss.backward()
    assert_close(gradients(fresh), gradients(maml), 0)


def test_gradcheck_has_a_row_for_each_tensor() -> None:
    names = [row.name for row in gradcheck(made("auto"), *episode())]
    assert names[-3:] == [
        "inner_optimizer.0.momentum", "inner_optimizer.0.state.0.bias.momentum_buffer", "inner_optimizer.1.beta2",
    ]  # fmt: skip


def test_explain_says_what_an_inner_step_is() -> None:
    text = made("auto").explain()
    assert (
        "inner gradients: clipped by norm 0.5; group 0: SGD(dampening=0.0, weight_decay=0.0), group 1: Adam(eps=0.01, "
        "weight_decay=0.0)"
    ) in text
    assert "inner gradients" not in FusedMAML(net(), 0.1).explain()


def test_printed() -> None:
    assert (
        repr(optim.SGD(momentum=0.9, nesterov=True))
        == "SGD(momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=True)"
    )


# -- with others --------------------------------------------------------------------------------------------------


def test_complex_parameters() -> None:
    """Their real and imaginary parts are parameters of their own, as in torch."""

    class Real(nn.Module):
        """The same net with parameters [..., 2]."""

        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.to(torch.complex128), *map(torch.view_as_complex, (self.weight, self.bias)))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z.abs().square() - y).square().mean()

    class Complex(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(torch.complex128))

    model = Complex(3, 4, dtype=torch.complex128)
    parts = Real(*(torch.view_as_real(p.detach()).clone() for p in (model.weight, model.bias)))
    data = episode(target=(4,))
    found = []
    for each in (model, parts):
        optimizer = optim.Adam(eps=1e-2, weight_decay=0.1)
        maml = FusedMAML(each, 0.1, 3, loss=loss, inner_optimizer=optimizer, inner_clip_norm=1.0)
        maml(*data).loss.backward()
        found.append([p.grad for p in each.parameters()])
    for g, of_parts in zip(*found, strict=True):
        torch.testing.assert_close(torch.view_as_real(g), of_parts, rtol=1e-9, atol=1e-9)


def test_the_state_goes_on_from_step_to_step(machine: str, backend: str) -> None:
    """The steps of inner_loop are those of adapt."""
    maml, data = made(backend), episode()
    for k, fast in enumerate(maml.inner_loop(*data[:2], 4)):
        assert_close(fast, maml.adapt(*data[:2], steps=k), 0)
    first, other = (maml.adapt(*data[:2]) for _ in range(2))
    assert_close(first, other, 0)  # every call starts anew


def test_differentiable_adaptation(machine: str, backend: str) -> None:
    """The gradient of the query loss through adapt(differentiable=True) and predict is the meta-gradient."""
    maml, data = made(backend), episode()
    maml(*data).loss.backward()
    expected = gradients(maml)
    maml.zero_grad()
    fast = maml.adapt(*data[:2], differentiable=True)
    prediction = maml.predict(fast, data[2])
    nn.functional.cross_entropy(prediction.flatten(0, 1), data[3].flatten()).backward()
    assert_close(gradients(maml), expected, 1e-9)


def test_fisher_vector_product(machine: str, backend: str) -> None:
    """J^T F J v, with J the Jacobian of the adapted policy's logits in theta, column by column."""
    model = net()
    maml = FusedMAML(
        model, 0.1, 2, loss="categorical_policy_gradient", inner_optimizer=optim.Adam(eps=1e-2), backend=backend
    )
    x_spt, actions, x_qry, _ = episode()
    y = PolicyTarget(actions, torch.randn(actions.shape, dtype=torch.float64))
    theta = dict(model.named_parameters())
    v = {name: torch.randn_like(p) for name, p in theta.items()}
    found = maml.fisher_vector_product(x_spt, y, x_qry, v)
    assert_close(maml.fisher(x_spt, y, x_qry)(v), found, 1e-12)
    logits = maml.predict(maml.adapt(x_spt, y, differentiable=True), x_qry)  # [tasks, n, actions]
    tasks, n, _ = logits.shape
    flat = torch.cat([d.flatten() for d in v.values()])
    expected = torch.zeros_like(flat)
    for t in range(tasks):
        for i in range(n):
            rows = [torch.autograd.grad(z, list(theta.values()), retain_graph=True) for z in logits[t, i]]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            chances = logits[t, i].detach().softmax(0)
            fisher = chances.diag() - torch.outer(chances, chances)
            expected += jacobian.T @ (fisher @ (jacobian @ flat)) / (tasks * n)
    torch.testing.assert_close(torch.cat([p.flatten() for p in found.values()]), expected, rtol=1e-8, atol=1e-10)
