"""`python -m benchmarks.long_inner_loops`: memory of one task of Omniglot with many inner steps.

For each `checkpoint` and each `meta_gradient`, what memory_estimate says, and what becomes resident in a process of its
own: the most of a few meta-steps. Results do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

STEPS = (100, 1000)
ROWS: dict[str, dict[str, object]] = {
    "`checkpoint=None`": {},
    '`checkpoint="recompute"`': {"checkpoint": "recompute"},
    '`checkpoint="sqrt"`': {"checkpoint": "sqrt"},
    '`meta_gradient="truncated"`, 5 steps': {"meta_gradient": "truncated", "truncate": 5},
    '`meta_gradient="implicit"`': {"meta_gradient": "implicit", "proximal": 2.0},
    '`meta_gradient="reptile"`': {"meta_gradient": "reptile"},
    "`first_order=True`": {"first_order": True},
}


def measure(row: str, steps: int) -> tuple[int, int]:
    """Bytes: the estimate, and what became resident."""
    import torch

    from benchmarks.memory import peak_bytes
    from maml_cuda import FusedMAML
    from maml_cuda.train.models import conv4

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = [t for _ in range(2) for t in (torch.randn(1, 5, 1, 28, 28), torch.arange(5)[None])]
    maml = FusedMAML(conv4(5, 64), 0.01, steps, backend="fused", **ROWS[row])  # type: ignore[arg-type]
    few = FusedMAML(maml.model, 0.01, 1, backend="fused")
    few(*data).loss.backward()  # what torch and the core take once

    def step() -> None:
        maml(*data).loss.backward()

    return maml.memory_estimate(data[0], data[2]), peak_bytes(step)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_inner_loops", description=__doc__)
    parser.add_argument("row", nargs="?", choices=tuple(ROWS), help="one measurement alone, in this process")
    parser.add_argument("steps", nargs="?", type=int, help="its number of inner steps")
    arguments = parser.parse_args()
    if arguments.row:
        print(*measure(arguments.row, arguments.steps))
        return
    print("| MB | " + " | ".join(f"estimate, K = {k} | resident, K = {k}" for k in STEPS) + " |")
    print("| --- |" + " ---: |" * 2 * len(STEPS))
    for row in ROWS:
        cells = []
        for steps in STEPS:
            command = [sys.executable, "-m", "benchmarks.long_inner_loops", row, str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            cells += [f"{int(bytes_) / 1e6:.1f}" for bytes_ in done.stdout.split()]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
