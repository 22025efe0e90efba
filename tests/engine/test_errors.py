"""Every bad input is refused in words (what, expected, got), and nothing has moved afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck

pytestmark = pytest.mark.usefixtures("machine")

TASKS, SUPPORT, QUERY, FEATURES, CLASSES = 2, 4, 3, 3, 5
BACKENDS = ("auto", "reference")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _labels_at_once(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU looks at labels before a call where it is asked to."""
    if machine != "cpu":
        monkeypatch.setitem(FusedMAML.__init__.__kwdefaults__, "check_labels", True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES)).double()


def episode(*sample: int, loss: str = "cross_entropy", n_support: int = SUPPORT) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    data = {}
    for name, n in (("spt", n_support), ("qry", QUERY)):
        data[f"x_{name}"] = torch.randn(TASKS, n, *(sample or (FEATURES,)), generator=g, dtype=torch.float64)
        if loss == "mse":
            data[f"y_{name}"] = torch.randn(TASKS, n, CLASSES, generator=g, dtype=torch.float64)
        else:
            data[f"y_{name}"] = torch.randint(CLASSES, (TASKS, n), generator=g)
    return {name: data[name] for name in ("x_spt", "y_spt", "x_qry", "y_qry")}


def state(module: nn.Module) -> list[Any]:
    """All that an error must leave alone; read it twice and compare."""
    tensors = [
        *module.parameters(),
        *module.buffers(),
        *(p.grad for p in module.parameters() if p.grad is not None),
    ]
    return [
        torch.get_rng_state().tolist(),
        [(id(t), t.dtype, t.requires_grad, t.detach().clone().tolist()) for t in tensors],
        [(name, m.training, sorted(vars(m)), list(m._modules)) for name, m in module.named_modules()],
        torch.is_grad_enabled(),
        getattr(module, "backend", None),
    ]


def refuses(module: nn.Module, call: Callable[[], object], error: type[Exception], *pieces: str) -> None:
    """`call` raises exactly `error`, its text holds `pieces` in this order, and `module` stays as it was."""
    for p in module.parameters():
        if p.is_floating_point():
            p.grad = torch.full_like(p, 0.25)
    before = state(module)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text, at = str(caught.value), 0
    for piece in pieces:
        assert piece in text[at:], f"{piece!r} is not in its place in: {text}"
        at = text.index(piece, at) + len(piece)
    assert state(module) == before


# -- the constructor -----------------------------------------------------------------------------------------


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


def dict_of_rates(**changes: Any) -> dict[str, Any]:
    rates: dict[str, Any] = {name: 0.1 for name, _ in net().named_parameters()}
    for name, rate in changes.items():
        rates[name.replace("_", ".")] = rate
    return rates


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
    "checkpoint": (net, {"checkpoint": "save"}, ValueError, ('checkpoint must be None or "recompute"', "got 'save'")),
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
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)), {"backend": "fused"}, ValueError,
        ('backend="fused" cannot serve this model', "0 (Conv2d)", "groups=2"),
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


def test_backend_fused_refuses_a_callable_loss() -> None:
    model = net()
    refuses(
        model, lambda: FusedMAML(model, 0.1, loss=lambda p, y: p.sum(), backend="fused"), ValueError,
        'backend="fused" cannot', "loss",
    )  # fmt: skip


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
    alone = FusedMAML(maml.model, 0.1, 0, loss=loss, backend="reference")  # the query loss is the first
    refuses(alone, lambda: alone(**data | {"x_qry": x, "y_qry": y}), error, *pieces)


# -- forward -------------------------------------------------------------------------------------------------


def change(name: str, to: Callable[[Tensor], Any]) -> Callable[[dict], dict]:
    return lambda data: data | {name: to(data[name])}


def some_tasks(n: int) -> Callable[[dict], dict]:
    return lambda data: {name: t[:n] for name, t in data.items()}


def with_weights(weights: Any) -> Callable[[dict], dict]:
    return lambda data: data | {"task_weights": weights}


