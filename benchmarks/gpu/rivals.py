"""One rival on one case, a job in a process of its own: we stand beside it, so that both have the same minutes.

Pieces as those of ours.py; the rival is proven before it is timed, and one that is wrong keeps its times and says why
under `unproven`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..flops import meta_step_flops
from ..proof import truth
from .cases import Job
from .entrants import Piece, enter, interleave, medians, moved, shape
from .machine import Machine, machine
from .ours import verdict
from .proof import smooth_errors
from .sides import Side, allow_tf32, copies_of, our_sides, rival_sides


def measure(job: Job, seconds: float) -> Iterator[Piece]:
    """`seconds` timed of each side."""
    case = job.case
    on, workload, first_order = machine(case.emulated), case.workload(), case.order == 1
    model, tasks = moved(workload, on)
    flops = meta_step_flops(workload, model, tasks, first_order)
    yield {**shape(case, workload, flops), "rival": job.who}
    copies = copies_of(flops)
    theirs = rival_sides(on, job.who, job.precision, workload, copies, job.build_seconds)
    expected = truth(workload, model, tasks, first_order)
    why = yield from doubts(theirs, job, on, (workload, model, tasks, first_order))
    torch.backends.cudnn.benchmark = True
    started = []
    try:
        for side in [*our_sides(on, job.precision, copies), *theirs]:
            entrant, found = enter(on, side, workload, model, tasks, first_order)
            said = {} if entrant else {"say": f"{job}: {side.name} {found['status']}: {found['reason']}"}
            if entrant:
                started.append(entrant)
                found |= verdict(workload, entrant, expected, None if side.is_ours else why)
            yield {"sides": {side.name: found}, **said}
        interleave(on, started, seconds)
    finally:
        torch.backends.cudnn.benchmark = False
        allow_tf32(False)
    yield {"sides": {e.side.name: e.summary() for e in started}, "say": f"{case}: {medians(started)}"}


def doubts(theirs: list[Side], job: Job, on: Machine, arguments: tuple) -> Iterator[Piece]:
    """Returns why the rival's formula is wrong on the smooth twin, or nothing. Compiled rivals are looked at on the net
    itself alone, for the time that compiling takes."""
    if job.build_seconds is not None:
        return ""
    allow_tf32(False)
    called = {side.who: side.build for side in theirs if side.form == "called"}
    why = ""
    for name, distance, text in smooth_errors(*arguments, called):
        on.synchronize()
        yield {"smooth": {name: distance}, **({"say": text} if text else {})}
        why = why or text
    return why
