"""Random programs on tensors of any shape, against the float64 oracle: fused, or refused in words, and never wrong.

MAML_CUDA_FUZZ sets the number of programs, of which a third is run here. A failure prints the module.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from maml_cuda import FusedMAML
from tests import oracle
from tests.conftest import relative_errors, run
from tests.engine.random_programs import RandomProgram, random_program
from tests.models.published import BUILT_PARTS

CASES = int(os.environ.get("MAML_CUDA_FUZZ", "300")) // 3
ON_A_GPU = CASES // 20
FUSED = 0.8 if "a" in BUILT_PARTS else 0.0  # the share at least


def check(program: RandomProgram) -> str:
    """Compares a meta-step with the oracle. Returns why the program was not fused, or ""."""
    given = program.model, program.loss, *program.data, program.inner_lr, program.steps, program.first_order
    value, expected = oracle.meta_gradient(*given, program.adapted)
    maml = FusedMAML(
        program.model, program.inner_lr, program.steps, loss=program.loss, first_order=program.first_order,
        adapt_params=program.adapted,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "maml_cuda runs this model on the general path")
        loss, grads = run(maml, program.data)
    torch.testing.assert_close(loss, value, rtol=1e-10, atol=1e-12)
    errors = relative_errors({name: grads[name] for name in expected}, expected)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-9, f"{worst}: relative error {errors[worst]:.2e}"
    assert not any(grads[name].any() for name in grads.keys() - expected.keys())
    _, _, reason = maml.explain().partition("\n")[0].partition(", because ")
    assert (maml.backend == "reference") == bool(reason)
    return reason


def checked(seed: int) -> str:
    program = random_program(seed)
    try:
        return check(program)
    except Exception as error:
        raise AssertionError(f"{error}\n\n{program.source}") from error


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("machine", "cases"), [("cpu", CASES), ("cuda_emulated", ON_A_GPU)], indirect=["machine"])
def test_random_programs(machine: str, cases: int) -> None:
    refusals = [reason for seed in range(cases) if (reason := checked(seed))]
    assert len(refusals) <= (1 - FUSED) * cases, "\n".join(sorted(refusals))


def test_a_seed_is_one_program() -> None:
    sources = [random_program(seed).source for seed in (0, 1, 0)]
    assert sources[0] == sources[2] != sources[1]
