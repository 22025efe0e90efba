"""torch.compile(fullgraph=True) of a FusedMAML gives the same bits, from the first call on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, reference
from tests import oracle
from tests.conftest import assert_close
from tests.engine.nets import episode, equal, gradients, learned, net, step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("first_order", [False, True])
def test_a_compiled_step_is_the_same_on_the_first_call(compiled: Any, first_order: bool) -> None:
    maml = FusedMAML(net(), learned(0.3, 0.2), 2, first_order=first_order)
    expected = step(maml, episode(), FusedMAML(maml.model, maml.inner_lr, 2, first_order=first_order))
    call = compiled(maml)  # maml itself was not called before
    equal(step(maml, episode(), call), expected)
    equal(step(maml, episode(seed=1), call), step(maml, episode(seed=1)))


def test_masks_of_a_compiled_step_follow_from_the_seed(compiled: Any) -> None:
    maml = FusedMAML(nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.4), nn.Linear(5, 4)).double(), 0.1, 2)
    call = compiled(maml)
    losses = []
    for step_of in (call, call, maml):
        torch.manual_seed(3)
        losses.append(step_of(*episode()).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], call(*episode()).loss)


class Counts(nn.Module):
    """A counter, an optional argument, and a forward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 4), 0
        self.linear.register_forward_hook(lambda module, args, out: 2 * out)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls += 1
        h = self.linear(x)
        return h if scale is None else h * scale


@pytest.mark.parametrize(
    ("model", "loss", "sample", "target"),
    [
        (Counts, "cross_entropy", (3,), None),
        (lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), "mse", (3,), ()),  # as of squeeze(-1)
        (lambda: nn.Conv2d(2, 3, 2), "mse", (2, 4, 3), (3, 3, 2)),
    ],
)
def test_what_capture_fuses_compiles_on_the_first_call(
    compiled: Any, model: Any, loss: str, sample: tuple[int, ...], target: tuple[int, ...] | None
) -> None:
    data = episode(sample, target=target)
    maml = FusedMAML(model().double(), 0.3, 2, loss=loss)
    got = step(maml, data, compiled(maml))
    assert getattr(maml.model, "calls", 0) == 0
    equal(got, step(FusedMAML(maml.model, 0.3, 2, loss=loss, backend="fused"), data))
    value, expected = oracle.meta_gradient(maml.model, loss, *data, 0.3, 2)
    torch.testing.assert_close(got[0], value, rtol=1e-12, atol=0)
    assert_close({name.removeprefix("model."): g for name, g in got[1].items()}, expected)


