"""The main loops of the matrix products in the machine code: `python -m benchmarks.gpu.loops`. It needs no GPU.

For each kernel of a product this counts the instructions that a warp executes in one pass of the main loop, when copies
are of 16 bytes, and derives a bound of the rate. A multiprocessor has four schedulers; each issues one instruction a
cycle. With c cycles for each multiply instruction on its scheduler,

    bound = multiprocessors * 4 * FLOP of the instruction * clock / c
    c     = max(unit, issue, shared)
    unit   = 6.4 for HMMA: m16n8k8 of tf32 and m16n8k16 of bf16 take 4 cycles at the peak of 495 and 989 TFLOP/s, and
             mma.sync reaches 62 % of it on Hopper (Luo et al. 2024, arXiv:2402.13499); 1 for FFMA
    issue  = instructions executed / multiply instructions
    shared = 512 bytes of each LDS.128 and of each copy into shared memory, at 128 bytes a cycle and multiprocessor:
             4 * 4 * (loads + copies) / multiply instructions

bf16x3 takes three multiply instructions for a product. The count of instructions is that of the longest path.

The products of csrc/cuda/conv2d_raster_gradients.cu are instructions of a warpgroup, which read their operands from
shared memory, and nothing else is in their loop. m64nNk16 of bf16 takes N / 2 cycles of a multiprocessor at the peak,
and at least the time of its operands, 2 KB and 32 N bytes, at 128 bytes a cycle. So N = 64 just reaches the peak, as
was measured (Luo et al.). Their copies take less than half of these cycles to issue, from another block at the same
time.
GAPS is the share of positions that are pixels (product/raster.h): 0.95 with images of 42 pixels a side, 0.77 with 7.

The model (model.py) expects `SHARE` of the bound, with the mean c of the products. The rest is lost to latencies,
barriers, and the first and last stages.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .model import markdown, tile_class
from .registers import ARCHITECTURE, machine_code
from .table import number

CLOCK = 1.7  # GHz, under load; the highest is 1.98
MULTIPROCESSORS = 132
HMMA_CYCLES = 4 / 0.62
# FlashAttention-2 reaches 35 % of the peak of an H100 with mma.sync, which is 0.56 of what mma.sync reaches alone.
SHARE = {"float32": 0.75, "tf32": 0.55, "bf16x3": 0.55, "bfloat16": 0.55}
FLOP = {"float32": 64, "tf32": 2048, "bf16x3": 4096 / 3, "bfloat16": 4096}  # of a multiply instruction
GAPS = 0.8
# (precision, channels of a tile) -> (N of the instructions, multiply-adds of the convolution that they compute
# together), of an input gradient and of a weight gradient.
WGMMA = {
    ("bf16x3", 32): (((64, 32), 64 * 32 * 16), ((64,), 32 * 32 * 16)),
    ("bf16x3", 64): (((64, 64, 64), 64 * 64 * 16), ((64, 64, 64), 64 * 64 * 16)),
    ("bfloat16", 32): (((32,), 64 * 32 * 16), ((32,), 32 * 32 * 16)),
    ("bfloat16", 64): (((64,), 64 * 64 * 16), ((64,), 64 * 64 * 16)),
}
PRECISIONS = {"SimtIfE": "float32", "Tf32Words": "tf32", "11Bf16x3Words": "bf16x3", "9Bf16Words": "bfloat16"}

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
MULTIPLY = re.compile(r"\b(HMMA|FFMA R\d+, R\d+(\.reuse)?, R\d+(\.reuse)?, R\d+)\b")  # FFMA with a constant rounds
# What the steady state of the loop does not execute: copies of single elements, and the change from the first term of a
# product to the second, which loads addresses and takes their region from the high byte.
RARE = re.compile(r"LDGSTS\.E(\.64)? \[|\bLDG\.|SHF\.R\.U32\.HI R\d+, RZ, 0x18")


@dataclass(frozen=True)
class Loop:
    """One pass of the main loop of a product, as a warp executes it."""

    kernel: str  # the mangled name
    precision: str
    tile: str  # "wide", "narrow" or "small"
    executed: Counter[str]

    @property
    def multiplies(self) -> int:
        return self.executed["multiply"]

    @property
    def issue(self) -> float:
        return sum(self.executed.values()) / self.multiplies

    @property
    def shared(self) -> float:
        return 16 * (self.executed["LDS.128"] + self.executed["LDGSTS.E.128"]) / self.multiplies

    @property
    def unit(self) -> float:
        return 1.0 if self.precision == "float32" else HMMA_CYCLES

    @property
    def cycles(self) -> float:
        """For each multiply instruction, on its scheduler."""
        return max(self.unit, self.issue, self.shared)


def bound(precision: str, cycles: float) -> float:
    """TFLOP/s of products whose multiply instructions take so many cycles each."""
    return MULTIPROCESSORS * 4 * FLOP[precision] * CLOCK / cycles / 1e3


def rates(found: Sequence[Loop]) -> dict[tuple[str, str], float]:
    """TFLOP/s that the model expects of each precision and tile."""
    cycles: dict[tuple[str, str], list[float]] = {}
    for loop in found:
        cycles.setdefault((loop.precision, loop.tile), []).append(loop.cycles)
    return {key: SHARE[key[0]] * bound(key[0], statistics.mean(of)) for key, of in cycles.items()}


def wgmma_rates() -> dict[tuple[str, int], float]:
    """TFLOP/s that the model expects of products by instructions of a warpgroup."""
    found = {}
    for key, products in WGMMA.items():
        cycles = [sum(max(n / 2, (2048 + 32 * n) / 128) for n in ns) / (2 * multiplies) for ns, multiplies in products]
        found[key] = SHARE[key[0]] * GAPS * MULTIPROCESSORS * CLOCK / statistics.mean(cycles) / 1e3
    return found


def loops(file: Path | None = None, architecture: str = ARCHITECTURE) -> list[Loop]:
    """The main loops in an object file, or in the installed library."""
    if file is None:
        from maml_cuda import _core

        file = Path(_core.__file__)
    return [loop for name, body in machine_code(file, architecture) for loop in loops_of(name, body)]


def loops_of(name: str, body: str) -> list[Loop]:
    """The main loops in the disassembly of a kernel, given by its mangled name; none if it is no product."""
    precision = next((p for word, p in PRECISIONS.items() if word in name), "")
    tile = re.search(r"4TileI((?:Li\d+E){6})E", name)
    if not precision or not tile:
        return []
    numbers = ", ".join(re.findall(r"Li(\d+)E", tile[1]))
    code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(body)]
    return [Loop(name, precision, tile_class(numbers), pass_) for pass_ in passes(code)]


def branch(instruction: str) -> int | None:
    """Where a branch goes."""
    to = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
    return int(to[1], 16) if to else None


def passes(code: list[tuple[int, str]]) -> Iterator[Counter[str]]:
    """The instructions executed in one pass of each loop that multiplies, its longest path without rare blocks."""
    backward = [(to, at) for at, text in code if (to := branch(text)) is not None and to < at]
    taken: list[tuple[int, int]] = []
    for first, last in sorted(backward, key=lambda loop: loop[1] - loop[0]):
        inside = [(at, text) for at, text in code if first <= at <= last]
        if sum(bool(MULTIPLY.search(text)) for _, text in inside) < 8:
            continue
        if not any("LDGSTS" in text for _, text in inside):  # such as the statistics of the output
            continue
        if any(first <= other <= last for other, _ in taken):
            continue
        taken.append((first, last))
        path = longest_path(inside)
        yield Counter("multiply" if MULTIPLY.search(text) else operation(text) for text in path)


def operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def longest_path(loop: list[tuple[int, str]]) -> list[str]:
    step, last = loop[1][0] - loop[0][0], loop[-1][0]
    starts = {loop[0][0]}
    for at, text in loop:
        if (to := branch(text)) is not None:
            starts |= {to, at + step}
    blocks: dict[int, list[tuple[int, str]]] = {}
    for at, text in loop:
        if at in starts:
            block = blocks[at] = []
        block.append((at, text))
    longest: dict[int, list[str]] = {}
    for start, block in sorted(blocks.items(), reverse=True):  # branches back are of inner loops, which end the path
        texts = [text for _, text in block]
        at, text = block[-1]
        if any(RARE.search(text) for text in texts):
            continue
        if at == last:
            longest[start] = texts
            continue
        to = branch(text)
        conditional = to is None or re.search(r"^@|BRA\S*\s+!?U?P\d", text)
        after = [n for n in (to, at + step if conditional else None) if n is not None]
        known = [longest[n] for n in after if n > start and n in longest]
        if known:
            longest[start] = texts + max(known, key=len)
    return longest[loop[0][0]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.loops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="object files (default: the library)")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    found = [loop for file in options.files or [None] for loop in loops(file, options.architecture)]
    rows = [
        [
            re.findall(r"([a-z_]+_kernel)I", loop.kernel)[-1], loop.precision, loop.tile, str(loop.multiplies),
            *map(number, (loop.issue, loop.shared, bound(loop.precision, loop.cycles))),
        ]
        for loop in found
    ]  # fmt: skip
    print(markdown(("product", "precision", "tile", "multiplies", "issue", "shared", "bound, TFLOP/s"), rows))
    print()
    expected = [[*key, number(rate)] for key, rate in rates(found).items()]
    expected += [[precision, f"wgmma {width}", number(rate)] for (precision, width), rate in wgmma_rates().items()]
    print(markdown(("precision", "tile", "expected, TFLOP/s"), expected))


if __name__ == "__main__":
    main()
