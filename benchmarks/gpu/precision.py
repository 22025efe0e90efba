"""Errors of the meta-gradient in each precision, for the image models: `python -m benchmarks.gpu.precision`.

Two correct computations may decide a ReLU or a maximum differently, which changes the meta-gradient of a deep network
by per cents in any precision. So two errors are measured against float64, |error| / |gradient| over all parameters:
that of the model, and that of its smooth variant (verification.py), which has no such decisions and shows rounding
errors only.

The number of decisions that differ is also counted: signs and positions of maxima, on the support set at every inner
step and on the query set at the end. Both sets of parameters, those that this precision reached and those of float64,
are evaluated in float64; decisions that rounding changes within a pass are not counted. Results are medians over seeds.

`--emulated` uses emulated matrix units, which round like those of a GPU, and smaller models and images.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..verification import reference_gradient
from ..workloads import WORKLOADS, MiniImageNetNet, OmniglotNet, Tasks, Workload, five_way, images
from .cases import TINY
from .implementations import PRECISIONS, allow_tf32, fused
from .machine import emulation, machine
from .table import precision
from .verification import distance, gradients, smooth

SEEDS = 3
# For the emulation: fewer filters, smaller images and one task, with the paper's inner steps and rates.
SMALL = {
    "omniglot": five_way(
        "omniglot", partial(OmniglotNet, filters=8), images(1, 28, 28), 5, 0.4, tasks=1, support=5, query=10
    ),
    "mini-imagenet": five_way(
        "mini-imagenet", partial(MiniImageNetNet, filters=8, side=16), images(3, 16, 16), 5, 0.01, tasks=1, support=5,
        query=10,
    ),
}  # fmt: skip
SIZES = {
    "omniglot": "Omniglot, 8 of 64 filters, 28 x 28",
    "mini-imagenet": "mini-ImageNet, 8 of 32 filters, 16 x 16 of 84 x 84 pixels",
}


def errors(emulated: bool, quick: bool = False, seeds: int = SEEDS) -> Iterator[dict[str, Any]]:
    """The job. `quick`: a tiny model and one seed, to test the command."""
    device = machine(emulated)
    workloads = SMALL if emulated else {name: WORKLOADS[name] for name in SMALL}
    if quick:
        workloads, seeds = {name: w.shrunk() for name, w in TINY.items() if w.loss == "cross_entropy"}, 1
    allow_tf32(False)
    for net, workload in workloads.items():
        found = [
            one_seed(dataclasses.replace(workload, seed=seed), device.torch_device) for seed in range(1, seeds + 1)
        ]
        medians = {
            name: {key: statistics.median(f[name][key] for f in found) for key in found[0][name]} for name in PRECISIONS
        }
        size = SIZES[net] if emulated and not quick else f"{net}, T = {workload.tasks}"
        yield {net: {"size": size, "seeds": seeds, "errors": medians}, "say": f"{size}: {medians}"}


def one_seed(workload: Workload, device: torch.device) -> dict[str, dict[str, float]]:
    """By precision: the errors "smooth" and "net", and "flips", the number of "decisions" that differ from float64."""
    model, tasks = workload.build()
    model, tasks = model.to(device), Tasks(*(x.to(device) for x in tasks))
    variant = smooth(model)
    exact = {net: reference_gradient(workload, net, tasks, False) for net in (model, variant)}
    expected = decisions(workload, copy.deepcopy(model).double(), tasks.double(), "float32")
    found = {}
    for name in PRECISIONS:
        off = {}
        for net in (model, variant):
            own = copy.deepcopy(net)
            fused(name, False)(workload, own, tasks, False)()
            off[net] = distance(gradients(own), exact[net])
        flips = decisions(workload, model, tasks, name) != expected
        found[name] = {
            "smooth": off[variant], "net": off[model], "flips": flips.sum().item(), "decisions": flips.numel(),
        }  # fmt: skip
    return found


def decisions(workload: Workload, model: nn.Module, tasks: Tasks, name: str) -> Tensor:
    """The signs at all ReLUs and the positions of all maxima in float64, at the parameters of a fused inner loop."""
    from maml_cuda import FusedMAML

    maml = FusedMAML(
        model, workload.inner_lr, workload.inner_steps, loss=workload.loss, backend="fused", precision=name,
        cuda_graphs=False,
    )  # fmt: skip
    recorder = Recorder(copy.deepcopy(model).double())
    made = []
    for k in range(workload.inner_steps + 1):
        fast = maml.adapt(tasks.x_spt, tasks.y_spt, steps=k)
        x = tasks.x_spt if k < workload.inner_steps else tasks.x_qry
        for task in range(len(x)):
            made += recorder.decide({name: p[task].double() for name, p in fast.items()}, x[task].double())
    return torch.cat(made)


class Recorder(fx.Interpreter):
    """Runs a model and records the decisions of its ReLUs and max-pools."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(fx.symbolic_trace(model))
        self._made: list[Tensor] = []

    def decide(self, parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        self._made = []
        with torch.no_grad():
            for name, p in parameters.items():
                self.module.get_parameter(name).copy_(p)
            self.run(x)
        return self._made

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is F.relu:
            self._made.append((args[0] > 0).flatten().long())
        elif target is F.max_pool2d:
            self._made.append(F.max_pool2d(args[0], args[1], return_indices=True)[1].flatten())
        return super().call_function(target, args, kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--emulated", action="store_true", help="run on a CPU with emulated matrix units")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with emulation() if options.emulated else nullcontext():
        for piece in errors(options.emulated, seeds=options.seeds):
            print(piece.pop("say"), flush=True)
            found |= piece
    print("\n".join(precision({"precision": found})))


if __name__ == "__main__":
    main()
