"""Each model of the list: its meta-gradient against the oracle, what runs it, and the model afterwards."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from tests import oracle
from tests.conftest import assert_close, run
from tests.models.page import PAGE, maml_of, markdown, row, why_not
from tests.models.published import BUILT_PARTS, Published
from tests.models.zoo import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = pytest.mark.parametrize("published", [pytest.param(p, id=f"{p.name}-{p.part}") for p in MODELS.values()])
ON_GPU = ("cnn4", "siren_film", "vit")  # of today's layers and of part "a"


def described(value: Any) -> Any:
    """A value as data that can be compared: tensors by identity, shape and bytes, containers by what they hold."""
    if isinstance(value, Tensor):
        data = torch.view_as_real(value) if value.is_complex() else value
        return type(value), id(value), value.requires_grad, value.shape, data.detach().numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: described(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    return id(value) if isinstance(value, nn.Module) else repr(value)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that the modules of a model hold, by its name in the model."""
    state = {}
    for name, m in model.named_modules():
        for key, value in {**vars(m), **m._parameters, **m._buffers, **m._modules}.items():
            if key not in ("_parameters", "_buffers", "_modules"):
                state[f"{name}.{key}".lstrip(".")] = described(value)
    return state


def fake_tensors() -> set[int]:
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is FakeTensor}


def right(published: Published) -> str:
    """Checks a meta-step against the oracle, and that it leaves the model alone. Returns why it was not fused."""
    maml, data = maml_of(published), published.data()
    model = maml.model
    value, expected = oracle.meta_gradient(
        model, published.loss, *data, published.inner_lr, maml.inner_steps, adapted=published.adapted
    )
    before = state_of(model)
    loss, grads = run(maml, data)
    torch.testing.assert_close(loss, value, rtol=1e-11, atol=1e-13)
    assert_close(grads, expected, 1e-9)
    now = state_of(model)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    reason = why_not(maml)
    assert (maml.backend == "reference") == bool(reason)
    buffers = dict(model.named_buffers())
    assert changed == {name for name in published.moves if reason or name in buffers}
    return reason


@EVERY
@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
def test_a_published_model(published: Published) -> None:
    fakes = fake_tensors()
    reason = right(published)
    assert ("general" if reason else "fused") == published.backend, reason
    if "a" in BUILT_PARTS:  # before, something else may stand in the way first
        assert published.reason in reason
    assert fake_tensors() <= fakes
    assert row(published, reason) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("machine", ["cuda_emulated"], indirect=True)
@pytest.mark.parametrize("name", [name for name in ON_GPU if MODELS[name].part in BUILT_PARTS])
def test_on_a_gpu(machine: str, name: str) -> None:
    assert right(MODELS[name]) == ""


def test_the_page_is_of_the_list() -> None:
    """The test of each model looks at its row."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", text, flags=re.MULTILINE)
    assert markdown({name: reason.replace("\\|", "|") for name, reason in rows}) == text


def test_the_list() -> None:
    assert len(MODELS) >= 44
    assert {p.part for p in MODELS.values()} == {"today", "a", "b", "c", "never"}
    assert all(bool(p.reason) == (p.part == "never") for p in MODELS.values())
