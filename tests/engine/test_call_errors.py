"""A call of FusedMAML on bad data raises ValueError or TypeError and changes no state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import FusedMAML
from tests.engine.refusals import (
    BACKENDS,
    CLASSES,
    FEATURES,
    SUPPORT,
    TASKS,
    change,
    episode,
    images,
    label,
    net,
    refuses,
)

pytestmark = pytest.mark.usefixtures("machine", "one_thread", "labels_at_once")


def some_tasks(n: int) -> Callable[[dict], dict]:
    return lambda data: {name: t[:n] for name, t in data.items()}


def with_weights(weights: Any) -> Callable[[dict], dict]:
    return lambda data: data | {"task_weights": weights}


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
    assert torch.equal(maml(**good).loss.detach(), before)  # the next call is not affected


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


@pytest.mark.parametrize("where", ["x_spt", "y_spt"])
def test_an_input_that_requires_grad_where_the_result_is_detached(where: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, loss="mse")
    data = episode(loss="mse")
    data[where].requires_grad_()
    refuses(
        maml,
        lambda: maml.adapt(data["x_spt"], data["y_spt"]),
        ValueError,
        f"{where} must not require grad",
        "got requires_grad=True",
        "reference",
    )
    FusedMAML(maml.model, 0.1, 2, loss="mse", backend="reference")(**data).loss.backward()
    assert data[where].grad is not None
    assert data[where].grad.abs().sum() > 0
    with torch.no_grad():
        maml(**data)  # without grad the input needs no gradient


def test_features_that_do_not_fit_name_the_layer() -> None:
    maml = FusedMAML(net(), 0.1)
    refuses(maml, lambda: maml(**episode(4)), ValueError, "x_spt must", "got [4]", "0 (Linear)", "[3, 7]")
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(6, 5)).double()
    refuses(model, lambda: FusedMAML(model, 0.1)(**episode(3)), ValueError, "got [3]", "2 (Linear)", "[4, 7] X [6, 5]")


def test_images_that_do_not_fit_name_the_layer() -> None:
    maml = FusedMAML(images(), 0.1)
    maml(**episode(2, 4, 4))
    refuses(maml, lambda: maml(**episode(3, 4, 4)), ValueError, "got [3, 4, 4]", "0 (Conv2d)", "to have 2 channels")
    refuses(maml, lambda: maml(**episode(2, 2, 4)), ValueError, "got [2, 2, 4]", "0 (Conv2d)", "Kernel size: (3 x 3)")
    refuses(maml, lambda: maml(**episode(2, 5, 4)), ValueError, "got [2, 5, 4]", "3 (Linear)", "[12, 5]")


@pytest.mark.parametrize("where", ["y_spt", "y_qry"])
def test_a_target_of_another_shape_than_an_image(where: str) -> None:
    model, data = nn.Conv2d(2, CLASSES, 3).double(), episode(2, 4, 5)
    data |= {y: torch.zeros(*data[y].shape, CLASSES, 2, 3).double() for y in ("y_spt", "y_qry")}
    data[where] = wrong = data[where][..., :2]
    n, got = wrong.shape[1], str(list(wrong.shape))
    ours = FusedMAML(model, 0.1, loss="mse", backend="fused")
    shape = [TASKS, n, CLASSES, 2, 3]
    refuses(ours, lambda: ours(**data), ValueError, f"{where} must have the prediction's shape {shape} for mse", got)
    for loss, name in ((F.mse_loss, "mse_loss in the loss (function)"), (nn.MSELoss(), "the loss (MSELoss)")):
        maml = FusedMAML(model, 0.1, loss=loss)
        pieces = f"{where} must be a target that the loss takes with the model's prediction", got, f"{name}: "
        refuses(maml, lambda maml=maml: maml(**data), ValueError, *pieces)


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_every_pixel(backend: str) -> None:
    maml = FusedMAML(nn.Conv2d(2, CLASSES, 3).double(), 0.1, backend=backend)
    pieces = ("must return logits [n, classes] for cross_entropy", f"got [{SUPPORT}, {CLASSES}, 2, 3]")
    with pytest.raises(ValueError, match="must return logits"):
        maml(**episode(2, 4, 5))  # no fused layer serves this shape, so that the reference runs
    refuses(maml, lambda: maml(**episode(2, 4, 5)), ValueError, *pieces)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_with_one_value_per_channel(backend: str) -> None:
    maml = FusedMAML(net(), 0.1, backend=backend)
    data = episode(n_support=1)
    refuses(maml, lambda: maml(**data), ValueError, "more than 1 value per channel")
    refuses(maml, lambda: maml.adapt(data["x_spt"], data["y_spt"]), ValueError, "more than 1 value per channel")
    pieces = ("x_qry must have samples", "got [3], 1 a task: 1 (BatchNorm1d)") if backend == "auto" else ()
    refuses(maml, lambda: maml(**label_free_query(episode())), ValueError, *pieces, "more than 1 value per channel")


def label_free_query(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """A query set of one sample a task."""
    return data | {"x_qry": data["x_qry"][:, :1], "y_qry": data["y_qry"][:, :1]}


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("bad", ["y_spt", "y_qry"])
def test_a_refused_call_draws_no_random_number(bad: str, backend: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 7), nn.Dropout(0.5), nn.Linear(7, CLASSES)).double()
    maml = FusedMAML(model, 0.1, backend=backend)
    maml(**episode())
    refuses(maml, lambda: maml(**label(bad, 99)(episode())), ValueError, f"{bad} must hold labels", "got 99")
