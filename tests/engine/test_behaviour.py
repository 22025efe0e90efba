"""How a FusedMAML lives: copied, saved, moved, called in every order; its blocks against the reference."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import maml_cuda
from maml_cuda import FusedMAML, gradcheck, reference

CLASSES = 4
BACKENDS = ("auto", "reference")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES)).to(dtype)


def image_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(45, CLASSES),
    ).to(dtype)  # fmt: skip


def episode(
    tasks: int = 3,
    n: tuple[int, int] = (5, 3),
    sample: tuple[int, ...] = (3,),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    data = []
    for count in n:
        data.append(torch.randn(tasks, count, *sample, generator=g, dtype=dtype))
        data.append(torch.randint(CLASSES, (tasks, count), generator=g))
    return data


def dotted_rates() -> dict[str, Any]:
    """Every form of rate in one dict, for net() and 2 inner steps."""
    torch.manual_seed(5)
    return {
        "0.weight": nn.Parameter(torch.rand(2, 7, 3).double()),
        "0.bias": nn.Parameter(torch.rand(7).double()),
        "1.weight": nn.Parameter(torch.tensor(0.2).double()),
        "1.bias": torch.tensor([0.1, 0.3]).double(),
        "3.weight": 0.25,
        "3.bias": nn.Parameter(torch.rand(2).double()),
    }


def learned(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values if len(values) > 1 else values[0]).double())


def step(maml: nn.Module, data: list[Tensor], **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one call."""
    maml.zero_grad()
    loss = maml(*data, **given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in maml.named_parameters() if p.grad is not None}


