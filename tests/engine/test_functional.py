"""The general path takes a model as it is: shared layers, attention, checkpoints, forces, buffers. Every entry point
against the oracle; afterwards the model is the one that it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from maml_cuda import FusedMAML, gradcheck
from maml_cuda.batch_norm import PerStepBatchNorm1d
from maml_cuda.functional import Functional
from tests import oracle
from tests.conftest import assert_close, run

RATE, STEPS = 0.3, 2


def episode(*sample: int, loss: str = "mse", out: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tasks of 3 support and 4 query samples."""
    x = [torch.randn(2, n, *sample).double() for n in (3, 4)]
    y = [torch.randn(2, n, out).double() if loss == "mse" else torch.randint(out, (2, n)) for n in (3, 4)]
    return x[0], y[0], x[1], y[1]


def held(model: nn.Module) -> list[tuple[int, str, int]]:
    """Which object stands in each place."""
    registries = [r for m in model.modules() for r in (m._parameters, m._buffers)]
    return [(id(r), key, id(t)) for r in registries for key, t in r.items()]


def maml_of(model: nn.Module, loss: str = "mse", **options: object) -> FusedMAML:
    return FusedMAML(model, RATE, STEPS, loss=loss, backend="reference", **options)


def check_entries(
    model: nn.Module, data: tuple[Tensor, ...], loss: str = "mse", plain: nn.Module | None = None
) -> None:
    """Every entry point at second order, and a call at first.

    plain: the model for the oracle, where it is not this one.
    """
    x_spt, y_spt, x_qry, y_qry = data
    plain = plain or copy.deepcopy(model)
    function = oracle.LOSSES.get(loss, loss)
    maml = maml_of(model, loss)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    before = held(model)
    for first_order in (True, False):
        maml.first_order = first_order
        value, expected = oracle.meta_gradient(plain, loss, *data, RATE, STEPS, first_order)
        got, grads = run(maml, data)
        torch.testing.assert_close(got, value, rtol=1e-11, atol=0)
        assert_close(grads, expected)

    maml.zero_grad()
    maml.backward(*data)
    assert_close(gradients(model), expected)
    with torch.no_grad():
        torch.testing.assert_close(maml(*data).loss, value, rtol=1e-11, atol=0)
        assert not maml.predict(maml.adapt(x_spt, y_spt), x_qry).requires_grad

    adapted, expected_adapted = maml.adapt(x_spt, y_spt), oracle.adapt(plain, loss, x_spt, y_spt, RATE, STEPS)
    assert_close({n: adapted[n] for n in names}, expected_adapted)
    maml.zero_grad()
    fast = maml.adapt(x_spt, y_spt, differentiable=True)
    predictions = maml.predict(fast, x_qry)
    with torch.no_grad():
        torch.testing.assert_close(maml.predict(fast, x_qry), predictions, rtol=1e-11, atol=1e-13)
    sum(function(p, y) for p, y in zip(predictions, y_qry, strict=True)).div(len(y_qry)).backward()
    assert_close(gradients(model), expected)

    fast, v = ({n: of_each(p) for n, p in model.named_parameters()} for _ in range(2))
    leaves = {n: p.clone().requires_grad_(n in names) for n, p in fast.items()}
    moved = {n: leaves[n] for n in names}
    losses = [function(p, y) for p, y in zip(oracle.predict(plain, leaves, x_qry), y_qry, strict=True)]
    first, second = derivatives(sum(losses), moved, v)
    values, gradient = maml.loss_and_grad(fast, x_qry, y_qry)
    torch.testing.assert_close(values, torch.stack(losses).detach(), rtol=1e-11, atol=0)
    assert_close(gradient, first)
    assert_close(maml.hvp(fast, x_qry, y_qry, v), second)
    predictions = maml.predict(leaves, x_qry)
    objective = sum(function(p, y) for p, y in zip(predictions, y_qry, strict=True))
    for got, expected in zip(derivatives(objective, moved, v), (first, second), strict=True):
        assert_close(got, expected)
    assert held(model) == before
    assert not any(x.requires_grad for x in (x_spt, x_qry))


def of_each(p: Tensor) -> Tensor:
    """Other parameters for each of two tasks; frozen ones as they are."""
    twice = p.detach().expand(2, *p.shape)
    return twice + 0.1 * torch.randn_like(twice) if p.requires_grad else twice


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def derivatives(value: Tensor, at: dict[str, Tensor], v: dict[str, Tensor]) -> tuple[dict, dict]:
    """The gradient, and the Hessian times v."""
    grads = torch.autograd.grad(value, at.values(), create_graph=True)
    along = sum((g.conj() * v[n]).real.sum() for n, g in zip(at, grads, strict=True))
    products = torch.autograd.grad(along, at.values())
    return dict(zip(at, map(Tensor.detach, grads), strict=True)), dict(zip(at, products, strict=True))


