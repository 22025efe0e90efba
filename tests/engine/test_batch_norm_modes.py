"""batch_norm=: collected statistics, conversion to per-step layers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, PerStepBatchNorm1d, PerStepBatchNorm2d, convert_per_step
from tests.conftest import program_of
from tests.engine.double_backward import make, mlp


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_update_statistics(per_step, momentum):
    """Compared with means and variances of the layer's inputs, computed here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh(), nn.Linear(4, 3)).double()
    maml = FusedMAML(model, 0.1, 2, batch_norm="per_step" if per_step else "transductive")
    x_s, x_q, y_s = torch.randn(3, 6, 3).double(), torch.randn(3, 5, 3).double(), torch.randint(0, 3, (3, 6))
    before = {n: p.clone() for n, p in model.named_parameters()}
    norm = model[1]
    for update in (1, 2):
        old = [norm.running_mean.clone(), norm.running_var.clone()]
        fast = [maml.adapt(x_s, y_s, steps=k) for k in range(3)]
        maml.update_statistics(x_s, y_s, x_q)
        moments: dict[int, list] = {0: [], 1: []}
        for t in range(3):
            for k in range(2):
                for at, x in ((k, x_s), (k + 1, x_q)):
                    z = x[t] @ fast[at]["0.weight"][t].T + fast[at]["0.bias"][t]
                    moments[k].append((z.mean(0), z.var(0)))
        share = 1 / update if momentum is None else momentum
        for got, was, which in ((norm.running_mean, old[0], 0), (norm.running_var, old[1], 1)):
            means = [torch.stack([m[which] for m in moments[k]]).mean(0) for k in range(2)]
            target = torch.stack(means) if per_step else torch.stack(means).mean(0)
            torch.testing.assert_close(got, (1 - share) * was + share * target)
        assert norm.num_batches_tracked.tolist() == ([update, update] if per_step else update)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not model[1]._forward_pre_hooks


def test_running_layers_stay_in_eval_mode(machine):
    maml, data, _ = make("conv", 2, batch_norm="running")
    assert maml.train() is maml
    norms = [m for m in maml.modules() if isinstance(m, nn.BatchNorm2d)]
    assert maml.model.training
    assert not any(m.training for m in norms)
    text = program_of(maml, data).text
    maml.update_statistics(data[0], data[1], data[2])
    assert not any(m.training for m in norms)
    assert program_of(maml, data).text == text
    assert "running_norm" in maml.explain()
    maml(*data).loss.backward()


def test_conversion():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, eps=0.01), nn.Flatten(), nn.BatchNorm1d(2, affine=False)
    )
    model[1].weight.data.fill_(3.0)
    model[1].bias.requires_grad_(False)
    model.eval()
    converted = convert_per_step(model, 3)
    assert converted is model
    norm = model[1]
    assert type(norm) is PerStepBatchNorm2d
    assert norm.weight.tolist() == [[3.0, 3.0]] * 3
    assert (norm.eps, norm.training, norm.bias.requires_grad) == (0.01, False, False)
    assert type(model[3]) is PerStepBatchNorm1d
    assert model[3].weight is None
    assert convert_per_step(model, 5)[1] is norm  # it is converted already
    assert type(convert_per_step(nn.BatchNorm1d(4), 2)) is PerStepBatchNorm1d
    shared = nn.BatchNorm1d(2)
    twice = convert_per_step(nn.Sequential(shared, nn.Linear(2, 2), shared), 2)
    assert twice[0] is twice[2]


@pytest.mark.parametrize("batch_norm", ["per_step", "running"])
def test_a_model_that_is_refused_stays_as_it_was(batch_norm):
    model = lone().half()
    norm = model[1]
    with pytest.raises(ValueError, match=r'backend="fused" cannot serve this model: the model is torch\.float16'):
        FusedMAML(model, 0.1, batch_norm=batch_norm, backend="fused")
    assert model[1] is norm
    assert norm.training


