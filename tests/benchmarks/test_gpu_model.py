"""The performance model of the CUDA backend. Launches and bytes of a meta-step must not grow unnoticed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from benchmarks import flops
from benchmarks.gpu import loops, model
from benchmarks.gpu.model import C, Launch
from benchmarks.workloads import WORKLOADS
from tests import emulated

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# (meta-step, first order) -> (kernels; bytes of their operands, each read or written once, in float32 and in bf16x3,
# which cuts products in other tiles and parts). If they shrink, enter the new
# numbers. If they grow, the change must be intended.
RECORDED = {
    ("sinusoid-k1 T=25", False): (2, 553632, 553632),
    ("sinusoid-k1 T=25", True): (2, 553632, 553632),
    ("sinusoid-k5 T=25", False): (2, 553632, 553632),
    ("sinusoid-k5 T=25", True): (2, 553632, 553632),
    ("policy T=20", False): (9, 63474272, 63474272),
    ("policy T=20", True): (6, 37367872, 37367872),
    ("omniglot T=4", False): (143, 513803376, 540542064),
    ("omniglot T=4", True): (83, 326759104, 353497792),
    ("omniglot T=32", False): (143, 4100996160, 4314905664),
    ("omniglot T=32", True): (83, 2604641984, 2818551488),
    ("omniglot-5shot T=32", False): (153, 10377583680, 10292649024),
    ("omniglot-5shot T=32", True): (88, 5164544704, 5229032128),
    ("mini-imagenet T=4", False): (163, 2344649456, 2366636784),
    ("mini-imagenet T=4", True): (93, 1665527104, 1683254592),
    ("mini-imagenet T=32", False): (163, 18754431040, 18930329664),
    ("mini-imagenet T=32", True): (93, 13321452224, 13463272128),
    ("mini-imagenet-5shot T=4", False): (203, 6395211936, 6490271904),
    ("mini-imagenet-5shot T=4", True): (113, 3251757344, 3306021152),
    ("lstm T=4", False): (135, 245879280, 245879280),
    ("lstm T=4", True): (74, 104309920, 104309920),
    ("transformer T=4", False): (498, 721199728, 721199728),
    ("transformer T=4", True): (272, 359277248, 359277248),
}


@pytest.mark.parametrize(("name", "first_order"), RECORDED)
def test_a_meta_step_launches_and_moves_no_more_than_it_did(name: str, first_order: bool) -> None:
    most_nodes, *most_bytes = RECORDED[name, first_order]
    for precision, most in zip(("float32", "bf16x3"), most_bytes, strict=True):
        step = model.meta_step(model.STEPS[name], precision, first_order)
        assert len(step.launches) <= most_nodes
        assert step.bytes <= most * (1 + 1e-9)


def test_every_meta_step_is_recorded() -> None:
    assert {name for name, _ in RECORDED} == set(model.STEPS)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("name", "slack"), [("policy T=20", 1e-9), ("omniglot T=4", 0.1), ("mini-imagenet T=4", 0.1)])
def test_flop_are_those_of_the_products(name: str, slack: float, first_order: bool) -> None:
    """The FLOP count from the layers of the model. A first convolution adds products for its statistics."""
    workload = model.STEPS[name]
    net, tasks = dataclasses.replace(workload, tasks=1).build()
    expected = flops.meta_step_flops(dataclasses.replace(workload), net, tasks, first_order)
    step = model.meta_step(workload, "float32", first_order)
    if step.executor == "chunked" and not first_order:  # a product computes values and cotangents again
        total, first = flops.forward_flops(net, tasks.x_spt[0])
        expected += workload.tasks * workload.inner_steps * workload.support * (2 * total - first)
    assert step.flop == pytest.approx(expected, rel=slack)


def test_nothing_is_computed_and_nothing_logged_afterwards() -> None:
    with emulated.log() as logged:
        before = len(logged())
    step = model.meta_step(WORKLOADS["sinusoid-k1"], "float32")
    assert [launch.kernel.partition("<")[0].rpartition("::")[2] for launch in step.launches] == [
        "small_mlp",
        "add_up_kernel",
    ]
    with emulated.log() as logged:
        assert len(logged()) == before == 0


def launch(**changes: object) -> Launch:
    plain = Launch("k", (1, 1, 1), 256, 0, False, 0.0, 0.0, 0, None)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "resident"),
    [
        ({}, 8),  # 2048 threads
        ({"threads": 32}, 32),  # the most blocks
        ({"shared": 49152}, 4),  # 228 KB over 48 + 1
        ({"registers": 64}, 4),  # 65536 over 8 warps of 2048
        ({"registers": 65}, 3),  # 2304 a warp: 28 of them
        ({"threads": 100, "registers": 255}, 2),  # four warps of 8192: two times
        ({"shared": 232448}, 1),
    ],
)
def test_blocks_that_fit_a_multiprocessor(changes: dict, resident: int) -> None:
    assert launch(**changes).resident == resident


def test_waves_and_the_time_of_a_launch() -> None:
    fixed = C["gap"].value + C["latency"].value
    assert launch().microseconds() == pytest.approx(fixed)
    assert [launch(grid=(n, 1, 1)).waves for n in (1, 8 * 132, 8 * 132 + 1)] == [1, 1, 2]
    assert launch(bytes=3e6).microseconds() == pytest.approx(fixed + 1.0)  # 3 MB at 3 TB/s
    # 132 blocks, one on each multiprocessor, at the share of one alone; eight on each at the full rate.
    product = {"kernel": "f<Simt<float>, Tile<32, 64, 2, 1, 2, 3> >", "flop": C["rate float32 wide"].value * 1e6}
    alone, full = (launch(grid=(n, 1, 1), **product).microseconds() - fixed for n in (132, 8 * 132))
    assert full == pytest.approx(1.0)
    assert alone == pytest.approx(1.0 / C["lone"].value)
    chunks = {"kernel": "chunk_kernel<MatrixUnit<Tf32Words>, (Pass)0>", "flop": 50e6, "shared": 200000}
    assert launch(grid=(132, 1, 1), **chunks).microseconds() == pytest.approx(fixed + 1.0)  # one has the full rate
    half_empty = launch(grid=(66, 1, 1), **product).microseconds() - fixed
    assert half_empty == pytest.approx(2 * alone)
    early = launch(early=True).microseconds()
    assert early == pytest.approx(C["early gap"].value + C["latency"].value)
    program = launch(grid=(1, 1, 25), instructions=10, flop=25e5)
    assert program.microseconds() == pytest.approx(fixed + 10 * C["instruction"].value + 1.0)
    # What one block of each task does alone, at its own bandwidth; several blocks share some bytes of a run.
    small, bandwidth = C["small instruction"].value, C["bandwidth of a block"].value * 1e6  # bytes a us
    run = {"kernel": "small_run_kernel<float>", "instructions": 5, "bytes": 4 * 75e3, "part_bytes": 50e3}
    led = launch(grid=(2, 1, 4), **run).microseconds()
    assert led == pytest.approx(fixed + 5 * small + (25e3 + 50e3 / 2) / bandwidth)
    assert launch(grid=(9, 1, 4), part_bytes=20e3).microseconds() == pytest.approx(fixed + small + 20e3 / bandwidth)
    # One block: its own cycles. Four of 64 registers on a multiprocessor: what they share, if it is more.
    clock, phase = C["clock"].value * 1e3, C["phase"].value
    mlp = {"phases": 10, "cycles": 4000.0, "registers": 64}
    for blocks, busy, cycles in (
        (25, 3000.0, 10 * phase + 4000),
        (528, 3000.0, 12000),
        (529, 1000.0, 20 * phase + 8000),
    ):
        predicted = launch(grid=(1, 1, blocks), busy_cycles=busy, **mlp).microseconds()
        assert predicted == pytest.approx(fixed + cycles / clock)


@pytest.mark.parametrize(
    ("kernel", "tile", "precision"),
    [
        ("f<MatrixArithmetic<Tf32Words>, Tile<64, 32, 2, 2, 1, 4> >", "wide", "tf32"),
        ("f<MatrixArithmetic<Bf16x3Words>, Tile<64, 32, 2, 1, 2, 3> >", "narrow", "bf16x3"),
        ("f<MatrixArithmetic<Bf16Words>, Tile<32, 32, 1, 1, 4, 3> >", "small", "bfloat16"),
        ("f<Simt<float>, Tile<32, 32, 2, 2, 1, 4> >", "wide", "float32"),
        ("maml::stem_forward_kernel<MatrixArithmetic<Tf32Words>, true>", "narrow", "tf32"),
        ("copy_kernel<float>", "", "float32"),
        ("chunk_kernel<MatrixUnit<Bf16Words>, (Pass)1>", "chunk", "bfloat16"),
        ("chunk_kernel<SimtUnit<float>, (Pass)0>", "chunk", "float32"),
        ("maml::raster_gradients_kernel<maml::MatrixArithmetic<Bf16x3Words>, 32>", "wgmma 32", "bf16x3"),
        ("maml::raster_gradients_kernel<maml::MatrixArithmetic<Bf16Words>, 64>", "wgmma 64", "bfloat16"),
    ],
)
def test_classes_of_products(kernel: str, tile: str, precision: str) -> None:
    assert (launch(kernel=kernel).tile, launch(kernel=kernel).precision) == (tile, precision)


def test_rates_of_products_of_a_warpgroup() -> None:
    for (precision, channels), rate in loops.wgmma_rates().items():
        assert C[f"rate {precision} wgmma {channels}"].value == pytest.approx(rate, rel=0.01)


def test_every_precision_has_kernels_of_its_own() -> None:
    for precision in model.PRECISIONS:
        step = model.meta_step(model.STEPS["omniglot T=4"], precision)
        assert {found.precision for found in step.launches if found.tile} == {precision}
        aside = [found.kernel for found in step.launches if found.branch]  # query values that depend on no parameter
        assert len(aside) == 1
        assert "patch_gram_kernel" in aside[0]


def test_kernels_start_early_except_after_an_event() -> None:
    """The table is sent without it; the first kernel of a branch, and the one that joins it, wait for an event."""
    late = [found.kernel for found in model.meta_step(model.STEPS["omniglot T=4"], "tf32").launches if not found.early]
    assert len(late) == 3
    assert "unpack_parcel" in late[0]
    assert "patch_" in late[1]


def test_a_branch_costs_nothing_beside_a_longer_chain() -> None:
    chain, aside = launch(bytes=2e7), launch(bytes=1e7, branch=True)
    both = model.MetaStep("batched", (chain, aside)).microseconds()
    assert both == model.MetaStep("batched", (chain,)).microseconds()
    assert model.MetaStep("batched", (launch(), aside)).microseconds() == aside.microseconds()


@pytest.mark.parametrize("first_order", [False, True])
def test_flop_of_a_pooled_stem_are_counted_once(first_order: bool) -> None:
    """The FLOP of the direct products and of the Gram matrix."""
    workload = model.STEPS["mini-imagenet T=4"]
    net, tasks = dataclasses.replace(workload, tasks=1).build()
    gram = 84 * 84 * 28 * 29 * (workload.support + workload.query) * workload.tasks
    expected = flops.meta_step_flops(workload, net, tasks, first_order) + gram
    assert model.meta_step(workload, "float32", first_order).flop == pytest.approx(expected, rel=1e-12)


def test_the_documentation_shows_this_model(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/gpu.md has the constants, and the columns of every meta-step that do not depend on registers."""
    docs = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    model.main(["--constants"])
    for line in capsys.readouterr().out.splitlines():
        assert line in docs
    model.main([])
    for line in capsys.readouterr().out.split("\n\n")[0].splitlines():
        start = " | ".join(line.split(" | ")[: model.COLUMNS.index("shared, KB")])
        assert f"{start} |" in docs, start