def label(name: str, value: int) -> Callable[[dict], dict]:
    def put(data: dict) -> dict:
        y = data[name].clone()
        y[1, 2] = value
        return data | {name: y}

    return put


FORWARD = {
    "x_spt no tensor": (change("x_spt", Tensor.tolist), TypeError, ("x_spt must be a tensor", "got list")),
    "x_qry no tensor": (
        change("x_qry", lambda t: None), TypeError, ("x_qry must be a tensor", "got NoneType"),
    ),
    "y_spt no tensor": (change("y_spt", Tensor.numpy), TypeError, ("y_spt must be a tensor", "got ndarray")),
    "x_spt without tasks axis": (
        change("x_spt", lambda t: t[0]), ValueError,
        ("x_spt must have shape [tasks, samples, ...]", "got [4, 3]"),
    ),
    "no tasks": (some_tasks(0), ValueError, ("x_spt must have at least 1 task", "got 0")),
    "empty support set": (
        lambda d: d | {"x_spt": d["x_spt"][:, :0], "y_spt": d["y_spt"][:, :0]}, ValueError,
        ("x_spt must have at least 1 sample", "got 0"),
    ),
    "empty query set": (
        lambda d: d | {"x_qry": d["x_qry"][:, :0], "y_qry": d["y_qry"][:, :0]}, ValueError,
        ("x_qry must have at least 1 sample", "got 0"),
    ),
    "other number of tasks": (
        lambda d: d | {"x_qry": d["x_qry"][:1], "y_qry": d["y_qry"][:1]}, ValueError,
        ("x_qry must have 2 tasks like x_spt", "got 1"),
    ),
    "other sample shape": (
        change("x_qry", lambda t: torch.cat([t, t], 2)), ValueError,
        ("x_qry must have samples of shape [3] like x_spt", "got [6]"),
    ),
    "y_spt other tasks": (
        change("y_spt", lambda t: t[:1]), ValueError, ("y_spt must have 2 tasks like x_spt", "got 1"),
    ),
    "y_qry other samples": (
        change("y_qry", lambda t: t[:, 1:]), ValueError,
        ("y_qry must have 3 samples a task like x_qry", "got 2"),
    ),
    "y_spt a scalar": (
        change("y_spt", lambda t: t[0, 0]), ValueError, ("y_spt must have 2 tasks", "got a scalar"),
    ),
    "y_spt one-hot": (
        change("y_spt", lambda t: t[..., None]), ValueError,
        ("y_spt must have shape [tasks, samples]", "got [2, 4, 1]"),
    ),
    "x_spt wrong dtype": (
        change("x_spt", Tensor.float), TypeError,
        ("x_spt must have the model's dtype torch.float64", "got torch.float32"),
    ),
    "x_qry wrong dtype": (
        change("x_qry", Tensor.half), TypeError,
        ("x_qry must have the model's dtype torch.float64", "got torch.float16"),
    ),
    "y_spt int32": (
        change("y_spt", Tensor.int), TypeError, ("y_spt must hold int64 labels", "got torch.int32"),
    ),
    "y_qry float": (
        change("y_qry", Tensor.double), TypeError, ("y_qry must hold int64 labels", "got torch.float64"),
    ),
    "x_spt elsewhere": (
        change("x_spt", lambda t: t.to("meta")), ValueError,
        ("x_spt must be on the model's device cpu", "got meta"),
    ),
    "y_qry elsewhere": (
        change("y_qry", lambda t: t.to("meta")), ValueError,
        ("y_qry must be on the device of x_qry, cpu", "got meta"),
    ),
    "weights no tensor": (with_weights([0.5, 0.5]), TypeError, ("task_weights must be a tensor", "got list")),
    "weights shape": (
        with_weights(torch.ones(3).double()), ValueError, ("task_weights must have shape [2]", "got [3]"),
    ),
    "weights 0-d": (
        with_weights(torch.tensor(1.0).double()), ValueError, ("task_weights must have shape [2]", "got []"),
    ),
    "weights dtype": (
        with_weights(torch.ones(2)), TypeError, ("task_weights must be torch.float64", "got torch.float32"),
    ),
    "weights that require grad": (
        with_weights(torch.ones(2).double().requires_grad_()), ValueError,
        ("task_weights must not require grad", "got requires_grad=True"),
    ),
}  # fmt: skip
for _set in ("spt", "qry"):
    for _value in (-1, -100, CLASSES):
        FORWARD[f"y_{_set} label {_value}"] = (
            label(f"y_{_set}", _value), ValueError,
            (f"y_{_set} must hold labels in [0, {CLASSES})", f"got {_value}", "task 1, sample 2"),
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FORWARD)
def test_forward_refuses(case: str, backend: str) -> None:
    spoil, error, pieces = FORWARD[case]
    maml = FusedMAML(net(), 0.1, 2, backend=backend)
    good = episode()
    before = maml(**good).loss.detach()
    refuses(maml, lambda: maml(**spoil(good)), error, *pieces)
    assert torch.equal(maml(**good).loss.detach(), before)  # and the next call is none the worse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["y_spt", "y_qry"])
