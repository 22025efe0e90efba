"""The machine code of the kernels in the installed library. Needs cuobjdump and nvdisasm, but no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.gpu.loops import Loop, loops_of, rates
from benchmarks.gpu.model import C
from benchmarks.gpu.registers import ARCHITECTURE, dump, machine_code, tool
from maml_cuda import _core

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
# They use local memory for the arguments of printf, only when an assertion fails.
PRINTS = ("loss", "megakernel", "small_mlp", "small_run_kernel", "chunk_kernel")

FUNCTIONS = re.findall(
    r"^  (\w+),$", (Path(__file__).parents[2] / "csrc/layers/functions.h").read_text(encoding="utf-8"), re.MULTILINE
)
# Kernels that use local memory: sin for large arguments, the interpreter of a map's expression, and the adjoint of
# windows, which is plain so far.
SIN = f"FunctionE{FUNCTIONS.index('sin')}E"
INTERPRETER = "_map_cu_"  # of the file's internal names
LOCAL_MEMORY = (SIN, INTERPRETER, "windows_transposed_kernel")

needs_kernels = pytest.mark.skipif(_core.cuda is None, reason="this build has no CUDA kernels")
needs_tool = pytest.mark.skipif(not tool(), reason="there is no cuobjdump")
each_architecture = pytest.mark.parametrize("architecture", _core.cuda_architectures.split() or ["none"])
pytestmark = needs_kernels

LIBRARY = Path(str(_core.__file__))


class Code(NamedTuple):
    kernels: dict[str, Counter[str]]  # mangled name -> how often each instruction occurs
    loops: list[Loop]


@cache
def code_for(architecture: str) -> Code:
    """Disassembled once for all tests: that takes a minute, and half a gigabyte of text."""
    code = Code({}, [])
    for name, body in machine_code(LIBRARY, f"sm_{architecture}"):
        if "raster_gradients" in name:  # of sm_90a, which is listed with sm_90
            continue
        code.kernels[name] = Counter(INSTRUCTION.findall(body))
        code.loops.extend(loops_of(name, body))
    return code


def kernels_with(architecture: str, *words: str) -> dict[str, Counter[str]]:
    found = {name: code for name, code in code_for(architecture).kernels.items() if all(word in name for word in words)}
    assert found, f"no kernel of {words}"
    return found


@needs_tool
@each_architecture
def test_nothing_spills(architecture: str) -> None:
    usage = dump(LIBRARY, "-arch", f"sm_{architecture}", "-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(found) > 100
    for name, registers, stack, shared, local in found:
        assert int(local) == 0, name
        assert int(stack) == 0 or any(word in name for word in (*PRINTS, *LOCAL_MEMORY)), name
        assert int(registers) <= 255, name
        assert int(shared) <= 48 * 1024, name


@needs_tool
@each_architecture
def test_no_hot_loop_touches_local_memory(architecture: str) -> None:
    for name, code in code_for(architecture).kernels.items():
        if any(word in name for word in LOCAL_MEMORY):
            continue
        loads = [i for i in code if i.startswith("LDL")]
        stores = [i for i in code if i.startswith("STL")]
        assert not loads, name
        assert not stores or any(word in name for word in PRINTS), name


@needs_tool
@each_architecture
@pytest.mark.parametrize(
    "product",
    [
        "forward_kernel",
        "gradients_kernel",
        "contraction_kernel",
        "stem_forward_kernel",
        "stem_backward_kernel",
    ],
)
@pytest.mark.parametrize(
    ("arithmetic", "instruction"),
    [
        ("4SimtIfE", "FFMA"),
        ("4SimtIdE", "DFMA"),
        ("9Tf32Words", "HMMA.1688.F32.TF32"),
        ("9Bf16Words", "HMMA.16816.F32.BF16"),
        ("11Bf16x3Words", "HMMA.16816.F32.BF16"),
    ],
)
def test_products_use_the_units_of_their_precision(
    architecture: str, product: str, arithmetic: str, instruction: str
) -> None:
    for name, code in kernels_with(architecture, product, arithmetic).items():
        assert code[instruction] >= 8, f"{name}: {code[instruction]}"
        matrix = sum(count for i, count in code.items() if i.startswith("HMMA"))
        assert matrix == (code[instruction] if instruction.startswith("HMMA") else 0), name
        assert code["LDGSTS.E.BYPASS.128"] + code["LDGSTS.E.128"] > 0, f"{name}: no copies of 16 bytes"
        assert code["LDS.128"] > 0, f"{name}: no shared loads of 16 bytes"


@needs_tool
@each_architecture
@pytest.mark.parametrize(
    "kernel",
    [
        "normalise_forward_kernel",
        "normalise_backward_kernel",
        "normalise_forward_tangent_kernel",
        "normalise_backward_tangent_kernel",
        "moments_kernel",
        "running_norm_forward",
        "running_norm_backward",
        "mean_of_all_kernel",
        "spread_over_all_kernel",
        "max_pool_cu",
        "avg_pool_cu",
        "pointwise_cu",
        "scale_kernel",
        "_add_cu_",
        "descend_kernel",
        "direction_kernel",
        "retreat_kernel",
        "add_weighted_kernel",
        "pull_kernel",
        "copy_kernel",
    ],
)
def test_kernels_without_products_move_16_bytes_at_a_time(architecture: str, kernel: str) -> None:
    for name, code in kernels_with(architecture, kernel).items():
        if "gather_kernel" not in name:  # the values at the places of a max-pool are not neighbours
            assert code["LDG.E.128"] + code["LDG.E.128.CONSTANT"] > 0, f"{name}: no loads of 16 bytes"
        assert code["STG.E.128"] > 0, f"{name}: no stores of 16 bytes"
        assert code["ST.E.128"] + code["ST.E"] == 0, f"{name}: stores that may be to shared memory"


# The most instructions for each multiply instruction in the main loop of a product: wide, narrow and small tiles.
MOST_ISSUED = {
    "float32": (1.4, 1.8, 1.8), "tf32": (8, 13.5, 23), "bf16x3": (6.5, 10.5, 17.5), "bfloat16": (12, 21.5, 39),
}  # fmt: skip


@needs_tool
@each_architecture
def test_the_main_loops_of_products_issue_few_instructions(architecture: str) -> None:
    found = code_for(architecture).loops
    assert {(loop.precision, loop.tile) for loop in found} == {
        (precision, tile) for precision in MOST_ISSUED for tile in ("wide", "narrow", "small")
    }
    for loop in found:
        most = dict(zip(("wide", "narrow", "small"), MOST_ISSUED[loop.precision], strict=True))[loop.tile]
        assert loop.issue <= most, f"{loop.kernel}: {loop.issue:.2f} for each of {loop.multiplies}"


@needs_tool
def test_the_model_has_the_rates_that_follow_from_the_machine_code() -> None:
    for (precision, tile), rate in rates(code_for(ARCHITECTURE.removeprefix("sm_")).loops).items():
        assert C[f"rate {precision} {tile}"].value == pytest.approx(rate, rel=0.1), (precision, tile)


@needs_tool
@each_architecture
@pytest.mark.parametrize(
    ("unit", "instruction"),
    [
        ("8SimtUnitIf", "FFMA"),
        ("8SimtUnitId", "DFMA"),
        ("9Tf32Words", "HMMA.1688.F32.TF32"),
        ("9Bf16Words", "HMMA.16816.F32.BF16"),
        ("11Bf16x3Words", "HMMA.16816.F32.BF16"),
    ],
)
def test_chunks_use_the_units_of_their_precision(architecture: str, unit: str, instruction: str) -> None:
    found = kernels_with(architecture, "chunk_kernel", unit)
    assert len(found) == 3  # passes
    for name, code in found.items():
        assert code[instruction] >= 16, f"{name}: {code[instruction]}"
        matrix = sum(count for i, count in code.items() if i.startswith("HMMA"))
        assert matrix == (code[instruction] if instruction.startswith("HMMA") else 0), name
        assert code["LDS.128"] >= 16, f"{name}: {code['LDS.128']} shared loads of 16 bytes"


@needs_tool
@pytest.mark.skipif("90" not in _core.cuda_architectures.split(), reason="this build has no kernels for sm_90a")
def test_products_of_a_warpgroup_are_matrix_instructions_alone() -> None:
    """Two blocks of 384 threads fit a multiprocessor; operands come by 16-byte loads and go to 16-byte stores."""
    usage = dump(LIBRARY, "-arch", "sm_90a", "-res-usage")
    found = re.findall(r"Function (\S*raster_gradients\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(found) == 4  # two precisions, two numbers of channels
    for name, registers, stack, local in found:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 80, name
    for name, body in machine_code(LIBRARY, "sm_90a", [name for name, *_ in found]):
        code = Counter(INSTRUCTION.findall(body))
        products = re.findall(r"HGMMA\.(\w+)\.F32\.BF16", body)
        expected = {"64x64x16"} if "Li64E" in name else {"64x32x16"}
        assert set(products) == expected | ({"64x64x16"} if "Bf16x3" in name else set()), name
        assert len(products) >= 4, name
        assert not [i for i in code if i.startswith(("HMMA", "LDL", "STL", "LDGSTS"))], name
        assert code["STS.128"] >= 8, name
        assert code["LDG.E.128"] >= 16, name


@needs_tool
@each_architecture
@pytest.mark.parametrize(("scalar", "multiply"), [("f", "FFMA"), ("d", "DFMA")])
def test_small_perceptrons_load_vectors(architecture: str, scalar: str, multiply: str) -> None:
    for name, code in kernels_with(architecture, f"small_mlpI{scalar}E").items():
        assert code["LDS.128"] >= 20, name
        assert code[multiply] >= 200, name
        assert code["LDGSTS.E" if scalar == "f" else "LDGSTS.E.64"] > 0, f"{name}: no asynchronous copies"


def test_the_library_exports_only_the_module_and_imports_nothing_of_cuda() -> None:
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    lines = subprocess.run(
        ["nm", "-D", str(_core.__file__)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    symbols = [line.split()[-2:] for line in lines]
    defined = [name for kind, name in symbols if kind in "TDB"]
    assert defined == ["PyInit__core"]
    undefined = [name for kind, name in symbols if kind == "U"]
    assert not [name for name in undefined if re.match(r"cuda[A-Z]|cu[A-Z]|_ZN.*(torch|c10)", name)]
