"""gradcheck passes a right meta-gradient, and notices a wrong one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maml_cuda import FusedMAML, gradcheck
from tests.engine.nets import BACKENDS, dotted_rates, episode, net

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner_lr", [lambda: 0.3, dotted_rates])
def test_gradcheck_passes_and_leaves_all_as_it_was(inner_lr: Callable[[], Any], backend: str) -> None:
    maml = FusedMAML(net(), inner_lr(), 2, backend=backend)
    before = copy.deepcopy(maml.state_dict())
    table = gradcheck(maml, *episode())
    assert {row.name for row in table} == {n.removeprefix("model.") for n, _ in maml.named_parameters()}
    assert all(row.autograd_error <= 1e-8 and row.finite_difference_error <= 1e-4 for row in table)
    assert max(row.norm for row in table) > 0
    for name in ("0.weight", "finite differences", "autograd"):
        assert name in str(table)
    assert all(torch.equal(t, before[name]) for name, t in maml.state_dict().items())
    assert all(p.grad is None for p in maml.parameters())


def test_gradcheck_of_a_float32_model_runs_on_a_float64_copy() -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2)
    assert max(row.autograd_error for row in gradcheck(maml, *episode(dtype=torch.float32))) < 1e-10
    assert all(p.dtype == torch.float32 for p in maml.parameters())


def test_gradcheck_of_first_order_skips_finite_differences() -> None:
    table = gradcheck(FusedMAML(net(), 0.3, 2, first_order=True), *episode())
    assert all(row.finite_difference_error != row.finite_difference_error for row in table)  # nan: not measured


def test_gradcheck_notices_a_meta_gradient_that_is_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FusedMAML.forward

    def first_order_forward(self: FusedMAML, *args: Tensor, **kwargs: Any) -> Any:
        self.first_order, before = True, self.first_order
        out = forward(self, *args, **kwargs)
        self.first_order = before
        return out

    maml = FusedMAML(net(), 0.3, 2)
    monkeypatch.setattr(FusedMAML, "forward", first_order_forward)
    with pytest.raises(RuntimeError, match=r"meta-gradient of .*0\.weight.* is wrong"):
        gradcheck(maml, *episode())


def test_gradcheck_notices_one_wrong_entry() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)meta-gradient of 3\.bias is wrong\n.*3\.bias"):
        gradcheck(Spoiled(net(), 0.3, 2), *episode())


def _spoil(g: Tensor) -> Tensor:
    g = g.clone()
    g[1] *= 1 + 1e-5
    return g


class Spoiled(FusedMAML):
    """One entry of one gradient has a relative error of 1e-5."""

    def forward(self, *args: Tensor, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss.requires_grad:
            bias = self.model[3].bias
            (g,) = torch.autograd.grad(out.loss, bias, retain_graph=True)
            out.loss = out.loss + ((_spoil(g) - g) * (bias - bias.detach())).sum()
        return out