def test_mse_does_not_broadcast(where: str, backend: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, loss="mse", backend=backend)
    good = episode(loss="mse")
    n = good[where].shape[1]
    expected = f"{where} must have the prediction's shape [2, {n}, 5]"
    refuses(
        maml,
        lambda: maml(**change(where, lambda t: t[..., :1])(good)),
        ValueError,
        expected,
        f"got [2, {n}, 1]",
    )
    refuses(maml, lambda: maml(**change(where, lambda t: t[..., 0])(good)), ValueError, expected, f"got [2, {n}]")
    refuses(
        maml, lambda: maml(**change(where, Tensor.float)(good)), TypeError,
        f"{where} must have the model's dtype torch.float64", "got torch.float32",
    )  # fmt: skip
    fast = maml.adapt(good["x_spt"], good["y_spt"])
    for call in (maml.loss_and_grad, lambda *a: maml.hvp(*a, fast)):
        refuses(
            maml, lambda: call(fast, good["x_qry"], good["y_qry"][..., 0]), ValueError,  # noqa: B023
            "y must have the prediction's shape [2, 3, 5]", "got [2, 3]",
        )  # fmt: skip


@pytest.mark.parametrize("where", ["x_spt", "x_qry", "y_spt", "y_qry"])
def test_an_input_that_requires_grad_is_for_the_reference(where: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, loss="mse")
    data = episode(loss="mse")
    data[where].requires_grad_()
    refuses(
        maml,
        lambda: maml(**data),
        ValueError,
        f"{where} must not require grad",
        "got requires_grad=True",
        "reference",
    )
    FusedMAML(maml.model, 0.1, 2, loss="mse", backend="reference")(**data).loss.backward()
    assert data[where].grad is not None
    assert data[where].grad.abs().sum() > 0
    with torch.no_grad():
        maml(**data)  # nothing asks for that gradient here


def test_features_that_do_not_fit_name_the_layer() -> None:
    maml = FusedMAML(net(), 0.1)
    refuses(maml, lambda: maml(**episode(4)), ValueError, "0 (Linear)", "expects 3 features", "got", "[4]")
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(6, 5)).double()
    refuses(
        model,
        lambda: FusedMAML(model, 0.1)(**episode(3)),
        ValueError,
        "2 (Linear)",
        "expects 6",
        "got",
        "[7]",
    )


