"""Measures a case: each side is proven against the float64 reference, then all are timed in turn in one process."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maml_cuda import build_info, reference
from maml_cuda.benchmark import baselines, timing
from maml_cuda.benchmark.baselines import Step
from maml_cuda.benchmark.cases import Case
from maml_cuda.benchmark.memory import peak_bytes
from maml_cuda.benchmark.models import first_line
from maml_cuda.benchmark.verification import WrongGradient, distance, verified
from maml_cuda.diagnosis.borrowed import in_double
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.train import provenance

OURS, LOOP, VMAP = "maml_cuda", "autograd loop", "torch.func vmap"
ORDERS = {"second": False, "first": True}  # -> first_order
FLOAT64_LIMIT = 1e-8  # as of gradcheck
# In float32 two correct computations may decide a ReLU or a maximum differently. So a side may have ten times the error
# of plain autograd in float32, or LEAST, but not MOST, which no correct one has.
SLACK, LEAST, MOST = 10.0, 1e-3, 0.5
WARM_UP = 0.1  # of the timed seconds
MASKS = 7  # the seed of the proof with random numbers

Side = dict[str, Any]


class FusedStep:
    """maml_cuda: `maml.backward`."""

    def __init__(self, case: Case, model: nn.Module, data: Sequence[Tensor], first_order: bool) -> None:
        self.maml = FusedMAML(model, case.inner_lr, case.inner_steps, loss=case.loss, first_order=first_order)
        self._data = data
        self._parameters = list(model.parameters())

    def __call__(self) -> None:
        baselines.clear(self._parameters)
        self.maml.backward(*self._data)


def measure(case: Case, seconds: float, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The record of a case, ready for JSON, but for the conclusion.

    Args:
        seconds: for which each side is timed.
        log: gets a line before each long part.

    Raises:
        ValueError: the reference has no meta-gradient, or none that is finite and not zero.
    """
    sides: list[Side] = []
    steps: dict[str, Step] = {}
    served: dict[str, Any] = {}
    with warnings.catch_warnings(), _frozen():
        warnings.simplefilter("ignore")  # what runs, and why, is part of the record
        for order, first_order in ORDERS.items():
            log(f"proving the {order}-order meta-gradients against float64")
            proof = _Proof(case, first_order)
            for name in (OURS, LOOP, VMAP):
                side, step = _side(case, proof, name, sides)
                sides.append({"order": order, "side": name, **side})
                if step is not None:
                    steps[f"{order} {name}"] = step
                if isinstance(step, FusedStep) and not served:
                    served = _served(step.maml)
        log(f"timing {len(steps)} sides in turn, about {len(steps) * seconds * (1 + WARM_UP):.0f} seconds")
        _time(case, sides, steps, seconds)
    parameters = list(case.model.parameters())
    x_spt, _, x_qry, _ = case.data
    build = build_info()
    return {
        "model": case.name,
        "parameters": sum(p.numel() for p in parameters),
        "input": list(x_spt.shape[2:]),
        "loss": case.loss,
        "ways": case.ways,
        "tasks": case.tasks,
        "support": x_spt.shape[1],
        "query": x_qry.shape[1],
        "inner_steps": case.inner_steps,
        "inner_lr": case.inner_lr,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": str(case.device),
        "threads": torch.get_num_threads(),
        "machine": provenance.machine(),
        "versions": {"torch": torch.__version__, "maml_cuda": f"{build['version']} ({build['cpu_isa']})"},
        "backend": None,
        "why_not_fused": None,
        "explain": None,
        **served,
        "notes": list(case.notes),
        "sides": sides,
    }


