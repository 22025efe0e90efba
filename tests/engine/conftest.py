"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from maml_cuda import FusedMAML


@pytest.fixture
def labels_at_once(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CUDA backend labels are checked before a call too (check_labels=True), as they always are on the CPU."""
    if machine != "cpu":
        monkeypatch.setitem(FusedMAML.__init__.__kwdefaults__, "check_labels", True)


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile with fullgraph=True; what it compiled is forgotten after the test."""
    torch._dynamo.reset()
    yield lambda f, backend="aot_eager", **given: torch.compile(f, fullgraph=True, backend=backend, **given)
    torch._dynamo.reset()