def test_images_that_do_not_fit_name_the_layer() -> None:
    maml = FusedMAML(images(), 0.1)
    maml(**episode(2, 4, 4))
    refuses(
        maml,
        lambda: maml(**episode(3, 4, 4)),
        ValueError,
        "0 (Conv2d)",
        "expects 2 channels",
        "got",
        "[3, 4, 4]",
    )
    refuses(maml, lambda: maml(**episode(2, 2, 4)), ValueError, "0 (Conv2d)", "kernel of 3", "[2, 2, 4]")
    refuses(maml, lambda: maml(**episode(2, 5, 4)), ValueError, "3 (Linear)", "expects 12 features", "got", "[18]")


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_every_pixel(backend: str) -> None:
    maml = FusedMAML(nn.Conv2d(2, CLASSES, 3).double(), 0.1, backend=backend)
    pieces = ("must return logits [n, classes] for cross_entropy", f"got [{SUPPORT}, {CLASSES}, 2, 3]")
    with pytest.raises(ValueError, match="must return logits"):
        maml(**episode(2, 4, 5))  # no fused layer serves such samples: the backend is the reference for them
    refuses(maml, lambda: maml(**episode(2, 4, 5)), ValueError, *pieces)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_with_one_value_per_channel(backend: str) -> None:
    maml = FusedMAML(net(), 0.1, backend=backend)
    data = episode(n_support=1)
    refuses(maml, lambda: maml(**data), ValueError, "more than 1 value per channel")
    refuses(maml, lambda: maml.adapt(data["x_spt"], data["y_spt"]), ValueError, "more than 1 value per channel")
    refuses(maml, lambda: maml(**label_free_query(episode())), ValueError, "more than 1 value per channel")


def label_free_query(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """A query set of one sample a task."""
    return data | {"x_qry": data["x_qry"][:, :1], "y_qry": data["y_qry"][:, :1]}


@pytest.mark.parametrize("bad", ["y_spt", "y_qry"])
def test_a_refused_call_draws_no_random_number(bad: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 7), nn.Dropout(0.5), nn.Linear(7, CLASSES)).double()
    maml = FusedMAML(model, 0.1, backend="reference")
    refuses(maml, lambda: maml(**label(bad, 99)(episode())), ValueError, f"{bad} must hold labels", "got 99")


# -- adapted parameters that do not reach the loss -----------------------------------------------------------


