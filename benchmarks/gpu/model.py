"""Predicts the time of a meta-step on a GPU without a GPU: `python -m benchmarks.gpu.model`.

The library plans a warm meta-step as for a GPU, and the emulation (tests/emulated.py) logs the launches without running
them: kernel, grid, threads, shared memory, and the FLOP and bytes counted by csrc/cuda/run/work.h. Register counts are
those of the compiled library. The time follows from the constants below:

    time of a launch = gap + latency + max(FLOP time, bytes time)    (a smaller gap where it may start early)
    bytes time       = bytes / bandwidth
    FLOP time        = FLOP / (multiprocessors * speed(b)),   b = blocks / (waves * multiprocessors)
    speed(b)         = rate / multiprocessors * (lone b                              for b <= 1,
                                                 lone + (1 - lone) (b - 1) / (resident - 1) for b > 1)

`resident` blocks fit on a multiprocessor, and b is their average number there. So the formula includes grids that do
not fill the GPU and incomplete last waves. The time of a meta-step is the sum over its launches. Launches on a parallel
branch of its CUDA graph count only if the branch takes longer than the rest. The megakernel takes the time of its
instructions plus that of the products in one block. So does a run of small layers, whose instructions wait for device
memory, and whose bytes all go through one multiprocessor, but for those of a first instruction that several blocks
share. A convolution whose last blocks go on alone takes longer by one such instruction with their bytes. The kernel of
small perceptrons takes, in each wave of b blocks a multiprocessor, the longer of

    phases * phase + cycles    of a block alone: its barriers, and the cycles of its longest thread or of its loads
    b * busy cycles            of all blocks: the loads of shared memory, or the instructions of all warps

which csrc/cuda/run/small_mlp_work.h counts phase by phase from the loops of the compiled kernel.

A prediction is not a measurement. It shows where the time should go, and what a change should gain.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..workloads import WORKLOADS, Workload
from .machine import emulated_log
from .registers import RESERVED, Usage, usage
from .table import number, short

PRECISIONS = ("float32", "bf16x3", "tf32", "bfloat16")


@dataclass(frozen=True)
class Constant:
    value: float
    unit: str
    source: str  # "estimated", "derived" (loops.py), "measured", or "sm_90": specified by the architecture
    what: str


C = {
    "multiprocessors": Constant(132, "", "sm_90", "of an H100 SXM or H200"),
    "threads": Constant(2048, "", "sm_90", "resident on a multiprocessor"),
    "blocks": Constant(32, "", "sm_90", "resident on a multiprocessor"),
    "registers": Constant(65536, "", "sm_90", "of a multiprocessor, allocated per warp in units of 256"),
    "shared memory": Constant(233472, "bytes", "sm_90", "of a multiprocessor"),
    "reserved shared memory": Constant(RESERVED, "bytes", "sm_90", "reserved by the system per block"),
    "gap": Constant(1.0, "us", "estimated", "between two dependent nodes of a graph, without their work"),
    "early gap": Constant(0.4, "us", "estimated", "the same with programmatic dependent launch: blocks wait already"),
    "latency": Constant(1.4, "us", "estimated", "of a kernel with almost no work, whose arguments hold the addresses"),
    "bandwidth": Constant(3.0, "TB/s", "estimated", "16-byte accesses, 16 KB in flight on each multiprocessor"),
    "lone": Constant(0.45, "", "estimated", "share of the rate of a multiprocessor that a single block reaches"),
    "instruction": Constant(0.5, "us", "estimated", "of the megakernel, without its products"),
    "clock": Constant(1.7, "GHz", "estimated", "of a multiprocessor"),
    "phase": Constant(60, "cycles", "estimated", "a barrier of the kernel of small perceptrons, and what follows it"),
    "rate of the megakernel": Constant(0.1, "TFLOP/s", "estimated", "of one block"),
    "small instruction": Constant(
        0.8, "us", "estimated", "of a run of small layers: two waits for L2, a sum, barriers"
    ),
    "bandwidth of a block": Constant(0.025, "TB/s", "estimated", "256 threads, four loads in flight, 0.35 us to L2"),
    "rate float32 small": Constant(25, "TFLOP/s", "derived", "products of 32 x 32 tiles, four slices of k"),
    "rate float32 narrow": Constant(25, "TFLOP/s", "derived", "products of at most 32 columns"),
    "rate float32 wide": Constant(34, "TFLOP/s", "derived", "products of 64 x 64 tiles; 128 x 64 with matrix units"),
    "rate tf32 small": Constant(57, "TFLOP/s", "derived", ""),
    "rate tf32 narrow": Constant(87, "TFLOP/s", "derived", ""),
    "rate tf32 wide": Constant(141, "TFLOP/s", "derived", ""),
    "rate bf16x3 small": Constant(50, "TFLOP/s", "derived", ""),
    "rate bf16x3 narrow": Constant(79, "TFLOP/s", "derived", ""),
    "rate bf16x3 wide": Constant(104, "TFLOP/s", "derived", ""),
    "rate bfloat16 small": Constant(61, "TFLOP/s", "derived", ""),
    "rate bfloat16 narrow": Constant(92, "TFLOP/s", "derived", ""),
    "rate bfloat16 wide": Constant(144, "TFLOP/s", "derived", ""),
    "rate bf16x3 wgmma 32": Constant(108, "TFLOP/s", "derived", "gradients of 3 x 3 convolutions, 32 channels"),
    "rate bf16x3 wgmma 64": Constant(135, "TFLOP/s", "derived", "the same, multiples of 64 channels"),
    "rate bfloat16 wgmma 32": Constant(180, "TFLOP/s", "derived", ""),
    "rate bfloat16 wgmma 64": Constant(404, "TFLOP/s", "derived", ""),
    # A block of the chunked executor has a multiprocessor to itself, so these are rates of single blocks, without the
    # share `lone`. tf32: shared memory feeds 341 multiply-adds a clock (product/shared_matrix.h), 158 TFLOP/s; 55 % of
    # them are those of 2-100-100-2, the rest fills up units; the functions, the narrow layers and the barriers, between
    # which nothing overlaps, take another 40 %. bf16x3 issues half more instructions. float32: shared memory feeds 64
    # multiply-adds a clock, of which 63 % are the net's.
    "rate float32 chunk": Constant(15, "TFLOP/s", "estimated", "an MLP's pass in one kernel (csrc/cuda/run/chunk.h)"),
    "rate tf32 chunk": Constant(50, "TFLOP/s", "estimated", ""),
    "rate bf16x3 chunk": Constant(45, "TFLOP/s", "estimated", ""),
    "rate bfloat16 chunk": Constant(50, "TFLOP/s", "estimated", ""),
}

# The workloads with targets (table.py), variants with more shots or tasks, and two of layers on tensors of any shape.
STEPS: dict[str, Workload] = {
    f"{workload.name} T={workload.tasks}": workload
    for workload in (
        WORKLOADS["sinusoid-k1"],
        WORKLOADS["sinusoid-k5"],
        WORKLOADS["policy"],
        WORKLOADS["omniglot"],
        dataclasses.replace(WORKLOADS["omniglot"], tasks=32),
        dataclasses.replace(WORKLOADS["omniglot"], name="omniglot-5shot", tasks=32, support=25),
        WORKLOADS["mini-imagenet"],
        dataclasses.replace(WORKLOADS["mini-imagenet"], tasks=32),
        dataclasses.replace(WORKLOADS["mini-imagenet-5shot"], tasks=4),
        WORKLOADS["lstm"],
        WORKLOADS["transformer"],
    )
}


def tile_class(numbers: str) -> str:
    """The name that csrc/cuda/conv2d.h gives to Tile<numbers>: warp m, warp n, warps m, warps n, slices, stages."""
    _, warp_n, _, warps_n, slices, _ = map(int, numbers.split(", "))
    return "small" if slices == 4 else "narrow" if warp_n * warps_n <= 32 else "wide"


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a meta-step. FLOP and bytes are those of the whole grid."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes, static and dynamic
    branch: bool
    flop: float
    bytes: float
    instructions: int
    registers: int | None
    early: bool = False  # by programmatic dependent launch
    phases: int = 0  # of the kernel of small perceptrons, with the cycles of one block
    cycles: float = 0.0
    busy_cycles: float = 0.0
    # Of a run of small layers: the bytes that all blocks of a task share. Of a product: the bytes that the last block
    # of a column of tiles moves after it, for the normalisation that follows.
    part_bytes: float = 0.0

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def resident(self) -> int:
        """Blocks that fit on one multiprocessor."""
        limits = [C["blocks"].value, C["threads"].value // (32 * math.ceil(self.threads / 32))]
        limits.append(C["shared memory"].value // (self.shared + C["reserved shared memory"].value))
        if self.registers:
            of_a_warp = 256 * math.ceil(self.registers * 32 / 256)
            limits.append(C["registers"].value // of_a_warp // math.ceil(self.threads / 32))
        return max(1, int(min(limits)))

    @property
    def waves(self) -> int:
        return math.ceil(self.blocks / (self.resident * C["multiprocessors"].value))

    @property
    def tile(self) -> str:
        """The tile class of a matrix product; "" for other kernels. A stem has the 32 columns of narrow tiles."""
        if "chunk_kernel" in self.kernel:
            return "chunk"
        if "::stem_" in self.kernel:
            return "narrow"
        if wgmma := re.search(r"::raster_gradients_kernel<.*, (\d+)>", self.kernel):
            return f"wgmma {wgmma[1]}"
        found = re.search(r"Tile<(\d+(?:, \d+){5})>", self.kernel)
        return tile_class(found[1]) if found else ""

    @property
    def precision(self) -> str:
        names = {"Bf16x3": "bf16x3", "Tf32": "tf32", "Bf16": "bfloat16"}
        return next((precision for name, precision in names.items() if name in self.kernel), "float32")

    def microseconds(self) -> float:
        fixed = C["early gap" if self.early else "gap"].value + C["latency"].value
        if self.instructions:
            if "small_run_kernel" in self.kernel:
                return fixed + self.run_time()
            flop_time = self.flop / self.blocks / C["rate of the megakernel"].value * 1e-6
            return fixed + self.waves * (self.instructions * C["instruction"].value + flop_time)
        if self.phases:
            resident = math.ceil(self.blocks / (self.waves * C["multiprocessors"].value))
            alone = self.phases * C["phase"].value + self.cycles
            return fixed + self.waves * max(alone, resident * self.busy_cycles) / C["clock"].value * 1e-3
        alone = 0.0
        if self.part_bytes:  # a product whose last blocks go on alone
            alone = C["small instruction"].value + self.part_bytes / C["bandwidth of a block"].value * 1e-6
        return fixed + alone + max(self.flop_time(), self.bytes / C["bandwidth"].value * 1e-6)

    def run_time(self) -> float:
        """A run of small layers: what all blocks share, and then what one block computes for each task."""
        blocks, _, tasks = self.grid
        of_a_block = C["bandwidth of a block"].value
        alone = self.instructions * C["small instruction"].value
        alone += self.flop / tasks / C["rate of the megakernel"].value * 1e-6
        alone += (self.bytes / tasks - self.part_bytes) / of_a_block * 1e-6
        waves = math.ceil(tasks / (self.resident * C["multiprocessors"].value))
        return waves * alone + self.waves * self.part_bytes / blocks / of_a_block * 1e-6

    def flop_time(self) -> float:
        if not self.flop:
            return 0.0
        multiprocessors, lone = C["multiprocessors"].value, C["lone"].value
        rate = C[f"rate {self.precision} {self.tile or 'small'}"].value / multiprocessors
        b = self.blocks / (self.waves * multiprocessors)
        if self.tile == "chunk":
            lone = 1.0
        share = lone * b if b <= 1 else lone + (1 - lone) * (b - 1) / max(1, self.resident - 1)
        return self.flop / (multiprocessors * rate * min(1.0, share)) * 1e-6


@dataclass(frozen=True)
class MetaStep:
    """The launches of a warm meta-step."""

    executor: str
    launches: tuple[Launch, ...]

    @property
    def flop(self) -> float:
        return sum(launch.flop for launch in self.launches)

    @property
    def bytes(self) -> float:
        return sum(launch.bytes for launch in self.launches)

    def microseconds(self) -> float:
        main, branch = (
            sum(launch.microseconds() for launch in self.launches if launch.branch == aside) for aside in (False, True)
        )
        return max(main, branch)


def meta_step(workload: Workload, precision: str, first_order: bool = False) -> MetaStep:
    """The launches of a meta-step from the second call on, when it replays a graph. Nothing is computed."""
    executor, launches = logged_launches(workload, precision, first_order)
    return MetaStep(executor, tuple(described(launches, usage())))


def logged_launches(workload: Workload, precision: str, first_order: bool) -> tuple[str, list[dict[str, Any]]]:
    """The executor, and the launches that the emulation logged."""
    from maml_cuda import FusedMAML
    from maml_cuda.engine import meta_step, ops
    from maml_cuda.engine.problem import problem_of

    with emulated_log(only=True) as logged:
        model, data = dataclasses.replace(workload, tasks=1).build()
        x_spt, y_spt, x_qry, y_qry = (d.new_empty((workload.tasks, *d.shape[1:])) for d in data)
        maml = FusedMAML(
            model, workload.inner_lr, workload.inner_steps, loss=workload.loss, backend="fused", precision=precision
        )
        program = meta_step.program_of(maml, x_spt, x_qry)
        assert program is not None
        problem = problem_of(
            program.text, "meta_gradient", tuple(x_spt.shape[2:]), workload.support, workload.query,
            workload.inner_steps, first_order, False, (),
        )  # fmt: skip
        support, query = [x_spt, y_spt, None, None], [x_qry, y_qry, None, None]
        arguments = (list(model.parameters()), [], support, query, None, None, workload.inner_steps, True, None)
        ops.meta_step(problem, *arguments)
        before = len(logged())
        ops.meta_step(problem, *arguments)
        launches = logged()[before:]
        executor = problem.runner(x_spt.device).executor
    return executor, launches


def described(launches: list[dict[str, Any]], kernels: dict[str, Usage]) -> Iterator[Launch]:
    # Stream 0 is the caller's: the kernel that sends the addresses runs there before the graph. It is no branch.
    streams = Counter(launch["stream"] for launch in launches if launch["stream"])
    for launch in launches:
        known = kernels.get(launch["kernel"])
        branch = 0 < streams[launch["stream"]] < max(streams.values())
        yield Launch(
            launch["kernel"], tuple(launch["grid"]), launch["threads"],
            launch["dynamic_shared"] + (known.shared if known else launch["static_shared"]), branch,
            launch["flop"], launch["bytes"], launch["instructions"], known.registers if known else None,
            launch["early"], launch["phases"], launch["cycles"], launch["busy_cycles"],
            launch["part_bytes"],
        )  # fmt: skip


COLUMNS = (
    "meta-step", "K", "precision", "executor", "nodes", "blocks", "GFLOP", "MB", "shared, KB", "registers",
    "predicted, ms",
)  # fmt: skip
LAUNCH_COLUMNS = (
    "kernel", "grid", "threads", "registers", "shared", "resident", "waves", "MFLOP", "MB", "predicted, us",
)  # fmt: skip


def row(name: str, workload: Workload, precision: str, step: MetaStep) -> list[str]:
    registers = [launch.registers for launch in step.launches if launch.registers]
    products = "any" if step.executor == "megakernel" else precision
    return [
        name, str(workload.inner_steps), products, step.executor, str(len(step.launches)),
        f"{statistics.median(launch.blocks for launch in step.launches):g}", number(step.flop / 1e9),
        number(step.bytes / 1e6), number(max(launch.shared for launch in step.launches) / 1024),
        str(max(registers)) if registers else "-", number(step.microseconds() / 1e3),
    ]  # fmt: skip


def launch_row(launch: Launch) -> list[str]:
    return [
        f"`{short(launch.kernel)}`{' (branch)' if launch.branch else ''}", " x ".join(map(str, launch.grid)),
        str(launch.threads), str(launch.registers or "-"), str(launch.shared), str(launch.resident), str(launch.waves),
        number(launch.flop / 1e6), number(launch.bytes / 1e6), number(launch.microseconds()),
    ]  # fmt: skip


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("meta_steps", nargs="*", metavar="META-STEP", help=f"of {'; '.join(STEPS)} (default: all)")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="may be repeated (default: all)")
    parser.add_argument("--first-order", action="store_true")
    parser.add_argument("--launches", action="store_true", help="also print a table of the launches")
    parser.add_argument("--constants", action="store_true", help="print the constants instead")
    options = parser.parse_args(arguments)
    if options.constants:
        rows = [[name, f"{c.value:g} {c.unit}".strip(), c.source, c.what] for name, c in C.items()]
        print(markdown(("constant", "value", "source", "meaning"), rows))
        return
    if unknown := [name for name in options.meta_steps if name not in STEPS]:
        parser.error(f"META-STEP must be of {'; '.join(STEPS)}; got {unknown[0]}")
    found = [
        (name, precision, meta_step(STEPS[name], precision, options.first_order))
        for name in options.meta_steps or STEPS
        for precision in options.precision or PRECISIONS
    ]
    rows = [row(name, STEPS[name], precision, step) for name, precision, step in found]
    print(markdown(COLUMNS, list(dict.fromkeys(map(tuple, rows)))))
    if not usage():
        print("\nNo registers: the installed library has no CUDA kernels, or cuobjdump is missing.")
    for name, precision, step in found if options.launches else ():
        print(f"\n{name}, {precision}\n\n{markdown(LAUNCH_COLUMNS, [launch_row(launch) for launch in step.launches])}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
