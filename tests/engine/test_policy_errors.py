"""Bad policies, targets and directions raise ValueError or TypeError, on the fused path and on the general one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, PolicyTarget
from tests.conftest import check_meta_gradient
from tests.engine.policy_models import LOSSES, Gaussian, episode, policy
from tests.engine.refusals import refuses

pytestmark = pytest.mark.usefixtures("machine", "labels_at_once")

BACKENDS = ["fused", "reference"]


def changed(y: PolicyTarget, **fields: Any) -> PolicyTarget:
    return y._replace(**{name: f(getattr(y, name)) if callable(f) else f for name, f in fields.items()})


def at(index: tuple[int, int], value: float) -> Any:
    def put(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    return put


# kind, fields of y_qry, error, pieces of its text
TARGETS: dict[str, tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "actions no tensor": ("gaussian", {"actions": None}, TypeError, ("y_qry.actions must be a tensor", "NoneType")),
    "actions of one axis": (
        "gaussian", {"actions": lambda t: t[..., 0]}, ValueError,
        ("y_qry.actions must have shape [tasks, samples, action]", "got [3, 6]"),
    ),
    "actions of another size": (
        "gaussian", {"actions": lambda t: torch.cat([t, t], -1)}, ValueError,
        ("y_qry.actions must have the mean's shape [3, 6, 2]", "got [3, 6, 4]"),
    ),
    "actions of another type": (
        "gaussian", {"actions": lambda t: t.float()}, TypeError, ("y_qry.actions must be torch.float64", "float32"),
    ),
    "choices that are floats": (
        "categorical", {"actions": lambda t: t.double()}, TypeError, ("y_qry.actions must be torch.int64", "float64"),
    ),
    "choices of three axes": (
        "categorical", {"actions": lambda t: t[..., None]}, ValueError,
        ("y_qry.actions must have shape [tasks, samples]", "got [3, 6, 1]"),
    ),
    "a choice too large": (
        "categorical", {"actions": at((2, 3), 4)}, ValueError,
        ("y_qry.actions must hold actions in [0, 4)", "got 4 (task 2, sample 3)"),
    ),
    "a choice below zero": (
        "categorical", {"actions": at((1, 0), -100)}, ValueError, ("y_qry.actions", "got -100 (task 1, sample 0)"),
    ),
    "advantages missing": (
        "gaussian", {"advantages": None}, TypeError, ("y_qry.advantages must be a tensor", "NoneType"),
    ),
    "advantages of fewer tasks": (
        "gaussian", {"advantages": lambda t: t[:2]}, ValueError, ("y_qry.advantages must have 3 tasks", "got 2"),
    ),
    "advantages of fewer samples": (
        "gaussian", {"advantages": lambda t: t[:, :5]}, ValueError, ("y_qry.advantages must have 6 samples", "got 5"),
    ),
    "advantages of another type": (
        "gaussian", {"advantages": lambda t: t.float()}, TypeError, ("y_qry.advantages must be torch.float64",),
    ),
    "old log-probabilities of each dimension": (
        "gaussian", {"old_log_probs": lambda t: t[..., None]}, ValueError,
        ("y_qry.old_log_probs must have shape [tasks, samples]", "got [3, 6, 1]"),
    ),
    "old log-probabilities as a list": (
        "gaussian", {"old_log_probs": [0.5]}, TypeError, ("y_qry.old_log_probs must be a tensor", "got list"),
    ),
    "a weight below zero": (
        "gaussian", {"weights": at((1, 2), -1)}, ValueError,
        ("y_qry.weights must be finite and at least 0", "got -1.0 (task 1, sample 2)"),
    ),
    "a weight that is no number": (
        "categorical", {"weights": at((1, 2), float("nan"))}, ValueError,
        ("y_qry.weights", "got nan (task 1, sample 2)"),
    ),
    "an infinite weight": (
        "gaussian", {"weights": at((0, 2), float("inf"))}, ValueError, ("y_qry.weights", "got inf (task 0, sample 2)"),
    ),
    "a task without samples": (
        "gaussian", {"weights": at((slice(2, 3), slice(None)), 0)}, ValueError,
        ("y_qry.weights must have a positive sum in every task", "got 0 in task 2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TARGETS)
def test_target(case: str, backend: str) -> None:
    kind, fields, error, pieces = TARGETS[case]
    maml = FusedMAML(policy(kind), 0.1, 2, loss=LOSSES[kind], backend=backend)
    data = episode(kind)
    data[3] = changed(data[3], **fields)
    refuses(maml, lambda: maml(*data), error, *pieces)
    renamed = [piece.replace("y_qry", "y_spt") for piece in pieces]
    refuses(maml, lambda: maml.adapt(data[2], data[3]), error, *renamed)
    renamed = [piece.replace("y_qry", "y") for piece in pieces]
    fast = maml.adapt(*data[:2])
    refuses(maml, lambda: maml.loss_and_grad(fast, data[2], data[3]), error, *renamed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_target(backend: str) -> None:
    maml = FusedMAML(policy("categorical"), 0.1, 2, loss=LOSSES["categorical"], backend=backend)
    x_spt, y_spt, x_qry, y_qry = episode("categorical")
    for wrong, name in ((y_spt.actions, "Tensor"), (tuple(y_spt), "tuple"), (None, "NoneType")):
        refuses(
            maml, lambda wrong=wrong: maml(x_spt, wrong, x_qry, y_qry), TypeError,
            "y_spt must be a PolicyTarget for categorical_policy_gradient", f"got {name}",
        )  # fmt: skip
    labels = FusedMAML(policy("categorical"), 0.1, 2, backend=backend)
    refuses(labels, lambda: labels(x_spt, y_spt, x_qry, y_qry), TypeError, "y_spt must be a tensor", "got PolicyTarget")


def test_a_target_that_requires_grad() -> None:
    data = episode("gaussian")
    data[1].advantages.requires_grad_()
    maml = FusedMAML(policy("gaussian"), 0.1, 2, loss=LOSSES["gaussian"], backend="fused")
    refuses(maml, lambda: maml(*data), ValueError, "gradients of targets are fused for losses of x and y")
    oracle = FusedMAML(policy("gaussian"), 0.1, 2, loss=LOSSES["gaussian"], backend="reference")
    oracle(*data).loss.backward()
    assert data[1].advantages.grad.norm() > 0


class Returns(nn.Module):
    """A model that returns `f` of its features."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f, self.linear, self.log_std = f, nn.Linear(3, 2).double(), nn.Parameter(torch.zeros(2).double())

    def forward(self, x: Tensor) -> Any:
        return self.f(self.linear(x), self.log_std)


