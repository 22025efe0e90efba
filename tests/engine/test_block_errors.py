"""adapt, predict, loss_and_grad, hvp and gradcheck refuse bad arguments, and change no state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck
from tests.engine.refusals import BACKENDS, CLASSES, FEATURES, episode, label, net, refuses

pytestmark = pytest.mark.usefixtures("machine", "one_thread", "labels_at_once")


class Detour(nn.Module):
    """forward does not use `spare`."""

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
    """With inner_steps=0, inner_lr has shape [0]: `adapt` with more steps has no last rate to repeat."""
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
