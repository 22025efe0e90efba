"""Models that take several tensors: x is a tuple or a dict of them, each [tasks, samples, ...] in fused layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, PolicyTarget, gradcheck
from tests import oracle
from tests.conftest import assert_close, run
from tests.engine.pytree_models import GENERAL, QUERY, RATE, STEPS, SUPPORT, TASKS, Net, randn, right, squared

pytestmark = pytest.mark.usefixtures("one_thread")


class Operator(nn.Module):
    """A DeepONet: a function's values [n, 3] and points [n, 4, 2] give [n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
        self.trunk = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5))
        self.double()

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        values, points = x
        return torch.einsum("ni,npi->np", self.branch(values), self.trunk(points))


class Masked(nn.Module):
    """Attention over [n, length, 3] with a mask [n, length], which may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2)
        self.double()

    def forward(self, x: dict[str, Tensor | None]) -> Tensor:
        tokens, mask = x["tokens"], x["mask"]
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return self.out((scores.softmax(-1) @ tokens).mean(1))


class Image(nn.Module):
    """A convolution of an image [n, 2, 5, 4], whose channels are scaled by a second input [n, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Any) -> Tensor:
        image, (scale, number) = x
        h = F.max_pool2d(torch.tanh(self.norm(self.conv(image))), 2) * scale[:, :, None, None]
        return self.head(h.mean((2, 3))) + number[:, None]


def operator(n: int) -> Any:
    return randn(TASKS, n, 3), randn(TASKS, n, 4, 2)


def masked(n: int) -> Any:
    mask = torch.rand(TASKS, n, 5) < 0.6
    mask[..., 2] = True
    return {"tokens": randn(TASKS, n, 5, 3), "mask": mask}


def image(n: int) -> Any:
    return [randn(TASKS, n, 2, 5, 4), (randn(TASKS, n, 3), randn(TASKS, n))]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], tuple[int, ...]]] = {
    "a tuple": (Operator, operator, (4,)),
    "a dict with a mask": (Masked, masked, (2,)),
    "a dict with None": (Masked, lambda n: {**masked(n), "mask": None}, (2,)),
    "a nested list with an image": (Image, image, (2,)),
    "one tensor in a tuple": (lambda: Net(lambda m, x: m.h(x[0])), lambda n: (randn(TASKS, n, 3),), (2,)),
    "integers": (
        lambda: Net(lambda m, x: m.h(x[0]) * x[1][:, None]),
        lambda n: (randn(TASKS, n, 3), torch.randint(3, (TASKS, n))), (2,),
    ),
    "layouts": (
        lambda: Net(lambda m, x: m.h(x[0]) * x[1].transpose(1, 2)[:, 1]),
        lambda n: (randn(TASKS, 3, n).transpose(1, 2), randn(n, TASKS, 2, 3).transpose(0, 1)), (2,),
    ),
}  # fmt: skip


def episode_of(x: Callable[[int], Any], shape: tuple[int, ...]) -> list[Any]:
    return [part for n in (SUPPORT, QUERY) for part in (x(n), randn(TASKS, n, *shape))]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", CASES)
def test_several_inputs(case: str) -> None:
    model, x, shape = CASES[case]
    maml = FusedMAML(model(), RATE, STEPS, loss="mse", backend="fused")
    right(maml, episode_of(x, shape), "mse")
    assert maml.backend != "reference"


@pytest.mark.parametrize("n", [1, 2, 130])
def test_numbers_of_samples(n: int) -> None:
    """One sample, and more than a tile of them."""
    maml = FusedMAML(Operator(), RATE, STEPS, loss="mse", backend="fused")
    data = [part for size in (n, 3) for part in (operator(size), randn(TASKS, size, 4))]
    _, grads = run(maml, data)
    assert_close(grads, oracle.meta_gradient(maml.model, "mse", *data, RATE, STEPS)[1], 1e-10)


