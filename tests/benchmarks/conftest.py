"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.gpu import facts, machine, profile, timing


@pytest.fixture
def emulation() -> Iterator[None]:
    """CPU tensors go to the emulated CUDA kernels."""
    with machine.emulation():
        yield


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest possible measurements: these tests read what is reported, never a time."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "BURST", 1e-4)
    monkeypatch.setattr(facts, "REPEATS", 1)
    monkeypatch.setattr(profile, "STEPS", 1)
