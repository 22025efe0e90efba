"""What the command does, one step after the other, each within its share of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from ..worker import Failed, Stopped, words
from . import check
from .cases import PROFILED, Case, Job, cases, rival_jobs
from .machine import machine
from .record import Record, Run

CASE = 60.0  # seconds at most for timing and proving one case of ours


@dataclass(frozen=True)
class Step:
    """`most` seconds; at least `least` are kept free for it while earlier steps run."""

    name: str
    part: str  # as --parts asks for it; "": always
    do: Callable[[Run, float], None]
    most: float
    least: float = 0


def raise_if(reason: Failed | None) -> None:
    if reason is not None:
        raise reason


def describe(run: Run, seconds: float) -> None:
    raise_if(run.job(run.record["machine"], ".gpu.check:describe", run.emulated, seconds=seconds))


def build(run: Run, seconds: float) -> None:
    record = run.record["machine"]
    if run.emulated:
        raise check.Skipped("the emulated kernels are built by tests/emulated.py")
    record.update(check.prebuilt(run.prebuilt) if run.prebuilt else check.build(record["gpu"]["capability"], seconds))
    run.say(f"maml_cuda {record['build_info']['version']}, kernels: {record['build']}")


def smallest(run: Run, seconds: float) -> None:
    found = run.record["smallest"] = {}
    raise_if(run.job(found, ".gpu.smallest:job", run.emulated, seconds=seconds))


def memcheck(run: Run, seconds: float) -> None:
    if run.emulated:
        raise check.Skipped("the emulation runs on a CPU, where compute-sanitizer sees nothing")
    found = check.sanitizer("memcheck", seconds)
    run.record["sanitizer"] = {"memcheck": found}
    run.say(f"memcheck: {found['verdict']}; {found['summary'] or 'no summary'}")
    if found["exit_code"] is None:
        raise Stopped(f"memcheck was stopped after {seconds:.0f} seconds")
    if found["verdict"] != "clean":
        raise Failed(f"memcheck {found['verdict']}")


def tests(run: Run, seconds: float) -> None:
    if run.emulated:
        found = check.tests("cuda_emulated", check.SMALL_TESTS, seconds, workers=0)
    else:
        found = check.tests("cuda", check.TESTS, seconds, check.WORKERS)
    run.record["tests"] = found
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items()) or "none ran"
    run.say("; ".join([f"tests on {found['backend']}: {counts}", *found["notes"], *found["not_passed"]]))
    for line in found.get("last_lines", []):
        print("    " + line, flush=True)
    if found["exit_code"] is None and not found["not_passed"]:
        raise Stopped(found["notes"][-1])
    if found["exit_code"] != 0 or not found["counts"].get("passed"):
        reasons = found["not_passed"] or found["notes"][-1:] or [f"pytest ended with exit code {found['exit_code']}"]
        raise Failed("; ".join(reasons))


def facts(run: Run, seconds: float) -> None:
    found = run.record["facts"] = {}
    raise_if(run.job(found, ".gpu.facts:facts", run.emulated, seconds=seconds))


def ours(run: Run, seconds: float) -> None:
    jobs = [(f"{case.name}: ours", ".gpu.ours:measure", case, CASE, False) for case in chosen(run)]
    measure(run, seconds, jobs)


def against(run: Run, seconds: float) -> None:
    found = rival_jobs(chosen(run), machine(run.emulated))
    measure(run, seconds, [(str(job), ".gpu.rivals:measure", job, job.seconds, True) for job in found])


def measure(run: Run, seconds: float, jobs: list[tuple[str, str, Case | Job, float, bool]]) -> None:
    """Each job (name, target, argument, seconds, in a process of its own) as long as there is time."""
    end, without = run.left() - seconds, []
    for name, target, argument, most, fresh in jobs:
        left = run.left() - end
        if left < 1:
            without.append(name)
            continue
        found = run.case(name)
        run.job(found, target, argument, run.side_seconds, seconds=min(left, most), fresh=fresh)
    done = [run.record["cases"][name] for name, *_ in jobs if name not in without]
    bad = sum("failed" in found for found in done)
    if bad:
        raise Failed(f"{bad} of {len(jobs)} cases did not come to their end")
    late = [name for name, *_ in jobs if "stopped" in run.record["cases"].get(name, {})] + without
    if late:
        raise Stopped(f"no time was left for all of {'; '.join(late)}")


def kernels(run: Run, seconds: float) -> None:
    found = run.record["kernels"] = {}
    wanted = [case for case in chosen(run) if run.case_names or run.emulated or case.name in PROFILED]
    end, reasons = run.left() - seconds, []
    for case in wanted:
        into: Record = found.setdefault(case.name, {})
        reasons.append(run.job(into, ".gpu.profile:kernels", case, seconds=run.left() - end))
    ended = [reason for reason in reasons if reason is not None]
    raise_if(next((reason for reason in ended if not isinstance(reason, Stopped)), ended[0] if ended else None))


def nsight(run: Run, seconds: float) -> None:
    if run.emulated:
        raise check.Skipped("the emulation runs on a CPU, where Nsight Compute sees nothing")
    end, names = run.left() - seconds, ("omniglot-t4", "sinusoid-k1-t25")
    for number, name in enumerate(names):
        file = run.files()[0].with_name(f"{run.files()[0].stem}-ncu-{name}.txt")
        share = (run.left() - end) / (len(names) - number)
        run.say(check.nsight(["-m", "benchmarks.gpu.profile", name, "tf32"], file, share))


def precision(run: Run, seconds: float) -> None:
    found = run.record["precision"] = {}
    raise_if(run.job(found, ".gpu.precision:errors", run.emulated, run.quick, seconds=seconds))


def chosen(run: Run) -> list[Case]:
    return cases(run.quick, run.emulated, run.case_names)


STEPS = (
    Step("describe", "", describe, most=60),
    Step("build", "", build, most=300),
    Step("smallest", "smoke", smallest, most=60),
    Step("memcheck", "smoke", memcheck, most=60, least=20),
    Step("tests", "smoke", tests, most=90, least=30),
    Step("facts", "ours", facts, most=30, least=10),
    Step("ours", "ours", ours, most=math.inf, least=100),
    Step("kernels", "profile", kernels, most=60, least=20),
    Step("nsight", "profile", nsight, most=80, least=20),
    Step("rivals", "rivals", against, most=math.inf, least=60),
    Step("precision", "precision", precision, most=60, least=20),
)
PARTS = tuple(part for part, _ in groupby(STEPS, lambda step: step.part) if part)
DEFAULT_PARTS = ("smoke", "ours", "profile", "rivals")
NEEDED = "describe"  # without a device there is nothing to do


def perform(run: Run) -> None:
    """Every step of the parts that are wanted; what fails is recorded and the next one begins."""
    steps = [step for step in STEPS if not step.part or step.part in run.parts]
    for index, step in enumerate(steps):
        kept_free = sum(later.least for later in steps[index + 1 :])
        seconds = min(step.most, max(run.left() - kept_free, min(run.left(), step.least)))
        note = {"status": "running"}
        begin = run.elapsed()
        try:
            if seconds <= 0:
                raise check.Skipped("no time was left for it")
            run.say(f"{step.name}, at most {seconds:.0f} s")
            step.do(run, seconds)
            note["status"] = "done"
        except check.Skipped as why:
            note |= {"status": "skipped", "reason": str(why)}
        except Stopped as why:
            note |= {"status": "stopped", "reason": str(why)}
        except Failed as why:
            note |= {"status": "failed", "reason": str(why)}
        except Exception as error:  # a mistake in a step must not cost the others
            note |= {"status": "failed", "reason": words(error)}
        run.note(step.name, {**note, "seconds": round(run.elapsed() - begin, 2)})
        if note["status"] != "done":
            run.say(f"{step.name} {note['status']}: {note['reason']}")
        run.write()
        if step.name == NEEDED and note["status"] != "done":
            return