@pytest.mark.parametrize("first_order", [False, True])
def test_inner_loop_weights_and_statistics(first_order: bool) -> None:
    """Everything else that takes x gives what the general path gives."""
    torch.manual_seed(0)
    model, data = Image(), episode_of(image, (2,))
    fused, general = (
        FusedMAML(model, RATE, STEPS, loss="mse", first_order=first_order, backend=b) for b in ("fused", "reference")
    )
    for a, b in zip(fused.inner_loop(*data[:2], 3), general.inner_loop(*data[:2], 3), strict=True):
        assert_close(a, b, 1e-11)
    weights = torch.rand(TASKS, dtype=torch.float64)
    torch.testing.assert_close(fused(*data, task_weights=weights).loss, general(*data, task_weights=weights).loss)
    taken = [maml.adapt(*data[:2], differentiable=True) for maml in (fused, general)]
    grads = [torch.autograd.grad(sum(t.sin().sum() for t in fast.values()), list(model.parameters())) for fast in taken]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    buffers = []
    for maml in (fused, general):
        model.norm.reset_running_stats()
        maml.update_statistics(*data[:3])
        buffers.append(model.norm.running_var.clone())
    torch.testing.assert_close(*buffers)
    if not first_order:
        gradcheck(fused, *data)


def test_memory_is_that_of_the_inputs_beside_each_other() -> None:
    """Of one tensor [tasks, n, features] that a model takes apart."""
    apart = Operator()
    apart.forward = lambda x: Operator.forward(apart, (x[..., :3], x[..., 3:].unflatten(-1, (4, 2))))
    several, one = (FusedMAML(m, RATE, STEPS, loss="mse", backend="fused") for m in (Operator(), apart))
    for n in (5, 300):
        assert several.memory_estimate(operator(n), operator(n)) == one.memory_estimate(*2 * [randn(TASKS, n, 11)])


def test_a_loss_of_ones_own_and_float32() -> None:
    """A computed loss that reads a second input by way of the prediction, and a mask, in float32."""

    def loss(prediction: Tensor, target: dict[str, Tensor]) -> Tensor:
        return ((prediction - target["y"]).abs() * target["weight"]).mean()

    def data(n: int) -> list[Any]:
        return [masked(n), {"y": randn(TASKS, n, 2), "weight": randn(TASKS, n, 2) ** 2}]

    maml = FusedMAML(Masked(), RATE, STEPS, loss=loss, backend="fused")
    given = [*data(SUPPORT), *data(QUERY)]
    right(maml, given, loss)
    single = FusedMAML(Masked().float(), RATE, STEPS, loss=loss, backend="fused")
    single.model.load_state_dict(maml.model.state_dict())
    value = single(*torch.utils._pytree.tree_map(lambda t: t if t.dtype == torch.bool else t.float(), given)).loss
    torch.testing.assert_close(value.double(), maml(*given).loss, rtol=1e-5, atol=0)


def test_a_policy_of_two_inputs() -> None:
    maml = FusedMAML(
        Net(lambda m, x: m.h(x[0]) + x[1]), RATE, STEPS, loss="categorical_policy_gradient", backend="fused"
    )
    general = FusedMAML(maml.model, RATE, STEPS, loss="categorical_policy_gradient", backend="reference")

    def data(n: int) -> list[Any]:
        x = randn(TASKS, n, 3), randn(TASKS, n, 2)
        return [x, PolicyTarget(torch.randint(2, (TASKS, n)), randn(TASKS, n))]

    given = [*data(SUPPORT), *data(QUERY)]
    torch.testing.assert_close(run(maml, given), run(general, given))


@pytest.mark.parametrize("make", [tuple, list])
def test_compiled(compiled: Any, make: type) -> None:
    """The same bits under torch.compile(fullgraph=True), on the first call."""
    model, data = Operator(), episode_of(lambda n: make(operator(n)), (4,))
    results = []
    for call in (compiled, lambda maml: maml):
        loss = call(FusedMAML(model, RATE, STEPS, loss="mse", backend="fused"))(*data).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(map(torch.equal, *results))