# -- parts that stand in several places ------------------------------------------------------------------------


class TwoNames(nn.Module):
    """A layer that is a submodule itself and part of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, dilation=2)
        self.net = nn.Sequential(self.conv, nn.Tanh())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).mean(-1))


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin()


class Tied(nn.Module):
    """One parameter under two names, in two layers of which one is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(3, 2), nn.Linear(2, 3)
        self.again = nn.Linear(3, 2)
        self.again.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.back(self.into(x))))


def wrapped() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(Wrapper(layer), nn.Linear(3, 3), Wrapper(layer), nn.Linear(3, 2))


SHARED = {"two names": (TwoNames, (2, 7)), "two wrappers": (wrapped, (3,)), "a tied parameter": (Tied, (3,))}


@pytest.mark.parametrize("case", SHARED)
def test_what_stands_in_several_places(case):
    make, sample = SHARED[case]
    check_entries(make().double(), episode(*sample))


@pytest.mark.parametrize("case", SHARED)
def test_an_optimizer_holds_what_the_model_holds(case):
    """Trained on, as a plain loop would."""
    make, sample = SHARED[case]
    model = make().double()
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    maml = maml_of(model, first_order=True)
    for _ in range(3):
        data = episode(*sample)
        _, grads = oracle.meta_gradient(twin, "mse", *data, RATE, STEPS, True)
        for name, p in twin.named_parameters():
            p.grad = grads[name]
        theirs.step()
        ours.zero_grad()
        maml(*data).loss.backward()
        ours.step()
    assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert list(model.state_dict()) == list(twin.state_dict())


def test_an_error_leaves_the_model_as_it_was():
    model = wrapped().double()
    maml, data = maml_of(model), episode(3)
    calls = []

    def fail(m: nn.Module, args: tuple) -> None:
        calls.append(m)
        if len(calls) > 4:
            raise KeyError("the user's own")

    model[0].layer.register_forward_pre_hook(fail)
    before = held(model)
    with pytest.raises(KeyError, match="the user's own"):
        maml(*data)
    assert held(model) == before
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


def test_attributes_of_parameters_are_there_in_forward():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.weight.scale, self.bias)

    model = Scaled(3, 2).double()
    model.weight.scale, model.weight.names_of_users = 0.5, ["a"]
    scale = {"scale": 0.5, "names_of_users": ["a"]}
    plain = nn.Linear(3, 2).double()
    plain.load_state_dict(model.state_dict())
    data = episode(3)
    parametrize.register_parametrization(plain, "weight", Half())
    _, expected = oracle.meta_gradient(plain, "mse", *data, RATE, STEPS)
    _, grads = run(maml_of(model), data)
    torch.testing.assert_close(grads["weight"], expected["parametrizations.weight.original"], rtol=1e-11, atol=1e-13)
    assert vars(model.weight) == scale


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 0.5 * w


# -- attention -------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        if attention == "MultiheadAttention":
            self.layer: nn.Module = nn.MultiheadAttention(4, 2, batch_first=True)
        elif attention == "TransformerEncoderLayer":
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, activation="gelu")
        else:
            self.layer = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention == "MultiheadAttention":
            x = self.layer(x, x, x, need_weights=False)[0]
        elif self.attention == "TransformerEncoderLayer":
            x = self.layer(x)
        else:
            q, k, v = self.layer(x).unsqueeze(1).chunk(3, -1)
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head(x.mean(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["scaled_dot_product", "MultiheadAttention", "TransformerEncoderLayer"])
def test_attention(attention, training):
    check_entries(Attends(attention).double().train(training), episode(5, 4))


def test_attention_in_several_threads():
    """What one of them needs the other does not take away."""
    enabled = torch.backends.cuda.flash_sdp_enabled
    function = Functional(nn.Linear(1, 1))
    with function.differentiable_twice():
        thread = threading.Thread(target=lambda: maml_of(Attends("scaled_dot_product").double())(*episode(5, 4)))
        thread.start()
        thread.join()
        assert not enabled()
    assert enabled()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)
        self.cudnn: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.cudnn.add(torch.backends.cudnn.enabled)
        return self.head(self.layer(x)[0][:, -1])


def test_recurrent_layers():
    """Without cuDNN, whose backward has no derivative, where a second one is taken."""
    model, data = Recurrent().double(), episode(5, 2)
    before = torch.backends.cudnn.enabled
    maml_of(model, first_order=True, loss=F.mse_loss)(*data)
    assert model.cudnn == {before}
    check_entries(model, data)
    assert model.cudnn == {before, False}
    assert torch.backends.cudnn.enabled == before
    copy.deepcopy(model)