@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path:UserWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_policy_loss_wants_a_policy(backend: str) -> None:
    data = episode("gaussian")
    for f, pieces in (
        (lambda mean, log_std: mean, ("must return (mean, log_std)", "got Tensor")),
        (lambda mean, log_std: (mean, log_std, mean), ("must return (mean, log_std)", "got a tuple of 3")),
        (lambda mean, log_std: (mean, log_std[:1]), ("log_std [action] or [n, action]", "got [5, 2] and [1]")),
    ):
        maml = FusedMAML(Returns(f), 0.1, loss=LOSSES["gaussian"], backend=backend)
        refuses(maml.model, lambda maml=maml: maml(*data), ValueError, *pieces)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "categorical_policy_gradient"])
def test_other_losses_want_one_tensor(loss: str, backend: str) -> None:
    pieces = (f"the model must return one tensor for {loss}", "got a tuple of 2", "gaussian_policy_gradient")
    maml = FusedMAML(Gaussian().double(), 0.1, loss=loss, backend=backend)
    data: list[Any] = episode("categorical")
    if loss != "categorical_policy_gradient":
        data[1], data[3] = (
            y.actions if loss == "cross_entropy" else torch.zeros(*y.actions.shape, 2).double() for y in data[1::2]
        )
    refuses(maml, lambda: maml(*data), ValueError, *pieces)


