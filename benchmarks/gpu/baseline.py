"""The job that measures one baseline on one case, in its own process, in alternation with maml_cuda.

It yields the same pieces as fused.py. The baseline is verified before it is timed; if it is wrong, `unverified` has the
reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..flops import meta_step_flops
from ..verification import reference_gradient
from .cases import Job
from .fused import verdict
from .implementations import Implementation, allow_tf32, baseline_implementations, copies_of, fused_implementations
from .machine import Machine, machine
from .timing import Piece, interleave, medians, on_device, prepare, shape
from .verification import smooth_errors


def measure(job: Job, seconds: float) -> Iterator[Piece]:
    """`seconds`: how long each implementation is timed."""
    case = job.case
    device, workload, first_order = machine(case.emulated), case.workload(), case.order == 1
    model, tasks = on_device(workload, device)
    flops = meta_step_flops(workload, model, tasks, first_order)
    yield {**shape(case, workload, flops), "baseline": job.method}
    copies = copies_of(flops)
    own = fused_implementations(device, job.precision, copies)
    baselines = baseline_implementations(device, job.method, job.precision, workload, copies, job.build_seconds)
    expected = reference_gradient(workload, model, tasks, first_order)
    reason = yield from check_formula(baselines, job, device, (workload, model, tasks, first_order))
    torch.backends.cudnn.benchmark = True
    started = []
    try:
        for implementation in [*own, *baselines]:
            candidate, found = prepare(device, implementation, workload, model, tasks, first_order)
            said = {} if candidate else {"say": f"{job}: {implementation.name} {found['status']}: {found['reason']}"}
            if candidate:
                started.append(candidate)
                found |= verdict(workload, candidate, expected, None if implementation.is_fused else reason)
            yield {"implementations": {implementation.name: found}, **said}
        interleave(device, started, seconds)
    finally:
        torch.backends.cudnn.benchmark = False
        allow_tf32(False)
    yield {
        "implementations": {c.implementation.name: c.summary() for c in started},
        "say": f"{case}: {medians(started)}",
    }


def check_formula(baselines: list[Implementation], job: Job, device: Machine, arguments: tuple) -> Iterator[Piece]:
    """Verifies the baseline on the smooth variant. Returns the reason if it is wrong, else "".

    Compiled baselines are verified on the model itself only, because compiling takes long.
    """
    if job.build_seconds is not None:
        return ""
    allow_tf32(False)
    called = {b.method: b.build for b in baselines if b.form == "called"}
    reason = ""
    for name, distance, text in smooth_errors(*arguments, called):
        device.synchronize()
        yield {"smooth": {name: distance}, **({"say": text} if text else {})}
        reason = reason or text
    return reason