@pytest.mark.parametrize("chosen", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_users_choice_of_attention_comes_back(chosen):
    flags = ("flash_sdp_enabled", "math_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled")
    maml, data = maml_of(Attends("scaled_dot_product").double()), episode(5, 4)
    with sdpa_kernel(chosen):
        before = [getattr(torch.backends.cuda, name)() for name in flags]
        maml(*data).loss.backward()
        assert [getattr(torch.backends.cuda, name)() for name in flags] == before


# -- recomputation ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Blocks that a backward computes again; BatchNorm has a slot for each step."""

    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5))
        self.norm = PerStepBatchNorm1d(5, STEPS)
        self.last = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.norm(h))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.block, self.last):
            x = part(x) if self.how is None else checkpoint(part, x, use_reentrant=self.how)
        return x


def test_checkpoints():
    """One slot, which the oracle can take for a plain layer."""
    model = Checkpointed(False)
    model.norm = PerStepBatchNorm1d(5, 1)
    plain = copy.deepcopy(model)
    plain.how = None
    for p in (*model.norm.parameters(), *plain.norm.parameters()):
        p.requires_grad_(False)
    check_entries(model.double(), episode(3), plain=plain)


@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]])
def test_checkpoints_of_layers_with_a_slot_for_each_step(weights):
    """And query losses at every step: as without checkpoints."""
    data, results = episode(3), []
    torch.manual_seed(3)
    state = Checkpointed(None).state_dict()
    state["norm.weight"] = torch.rand(STEPS, 5)
    for how in (None, False):
        model = Checkpointed(how)
        model.load_state_dict(state)
        maml = maml_of(model.double(), query_weights=weights)
        _, grads = run(maml, data)
        maml.zero_grad()
        fast = maml.adapt(*data[:2], differentiable=True)
        maml.predict(fast, data[2], slot=0).square().sum().backward()
        results.append({**grads, **{f"blocks.{n}": p.grad for n, p in model.named_parameters()}})
    assert_close(*results, 1e-13)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpoints_are_refused():
    model = Checkpointed(True).double()
    maml, (x_spt, y_spt, x_qry, y_qry) = maml_of(model), episode(3)
    leaf = x_spt.clone().requires_grad_()  # without which such a checkpoint has no gradient at all
    fast = {n: p.detach().expand(2, *p.shape).clone().requires_grad_() for n, p in model.named_parameters()}
    before = held(model)
    for entry in (
        lambda: maml(leaf, y_spt, x_qry, y_qry),
        lambda: maml.adapt(leaf, y_spt, differentiable=True),
        lambda: maml.predict(fast, leaf),
    ):
        with pytest.raises(ValueError, match="must have use_reentrant=False, got use_reentrant=True"):
            entry()
    assert held(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_a_reentrant_checkpoint_before_the_model_is_the_users():
    below, x = nn.Linear(3, 3).double(), torch.randn(2, 4, 3).double().requires_grad_()
    model = nn.Linear(3, 2).double()
    fast = {n: p.detach().expand(2, *p.shape) for n, p in model.named_parameters()}
    (expected,) = torch.autograd.grad(model(below(x)).square().sum(), below.weight)
    maml_of(model).predict(fast, checkpoint(below, x, use_reentrant=True)).square().sum().backward()
    torch.testing.assert_close(below.weight.grad, expected, rtol=1e-12, atol=1e-14)


# -- a forward that differentiates -----------------------------------------------------------------------------


class Force(nn.Module):
    """Minus the gradient of an energy by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_(True)
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_forces():
    model, data = Force().double(), episode(2)
    model.net[2].bias.requires_grad_(False)  # of which no force depends
    check_entries(model, data)
    with torch.inference_mode():
        maml = maml_of(model)
        prediction = maml.predict(maml.adapt(*data[:2]), data[2])
    expected = oracle.predict(model, {**maml.adapt(*data[:2])}, data[2])
    torch.testing.assert_close(prediction, torch.stack(expected).detach(), rtol=1e-12, atol=1e-14)


# -- buffers ---------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Buffers that forward writes: a counter, a mean over calls, one that is assigned, and BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            self.count += 1
            self.mean.data.mul_(0.9).add_(0.1 * h.mean(0).detach())
            self.last = h[:, 0]
        return self.head(torch.tanh(self.norm(h) + self.mean))


def test_buffers_move_once_a_call():
    """To what the first forward leaves, of the first task's support set at theta; BatchNorm's stay."""
    model, data = Counting().double(), episode(3)
    once = copy.deepcopy(model)
    once(data[0][0])
    _, expected = oracle.meta_gradient(model, "mse", *data, RATE, STEPS)
    maml = maml_of(model)
    before = [id(model.mean), id(model.count), *held(model.layer)]
    running = {n: b.clone() for n, b in model.norm.named_buffers()}
    _, grads = run(maml, data)
    assert_close(grads, expected)
    assert [id(model.mean), id(model.count), *held(model.layer)] == before
    assert int(model.count) == 1
    torch.testing.assert_close(model.mean, once.mean, rtol=0, atol=0)
    torch.testing.assert_close(model.last, once.last.detach(), rtol=0, atol=0)
    assert not model.last.requires_grad
    for name, b in model.norm.named_buffers():
        torch.testing.assert_close(b, running[name], rtol=0, atol=0)


def test_buffers_move_once_in_a_differentiable_adaptation():
    model, data = Counting().double(), episode(3)
    maml = maml_of(model)
    maml.predict(maml.adapt(*data[:2], differentiable=True), data[2]).sum().backward()
    assert int(model.count) == 1


class Balanced(nn.Module):
    """A loss with a parameter, and a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = self.w * (prediction - target).square().mean()
        self.scale.mul_(0.5).add_(0.5 * error.detach())
        return error / self.scale


def test_buffers_of_a_loss_move_once_a_call():
    model, data, loss = nn.Linear(3, 2).double(), episode(3), Balanced()
    once = copy.deepcopy(loss)
    once(model(data[0][0]), data[1][0])

    def plain(prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target).square().mean()
        return error / (0.5 + 0.5 * error.detach())

    maml = maml_of(model, loss)
    _, grads = run(maml, data)
    assert_close(grads, oracle.meta_gradient(model, plain, *data, RATE, STEPS)[1])
    assert loss.w.grad.abs() > 1e-3
    torch.testing.assert_close(loss.scale, once.scale, rtol=1e-13, atol=0)
    fast = maml.adapt(*data[:2])
    maml.loss_and_grad(fast, *data[2:])
    torch.testing.assert_close(loss.scale, once.scale, rtol=1e-13, atol=0)


class Graph(nn.Module):
    """Sums over neighbours, by a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neighbours", torch.eye(3).roll(1, 0).to_sparse())
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x)).transpose(0, 1).flatten(1)
        return self.head(torch.sparse.mm(self.neighbours, h).view(3, len(x), 4).transpose(0, 1).flatten(1))


def test_sparse_buffers():
    model = Graph().double()
    before = model.neighbours
    check_entries(model, episode(3, 2))
    assert model.neighbours is before


def test_buffers_move_by_nothing_else():
    model, data = Counting().double(), episode(3)
    maml = maml_of(model)
    state = copy.deepcopy(model.state_dict())
    fast = maml.adapt(*data[:2])
    maml.predict(fast, data[2])
    maml.loss_and_grad(fast, *data[2:])
    maml.hvp(fast, *data[2:], fast)
    with torch.no_grad():
        maml(*data)
    model.eval()
    model.training = True  # its own flag is not that of its layers
    model.norm.num_batches_tracked += 1
    state["norm.num_batches_tracked"] += 1
    with pytest.raises(ValueError, match="y_qry must have the prediction's shape"):
        maml(*data[:3], data[3][..., :1])
    model.eval()
    maml(*data)
    for name, b in model.state_dict().items():
        torch.testing.assert_close(b, state[name], rtol=0, atol=0)


def test_gradcheck_starts_every_call_with_the_same_buffers():
    """Its finite differences count for nothing here: they move the mean, which has no gradient."""
    model, data = Counting().double(), episode(3)
    gradcheck(maml_of(model), *data, finite_difference_tolerance=10)
    assert int(model.count) == 0


def test_spectral_norm_keeps_its_norm():
    """300 steps, as by a plain loop whose state moves once a step."""

    def spectral() -> nn.Sequential:
        torch.manual_seed(0)
        layer = parametrizations.spectral_norm(nn.Linear(4, 4))
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()

    model, twin = spectral(), spectral()
    maml = maml_of(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin))
    for step in range(300):
        data = episode(4)
        if step < 3:
            _, grads = oracle.meta_gradient(twin, "mse", *data, RATE, STEPS)
            twin(data[0][0])
            for name, p in twin.named_parameters():
                p.grad = grads[name]
            theirs.step()
        ours.zero_grad()
        maml(*data).loss.backward()
        ours.step()
        if step < 3:
            assert_close(model.state_dict(), twin.state_dict())
    model.eval()
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=0.02)


def test_cached_parametrizations_are_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))).double()
    maml, data = maml_of(model), episode(3)
    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize.cached\(\) must be off"):
        maml(*data)
    check_entries(model, data)
