"""Changes between two calls of a FusedMAML are seen, and a call changes nothing itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, PolicyTarget
from tests import conftest


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


def normalised() -> nn.Sequential:
    """A net whose running statistics are those of one batch."""
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    model(torch.randn(20, 3))
    return model


def episode(*sample: int) -> list[Tensor]:
    return conftest.episode(sample or (3,), tasks=2, n=(5, 5), dtype=torch.float32, seed=0)


def freeze(maml: FusedMAML) -> None:
    maml.model.requires_grad_(False)


def freeze_the_head(maml: FusedMAML) -> None:
    maml.model[2].requires_grad_(False)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("adapted", "change"), [(None, freeze), (["2.weight", "2.bias"], freeze_the_head)])
def test_everything_adapted_frozen_later(backend: str, adapted: Any, change: Any) -> None:
    maml = FusedMAML(net(), 0.1, 2, adapt_params=adapted, backend=backend)
    maml(*episode())
    change(maml)
    with pytest.raises(ValueError, match="adapt_params must choose at least one trainable parameter, got none"):
        maml(*episode())


def test_only_what_has_a_slot_is_trainable() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match="adapt_params must choose at least one trainable parameter, got none"):
        FusedMAML(model, 0.1, 2, batch_norm="per_step")
    assert type(model[1]) is nn.BatchNorm1d


def test_another_model() -> None:
    first, second = net(), net()
    maml = FusedMAML(first, 0.1, 2)
    maml(*episode())
    maml.model = second
    out = maml(*episode())
    out.loss.backward()
    assert torch.equal(out.loss, FusedMAML(copy.deepcopy(second), 0.1, 2)(*episode()).loss)
    assert first[0].weight.grad is None
    assert second[0].weight.grad is not None


class LogSumsSoFar(nn.Linear):
    """Of series [n, steps, features]; it is fused for samples [features] alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.logcumsumexp(1) if x.dim() > 2 else x)


def test_samples_with_more_axes() -> None:
    model = nn.Linear(3, 4).double()
    data = episode()[0].double(), torch.rand(2, 5, 4).double(), episode()[2].double(), torch.rand(2, 5, 4).double()
    wide = [t[:, :, None].expand(*t.shape[:2], 6, t.shape[2]).contiguous() for t in data]
    maml, plain = (FusedMAML(model, 0.1, loss="mse", backend=backend) for backend in ("fused", "reference"))
    for given in (data, wide, data):
        torch.testing.assert_close(maml(*given).loss, plain(*given).loss, rtol=1e-12, atol=0)
        assert maml.backend == "cpu"


def test_a_shape_that_no_layer_fits_spoils_no_other() -> None:
    model = nn.Sequential(LogSumsSoFar(3, 4))
    wide = episode(2, 3)
    wide = wide[0], torch.rand(2, 5, 2, 4), wide[2], torch.rand(2, 5, 2, 4)
    narrow = episode()[0], torch.rand(2, 5, 4), episode()[2], torch.rand(2, 5, 4)
    strict = FusedMAML(model, 0.1, loss="mse", backend="fused")
    for _ in range(2):
        loss = strict(*narrow).loss
        with pytest.raises(ValueError, match=r'"fused" cannot serve this model: logcumsumexp in 0 \(LogSumsSoFar\)'):
            strict(*wide)
        assert strict.backend == "cpu"
    maml = FusedMAML(model, 0.1, loss="mse")
    assert torch.equal(maml(*narrow).loss, loss)
    with pytest.warns(UserWarning, match="general path"):
        maml(*wide)
    assert maml.backend == "reference"
    assert "logcumsumexp in 0 (LogSumsSoFar): no fused layer serves it" in maml.explain()
    for _ in range(2):
        assert torch.equal(maml(*narrow).loss, loss)
        assert maml.backend == "cpu"


def test_held_statistics_stay_held() -> None:
    model = normalised()
    maml = FusedMAML(model, 0.1, 2, batch_norm="running")
    loss = maml(*episode()).loss
    maml.model.train()
    assert torch.equal(maml(*episode()).loss, loss)
    assert not model[1].training
    before = model[1].running_mean.clone()
    maml.model.train()
    maml.update_statistics(*episode()[:3])
    assert not torch.equal(model[1].running_mean, before)