def test_explain() -> None:
    maml = FusedMAML(Operator(), RATE, STEPS, loss="mse")
    table = maml.explain(operator(5))
    assert table.startswith("backend: cpu\n")
    assert "contract" in table or "linear" in table


# -- what is refused -------------------------------------------------------------------------------------------


def refusal(model: nn.Module, support: Any, query: Any) -> str:
    maml = FusedMAML(model, RATE, STEPS, loss="mse", backend="fused")
    with pytest.raises(ValueError, match="cannot serve this model") as caught:
        maml(support, randn(TASKS, SUPPORT, 2), query, randn(TASKS, QUERY, 2))
    return str(caught.value)


def net(f: Callable[[Net, Any], Tensor]) -> Net:
    return Net(f)


def test_an_input_without_samples_is_refused() -> None:
    """A context of the task."""
    words = refusal(
        net(lambda m, x: m.h(x["x"] + x["context"])),
        {"x": randn(TASKS, SUPPORT, 3), "context": randn(TASKS, 3)},
        {"x": randn(TASKS, QUERY, 3), "context": randn(TASKS, 3)},
    )  # fmt: skip
    assert "x['context'] has shape [3], whose first axis does not count the 5 samples" in words


def test_inputs_of_no_elements_are_refused() -> None:
    words = refusal(
        net(lambda m, x: m.h(torch.cat(x, -1))),
        (randn(TASKS, SUPPORT, 3), randn(TASKS, SUPPORT, 0)), (randn(TASKS, QUERY, 3), randn(TASKS, QUERY, 0)),
    )  # fmt: skip
    assert "x_spt[1] has no elements" in words


def test_other_inputs_of_the_query_set_are_refused() -> None:
    x, other = {"tokens": randn(TASKS, SUPPORT, 5, 3), "mask": None}, masked(QUERY)
    words = refusal(Masked(), x, other)
    assert (
        "support and query samples are of shapes {'tokens': [5, 3], 'mask': None} and {'tokens': [5, 3], 'mask': [5]}; "
        "fused layers take one for both"
    ) in words


def test_inputs_that_the_model_does_not_take() -> None:
    maml = FusedMAML(Operator(), RATE, STEPS, loss="mse")
    values, points = operator(SUPPORT)
    with pytest.raises(
        ValueError,
        match=r"x_spt must be an input that the model takes, got tensors of shapes \(\[5, 2\], \[5, 4, 2\]\) a",
    ):
        maml.adapt((values[..., :2], points), randn(TASKS, SUPPORT, 4))
    with pytest.raises(
        ValueError, match=r"x_qry must have samples of shape \(\[3\], \[4, 2\]\) like x_spt.*got \(\[2\], \[4, 2\]\): "
    ):
        maml((values, points), randn(TASKS, SUPPORT, 4), (values[..., :2], points), randn(TASKS, SUPPORT, 4))
    with pytest.raises(ValueError, match="y_spt must have the prediction's shape"):
        maml.adapt((values, points), randn(TASKS, SUPPORT - 1, 4))
    assert all(p.grad is None for p in maml.parameters())


def test_an_input_that_requires_grad() -> None:
    data = episode_of(operator, (4,))
    data[0][1].requires_grad_()
    model = Operator()
    fused, general = (FusedMAML(model, RATE, STEPS, loss="mse", backend=b) for b in ("fused", "reference"))
    gradients = [torch.autograd.grad(maml(*data).loss, data[0][1])[0] for maml in (fused, general)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().sum() > 0
    with pytest.raises(ValueError, match=r"x_spt\[1\] must not require grad on the fused path"):
        fused.adapt(*data[:2])


@pytest.mark.filterwarnings(GENERAL)
def test_a_model_that_is_fused_for_one_set_alone() -> None:
    """Another structure is another program."""
    maml = FusedMAML(Masked(), RATE, STEPS, loss=squared)
    for x in (masked, lambda n: {**masked(n), "mask": None}):
        right(maml, episode_of(x, (2,)), squared)
        assert maml.backend == "cpu"
