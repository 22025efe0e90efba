"""Messages to users: the line a warning points to, explain() for given samples, hints in errors about shapes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, gradcheck

SERIES = "logcumsumexp in 0 (LogSumsSoFar): no fused layer serves it (logcumsumexp)"  # as of `series`
GENERAL = "ignore:maml_cuda runs this model on the general path:UserWarning"


class LogSumsSoFar(nn.Linear):
    """Of series [n, steps, features]; it is fused for samples [features] alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.logcumsumexp(1) if x.dim() > 2 else x)


def net() -> nn.Sequential:
    return nn.Sequential(LogSumsSoFar(4, 5), nn.Tanh(), nn.Linear(5, 3))


def series() -> list[Tensor]:
    """Samples [6 steps, 4 features], on which the net is not fused."""
    x, y = torch.randn(2, 2, 5, 6, 4), torch.randn(2, 2, 5, 6, 3)
    return [x[0], y[0], x[1], y[1]]


# -- warnings ------------------------------------------------------------------------------------------------


def without_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()


def fast_of(maml: FusedMAML) -> dict[str, Tensor]:
    return {n: p.detach().expand(2, *p.shape) for n, p in maml.model.named_parameters()}


CALLS: dict[str, Callable[[FusedMAML, list[Tensor]], object]] = {
    "call": lambda maml, data: maml(*data),
    "backward": lambda maml, data: maml.backward(*data),
    "adapt": lambda maml, data: maml.adapt(*data[:2]),
    "inner_loop": lambda maml, data: list(maml.inner_loop(*data[:2], 1)),
    "predict": lambda maml, data: maml.predict(fast_of(maml), data[2]),
    "loss_and_grad": lambda maml, data: maml.loss_and_grad(fast_of(maml), *data[:2]),
    "hvp": lambda maml, data: maml.hvp(fast_of(maml), *data[:2], fast_of(maml)),
    "in a module": lambda maml, data: nn.Sequential(maml.double())[0](*[t.double() for t in data]),
    "gradcheck": lambda maml, data: gradcheck(maml, *data),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_warning_of_a_call_points_at_the_line_of_the_user(case: str) -> None:
    maml = FusedMAML(net(), 0.1, loss="mse")
    with pytest.warns(UserWarning, match="general path.*one task at a time by plain autograd, because") as caught:
        CALLS[case](maml, series())
    assert caught[0].filename == __file__
    assert caught[0].lineno == inspect.getsourcelines(CALLS[case])[1]


@pytest.mark.parametrize("model", [net().half(), without_statistics()])
def test_a_warning_of_the_constructor_points_at_the_line_of_the_user(model: nn.Module) -> None:
    def make() -> FusedMAML:
        return FusedMAML(model, 0.1)

    with pytest.warns(UserWarning, match="general path|running statistics that no batch has updated") as caught:
        make()
    assert caught[0].filename == __file__
    assert caught[0].lineno == inspect.getsourcelines(make)[1] + 1


# -- explain -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("machine")
def test_explain_answers_for_samples_beforehand() -> None:
    maml = FusedMAML(net(), 0.1, loss="mse")
    fits = torch.randn(2, 5, 4)
    x, y = series()[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert "linear" in maml.explain(fits)
            assert "explain(x, y)" not in maml.explain(fits)
            assert "explain(x, y)" in maml.explain()
            for table in (maml.explain(x), maml.explain(x, y)):
                assert table.startswith(f"backend: reference, because {SERIES}")
                assert "linear" not in table.replace("Linear", "")
            assert "cannot be captured: 'dict' object has no attribute" in maml.explain({"x": x})
        assert maml.backend != "reference"
    with pytest.warns(UserWarning, match="general path"):
        maml.adapt(x, y)
    assert "linear" not in maml.explain().replace("Linear", "")
    assert "linear" in maml.explain(fits)


@pytest.mark.usefixtures("machine")
def test_explain_of_what_runs_by_name() -> None:
    x = series()[0]
    assert f"backend: reference, because {SERIES}" in FusedMAML(net(), 0.1, backend="fused").explain(x)
    assert FusedMAML(net(), 0.1, backend="reference").explain(x).startswith("backend: reference\n")


@pytest.mark.usefixtures("machine")
def test_explain_refuses_what_a_call_refuses() -> None:
    maml = FusedMAML(net(), 0.1, loss="mse")
    with pytest.raises(
        ValueError, match=r"x must have samples .*got \[3\], 5 a task: linear in 0 \(LogSumsSoFar\): .*\[4, 5\]"
    ):
        maml.explain(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="y must have 5 samples a task like x, got 4"):
        maml.explain(torch.randn(2, 5, 4), torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match=r"x must have shape \[tasks, samples, \.\.\.\], got \[4\]"):
        maml.explain(torch.randn(4))


# -- a forgotten axis ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(GENERAL)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_forgotten_axis_of_tasks_is_asked_for(backend: str) -> None:
    regression = FusedMAML(net(), 0.1, loss="mse", backend=backend)
    classes = FusedMAML(net(), 0.1, backend=backend)
    labels = torch.randint(3, (7,))
    both = r"if these are 7 .* of one task, the axis of tasks is missing: x_spt\.unsqueeze\(0\), y_spt\.unsqueeze\(0\)"
    with pytest.raises(ValueError, match=f"y_spt must have 24 samples a task like x_spt, got 1; {both}"):
        regression.adapt(torch.randn(7, 24, 4), torch.randn(7, 1))
    with pytest.raises(ValueError, match=f"y_spt must have 24 samples a task like x_spt, got none; {both}"):
        classes.adapt(torch.randn(7, 24, 4), labels)
    with pytest.raises(ValueError, match=r"x_spt must have .*got \[7, 4\].*x_spt\.unsqueeze\(0\)|" + both):
        classes.adapt(torch.randn(7, 4), labels)
    alone = r"x_spt must have shape \[tasks, samples, \.\.\.\], got \[7, 24, 4\], without the axis of tasks of y_spt"
    with pytest.raises(ValueError, match=rf"{alone} \[1, 7, 1\]: x_spt\.unsqueeze\(0\)"):
        regression.adapt(torch.randn(7, 24, 4), torch.randn(1, 7, 1))
    with pytest.raises(ValueError, match=rf"{alone} \[1, 7\]: x_spt\.unsqueeze\(0\)"):
        classes.adapt(torch.randn(7, 24, 4), labels[None])
    with pytest.raises(ValueError, match=r"x must have shape.*got \[7, 4\].*x\.unsqueeze\(0\)"):
        classes.predict({n: p.expand(7, *p.shape) for n, p in classes.model.named_parameters()}, torch.randn(7, 4))


# -- queries one by one --------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("batch_norm", ["transductive", "per_step"])
def test_one_query_under_batch_statistics_warns_once(batch_norm: str, backend: str) -> None:
    maml = FusedMAML(normed(), 0.1, batch_norm=batch_norm, backend=backend)
    fast, x = fast_of(maml), torch.randn(2, 4, 1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = maml.predict(fast, x)
    text = r'one query sample a task, which 1 \(.*BatchNorm2d\) normalises by its own.*chance.*batch_norm="running"'
    with pytest.warns(UserWarning, match=text) as caught:
        one, _ = maml.predict(fast, x[:, :1]), maml.predict(fast, x[:, 1:2])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not torch.allclose(one, together[:, :1], rtol=0.01)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_one_query_under_running_statistics_is_like_any_other(backend: str) -> None:
    model = normed()
    model[1].num_batches_tracked += 1
    maml = FusedMAML(model, 0.1, batch_norm="running", backend=backend)
    fast, x = fast_of(maml), torch.randn(2, 4, 1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = maml.predict(fast, x[:, :1])
    torch.testing.assert_close(one, maml.predict(fast, x)[:, :1])