@contextmanager
def _frozen() -> Iterator[None]:
    """A context in which garbage collections, as before each timed block, skip what was there before: all modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _served(maml: FusedMAML) -> dict[str, Any]:
    """What ran the last call of maml_cuda."""
    last = maml._binding().last
    why = last.why_not if last is not None and last.program is None else ""
    return {"backend": maml.backend, "why_not_fused": why or None, "explain": maml.explain()}


class _Proof:
    """The reference of one order, and how far a side may be from it."""

    def __init__(self, case: Case, first_order: bool) -> None:
        self.case, self.first_order = case, first_order
        self.expected = self._reference(case.quiet, double=True)
        whole = math.hypot(*(g.norm().item() for g in self.expected.values()))
        if not (math.isfinite(whole) and whole > 0):
            words = "zero" if whole == 0 else "not finite: --inner-lr or --inner-steps may be too large"
            raise ValueError(f"the meta-gradient in float64 must be finite and not zero, got one that is {words}")
        own = distance(self._reference(case.quiet, double=False), self.expected)
        self.limit = min(MOST, max(LEAST, SLACK * own))

    def _reference(self, model: nn.Module, double: bool) -> dict[str, Tensor]:
        case, own = self.case, copy.deepcopy(model)
        x_spt, y_spt, x_qry, y_qry = case.data
        if double:
            own = own._apply(in_double)
            x_spt, y_spt, x_qry, y_qry = map(in_double, case.data)
        rate, steps, first = case.inner_lr, case.inner_steps, self.first_order
        return reference.meta_gradient(own, case.loss, x_spt, y_spt, x_qry, y_qry, rate, steps, first)[1]

    def of(self, name: str) -> tuple[float, float, Step]:
        """The errors of a side in float64 and in the model's dtype, and its step on the model.

        Raises:
            WrongGradient: an error exceeds its limit.
        """
        case = self.case

        def build(model: nn.Module, data: Sequence[Tensor]) -> Step:
            if name == OURS:
                return FusedStep(case, model, data, self.first_order)
            _without_running_statistics(model)
            builder = baselines.autograd_loop if name == LOOP else baselines.func_vmap
            return builder(case, model, data, self.first_order)

        float64, step = verified(build, case.quiet, case.data, self.expected, FLOAT64_LIMIT, double=True)
        error = float64
        if case.dtype != torch.float64:
            error, step = verified(build, case.quiet, case.data, self.expected, self.limit, double=False)
        if case.draws:
            if name == OURS:
                torch.manual_seed(MASKS)
                expected = self._reference(case.model, double=True)
                torch.manual_seed(MASKS)
                verified(build, case.model, case.data, expected, FLOAT64_LIMIT, double=True)
            step = build(copy.deepcopy(case.model), case.data)
            step()
        return float64, error, step


def _side(case: Case, proof: _Proof, name: str, before: Sequence[Side]) -> tuple[Side, Step | None]:
    """The proof and the memory of a side, and its step; None where it is not to be timed."""
    if name == VMAP and (words := _too_large(case, before)):
        return {"status": "not tried", "reason": words}, None
    try:
        if case.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(case.device)
            held = torch.cuda.memory_allocated(case.device)
        float64, error, step = proof.of(name)
        if case.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(case.device) - held
        else:
            peak = peak_bytes(step)
    except WrongGradient as wrong:
        return {"status": "wrong", "reason": str(wrong)}, None
    except Exception as error_:  # a side that cannot run the model is a result
        return {"status": "failed", "reason": first_line(error_)}, None
    return {"status": "proven", "error_float64": float64, "error": error, "peak_bytes": peak}, step


def _too_large(case: Case, before: Sequence[Side]) -> str:
    """Words if vmap, which has the graphs of all tasks at once, would not fit into the memory of this machine."""
    loop = [side["peak_bytes"] for side in before if side["side"] == LOOP and side.get("peak_bytes")]
    free = _free_memory() if case.device.type == "cpu" else None
    if not loop or free is None:
        return ""
    wanted = case.tasks * loop[-1] * (1 if case.dtype == torch.float64 else 2)  # of the proof in float64
    if wanted < free:
        return ""
    there = f"{free / 2**30:.1f} GiB are free"
    return f"all tasks at once would take about {wanted / 2**30:.1f} GiB in float64, and {there}"


def _free_memory() -> int | None:
    """Bytes that this system can give to a process; None where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return 1024 * int(line.split()[1])
    return None


def _without_running_statistics(model: nn.Module) -> None:
    """Norm layers in train mode no longer write running statistics, which vmap cannot do; the gradient is the same."""
    for m in model.modules():
        if isinstance(m, _NormBase) and m.training and m.track_running_stats:
            m.running_mean = m.running_var = m.num_batches_tracked = None
            m.track_running_stats = False


def _time(case: Case, sides: Sequence[Side], steps: Mapping[str, Step], seconds: float) -> None:
    """Times the proven sides in turn and writes their times to them."""
    named = {f"{side['order']} {side['side']}": side for side in sides}

    def block(name: str, duration: float) -> timing.Timing:
        side, step = named[name], steps[name]
        if side["status"] != "proven":
            return timing.Timing()
        try:
            return timing.run_block(step if case.device.type == "cpu" else _synchronised(step), duration)
        except Exception as error:
            side |= {"status": "failed", "reason": f"while it was timed: {first_line(error)}"}
            return timing.Timing()

    once = {}
    for name in steps:
        warm = block(name, WARM_UP * seconds).wall
        once[name] = warm[-1] if warm else seconds
    blocks = {name: partial(block, name) for name in steps}
    for name, found in timing.interleave(blocks, once, seconds).items():
        side = named[name]
        if side["status"] == "proven":
            q1, median, q3 = (1e3 * t for t in found.quartiles())
            side |= {"status": "timed", "wall_ms": {"q1": q1, "median": median, "q3": q3}, "steps": len(found.wall)}


def _synchronised(step: Step) -> Step:
    def whole() -> None:
        step()
        torch.cuda.synchronize()

    return whole
