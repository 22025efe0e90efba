"""What the performance model of the CUDA backend takes from the kernels in the library, where cuobjdump can read it."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.gpu import model, registers
from benchmarks.gpu.model import C

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_usage = pytest.mark.skipif(not registers.usage(), reason="no kernels in this build, or no cuobjdump")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    model.main(["sinusoid-k1 T=25", "omniglot T=4", "--precision", "tf32", "--launches"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == f"| {' | '.join(model.COLUMNS)} |"
    assert [line.split(" | ")[3] for line in lines[2:4]] == ["megakernel", "batched"]
    assert sum(line.startswith("| `") for line in lines) == sum(int(line.split(" | ")[4]) for line in lines[2:4])
    assert ("No registers: " in text) == (not registers.usage())
    model.main(["--constants"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(C)
    assert {row.split(" | ")[2] for row in rows} <= {"derived", "estimated", "measured", "sm_90"}
    with pytest.raises(SystemExit):
        model.main(["omniglot T=5"])
    assert "META-STEP must be of sinusoid-k1 T=25; " in capsys.readouterr().err


@needs_usage
def test_every_launched_kernel_is_in_the_library() -> None:
    for precision in model.PRECISIONS:
        for name in ("sinusoid-k5 T=25", "omniglot T=4", "mini-imagenet T=4"):
            step = model.meta_step(model.STEPS[name], precision)
            assert [found.kernel for found in step.launches if not found.registers] == []


@needs_usage
def test_the_emulation_counts_shared_memory_as_the_compiler_does() -> None:
    """For kernels with dynamic shared memory, so that the emulation enforces the limits of a GPU."""
    found = []
    for name in ("sinusoid-k1 T=25", "omniglot T=4", "mini-imagenet T=4"):
        _, launches = model.logged_launches(model.STEPS[name], "tf32", False)
        found += [launch for launch in launches if launch["dynamic_shared"]]
    assert {"small_mlp", "gradients_kernel"} <= {
        launch["kernel"].partition("<")[0].rpartition("::")[2] for launch in found
    }
    for launch in found:
        assert registers.usage()[launch["kernel"]].shared == launch["static_shared"], launch["kernel"]


@needs_usage
def test_shared_memory_of_kernels_is_what_they_declare() -> None:
    """The memory that the system reserves per block is a constant of the model and must not be counted twice."""
    shared = {name: used.shared for name, used in registers.usage().items()}
    assert {bytes_ for name, bytes_ in shared.items() if "::patch_gram_kernel<float>" in name} == {33408}
    assert {bytes_ for name, bytes_ in shared.items() if "::copy_kernel<float>" in name} == {0}
