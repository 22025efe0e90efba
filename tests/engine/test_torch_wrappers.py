"""Compiled and wrapped models, parameters in lists, an overridden `parameters`, adapt_params and later layers."""

from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.torch_wrappers import uncompiled
from tests import oracle
from tests.conftest import assert_close, run

RATE, STEPS = 0.2, 2


def episode(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x_spt, x_qry = torch.randn(2, 2, 5, 4, dtype=dtype)
    y_spt, y_qry = torch.randint(3, (2, 2, 5))
    return [x_spt, y_spt, x_qry, y_qry]


def net() -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 6), act=nn.Tanh(), head=nn.Linear(6, 3))).double()


def check(maml: FusedMAML, plain: nn.Module, adapted: list[str] | None = None) -> None:
    """Compares the meta-gradient with the oracle's of `plain`, which has the same parameters under the same names."""
    data = episode()
    loss, grads = run(maml, data)
    expected_loss, expected = oracle.meta_gradient(plain, "cross_entropy", *data, RATE, STEPS, adapted=adapted)
    assert_close({"loss": loss, **grads}, {"loss": expected_loss, **expected})


# -- wrappers ------------------------------------------------------------------------------------------------


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def of_two_parts(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(OrderedDict(model.named_children()) | {"body": torch.compile(model.body, backend="aot_eager")})


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="aot_eager"), in_place], ids=["outside", "inside"])
def test_a_compiled_model(wrap, backend: str) -> None:
    model = net()
    maml = FusedMAML(wrap(model), RATE, STEPS, backend=backend)
    assert maml.model is model
    check(maml, net_like(model))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_compiled_part(backend: str) -> None:
    model = net()
    whole = of_two_parts(model)
    maml = FusedMAML(whole, RATE, STEPS, backend=backend)
    data = episode()
    loss, grads = run(maml, data)
    expected_loss, expected = oracle.meta_gradient(net_like(model), "cross_entropy", *data, RATE, STEPS)
    assert_close({"loss": loss}, {"loss": expected_loss})
    assert_close({name.replace("_orig_mod.", ""): g for name, g in grads.items()}, expected)
    assert whole(data[0][0]).requires_grad  # the compiled code still runs


def test_threads_that_overlap_leave_compilation_on() -> None:
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    graphs = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)(torch.ones(3))
    assert len(graphs) == 1


def net_like(model: nn.Module) -> nn.Module:
    twin = net()
    twin.load_state_dict(model.state_dict())
    return twin


def test_data_parallel_is_taken_off_with_a_word() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"uses the module inside nn.DataParallel: it runs on one device") as caught:
        maml = FusedMAML(nn.DataParallel(model), RATE, STEPS, backend="fused")
    assert caught[0].filename == __file__
    assert maml.model is model
    check(maml, model)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torch_jit_is_refused(backend: str, part: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 deprecates it
        scripted = torch.jit.script(nn.Linear(4, 3))
    name = r" \(0\)" if part else ""
    model = nn.Sequential(scripted) if part else scripted
    with pytest.raises(TypeError, match=f"model must be made of Python modules, got RecursiveScriptModule{name}: give"):
        FusedMAML(model, RATE, backend=backend)


def test_distributed_data_parallel_belongs_outside(tmp_path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(TypeError, match=r"must be free of DistributedDataParallel, got .*: wrap the"):
            FusedMAML(model, RATE)
    finally:
        torch.distributed.destroy_process_group()


# -- parameters ----------------------------------------------------------------------------------------------


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(6, 4), torch.randn(6), torch.randn(3, 6), torch.randn(3)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w[0], self.w[1])), self.w[2], self.w[3])


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict({"in": torch.randn(6, 4), "out": torch.randn(3, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w["in"])), self.w["out"])


class Contextual(nn.Module):
    """`parameters` is overridden to return the context parameters only, as in CAVIA."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.context = nn.Parameter(torch.randn(3, 6))

    def parameters(self) -> list[Tensor]:  # type: ignore[override]
        return [self.context]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return self.head(h) + F.linear(h, self.context)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def gain(self) -> float:
        return 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) * self.gain()))


class Noted(Scaled):
    """Reads a gain that is an attribute of its weight."""

    def gain(self) -> float:
        return self.body.weight.gain


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (Listed, "fused"), (Listed, "reference"), (Keyed, "fused"), (Keyed, "reference"),
        (Contextual, "fused"), (Contextual, "reference"),
    ],
)  # fmt: skip
def test_parameters_wherever_they_are(make, backend: str) -> None:
    model = make().double()
    maml = FusedMAML(model, RATE, STEPS, backend=backend)
    check(maml, model)
    assert sum(p.numel() for p in maml.parameters()) == sum(p.numel() for _, p in model.named_parameters())


def test_what_is_noted_on_a_parameter_is_read() -> None:
    plain, model = Scaled().double(), Noted().double()
    model.load_state_dict(plain.state_dict())
    model.body.weight.gain = 1.5
    check(FusedMAML(model, RATE, STEPS, backend="reference"), plain)


def test_a_fused_model_keeps_what_is_noted_on_its_parameters() -> None:
    model = net()
    model.body.weight.gain = 1.5
    check(FusedMAML(model, RATE, STEPS, backend="fused"), model)
    assert model.body.weight.gain == 1.5


# -- rules of adaptation -------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A body, and a head of any number of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def is_of_the_head(name: str) -> bool:
    return name.startswith("head")


def saved_and_loaded(maml: FusedMAML) -> FusedMAML:
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("duplicate", [lambda maml: maml, copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("step_first", [False, True])
def test_a_rule_meets_a_layer_that_is_added_later(step_first: bool, duplicate, backend: str) -> None:
    maml = FusedMAML(Heads().double(), RATE, STEPS, adapt_params=is_of_the_head, backend=backend)
    if step_first:
        run(maml, episode())
    maml = duplicate(maml)
    maml.model.head.append(nn.Linear(3, 3).double())
    check(maml, maml.model, ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"])


def test_a_rule_that_cannot_be_saved_decides_on_nothing_new() -> None:
    maml = saved_and_loaded(FusedMAML(Heads().double(), RATE, STEPS, adapt_params=lambda name: name.startswith("head")))
    check(maml, maml.model, ["head.0.weight", "head.0.bias"])
    maml = copy.deepcopy(maml)
    maml.model.head.append(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match=r"must say whether the inner loop changes head\.1\.weight, got a"):
        maml(*episode())


def test_a_rule_meets_per_step_layers_that_are_added_later() -> None:
    maml = FusedMAML(Heads().double(), RATE, STEPS, adapt_params=is_of_the_head)
    from maml_cuda import PerStepBatchNorm1d

    maml.model.head.append(PerStepBatchNorm1d(3, STEPS).double())
    with pytest.raises(ValueError, match=r"must leave out the parameters of per-step .*, got head\.1\.weight"):
        maml(*episode())
