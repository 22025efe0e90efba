"""The whole meta-gradient on every backend, in float64 and float32, against the reference."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML
from maml_cuda.engine.problem import problem_of
from tests import conftest
from tests.conftest import as_good_as_the_reference, check_meta_gradient, flat, program_of, run

pytestmark = pytest.mark.usefixtures("machine")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 17), nn.Tanh(), nn.Linear(17, 9), nn.Softplus(), nn.Linear(9, 4))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 9, 3, 2, 1), nn.BatchNorm2d(9), nn.GELU(), nn.Conv2d(9, 5, 3, 1, 1), nn.BatchNorm2d(5),
        nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 4),
    )  # fmt: skip


class ResNet(nn.Module):
    """A small and smooth ResNet-12: residual blocks with a projection, max-pools, a spatial mean."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for c_in, c in ((2, 5), (5, 7)):
            layers = []
            for i in range(2):
                layers += [
                    nn.Conv2d(c if i else c_in, c, 3, padding=1, bias=False),
                    nn.BatchNorm2d(c),
                    nn.SiLU(),
                ]
            self.blocks.append(nn.ModuleList([nn.Sequential(*layers), nn.Conv2d(c_in, c, 1), nn.BatchNorm2d(c)]))
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        for body, shortcut, norm in self.blocks:
            x = self.pool(torch.tanh(body(x) + norm(shortcut(x))))
        return self.head(x.mean([2, 3]))


MODELS = {"mlp": (mlp, (3,)), "conv": (conv, (2, 9, 8)), "resnet": (ResNet, (2, 8, 9))}


def episode(name, loss="cross_entropy", tasks=3, n_support=5, n_query=7, dtype=torch.float64):
    target = None if loss == "cross_entropy" else (4,)
    return conftest.episode(MODELS[name][1], tasks=tasks, n=(n_support, n_query), target=target, dtype=dtype)


