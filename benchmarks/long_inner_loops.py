"""`python -m benchmarks.long_inner_loops`: memory of one task of Omniglot with many inner steps.

For each `checkpoint` and each `meta_gradient`, in MB: what memory_estimate says, and what a meta-step adds to the
resident memory of a process of its own. Results do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from maml_cuda import FusedMAML
from maml_cuda.benchmark.memory import peak_bytes
from maml_cuda.train.models import conv4

from .markdown import markdown_table

STEPS = (5, 100, 1000)
ROWS: dict[str, dict[str, object]] = {
    "`checkpoint=None`": {},
    '`checkpoint="recompute"`': {"checkpoint": "recompute"},
    '`checkpoint="sqrt"`': {"checkpoint": "sqrt"},
    '`meta_gradient="truncated"`, 5 steps': {"meta_gradient": "truncated", "truncate": 5},
    '`meta_gradient="implicit"`': {"meta_gradient": "implicit", "proximal": 2.0},
    '`meta_gradient="reptile"`': {"meta_gradient": "reptile"},
    "`first_order=True`": {"first_order": True},
}


def measure(row: str, steps: int) -> tuple[int, int | None]:
    """Bytes: the estimate, and what became resident (None where the system does not report it)."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = [t for _ in range(2) for t in (torch.randn(1, 5, 1, 28, 28), torch.arange(5)[None])]
    options: Any = dict(ROWS[row])
    if options.get("meta_gradient") == "truncated":
        options["truncate"] = min(options["truncate"], steps)
    maml = FusedMAML(conv4(5, 64), 0.01, steps, backend="fused", **options)
    FusedMAML(maml.model, 0.01, 1, backend="fused").backward(*data)  # what torch and the core take once
    maml.zero_grad()
    return maml.memory_estimate(data[0], data[2]), peak_bytes(lambda: maml.backward(*data))


def table(rows: Sequence[str], steps: Sequence[int]) -> Iterator[str]:
    """The lines of the table. Each measurement has a process of its own, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "maml_cuda.train.models", "benchmarks.memory"])

    def cells(row: str, pool: Any) -> Iterator[str]:
        yield row
        for count in steps:
            estimate, resident = pool.apply(measure, (row, count))
            yield f"{estimate / 1e6:.1f}" + ("" if resident is None else f" / {resident / 1e6:.1f}")

    with context.Pool(1, maxtasksperchild=1) as pool:
        columns = ["estimate / resident", *(f"K = {count}" for count in steps)]
        yield from markdown_table(columns, (list(cells(row, pool)) for row in rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_inner_loops", description=__doc__)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="inner steps (default: 5 100 1000)")
    options = parser.parse_args(arguments)
    if min(options.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(options.steps)}")
    for line in table(list(ROWS), options.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