class Detour(nn.Module):
    """`spare` is there, and nothing reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(FEATURES, CLASSES).double()
        self.spare = nn.Linear(FEATURES, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
def test_an_adapted_parameter_that_does_not_reach_the_loss(backend: str) -> None:
    model = Detour()
    data = episode()
    for call in (lambda maml: maml(**data), lambda maml: maml.adapt(data["x_spt"], data["y_spt"])):
        refuses(
            model, lambda: call(FusedMAML(model, 0.1, backend=backend)), ValueError,  # noqa: B023
            "spare.weight", "does not reach the support loss", "adapt_params",
        )  # fmt: skip
    model.zero_grad()
    FusedMAML(model, 0.1, adapt_params=lambda n: "used" in n, backend=backend)(**data).loss.backward()
    assert model.spare.weight.grad is None
    assert model.used.weight.grad is not None


# -- adapt and the building blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapt_refuses(backend: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, backend=backend)
    x, y = episode()["x_spt"], episode()["y_spt"]
    refuses(maml, lambda: maml.adapt(x, y, steps=-1), ValueError, "steps must be at least 0", "got -1")
    refuses(maml, lambda: maml.adapt(x, y, steps=1.5), TypeError, "steps must be an int", "got float")
    refuses(maml, lambda: maml.adapt(x, y, steps=True), TypeError, "steps must be an int", "got bool")
    refuses(maml, lambda: maml.adapt(x, y[:, :2]), ValueError, "y_spt must have 4 samples", "got 2")
    refuses(maml, lambda: maml.adapt(x, y - 1), ValueError, "y_spt must hold labels in [0, 5)", "got -1")
    refuses(
        maml,
        lambda: maml.adapt(x.float(), y),
        TypeError,
        "x_spt must have the model's dtype",
        "torch.float32",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rate_to_repeat(backend: str) -> None:
    """inner_lr [0] fits inner_steps=0; `adapt` with more steps then has no last rate."""
    maml = FusedMAML(net(), torch.zeros(0, dtype=torch.float64), 0, backend=backend)
    x, y = episode()["x_spt"], episode()["y_spt"]
    assert torch.equal(maml.adapt(x, y)["0.weight"][1], maml.model[0].weight)
    refuses(maml, lambda: maml.adapt(x, y, steps=2), ValueError, "inner_lr")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", ["predict", "loss_and_grad", "hvp"])
def test_building_blocks_refuse(block: str, backend: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, backend=backend)
    data = episode()
    x, y = data["x_qry"], data["y_qry"]
    fast = maml.adapt(data["x_spt"], data["y_spt"])

    def call(fast: Any, x: Any = x, y: Any = y, v: Any = None) -> object:
        if block == "predict":
            return maml.predict(fast, x)
        if block == "loss_and_grad":
            return maml.loss_and_grad(fast, x, y)
        return maml.hvp(fast, x, y, {} if v is None else v)

    call(fast)
    lacking = {name: t for name, t in fast.items() if name != "3.bias"}
    refuses(maml, lambda: call(list(fast.values())), TypeError, "fast must be a mapping", "got list")
    refuses(maml, lambda: call(lacking), ValueError, "fast must hold exactly", "got none for 3.bias")
    refuses(maml, lambda: call(fast | {"4.bias": x}), ValueError, "fast must hold exactly", "got unknown 4.bias")
    refuses(
        maml, lambda: call(fast | {"3.bias": maml.model[3].bias.detach()}), ValueError,
        "fast['3.bias'] must have shape [2, 5]", "got [5]",
    )  # fmt: skip
    refuses(
        maml,
        lambda: call(fast | {"3.bias": None}),
        ValueError,
        "fast['3.bias'] must have shape [2, 5]",
        "NoneType",
    )
    refuses(
        maml, lambda: call(fast | {"3.bias": fast["3.bias"].float()}), TypeError,
        "fast['3.bias'] must be torch.float64", "got torch.float32",
    )  # fmt: skip
    refuses(
        maml, lambda: call(fast, x[:1], y[:1]), ValueError, "x must have 2 tasks like fast", "got 1", "x.unsqueeze(0)"
    )
    refuses(maml, lambda: call(fast, x[0, 0]), ValueError, "x must have shape [tasks, samples, ...]", "got [3]")
    if block == "predict":
        return
    graph = maml.adapt(data["x_spt"], data["y_spt"], differentiable=True)
    text = f"must not require grad in {block}, whose results are detached, got requires_grad=True"
    refuses(maml, lambda: call(graph), ValueError, f"fast {text}", "predict(fast, x)")
    refuses(maml, lambda: call(fast, x.clone().requires_grad_()), ValueError, f"x {text}")
    if block == "hvp":
        refuses(maml, lambda: call(fast, v={"3.bias": graph["3.bias"]}), ValueError, f"v {text}")
    with torch.no_grad():
        call(graph)
    refuses(maml, lambda: call(fast, x, y + CLASSES), ValueError, "y must hold labels in [0, 5)", "got")
    refuses(maml, lambda: call(fast, x, y.int()), TypeError, "y must hold int64 labels", "got torch.int32")
    if block == "hvp":
        refuses(maml, lambda: call(fast, v={"bias": x}), ValueError, "v must hold only", "got unknown bias")
        refuses(
            maml, lambda: call(fast, v={"3.bias": fast["0.bias"]}), ValueError,
            "v['3.bias'] must have shape [2, 5]", "got [2, 7]",
        )  # fmt: skip
        refuses(maml, lambda: call(fast, v=[x]), TypeError, "v must be a mapping", "got list")


def test_the_wrong_label_in_loss_and_grad_is_the_one_named() -> None:
    maml = FusedMAML(net(), 0.1)
    data = label("y_qry", 17)(episode())
    fast = maml.adapt(data["x_spt"], data["y_spt"])
    refuses(
        maml, lambda: maml.loss_and_grad(fast, data["x_qry"], data["y_qry"]), ValueError,
        "y must hold labels in [0, 5)", "got 17", "task 1, sample 2",
    )  # fmt: skip


@pytest.mark.parametrize("value", [0, -1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["tolerance", "finite_difference_tolerance"])
def test_gradcheck_refuses_a_tolerance(name: str, value: float) -> None:
    maml = FusedMAML(net(), 0.1)
    refuses(
        maml, lambda: gradcheck(maml, **episode(), **{name: value}), ValueError,
        f"{name} must be a positive number", f"got {value}",
    )  # fmt: skip


# -- flags that change later, into something wrong -----------------------------------------------------------


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