def equal(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To the bit."""
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, g in got[1].items():
        assert torch.equal(g, expected[1][name]), name


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda m: f"{what}: {m}")


# -- copied and saved ----------------------------------------------------------------------------------------


def saved_and_loaded(maml: FusedMAML) -> FusedMAML:
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner_lr", [lambda: 0.3, lambda: learned(0.3, 0.2), dotted_rates])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_the_same_and_apart(duplicate: Callable, inner_lr: Callable[[], Any], backend: str) -> None:
    maml = FusedMAML(net(), inner_lr(), 2, backend=backend)
    expected = step(maml, episode())
    twin = duplicate(maml)
    assert twin.backend == maml.backend
    equal(step(twin, episode()), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in maml.parameters()}
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert not torch.equal(step(twin, episode())[0], expected[0])
    equal(step(maml, episode()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_dict_goes_round(backend: str) -> None:
    maml = FusedMAML(net(), dotted_rates(), 2, backend=backend)
    keys = set(maml.state_dict())
    assert {f"model.{name}" for name in net().state_dict()} < keys
    assert {k for k in keys if not k.startswith("model.")} == {
        "inner_lr.0.weight", "inner_lr.0.bias", "inner_lr.1.weight", "inner_lr.1.bias", "inner_lr.3.bias",
    }  # fmt: skip
    with torch.no_grad():
        for p in maml.parameters():
            p.add_(0.05)
    expected = step(maml, episode())
    fresh = FusedMAML(net(), dotted_rates(), 2, backend=backend)
    assert not torch.equal(step(fresh, episode())[0], expected[0])
    fresh.load_state_dict(maml.state_dict())
    equal(step(fresh, episode()), expected)


def test_state_dict_keys_of_one_rate() -> None:
    def others(inner_lr: Any) -> set[str]:
        return {k for k in FusedMAML(net(), inner_lr, 2).state_dict() if not k.startswith("model.")}

    assert others(0.3) == set()
    assert others(torch.tensor(0.3).double()) == {"inner_lr"}
    assert others(learned(0.3)) == {"inner_lr"}
    assert others(learned(0.3, 0.1)) == {"inner_lr"}


def test_learned_rates_are_the_objects_that_were_passed() -> None:
    rate = learned(0.3)
    assert any(p is rate for p in FusedMAML(net(), rate).parameters())
    rates = dotted_rates()
    maml = FusedMAML(net(), rates, 2)
    held = {id(p) for p in maml.parameters()}
    passed = [r for r in rates.values() if isinstance(r, nn.Parameter)]
    assert {id(p) for p in passed} < held
    assert len(held) == len(passed) + len(list(maml.model.parameters()))
    step(maml, episode())
    del rates["0.bias"]  # a bias before a BatchNorm moves nothing
    passed = [r for r in rates.values() if isinstance(r, nn.Parameter)]
    assert all(r.grad is not None and r.grad.abs().sum() > 0 for r in passed)


def test_an_optimizer_step_on_a_learned_rate_is_seen() -> None:
    rate = learned(0.3)
    maml = FusedMAML(net(), rate, 2)
    before = step(maml, episode())[0]
    with torch.no_grad():
        rate.fill_(0.05)
    assert not torch.equal(step(maml, episode())[0], before)
    equal(step(maml, episode()), step(FusedMAML(maml.model, rate, 2), episode()))


# -- grad modes and the order of calls -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad(mode: Callable, backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    out = maml(*episode())
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.task_losses, out.logits, out.support_losses))
    with mode():
        plain = maml(*episode())
        fast = maml.adapt(*episode()[:2], differentiable=True)
        logits = maml.predict(fast, episode()[2])
    assert not any(t.requires_grad for t in (*vars(plain).values(), *fast.values(), logits))
    for name, value in vars(plain).items():
        assert torch.equal(value, getattr(out, name).detach()), name
    close(logits, out.logits)
    assert all(p.grad is None for p in maml.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_on_one_model(backend: str) -> None:
    model = net()
    one = FusedMAML(model, 0.3, 2, backend=backend)
    two = FusedMAML(model, 0.1, 3, first_order=True, backend=backend)
    expected = [step(maml, episode())[1] for maml in (one, two)]
    model.zero_grad()
    first, second = one(*episode()).loss, two(*episode()).loss
    second.backward()
    first.backward()
    for name, p in model.named_parameters():
        close(p.grad, expected[0][f"model.{name}"] + expected[1][f"model.{name}"], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_calls_before_one_backward(backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    expected = [step(maml, episode(seed=s))[1] for s in range(3)]
    maml.zero_grad()
    losses = [maml(*episode(seed=s)).loss for s in range(3)]
    (losses[0] - 2 * losses[1] + 0.5 * losses[2]).backward()
    for name, p in maml.named_parameters():
        close(p.grad, expected[0][name] - 2 * expected[1][name] + 0.5 * expected[2][name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_with_retain_graph(backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    _, once = step(maml, episode())
    maml.zero_grad()
    loss = maml(*episode()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, p in maml.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_step_between_forward_and_backward(backend: str) -> None:
    """The gradient is that of the parameters at the call."""
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    _, expected = step(maml, episode())
    maml.zero_grad()
    loss = maml(*episode()).loss
    with torch.no_grad():
        for p in maml.parameters():
            p.mul_(3)
    loss.backward()
    for name, p in maml.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_reused_between_forward_and_backward(backend: str) -> None:
    maml = FusedMAML(net(), 0.3, 2, backend=backend)
    _, expected = step(maml, episode())
    data = episode()
    maml.zero_grad()
    out = maml(*data)
    for t in data:
        t.zero_()
    out.loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in maml.named_parameters())


def test_adapt_does_not_hide_a_changed_parameter() -> None:
    """Its backward recomputes from the parameters, so a step in between must raise."""
    maml = FusedMAML(net(), 0.3, 2)
    total = sum(t.square().sum() for t in maml.adapt(*episode()[:2], differentiable=True).values())
    with torch.no_grad():
        maml.model[0].weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_order_may_change_at_any_time(backend: str) -> None:
    maml = FusedMAML(net(), 0.3, 2, backend=backend)
    second = step(maml, episode())
    maml.first_order = True
    first = step(maml, episode())
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1]["model.0.weight"], second[1]["model.0.weight"])
    maml.first_order = False
    equal(step(maml, episode()), second)


# -- moved, and odd memory -----------------------------------------------------------------------------------


def test_to_double_and_back() -> None:
    maml = FusedMAML(net(torch.float32), learned(0.3).float(), 2)
    single = step(maml, episode(dtype=torch.float32))
    assert maml.to(torch.float64) is maml
    double = step(maml, episode())
    assert double[0].dtype == torch.float64
    assert all(g.dtype == torch.float64 for g in double[1].values())
    maml.float()
    assert maml.backend == "cpu"
    equal(step(maml, episode(dtype=torch.float32)), single)


def every_other(t: Tensor) -> Tensor:
    """The same values, two apart in memory."""
    return torch.stack([t, t + 1], dim=-1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_everything(backend: str) -> None:
    maml = FusedMAML(net(), torch.tensor([0.3, 0.2]).double(), 2, backend=backend)
    weights = torch.tensor([0.2, 0.7, -0.4]).double()
    expected = step(maml, episode(), task_weights=weights)
    blocks = maml.predict(maml.adapt(*episode()[:2]), episode()[2])
    data = [every_other(t) for t in episode()]
    assert not any(t.is_contiguous() for t in data)
    maml.model[0].weight.data = maml.model[0].weight.data.t().contiguous().t()
    maml.inner_lr.data = torch.stack([maml.inner_lr, maml.inner_lr], 1)[:, 0]
    got = step(maml, data, task_weights=torch.stack([weights, weights], 1)[:, 0])
    close(got[0], expected[0])
    for name, g in got[1].items():
        close(g, expected[1][name], name)
    fast = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in maml.adapt(*data[:2]).items()}
    close(maml.predict(fast, data[2]), blocks)


# -- numbers that depend on nothing else ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    maml = FusedMAML(image_net(dtype), nn.Parameter(torch.tensor(0.1, dtype=dtype)), 2)
    data = episode(5, (7, 6), (2, 7, 6), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = maml(*data)
        results.append((step(maml, data), out, maml.adapt(*data[:2])))
    for got, out, fast in results[1:]:
        equal(got, results[0][0])
        assert torch.equal(out.logits, results[0][1].logits)
        assert torch.equal(out.support_losses, results[0][1].support_losses)
        assert all(torch.equal(t, results[0][2][name]) for name, t in fast.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "sample"), [(net, (3,)), (image_net, (2, 7, 6))])
def test_a_task_does_not_feel_its_neighbours(make: Callable, sample: tuple[int, ...], dtype: torch.dtype) -> None:
    maml = FusedMAML(make(dtype), 0.1, 2)
    data = episode(5, (6, 5), sample, dtype)
    out, fast = maml(*data), maml.adapt(*data[:2])
    for t in range(5):
        own = [d[t : t + 1] for d in data]
        alone = maml(*own)
        assert torch.equal(alone.task_losses[0], out.task_losses[t])
        assert torch.equal(alone.logits[0], out.logits[t])
        assert torch.equal(alone.support_losses[0], out.support_losses[t])
        for name, p in maml.adapt(*own[:2]).items():
            assert torch.equal(p[0], fast[name][t]), name
        picked = torch.zeros(5, dtype=dtype)
        picked[t] = 1
        in_company = step(maml, data, task_weights=picked)[1]
        for name, g in step(maml, own)[1].items():
            assert torch.equal(in_company[name], g), name


# -- task weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tasks", [1, 3, 33])
def test_task_weights(tasks: int, backend: str) -> None:
    maml = FusedMAML(net(), learned(0.3), 2, backend=backend)
    data = episode(tasks)
    weights = torch.randn(tasks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = step(maml, data)
    uniform = step(maml, data, task_weights=torch.full((tasks,), 1 / tasks).double())
    loss, grads = step(maml, data, task_weights=weights)
    losses = maml(*data).task_losses
    close(loss, (weights * losses).sum())
    close(plain[0], losses.mean())
    total: dict[str, Tensor] = {}
    for t in range(tasks):
        for name, g in step(maml, [d[t : t + 1] for d in data])[1].items():
            total[name] = total.get(name, torch.zeros_like(g)) + weights[t] * g
    for name, g in grads.items():
        close(g, total[name], name)
        torch.testing.assert_close(uniform[1][name], plain[1][name], rtol=1e-5, atol=1e-7)  # 1 / tasks in float32


@pytest.mark.parametrize("tasks", [1, 3, 33])
def test_tasks_against_the_reference(tasks: int) -> None:
    model, data = net(), episode(tasks)
    loss, truth = reference.meta_gradient(model, "cross_entropy", *data, 0.3, 2)
    got = step(FusedMAML(model, 0.3, 2), data)
    close(got[0], loss)
    for name, g in truth.items():
        close(got[1][f"model.{name}"], g, name)


# -- adapt, predict, loss_and_grad, hvp ----------------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor, y: Tensor, rate: Callable[[int], float], steps: int) -> dict[str, Tensor]:
    """The inner loop of one task, written out."""
    phi = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    for k in range(steps):
        loss = nn.functional.cross_entropy(functional_call(model, (phi, buffers), (x,)), y)
        grads = torch.autograd.grad(loss, list(phi.values()))
        phi = {n: (p - rate(k) * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
    return {name: p.detach() for name, p in phi.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [None, 0, 1, 5])
def test_adapt(steps: int | None, backend: str) -> None:
    model, rates = net(), torch.tensor([0.3, 0.1, 0.2]).double()
    maml = FusedMAML(model, rates, 3, backend=backend)
    x, y, *_ = episode()
    fast = maml.adapt(x, y, steps=steps)
    assert list(fast) == [name for name, _ in model.named_parameters()]
    for t in range(3):
        truth = by_hand(model, x[t], y[t], lambda k: float(rates[min(k, 2)]), 3 if steps is None else steps)
        for name, p in truth.items():
            close(fast[name][t], p, name)
    assert not any(t.requires_grad for t in fast.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapt_keeps_the_others_as_expanded_views(backend: str) -> None:
    maml = FusedMAML(net(), 0.3, 2, adapt_params=["3.weight", "3.bias"], backend=backend)
    fast = maml.adapt(*episode()[:2])
    body = fast["0.weight"]
    assert body.shape == (3, 7, 3)
    assert body.stride(0) == 0
    assert body.data_ptr() == maml.model[0].weight.data_ptr()
    assert not body.requires_grad
    assert not torch.equal(fast["3.weight"][0], maml.model[3].weight)


ADAPT: dict[str, dict[str, Any]] = {
    "plain": {"inner_lr": lambda: 0.3},
    "one learned rate": {"inner_lr": lambda: learned(0.3)},
    "learned per step": {"inner_lr": lambda: learned(0.3, 0.2)},
    "more steps than rates": {"inner_lr": lambda: learned(0.3, 0.2), "steps": 4},
    "fewer steps than rates": {"inner_lr": lambda: learned(0.3, 0.2), "steps": 1},
    "no steps": {"inner_lr": lambda: learned(0.3, 0.2), "steps": 0},
    "a dict": {"inner_lr": dotted_rates},
    "ANIL": {"inner_lr": lambda: learned(0.3), "adapt_params": ["3.weight", "3.bias"]},
    "first order": {"inner_lr": lambda: learned(0.3), "first_order": True},
}


@pytest.mark.parametrize("case", ADAPT)
def test_adapt_differentiable_against_the_reference(case: str) -> None:
    given = dict(ADAPT[case])
    inner_lr, steps = given.pop("inner_lr")(), given.pop("steps", None)
    model = net()
    x, y, *_ = episode()
    results = []
    for backend in BACKENDS:
        maml = FusedMAML(model, inner_lr, 2, backend=backend, **given)
        maml.zero_grad()
        fast = maml.adapt(x, y, steps=steps, differentiable=True)
        g = torch.Generator().manual_seed(4)
        total = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in fast.values())
        total.backward()
        detached = maml.adapt(x, y, steps=steps)
        for name, t in fast.items():
            assert torch.equal(t.detach(), detached[name]), name
        results.append((fast, {name: p.grad for name, p in maml.named_parameters()}))
    for name, t in results[0][0].items():
        close(t.detach(), results[1][0][name].detach(), name)
    for name, grad in results[1][1].items():
        own = results[0][1][name]
        if grad is None:  # a rate that no step uses
            assert own is None or not own.any(), name
        else:
            close(own, grad, name)


def test_adapt_in_an_objective_of_your_own_is_the_meta_gradient() -> None:
    rate = learned(0.3)
    maml = FusedMAML(net(), rate, 2)
    x_spt, y_spt, x_qry, y_qry = episode()
    expected = step(maml, episode())
    maml.zero_grad()
    logits = maml.predict(maml.adapt(x_spt, y_spt, differentiable=True), x_qry)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), y_qry.flatten())
    loss.backward()
    close(loss.detach(), expected[0])
    for name, p in maml.named_parameters():
        close(p.grad, expected[1][name], name)


@pytest.mark.parametrize("inner_lr", [lambda: 0.3, lambda: learned(0.3), dotted_rates])
def test_building_blocks_against_the_reference(inner_lr: Callable[[], Any]) -> None:
    model = net()
    x_spt, y_spt, x, y = episode()
    rate = inner_lr()
    g = torch.Generator().manual_seed(6)
    results = []
    for backend in BACKENDS:
        maml = FusedMAML(model, rate, 2, backend=backend)
        fast = maml.adapt(x_spt, y_spt)
        if not results:
            v = {name: torch.randn(t.shape, generator=g, dtype=t.dtype) for name, t in fast.items()}
        leaves = {name: t.clone().requires_grad_() for name, t in fast.items()}
        logits = maml.predict(leaves, x)
        grads = torch.autograd.grad(logits.square().sum(), list(leaves.values()))
        losses, gradient = maml.loss_and_grad(fast, x, y)
        results.append(
            {"logits": logits.detach(), "losses": losses}
            | {f"predict {name}": t for name, t in zip(leaves, grads, strict=True)}
            | {f"gradient {name}": t for name, t in gradient.items()}
            | {f"hvp {name}": t for name, t in maml.hvp(fast, x, y, v).items()}
            | {f"part hvp {name}": t for name, t in maml.hvp(fast, x, y, {"3.bias": v["3.bias"]}).items()}
        )
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert not value.requires_grad
        close(value, results[1][name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_at_parameters_that_all_tasks_share(backend: str) -> None:
    """adapt(steps=0) of frozen parameters gives expanded views; every block takes them."""
    model = net()
    model[0].requires_grad_(False)
    maml = FusedMAML(model, 0.3, adapt_params=["3.bias"], backend=backend)
    x, y = episode()[2:]
    views = {name: p.detach().expand(3, *p.shape) for name, p in model.named_parameters()}
    dense = {name: t.clone() for name, t in views.items()}
    assert torch.equal(maml.predict(views, x), maml.predict(dense, x))
    for a, b in zip(
        maml.loss_and_grad(views, x, y)[1].items(), maml.loss_and_grad(dense, x, y)[1].items(), strict=True
    ):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    assert "0.weight" not in maml.hvp(views, x, y, dense)


# -- BatchNorm, dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_running_statistics_are_never_written(mode: str, backend: str) -> None:
    model = net()
    model(torch.randn(6, 3).double())
    getattr(model, mode)()
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert len(before) == 3
    maml = FusedMAML(model, 0.3, 2, backend=backend)
    x_spt, y_spt, x, y = episode()
    step(maml, [x_spt, y_spt, x, y])
    fast = maml.adapt(x_spt, y_spt)
    maml.predict(fast, x)
    maml.loss_and_grad(fast, x, y)
    maml.hvp(fast, x, y, fast)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(m.training is (mode == "train") for m in model.modules())


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_never_read_in_train_mode(backend: str) -> None:
    model = net()
    maml = FusedMAML(model, 0.3, 2, backend=backend)
    expected = step(maml, episode())
    model[1].running_mean.fill_(float("nan"))
    model[1].running_var.fill_(float("nan"))
    equal(step(maml, episode()), expected)


def test_dropout_draws_what_the_reference_draws() -> None:
    """One mask a forward, in the order of the inner loop: the same seed gives the oracle's numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, CLASSES)).double()
    maml = FusedMAML(model, 0.3, 2, backend="reference")
    torch.manual_seed(9)
    got = step(maml, episode())
    torch.manual_seed(9)
    loss, truth = reference.meta_gradient(model, "cross_entropy", *episode(), 0.3, 2)
    close(got[0], loss)
    for name, g in truth.items():
        close(got[1][f"model.{name}"], g, name)


# -- gradcheck, build_info -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner_lr", [lambda: 0.3, dotted_rates])
def test_gradcheck_passes_and_leaves_all_as_it_was(inner_lr: Callable[[], Any], backend: str) -> None:
    maml = FusedMAML(net(), inner_lr(), 2, backend=backend)
    before = copy.deepcopy(maml.state_dict())
    table = gradcheck(maml, *episode())
    assert {row.name for row in table} == {n.removeprefix("model.") for n, _ in maml.named_parameters()}
    assert all(row.autograd_error <= 1e-8 and row.finite_difference_error <= 1e-4 for row in table)
    assert max(row.norm for row in table) > 0
    for name in ("0.weight", "finite differences", "autograd"):
        assert name in str(table)
    assert all(torch.equal(t, before[name]) for name, t in maml.state_dict().items())
    assert all(p.grad is None for p in maml.parameters())


def test_gradcheck_of_a_float32_model_runs_on_a_float64_copy() -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2)
    assert max(row.autograd_error for row in gradcheck(maml, *episode(dtype=torch.float32))) < 1e-10
    assert all(p.dtype == torch.float32 for p in maml.parameters())


