"""`python -m benchmarks.inner_optimizers`: meta-steps with momentum or Adam in the inner loop, at second order.

Two tables. The first is of maml_cuda beside an autograd loop, higher and parallel-metalearn. The second is of maml_cuda
alone, on the workloads of `python -m benchmarks`: momentum, Adam and clipping beside plain SGD.

Every meta-gradient is first compared with the float64 reference, and a side that is missing or wrong is not timed. The
sides of a row are then timed in turn, in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from maml_cuda import optim
from maml_cuda.benchmark.baselines import Step
from maml_cuda.benchmark.timing import Timing, interleave, run_block
from maml_cuda.benchmark.verification import WrongGradient

from . import inner_optimizer_steps, readme
from .implementations import MAML_CUDA
from .machine import machine
from .markdown import markdown_table
from .meta_steps import Builder, fused
from .parallel_metalearn import parallel_metalearn
from .verification import reference_gradient, verify
from .workloads import OMNIGLOT, SINUSOID, SMOOTH_TOLERANCE, WORKLOADS, Workload, mlp

HIGHER, PARALLEL_METALEARN = "higher", "parallel-metalearn"
OWN: dict[str, Builder] = {MAML_CUDA: fused("fused")}
SIDES: dict[str, Builder] = {
    **OWN,
    "autograd loop": inner_optimizer_steps.autograd_loop,
    HIGHER: inner_optimizer_steps.higher,
    PARALLEL_METALEARN: parallel_metalearn,
}
RIVALS, SPEED_UP = (HIGHER, PARALLEL_METALEARN), 5.0  # the target over both
SGD, MOMENTUM, ADAM, CLIPPED = "SGD", "momentum", "Adam", "SGD, clipped"
SLOW_DOWN = 1.3  # the target of Adam over SGD
ADAM_RATE = 1e-3  # torch's default
BEGIN = "<!-- python -m benchmarks.inner_optimizers --page -->"  # where the tables stand in docs/benchmarks.md

BESIDE_LIBRARIES = (
    replace(SINUSOID, name="sinusoid", inner_steps=5),
    replace(SINUSOID, name="mlp", model=partial(mlp, (1, 256, 256, 1)), inner_steps=5),
    OMNIGLOT,
)


def variant(workload: Workload, name: str) -> Workload:
    """The workload with an inner update of the name.

    With eps = 1e-8 the meta-gradient through Adam is dominated by the elements whose gradients are nearly 0, and no two
    float32 computations agree; see docs/inner_optimizers.md.
    """
    if name == MOMENTUM:
        return replace(workload, inner_optimizer=optim.SGD(momentum=0.9))
    if name == CLIPPED:
        return replace(workload, inner_clip_norm=1.0)
    if name == ADAM:
        tolerance = max(workload.float32_tolerance, SMOOTH_TOLERANCE)
        adam = optim.Adam(eps=1e-3)
        return replace(workload, inner_optimizer=adam, inner_lr=ADAM_RATE, float32_tolerance=tolerance)
    return workload


@dataclass
class Side:
    """One meta-step of a row: what it is, and either its step or why there is none; its time once measured."""

    status: str
    reason: str = ""
    note: str = ""
    step: Step | None = None
    timing: Timing | None = None

    @property
    def milliseconds(self) -> float | None:
        return None if self.timing is None else 1e3 * self.timing.quartiles()[1]

    @property
    def cell(self) -> str:
        if self.timing is None:
            return self.status
        q1, median, q3 = (1e3 * t for t in self.timing.quartiles())
        return f"{median:.3g} ({q1:.3g} to {q3:.3g})"


def prepared(workload: Workload, builders: Mapping[str, Builder]) -> dict[str, Side]:
    """By name of an implementation: a side whose meta-gradient is verified, or one that says why it is not timed."""
    model, tasks = workload.build()
    expected = reference_gradient(workload, model, tasks, False)

    def side(build: Builder) -> Side:
        try:
            _, _, step = verify(build, workload, model, tasks, False, expected)
        except ModuleNotFoundError as error:
            return Side("missing", str(error))
        except WrongGradient as error:
            return Side("wrong", str(error))
        except Exception as error:  # a library that cannot run the workload is a result
            return Side("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return Side("verified", note=getattr(step, "note", ""), step=step)

    return {name: side(build) for name, build in builders.items()}


def timed(sides: Mapping[str, Side], seconds: float) -> None:
    """Times the sides that have a step, in turn."""
    steps = {name: side.step for name, side in sides.items() if side.step is not None}
    once = {name: run_block(step, 0).wall[0] for name, step in steps.items()}
    blocks = {name: partial(run_block, step) for name, step in steps.items()}
    for name, timing in interleave(blocks, once, seconds).items():
        sides[name].timing = timing


Row = tuple[str, Mapping[str, Side]]  # its name and its sides


def beside_libraries(seconds: float, quick: bool) -> Iterator[Row]:
    """Of each workload and of momentum and Adam: the times of all implementations."""
    for workload in BESIDE_LIBRARIES:
        for name in (MOMENTUM, ADAM):
            given = variant(workload.shrunk() if quick else workload, name)
            log(f"{workload.name}, {name}")
            sides = prepared(given, SIDES)
            timed(sides, seconds)
            yield f"{workload.name}, {name}", sides


def beside_sgd(names: Sequence[str], seconds: float, quick: bool) -> Iterator[Row]:
    """Of each workload: the times of maml_cuda with each inner update."""
    for name in names:
        log(name)
        workload = WORKLOADS[name].shrunk() if quick else WORKLOADS[name]
        sides = {v: prepared(variant(workload, v), OWN)[MAML_CUDA] for v in (SGD, MOMENTUM, ADAM, CLIPPED)}
        timed(sides, seconds)
        yield name, sides


def table(rows: Sequence[Row], first: str, own: str) -> Iterator[str]:
    """The times in milliseconds, in brackets their quartiles, and how many times that of `own` each is."""

    def cell(sides: Mapping[str, Side], name: str) -> str:
        ratio = relative(sides, name, own)
        return sides[name].cell + (f", **{ratio:.2f}x**" if ratio and name != own else "")

    columns = list(rows[0][1])
    return markdown_table([first, *columns], ([name, *(cell(sides, c) for c in columns)] for name, sides in rows))


def relative(sides: Mapping[str, Side], name: str, own: str) -> float | None:
    """The time of a side over that of `own`; None where either was not timed."""
    time, base = sides[name].milliseconds, sides[own].milliseconds
    return time / base if time and base else None


def library_targets(rows: Sequence[Row]) -> Iterator[str]:
    for rival in RIVALS:
        found = {name: relative(sides, rival, MAML_CUDA) for name, sides in rows}
        yield target(f"{SPEED_UP:g}x over {rival}", found, lambda ratio: ratio >= SPEED_UP)


def sgd_targets(rows: Sequence[Row]) -> Iterator[str]:
    found = {name: relative(sides, ADAM, SGD) for name, sides in rows}
    yield target(f"Adam at most {SLOW_DOWN:g} times SGD", found, lambda ratio: ratio <= SLOW_DOWN)


def target(what: str, found: Mapping[str, float | None], reached: Callable[[float], bool]) -> str:
    times = {name: ratio for name, ratio in found.items() if ratio is not None}
    missed = [f"{name} ({ratio:.2f})" for name, ratio in times.items() if not reached(ratio)]
    result = f"met in {len(times) - len(missed)} of {len(times)} rows"
    return f"- Target {what}: {result}{'; missed: ' * bool(missed)}{', '.join(missed)}."


def not_timed(rows: Sequence[Row]) -> Iterator[str]:
    """The notes of the sides, and why some were not timed: each once."""
    notes = {(name, side.note): None for _, sides in rows for name, side in sides.items() if side.note}
    yield from (f"- {name}: {note}." for name, note in notes)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, sides in rows:
        for name, side in sides.items():
            if side.step is None:
                reasons.setdefault((name, f"{side.status}: {side.reason}"), []).append(row)
    for (name, reason), where in reasons.items():
        yield f"- Not timed: {name}, {'; '.join(where)}; {reason}"


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def heading(quick: bool) -> Iterator[str]:
    where = machine()
    build = where["maml_cuda"]
    versions = [f", {name} {version}" for name, version in where["rivals"].items() if name in RIVALS]
    yield (
        f"Milliseconds of a meta-step on {where['cpu']}, {where['threads']} of {where['cores']} cores: median "
        f"(lower to upper quartile). torch {where['torch']}, maml_cuda {build['version']} ({build['cpu_isa']}), commit "
        f"{where['commit'] or 'unknown'}{''.join(versions)}."
    )
    if quick:
        yield "**Quick run with reduced shapes: it tests the benchmark; the times are not meaningful.**"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_optimizers", description=__doc__)
    add = parser.add_argument
    add("--table", nargs="+", choices=("libraries", "sgd"), default=["libraries", "sgd"], help="default: both")
    names = list(WORKLOADS)
    add("--workload", nargs="+", choices=names, default=names, metavar="NAME", help="of the second table: default all")
    add("--seconds", type=float, default=3.0, help="timed seconds per side (default: 3)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--quick", action="store_true", help="reduced shapes, to test the benchmark itself")
    add("--page", action="store_true", help="also write the tables into docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    if options.page and (options.quick or len(options.table) < 2 or len(options.workload) < len(names)):
        parser.error("--page must go with a full run, got --quick, one table or only some workloads")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables. Returns 1 if maml_cuda was wrong or failed anywhere, else 0."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    lines, every = list(heading(options.quick)), []
    if "libraries" in options.table:
        rows = list(beside_libraries(options.seconds, options.quick))
        every += [sides[MAML_CUDA] for _, sides in rows]
        lines += ["", *table(rows, "second order, K = 5", MAML_CUDA), "", *library_targets(rows)]
        lines += not_timed(rows)
    if "sgd" in options.table:
        rows = list(beside_sgd(options.workload, options.seconds, options.quick))
        every += [side for _, sides in rows for side in sides.values()]
        lines += ["", *table(rows, f"{MAML_CUDA}, inner update", SGD), "", *sgd_targets(rows), *not_timed(rows)]
    print("\n".join(lines))
    if options.page:
        readme.between(BEGIN, "\n".join(lines), readme.PAGE)
    return int(any(side.step is None for side in every))


if __name__ == "__main__":
    sys.exit(main())
