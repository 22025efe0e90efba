from __future__ import annotations

import pytest

from maml_cuda.engine import cuda_runner
from tests.conftest import EMULATIONS


@pytest.fixture
def allow_precision(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the emulation use the precisions of a GPU, though its tensors are on the CPU."""
    if machine in EMULATIONS:
        monkeypatch.setattr(cuda_runner, "has_precisions", lambda _: True)