def make(name, dtype=torch.float64):
    return MODELS[name][0]().to(dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_exact(name, loss, steps, first_order):
    check_meta_gradient(make(name), loss, episode(name, loss), 0.1, steps, first_order=first_order)


@pytest.mark.parametrize("tasks", [1, 3, 33, 65])
def test_tasks(tasks):
    check_meta_gradient(make("mlp"), "mse", episode("mlp", "mse", tasks), 0.1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_first_order_is_not_second_order(name):
    data, model = episode(name), make(name)
    maml = FusedMAML(model, 0.3, 2, backend="fused")
    second = run(maml, data)[1]
    maml.first_order = True
    first = run(maml, data)[1]
    assert max((second[n] - first[n]).norm() / second[n].norm() for n in second if second[n].norm() > 1e-6) > 1e-3


RATES = {
    "0-d": lambda shape, steps: torch.rand(()),
    "per step": lambda shape, steps: torch.rand(steps),
    "elementwise": lambda shape, steps: torch.rand(shape),
    "per step and elementwise": lambda shape, steps: torch.rand(steps, *shape),
}


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("form", RATES)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_learned_rates_by_name(name, form, first_order, steps):
    model = make(name)
    rates = {n: nn.Parameter(RATES[form](p.shape, steps).double() * 0.2) for n, p in model.named_parameters()}
    check_meta_gradient(model, "cross_entropy", episode(name), rates, steps, first_order=first_order)


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("adapt", [None, ["4.weight", "4.bias", "0.bias"]])
def test_one_rate_for_all(shape, learned, adapt):
    rate = torch.rand(shape).double() * 0.2
    rate = nn.Parameter(rate) if learned else rate
    check_meta_gradient(make("mlp"), "mse", episode("mlp", "mse"), rate, 3, adapt_params=adapt)


def test_mixed_rates():
    """Numbers, fixed tensors, learned tensors, and one learned rate that two parameters share."""
    model = make("conv")
    names = dict(model.named_parameters())
    one = nn.Parameter(torch.tensor(0.07).double())
    rates = dict.fromkeys(names, 0.1)
    rates.update({"0.weight": one, "8.weight": one, "4.weight": torch.tensor(0.2).double()})
    rates["3.weight"] = nn.Parameter(torch.rand(2, *names["3.weight"].shape).double() * 0.1)
    check_meta_gradient(model, "cross_entropy", episode("conv"), rates, 2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("part", ["head", "body", "norms"])
def test_partly_adapted(name, steps, first_order, part):
    """As in ANIL: parameters that are not adapted receive their exact gradient, which has mixed second derivatives."""
    model = make(name)
    last = [n for n, _ in model.named_parameters()][-2:]
    chosen = {
        "head": lambda n: n in last,
        "body": lambda n: n not in last,
        "norms": lambda n: "bias" in n,
    }[part]
    check_meta_gradient(model, "cross_entropy", episode(name), 0.2, steps, adapt_params=chosen, first_order=first_order)


@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters(name):
    model = make(name)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
    check_meta_gradient(model, "cross_entropy", episode(name), 0.2, 2)
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


def test_tied_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    model[2].weight = model[0].weight
    check_meta_gradient(model, "mse", episode("mlp", "mse"), 0.1, 3)


def test_task_weights():
    data, weights = episode("mlp"), torch.tensor([0.2, 1.5, -0.3]).double()
    grads = {}
    for backend in ("fused", "reference"):
        torch.manual_seed(1)
        maml = FusedMAML(make("mlp"), 0.1, 2, backend=backend)
        out = maml(*data, task_weights=weights)
        out.loss.backward()
        torch.testing.assert_close(out.loss, (weights * out.task_losses).sum())
        grads[backend] = torch.cat([p.grad.flatten() for p in maml.parameters()])
    torch.testing.assert_close(grads["fused"], grads["reference"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_states_give_the_same_bits(name):
    """Above a memory threshold the gradient pass is run again for each Hessian-vector product."""
    data = episode(name)
    maml = FusedMAML(make(name), 0.05, 4, backend="fused")
    program = program_of(maml, data)
    text = program.text
    parameters, rates = program.tensors()
    listed = data[0], [data[1]], data[2], [data[3]]
    results = []
    for plan in (text, json.dumps({**json.loads(text), "recompute": True})):
        signature = (plan, "meta_gradient", tuple(data[0].shape[2:]), 5, 7, 4, False, True)
        results.append(
            (
                problem_of(*signature).core.saved_steps,
                torch.ops.maml_cuda.meta_gradient(parameters, rates, *listed, None, plan, 4, False, True)[-1],
            )
        )
    assert [steps for steps, _ in results] == [4, 1]
    assert torch.equal(results[0][1], results[1][1])


# -- outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_outputs(backend):
    data = episode("conv")
    maml = FusedMAML(make("conv"), 0.1, 3, backend=backend)
    out = maml(*data)
    fast = maml.adapt(*data[:2])
    logits = maml.predict(fast, data[2])
    torch.testing.assert_close(out.logits, logits)
    losses = torch.stack([nn.functional.cross_entropy(z, y) for z, y in zip(logits, data[3], strict=True)])
    torch.testing.assert_close(out.task_losses, losses)
    torch.testing.assert_close(out.loss, losses.mean())
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.task_losses, out.logits, out.support_losses))
    for k in range(3):
        torch.testing.assert_close(
            out.support_losses[:, k], maml.loss_and_grad(maml.adapt(*data[:2], steps=k), *data[:2])[0]
        )
    with torch.no_grad():
        quiet = maml(*data)
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, out.loss.detach(), rtol=0, atol=0)
    torch.testing.assert_close(quiet.logits, out.logits, rtol=0, atol=0)


# -- bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_every_run_and_for_every_number_of_threads(machine, name, dtype):
    """Threads of the CPU share the tasks, more than one wave of them; kernels do not know of threads."""
    tasks, counts = (37, (1, 1, 2, 3)) if machine == "cpu" else (5, (1, 3))
    data = [d.to(dtype) if d.is_floating_point() else d for d in episode(name, tasks=tasks)]
    maml = FusedMAML(make(name, dtype), 0.1, 2, backend="fused")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(flat(run(maml, data)[1]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("name", MODELS)
def test_a_task_does_not_know_its_neighbours(name):
    data = [d.float() if d.is_floating_point() else d for d in episode(name, tasks=35)]
    maml = FusedMAML(make(name, torch.float32), 0.1, 2, backend="fused")
    whole = maml(*data)
    for t in (0, 33, 34):
        alone = maml(*[d[t : t + 1] for d in data])
        assert torch.equal(alone.task_losses[0], whole.task_losses[t])
        assert torch.equal(alone.logits[0], whole.logits[t])
        assert torch.equal(alone.support_losses[0], whole.support_losses[t])
    data[0][1] = float("nan")
    poisoned = maml(*data)
    assert torch.isnan(poisoned.task_losses[1])
    assert torch.equal(poisoned.task_losses[2:], whole.task_losses[2:])


# -- float32 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("first_order", [False, True])
def test_float32_is_as_good_as_the_reference(name, steps, first_order):
    """The nets are smooth: between two correct float32 computations a ReLU may take different branches, and then the
    meta-gradient jumps."""
    data = [d.float() if d.is_floating_point() else d for d in episode(name)]
    as_good_as_the_reference(make(name, torch.float32), data, steps, first_order)


@pytest.mark.parametrize("machine", ["cpu"], indirect=True)
@pytest.mark.parametrize("tasks", [1, 16])
def test_float32_sums_of_wide_layers_are_short(machine, tasks):
    """2048 equal products, whose rounding errors do not cancel, are summed in blocks of 256, forward and backward."""
    weight = torch.rand(3).repeat(2048, 1)

    def error(got, exact):
        return ((got.double() - exact).abs() / exact.abs()).max().item()

    x = torch.rand(tasks, 6, 1).repeat(1, 1, 2048)
    truth = x.double() @ weight.double()
    one_by_one = torch.from_numpy((x[..., None] * weight).numpy().cumsum(2)[:, :, -1])
    maml = FusedMAML(nn.Linear(2048, 3, bias=False), 0.1, 1, loss="mse", backend="fused")
    assert error(one_by_one, truth) > 1e-5
    assert error(maml.predict({"weight": weight.T.expand(tasks, 3, 2048)}, x), truth) < 5e-6

    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 2048, bias=False))
    first = torch.rand(3, 1)
    fast = {"0.weight": first.expand(tasks, 3, 1), "1.weight": weight.expand(tasks, 2048, 3)}
    maml = FusedMAML(model, 0.1, 1, loss="mse", backend="fused")
    _, grads = maml.loss_and_grad(fast, torch.ones(tasks, 1, 1), torch.zeros(tasks, 1, 2048))  # of mean (W first)^2
    truth = 2 / 2048 * weight.double().T @ (weight.double() @ first.double())
    assert error(grads["0.weight"], truth.expand(tasks, 3, 1)) < 5e-6