NOT_FUSED = {
    "computed": (lambda mean, log_std: (mean, mean + log_std.sum()), "not a value computed from x"),
    "another output": (
        lambda mean, log_std: (mean, mean),
        "where log_std is a parameter of the model, or clamp(min=...) of one, not a value",
    ),
    "scaled": (lambda mean, log_std: (mean, 2 * log_std), "not a value computed from parameters"),
    "clamped on both sides": (
        lambda mean, log_std: (mean, log_std.clamp(-1, 1)),
        "of one, not a value computed from parameters",
    ),
    "three": (lambda mean, log_std: (mean, log_std, log_std), "the model returns tuple"),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_policies_that_are_not_fused_run_on_the_general_path(case: str) -> None:
    f, reason = NOT_FUSED[case]
    maml, data = FusedMAML(Returns(f), 0.1, loss=LOSSES["gaussian"]), episode("gaussian", 5, 5)
    assert reason in maml.explain(*data[:2])
    with pytest.warns(UserWarning, match="general path") as caught:
        maml.predict(maml.adapt(*data[:2], steps=0), data[2])
    assert reason in str(caught[0].message)
    if case == "three":
        refuses(maml.model, lambda: maml(*data), ValueError, "must return (mean, log_std)", "got a tuple of 3")
    elif case == "another output":
        refuses(maml.model, lambda: maml(*data), ValueError, "log_std does not reach the support loss")
    else:
        maml(*data).loss.backward()
        v = {n: torch.ones_like(p) for n, p in maml.model.named_parameters()}
        assert maml.fisher_vector_product(*data[:3], v).keys() == v.keys()


def test_a_log_std_for_a_number_of_samples() -> None:
    """It is fused for sets of that many samples; for other sets the model and its loss do not fit each other."""
    model = Returns(lambda mean, log_std: (mean, log_std.expand(5, 2)))
    maml = check_meta_gradient(model, LOSSES["gaussian"], episode("gaussian", 5, 5), 0.1, 2)
    with pytest.raises(ValueError, match=r"log_std is a parameter of the model, .* value computed from parameters"):
        maml(*episode("gaussian", 5, 6))


DIRECTIONS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "no mapping": (lambda v: list(v.values()), TypeError, ("v must be a mapping", "got list")),
    "one missing": (
        lambda v: {n: t for n, t in v.items() if n != "log_std"}, ValueError,
        ("v must hold exactly the trainable parameters", "none for log_std"),
    ),
    "one unknown": (lambda v: {**v, "other": v["log_std"]}, ValueError, ("exactly", "unknown other")),
    "of tasks": (
        lambda v: {**v, "log_std": v["log_std"][None]}, ValueError, ("v['log_std'] must have shape [2]", "got [1, 2]"),
    ),
    "no tensor": (lambda v: {**v, "log_std": 1.0}, ValueError, ("v['log_std'] must have shape [2]", "got float")),
    "of another type": (
        lambda v: {**v, "log_std": v["log_std"].float()}, TypeError, ("v['log_std'] must be", "got torch.float32"),
    ),
}  # fmt: skip

WEIGHTS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "a list": ([1.0], TypeError, ("weights must be a tensor", "got list")),
    "of tasks": (torch.ones(3).double(), ValueError, ("weights must have shape [3, 6]", "got [3]")),
    "of another type": (torch.ones(3, 6), TypeError, ("weights must be torch.float64", "got torch.float32")),
    "below zero": (
        -torch.ones(3, 6).double(),
        ValueError,
        ("weights must be finite and at least 0", "task 0, sample 0"),
    ),
    "all zero": (torch.zeros(3, 6).double(), ValueError, ("weights must have a positive sum", "task 0")),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_fisher_vector_product(backend: str) -> None:
    maml = FusedMAML(policy("gaussian"), 0.1, 2, loss=LOSSES["gaussian"], backend=backend)
    data = episode("gaussian")
    v = {n: torch.ones_like(p) for n, p in maml.model.named_parameters()}
    for wrong, error, pieces in DIRECTIONS.values():
        refuses(maml, lambda wrong=wrong: maml.fisher_vector_product(*data[:3], wrong(v)), error, *pieces)
    for weights, error, pieces in WEIGHTS.values():
        refuses(maml, lambda weights=weights: maml.fisher_vector_product(*data[:3], v, weights=weights), error, *pieces)
    refuses(maml, lambda: maml.fisher_vector_product(*data[:2], data[2][:2], v), ValueError, "x_qry must have 3 tasks")
    refuses(maml, lambda: maml.fisher(*data[:2], data[2][:2]), ValueError, "x_qry must have 3 tasks")
    refuses(maml, lambda: maml.fisher(*data[:2], [data[2]]), TypeError, "x_qry must be a tensor for fisher", "got list")
    refuses(maml, lambda: maml.fisher(*data[:3], memory=-1), ValueError, "memory must be at least 0, got -1")
    refuses(maml, lambda: maml.fisher(*data[:3])({}), ValueError, "v must")
    classes = FusedMAML(policy("categorical"), 0.1, backend=backend)
    refuses(
        classes, lambda: classes.fisher_vector_product(*data[:3], v), ValueError,
        "fisher_vector_product must have a loss of gaussian_policy_gradient or categorical_policy_gradient",
        "got 'cross_entropy'",
    )  # fmt: skip