def test_gradcheck_of_first_order_skips_finite_differences() -> None:
    table = gradcheck(FusedMAML(net(), 0.3, 2, first_order=True), *episode())
    assert all(row.finite_difference_error != row.finite_difference_error for row in table)  # nan: not measured


def test_gradcheck_notices_a_meta_gradient_that_is_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FusedMAML.forward

    def first_order_forward(self: FusedMAML, *args: Tensor, **kwargs: Any) -> Any:
        self.first_order, before = True, self.first_order
        out = forward(self, *args, **kwargs)
        self.first_order = before
        return out

    maml = FusedMAML(net(), 0.3, 2)
    monkeypatch.setattr(FusedMAML, "forward", first_order_forward)
    with pytest.raises(RuntimeError, match=r"meta-gradient of .*0\.weight.* is wrong"):
        gradcheck(maml, *episode())


def test_gradcheck_notices_one_wrong_entry() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)meta-gradient of 3\.bias is wrong\n.*3\.bias"):
        gradcheck(Spoiled(net(), 0.3, 2), *episode())


def _spoil(g: Tensor) -> Tensor:
    g = g.clone()
    g[1] *= 1 + 1e-5
    return g


class Spoiled(FusedMAML):
    """One entry of one gradient is off by 1e-5 of itself."""

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss.requires_grad:
            bias = self.model[3].bias
            (g,) = torch.autograd.grad(out.loss, bias, retain_graph=True)
            out.loss = out.loss + ((_spoil(g) - g) * (bias - bias.detach())).sum()
        return out


def test_build_info() -> None:
    info = maml_cuda.build_info()
    assert {"version", "cuda", "cuda_architectures", "cpu_isa", "compiler"} <= set(info)
    assert info["version"] == maml_cuda.__version__
    assert isinstance(info["cuda_architectures"], list)
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["compiler"]