def test_compiled_with_the_optimizer_in_the_loop(compiled: Any) -> None:
    results = []
    for wrap in (compiled, lambda f: f):
        maml = FusedMAML(net(), learned(0.3, 0.2), 2)
        optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
        call = wrap(maml)
        for seed in range(4):
            step(maml, episode(seed=seed), call)
            optimizer.step()
        results.append([p.detach().clone() for p in maml.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch, while it imports inductor
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # by torch 2.6
def test_inductor(compiled: Any) -> None:
    maml = FusedMAML(net(), learned(0.3, 0.2), 2)
    equal(step(maml, episode(), compiled(maml, backend="inductor")), step(maml, episode()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_other_sizes(compiled: Any, dynamic: bool | None) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    call = compiled(maml, dynamic=dynamic)
    for tasks, n in ((2, (5, 3)), (3, (5, 3)), (7, (5, 3)), (3, (6, 4))):
        equal(step(maml, episode(tasks=tasks, n=n), call), step(maml, episode(tasks=tasks, n=n)))


def test_compiled_adapt_and_predict(compiled: Any) -> None:
    maml = FusedMAML(net(), learned(0.3, 0.2), 2)
    fixed = FusedMAML(maml.model, 0.3, 2)
    data = episode()

    def own_objective(x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Tensor:
        fast = maml.adapt(x_spt, y_spt, differentiable=True)
        return F.cross_entropy(fixed.predict(fast, x_qry).flatten(0, 1), y_qry.flatten())

    results = []
    for call in (compiled(own_objective), own_objective):
        maml.zero_grad()
        loss = call(*data)
        loss.backward()
        results.append((loss.detach(), gradients(maml)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-14)


def test_compiled_building_blocks(compiled: Any) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    x_spt, y_spt, x, y = episode()

    def blocks(x_spt: Tensor, y_spt: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        fast = maml.adapt(x_spt, y_spt)
        losses, gradient = maml.loss_and_grad(fast, x, y)
        return (losses, *gradient.values(), *maml.hvp(fast, x, y, gradient).values(), maml.predict(fast, x))

    with torch.no_grad():
        for a, b in zip(compiled(blocks)(x_spt, y_spt, x, y), blocks(x_spt, y_spt, x, y), strict=True):
            assert torch.equal(a, b)


def test_compiled_follows_the_flags() -> None:
    """A flag that changes after compilation takes effect, as without torch.compile."""
    torch._dynamo.reset()
    maml = FusedMAML(net(), 0.3, 2)
    call = torch.compile(maml, backend="aot_eager")
    equal(step(maml, episode(), call), step(maml, episode()))
    maml.model[0].weight.requires_grad_(False)
    maml.zero_grad()
    call(*episode()).loss.backward()
    assert maml.model[0].weight.grad is None
    maml.model[3].bias.requires_grad_(True)
    maml.model[2] = nn.ReLU()
    loss, _ = reference.meta_gradient(maml.model, "cross_entropy", *episode(), 0.3, 2)
    torch.testing.assert_close(call(*episode()).loss.detach(), loss, rtol=1e-12, atol=0)
    torch._dynamo.reset()


def test_compiled_for_another_model(compiled: Any) -> None:
    """Two models had the same plan when they were made; then an option of one changes."""
    call = compiled(lambda maml, *data: maml(*data))
    one, other = (
        FusedMAML(nn.Sequential(nn.Linear(3, 7), nn.LeakyReLU(0.2), nn.Linear(7, 4)).double(), 0.3, 2) for _ in range(2)
    )
    other.model[1].negative_slope = 0.9
    for maml in (one, other):
        out = call(maml, *episode())
        out.loss.backward()
        loss, expected = oracle.meta_gradient(maml.model, "cross_entropy", *episode(), 0.3, 2)
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-12, atol=0)
        assert_close({n: p.grad for n, p in maml.model.named_parameters()}, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_in_eval_mode() -> None:
    torch._dynamo.reset()
    maml = FusedMAML(net(), 0.3, 2)
    call = torch.compile(maml, backend="aot_eager")
    call(*episode())
    maml.eval()  # running statistics
    loss, _ = reference.meta_gradient(maml.model, "cross_entropy", *episode(), 0.3, 2)
    torch.testing.assert_close(call(*episode()).loss.detach(), loss, rtol=1e-12, atol=0)
    torch._dynamo.reset()


class LogSums(nn.Module):
    """No fused layer serves it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.logcumsumexp(1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_on_the_general_path_compiles_with_breaks() -> None:
    torch._dynamo.reset()
    maml = FusedMAML(nn.Sequential(nn.Linear(3, 5), LogSums(), nn.Linear(5, 4)).double(), 0.3, 2)
    call = torch.compile(maml, backend="aot_eager")
    got, expected = step(maml, episode(), call), step(maml, episode())
    assert maml.backend == "reference"
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    torch._dynamo.reset()


@pytest.mark.parametrize("first", [True, False])
def test_compiled_with_data_that_does_not_fit(compiled: Any, first: bool) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    call = compiled(maml)
    if not first:
        call(*episode())
    x_spt, y_spt, x_qry, y_qry = episode()
    with pytest.raises(Exception, match=r"0 \(Linear\): .*got \[5, 2\] X \[3, 7\]"):
        call(x_spt[..., :2], y_spt, x_qry[..., :2], y_qry)
    with pytest.raises(ValueError, match=r"y_qry must hold labels in \[0, 4\), got 9"):
        call(x_spt, y_spt, x_qry, torch.full_like(y_qry, 9))
    equal(step(maml, episode(), call), step(maml, episode()))
