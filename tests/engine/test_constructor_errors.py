"""FusedMAML's constructor refuses bad arguments with ValueError or TypeError: what, expected, got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_cuda import FusedMAML, gradcheck
from tests.engine.refusals import BACKENDS, FEATURES, dict_of_rates, episode, net, refuses

pytestmark = pytest.mark.usefixtures("machine", "one_thread", "labels_at_once")


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def half_frozen() -> nn.Sequential:
    model = net()
    model[0].requires_grad_(False)
    return model


def mixed() -> nn.Sequential:
    model = net()
    model[3].float()
    return model


def without(name: str) -> dict[str, Any]:
    rates = dict_of_rates()
    del rates[name]
    return rates


CONSTRUCTOR = {
    "unknown loss": (
        net, {"loss": "hinge"}, ValueError, ("loss must be one of cross_entropy, mse", "got 'hinge'"),
    ),
    "loss no callable": (net, {"loss": 3}, TypeError, ("loss must be", "callable", "got int")),
    "loss a class": (
        net, {"loss": nn.MSELoss}, TypeError, ("loss must be a callable", "got the class MSELoss", "MSELoss()"),
    ),
    "negative steps": (net, {"inner_steps": -1}, ValueError, ("inner_steps must be at least 0", "got -1")),
    "fractional steps": (net, {"inner_steps": 1.0}, TypeError, ("inner_steps must be an int", "got float")),
    "steps a bool": (net, {"inner_steps": True}, TypeError, ("inner_steps must be an int", "got bool")),
    "steps a tensor": (
        net, {"inner_steps": torch.tensor(2)}, TypeError, ("inner_steps must be an int", "got Tensor"),
    ),
    "first_order no bool": (net, {"first_order": 1}, TypeError, ("first_order must be a bool", "got int")),
    "rate nan": (net, {"inner_lr": float("nan")}, ValueError, ("inner_lr must be finite", "got nan")),
    "rate inf": (net, {"inner_lr": float("-inf")}, ValueError, ("inner_lr must be finite", "got -inf")),
    "rate tensor nan": (
        net, {"inner_lr": torch.tensor([0.1, float("nan")])}, ValueError,
        ("inner_lr must be finite", "got [0.1", "nan"),
    ),
    "rate bool": (net, {"inner_lr": True}, TypeError, ("inner_lr must be a float or a tensor", "got bool")),
    "rate string": (net, {"inner_lr": "0.1"}, TypeError, ("inner_lr must be a float or a tensor", "got str")),
    "rate None": (
        net, {"inner_lr": None}, TypeError, ("inner_lr must be a float or a tensor", "got NoneType"),
    ),
    "rate integer tensor": (
        net, {"inner_lr": torch.tensor(1)}, TypeError,
        ("inner_lr must be a floating-point tensor", "got torch.int64"),
    ),
    "rate shape": (
        net, {"inner_lr": torch.ones(3)}, ValueError,
        ("inner_lr must have shape", "[2] (inner_steps)", "got [3]"),
    ),
    "rate of a parameter's shape": (
        net, {"inner_lr": dict_of_rates(**{"0_bias": torch.ones(3)})}, ValueError,
        ("inner_lr['0.bias'] must have shape", "[2] (inner_steps)", "[7]", "[2, 7]", "got [3]"),
    ),
    "rate ambiguous": (
        net, {"inner_lr": dict_of_rates(**{"0_bias": torch.ones(7)}), "inner_steps": 7}, ValueError,
        ("inner_lr['0.bias'] of shape [7] is ambiguous", "inner_steps=7", "[7, 7]"),
    ),
    "rate missing": (
        net, {"inner_lr": without("3.bias")}, ValueError,
        ("inner_lr must have exactly", "got", "none for 3.bias"),
    ),
    "rate extra": (
        net, {"inner_lr": dict_of_rates(head=0.1)}, ValueError, ("inner_lr must have exactly", "got", "head"),
    ),
    "rate for a parameter not adapted": (
        net, {"inner_lr": dict_of_rates(), "adapt_params": ["3.weight", "3.bias"]}, ValueError,
        ("inner_lr must have exactly the adapted", "got", "0.weight", "not adapted"),
    ),
    "rate in a dict nan": (
        net, {"inner_lr": dict_of_rates(**{"0_weight": float("nan")})}, ValueError,
        ("inner_lr['0.weight'] must be finite", "got nan"),
    ),
    "unknown backend": (
        net, {"backend": "cuda"}, ValueError, ("backend must be one of auto, fused, reference", "got 'cuda'"),
    ),
    "unknown precision": (
        net, {"precision": "float16"}, ValueError, ("precision must be one of", "got 'float16'"),
    ),
    "precision not here": (
        net, {"precision": "tf32"}, ValueError, ("precision must be float32 on the CPU", "'tf32'"),
    ),
    "graphs no bool": (net, {"cuda_graphs": 1}, TypeError, ("cuda_graphs must be a bool", "got int")),
    "labels no bool": (net, {"check_labels": "yes"}, TypeError, ("check_labels must be a bool", "got str")),
    "checkpoint": (net, {"checkpoint": "save"}, ValueError, ('must be None, "recompute" or "sqrt"', "got 'save'")),
    "chunk no int": (net, {"task_chunk": 2.0}, TypeError, ("task_chunk must be an int or None", "got float")),
    "chunk of none": (net, {"task_chunk": 0}, ValueError, ("task_chunk must be at least 1", "got 0")),
    "adapts nothing": (
        net, {"adapt_params": lambda name: "head" in name}, ValueError,
        ("adapt_params must choose at least one", "0.weight", "none"),
    ),
    "adapts an empty list": (
        net, {"adapt_params": []}, ValueError, ("adapt_params must name", "got an empty list"),
    ),
    "adapts an unknown name": (
        net, {"adapt_params": ["0.weight", "4.weight"]}, ValueError,
        ("adapt_params must name parameters of the model", "0.weight", "got 4.weight"),
    ),
    "adapts a string": (
        net, {"adapt_params": "0.weight"}, TypeError, ("adapt_params must be", "a list", "got str"),
    ),
    "adapts a number": (net, {"adapt_params": 3}, TypeError, ("adapt_params must be", "a list", "got int")),
    "adapts a frozen name": (
        half_frozen, {"adapt_params": ["0.weight"]}, ValueError,
        ("adapt_params must name", "got frozen 0.weight"),
    ),
    "no parameters": (
        lambda: nn.ReLU(), {}, ValueError, ("model must have parameters that require grad", "got none"),
    ),
    "all frozen": (lambda: frozen(net()), {}, ValueError, ("model must have parameters", "got none")),
    "mixed dtypes": (
        mixed, {}, ValueError, ("parameters must have one dtype", "got torch.float32", "torch.float64"),
    ),
    "fused that cannot": (
        lambda: net().half(), {"backend": "fused"}, ValueError,
        ('backend="fused" cannot serve this model', "the model is torch.float16", "fused are float32 and float64"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTOR)
def test_the_constructor_refuses(case: str, machine: str) -> None:
    if case == "precision not here" and machine == "cuda":
        pytest.skip("a GPU has it")
    make, changes, error, pieces = CONSTRUCTOR[case]
    model = make()
    given = {"inner_lr": 0.1, "inner_steps": 2} | changes
    refuses(model, lambda: FusedMAML(model, **given), error, *pieces)


@pytest.mark.parametrize("model", [None, nn.Sequential, lambda x: x])
def test_a_model_that_is_no_module(model: Any) -> None:
    refuses(
        net(),
        lambda: FusedMAML(model, 0.1),
        TypeError,
        "model must be an nn.Module",
        f"got {type(model).__name__}",
    )


@pytest.mark.parametrize(
    ("model", "loss", "sample", "pieces"),
    [
        (lambda: net().append(nn.RReLU()), "cross_entropy", (FEATURES,), ("(RReLU)", "draws random numbers")),
        (net, lambda p, y: p.lgamma().mean(), (FEATURES,), ("lgamma in the loss", "no fused layer serves it")),
        (net, lambda p, y: F.cross_entropy(p + p.round(), y), (FEATURES,), ("round in the loss", "no fused layer")),
        (
            lambda: net().append(nn.LogSoftmax(1)),
            "mse",
            (FEATURES,),
            ("the prediction is a log_softmax", "not for mse"),
        ),
    ],
)
def test_what_backend_fused_cannot_serve_raises_at_the_first_call(
    model: Any, loss: Any, sample: tuple[int, ...], pieces: tuple[str, ...]
) -> None:
    maml, data = FusedMAML(model(), 0.1, loss=loss, backend="fused"), episode(*sample, loss=loss)
    for call in (lambda: maml(**data), lambda: maml.adapt(data["x_spt"], data["y_spt"])):
        refuses(maml, call, ValueError, 'backend="fused" cannot serve this model', *pieces)
    assert pieces[-1] in maml.explain(data["x_spt"], data["y_spt"])


LOSS_VALUES = {
    "one a sample": (
        lambda p, y: F.cross_entropy(p, y, reduction="none"), ValueError,
        ("the loss must return a 0-d tensor", "got one of shape [4]", "mean"),
    ),
    "one in a vector": (lambda p, y: p.sum().reshape(1), ValueError, ("a 0-d tensor", "got one of shape [1]")),
    "a float": (lambda p, y: p.sum().item(), TypeError, ("the loss must return a 0-d tensor", "got float")),
    "a pair": (lambda p, y: (p.sum(), p.mean()), TypeError, ("the loss must return a 0-d tensor", "got tuple")),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSS_VALUES)
def test_a_loss_that_is_no_number(case: str) -> None:
    loss, error, pieces = LOSS_VALUES[case]
    maml = FusedMAML(net(), 0.1, 2, loss=loss, backend="reference")
    data = episode()
    x, y = data["x_spt"], data["y_spt"]
    fast = maml.adapt(x, y, steps=0)
    calls = (
        lambda: maml(**data),
        lambda: maml.backward(**data),
        lambda: maml.adapt(x, y),
        lambda: list(maml.inner_loop(x, y, 1)),
        lambda: maml.loss_and_grad(fast, x, y),
        lambda: maml.hvp(fast, x, y, fast),
        lambda: gradcheck(maml, **data),
    )
    for call in calls:
        refuses(maml, call, error, *pieces)
    alone = FusedMAML(maml.model, 0.1, 0, loss=loss, backend="reference")  # query loss first
    refuses(alone, lambda: alone(**data | {"x_qry": x, "y_qry": y}), error, *pieces)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_of_the_model_in_another_dtype_later(backend: str) -> None:
    maml = FusedMAML(net(), 0.1, backend=backend)
    maml.model[3].float()
    with pytest.raises(ValueError, match=r"one dtype.*torch\.float32.*torch\.float64"):
        maml(**episode())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_for_a_parameter_frozen_later(backend: str) -> None:
    maml = FusedMAML(net(), dict_of_rates(), backend=backend)
    maml.model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"inner_lr must have exactly.*got 0\.bias, which are not adapted"):
        maml(**episode())
