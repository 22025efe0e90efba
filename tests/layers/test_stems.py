"""Every kind of layer has the same stem everywhere: its declaration, its file on each backend, its tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = re.findall(r"^  (\w+),$", (ROOT / "csrc" / "layers" / "kinds.h").read_text(encoding="utf-8"), re.MULTILINE)


def test_kinds_are_found() -> None:
    assert {"conv2d", "pointwise", "scale"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_files(kind: str) -> None:
    declaration = (ROOT / "csrc" / "layers" / f"{kind}.h").read_text(encoding="utf-8")
    assert f"struct Declaration<Kind::{kind}> {{" in declaration
    assert f'name = "{kind}";' in declaration
    on = dict(re.findall(r"\b(on_cpu|on_cuda) = (true|false)", declaration))
    assert (ROOT / "csrc" / "cpu" / f"{kind}.cpp").exists() == (on["on_cpu"] == "true")
    assert (ROOT / "csrc" / "cuda" / f"{kind}.cu").exists() == (on["on_cuda"] == "true")
    computes = "true" in on.values()  # a kind of neither backend is the memory of another value
    assert (ROOT / "tests" / "layers" / f"test_{kind}.py").exists() == computes