def test_per_step_parameters_are_not_adapted_by_default():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    maml = FusedMAML(model, dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), 0.1), 2, batch_norm="per_step")
    assert maml.model[1].weight.shape == (2, 4)
    x, y = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    assert "batch_norm" in maml.explain(x, y)
    fast = maml.adapt(x, y)
    assert fast["1.weight"].shape == (2, 2, 4)
    assert fast["1.weight"].stride(0) == 0


def lone() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class OwnNorm(nn.BatchNorm1d):
    pass


def hooked() -> nn.Module:
    model = lone()
    model[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        (lone, {"batch_norm": "eval"}, ValueError, "batch_norm must be one of transductive, per_step, running, got 'e"),
        (mlp, {"batch_norm": "per_step"}, ValueError, "batch_norm='per_step' must have a model with BatchNorm layers"),
        (mlp, {"batch_norm": "running"}, ValueError, "batch_norm='running' must have a model with BatchNorm layers"),
        (lambda: nn.Sequential(nn.Linear(3, 4), OwnNorm(4)), {"batch_norm": "per_step"}, ValueError,
         r"converts BatchNorm1d and BatchNorm2d, got 1 \(OwnNorm\)"),
        (hooked, {"batch_norm": "per_step"}, ValueError, r"would lose the hooks of 1 \(BatchNorm1d\)"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
         {"batch_norm": "running"}, ValueError, r"layers that track running statistics, got 1 \(BatchNorm1d\)"),
        (lone, {"batch_norm": "per_step", "adapt_params": ["0.weight", "1.bias"]}, ValueError,
         "must leave out the parameters of per-step BatchNorm layers, of which each step has its own, got 1.bias"),
        (lone, {"query_weights": [0.0, 1.0]}, ValueError,
         r"query_weights must hold 3 weights, of phi_0 to phi_2 \(inner_steps=2\), got 2"),
        (lone, {"query_weights": [0.0, -1.0, 1.0]}, ValueError, "finite, at least 0 and not all 0"),
        (lone, {"query_weights": [0.0, float("nan"), 1.0]}, ValueError, "finite, at least 0 and not all 0"),
        (lone, {"query_weights": [0.0, 0.0, 0.0]}, ValueError, "finite, at least 0 and not all 0"),
        (lone, {"query_weights": [0.0, "1", 1.0]}, TypeError, "query_weights must hold numbers, got str"),
        (lone, {"query_weights": 1.0}, TypeError, "query_weights must be a tensor or a sequence of numbers, got float"),
        (lone, {"query_weights": torch.ones(3, requires_grad=True)}, ValueError, "query_weights must not require grad"),
    ],
)  # fmt: skip
def test_bad_arguments(model, options, error, text):
    net = model()
    state = {n: t.shape for n, t in net.state_dict().items()}
    with pytest.raises(error, match=text):
        FusedMAML(net, 0.1, 2, **options)
    assert {n: t.shape for n, t in net.state_dict().items()} == state


def test_bad_calls():
    maml = FusedMAML(lone(), 0.1, 2)
    x, y = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    fast = maml.adapt(x, y)
    with pytest.raises(ValueError, match="slot must be at least 0, got -1"):
        maml.predict(fast, x, slot=-1)
    with pytest.raises(TypeError, match="slot must be an int or None, got float"):
        maml.predict(fast, x, slot=1.0)
    with pytest.raises(ValueError, match="update_statistics must have BatchNorm layers that track running statistics"):
        FusedMAML(mlp(), 0.1, 2).update_statistics(x, y, x)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        PerStepBatchNorm1d(3, 0)
    with pytest.raises(ValueError, match="PerStepBatchNorm2d must have an input of 4 axes, got 2"):
        PerStepBatchNorm2d(3, 1)(torch.randn(4, 3))
    maml.query_weights = [0.0, 0.5, 0.5]
    maml.inner_steps = 3
    with pytest.raises(ValueError, match="query_weights must hold 4 weights"):
        maml(x, y, x, y)