def test_a_renamed_submodule() -> None:
    maml = FusedMAML(net(), 0.1, 2)
    loss = maml(*episode()).loss
    modules = maml.model._modules
    modules["head"] = modules.pop("2")
    assert set(maml.adapt(*episode()[:2])) == {"0.weight", "0.bias", "head.weight", "head.bias"}
    assert torch.equal(maml(*episode()).loss, loss)


def test_a_rate_of_another_shape() -> None:
    rate = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
    maml = FusedMAML(net(), rate, 3)
    maml(*episode())
    rate.data = torch.tensor(0.1)
    out = maml(*episode())
    torch.testing.assert_close(out.loss, FusedMAML(copy.deepcopy(maml.model), 0.1, 3)(*episode()).loss)


def test_a_buffer_of_another_dtype() -> None:
    model = normalised()
    maml = FusedMAML(model, 0.1, 2, batch_norm="running")
    maml(*episode())
    model[1].running_mean.data = model[1].running_mean.double()
    with pytest.warns(UserWarning, match="running_mean is torch.float64"), pytest.raises(RuntimeError):
        maml(*episode())  # torch does not accept it either


def test_a_rate_elsewhere() -> None:
    with pytest.raises(ValueError, match="inner_lr must be on the model's device cpu, got meta"):
        FusedMAML(net(), torch.tensor(0.1, device="meta"))


def test_the_memory_of_what_no_call_takes() -> None:
    maml = FusedMAML(net(), 0.1)
    x = episode()[0]
    with pytest.raises(TypeError, match="x_spt must have the model's dtype"):
        maml.memory_estimate(x.half(), x)
    with pytest.raises(ValueError, match="x_qry must have at least 1 sample a task, got 0"):
        maml.memory_estimate(x, x[:, :0])


def test_data_made_in_inference_mode() -> None:
    maml = FusedMAML(net(), 0.1, 2)
    with torch.inference_mode():
        x_spt, y_spt, x_qry, _ = (t.clone() for t in episode())
    fast = maml.adapt(x_spt, y_spt, differentiable=True)
    maml.predict(fast, x_qry).square().sum().backward()
    got = [p.grad.clone() for p in maml.parameters()]
    maml.zero_grad()
    fast = maml.adapt(*episode()[:2], differentiable=True)
    maml.predict(fast, episode()[2]).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, maml.parameters(), strict=True))


def test_weights_that_are_a_negated_view() -> None:
    maml = FusedMAML(net(), 0.1, 2)
    weights = torch.tensor([0.25, 0.75])
    view = torch._neg_view(-weights)
    for _ in range(3):
        assert torch.equal(maml(*episode(), task_weights=view).loss, maml(*episode(), task_weights=weights).loss)


def test_a_fisher_vector_product_of_what_has_slots() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
            self.log_std = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), self.log_std

    def product(backend: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        maml = FusedMAML(
            Policy().double(), 0.1, 2, loss="gaussian_policy_gradient", batch_norm="per_step", backend=backend
        )
        x_spt, x_qry = torch.randn(2, 2, 5, 3, dtype=torch.float64)
        y_spt = PolicyTarget(torch.randn(2, 5, 2).double(), torch.randn(2, 5).double())
        v = {name: torch.ones_like(p) for name, p in maml.model.named_parameters()}
        return maml.fisher_vector_product(x_spt, y_spt, x_qry, v)

    with pytest.warns(UserWarning, match="takes no parameters with a slot"):
        got = product("auto")
    torch.testing.assert_close(got, product("reference"), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match='backend="fused" cannot serve'):
        product("fused")


def test_a_rate_changed_under_a_compiler() -> None:
    torch._dynamo.reset()
    maml = FusedMAML(net(), 0.1, 2)
    compiled = torch.compile(maml, backend="aot_eager", fullgraph=True)
    for rate in (0.1, 0.5):
        maml.inner_lr = rate
        assert torch.equal(compiled(*episode()).loss, maml(*episode()).loss)
    torch._dynamo.reset()
