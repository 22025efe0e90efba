"""The steps of the command, in order, each with its share of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from ..worker import Failed, TimedOut, describe_error
from . import check
from .cases import PROFILED, Case, Job, baseline_jobs, cases
from .machine import machine
from .record import Record, Run

CASE = 60.0  # seconds at most to time and verify maml_cuda on one case


@dataclass(frozen=True)
class Step:
    """One step. Earlier steps leave `reserved` seconds for it; it takes at most `limit` seconds."""

    name: str
    part: str  # the part of --parts to which it belongs; "" if it always runs
    do: Callable[[Run, float], None]
    limit: float
    reserved: float = 0


def raise_if(reason: Failed | None) -> None:
    if reason is not None:
        raise reason


def describe(run: Run, seconds: float) -> None:
    raise_if(run.job(run.record["machine"], ".gpu.check:describe", run.emulated, seconds=seconds))


def build(run: Run, seconds: float) -> None:
    record = run.record["machine"]
    if run.emulated:
        raise check.Skipped("tests/emulated.py builds the emulated kernels")
    record.update(check.prebuilt(run.prebuilt) if run.prebuilt else check.build(record["gpu"]["capability"], seconds))
    run.say(f"maml_cuda {record['build_info']['version']}, kernels: {record['build']}")


def smallest(run: Run, seconds: float) -> None:
    found = run.record["smallest"] = {}
    raise_if(run.job(found, ".gpu.smallest:job", run.emulated, seconds=seconds))


def memcheck(run: Run, seconds: float) -> None:
    if run.emulated:
        raise check.Skipped("compute-sanitizer does not work on the emulation")
    found = check.sanitizer("memcheck", seconds)
    run.record["sanitizer"] = {"memcheck": found}
    run.say(f"memcheck: {found['verdict']}; {found['summary'] or 'no summary'}")
    if found["exit_code"] is None:
        raise TimedOut(f"memcheck was stopped after {seconds:.0f} seconds")
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
        raise TimedOut(found["notes"][-1])
    if found["exit_code"] != 0 or not found["counts"].get("passed"):
        reasons = found["not_passed"] or found["notes"][-1:] or [f"pytest ended with exit code {found['exit_code']}"]
        raise Failed("; ".join(reasons))


def facts(run: Run, seconds: float) -> None:
    found = run.record["facts"] = {}
    raise_if(run.job(found, ".gpu.facts:facts", run.emulated, seconds=seconds))


def fused(run: Run, seconds: float) -> None:
    jobs = [(f"{case.name}: fused", ".gpu.fused:measure", case, CASE, False) for case in chosen(run)]
    measure(run, seconds, jobs)


def baselines(run: Run, seconds: float) -> None:
    found = baseline_jobs(chosen(run), machine(run.emulated))
    measure(run, seconds, [(str(job), ".gpu.baseline:measure", job, job.seconds, True) for job in found])


def measure(run: Run, seconds: float, jobs: list[tuple[str, str, Case | Job, float, bool]]) -> None:
    """Runs the jobs (name, target, argument, seconds, new process) while there is time."""
    end, not_run = run.left() - seconds, []
    for name, target, argument, limit, fresh in jobs:
        left = run.left() - end
        if left < 1:
            not_run.append(name)
            continue
        found = run.case(name)
        run.job(found, target, argument, run.timed_seconds, seconds=min(left, limit), fresh=fresh)
    done = [run.record["cases"][name] for name, *_ in jobs if name not in not_run]
    failed = sum("failed" in found for found in done)
    if failed:
        raise Failed(f"{failed} of {len(jobs)} cases failed")
    late = [name for name, *_ in jobs if "stopped" in run.record["cases"].get(name, {})] + not_run
    if late:
        raise TimedOut(f"no time left for {'; '.join(late)}")


def kernels(run: Run, seconds: float) -> None:
    found = run.record["kernels"] = {}
    wanted = [case for case in chosen(run) if run.case_names or run.emulated or case.name in PROFILED]
    end, reasons = run.left() - seconds, []
    for case in wanted:
        into: Record = found.setdefault(case.name, {})
        reasons.append(run.job(into, ".gpu.profile:kernels", case, seconds=run.left() - end))
    ended = [reason for reason in reasons if reason is not None]
    raise_if(next((reason for reason in ended if not isinstance(reason, TimedOut)), ended[0] if ended else None))


def nsight(run: Run, seconds: float) -> None:
    if run.emulated:
        raise check.Skipped("Nsight Compute does not work on the emulation")
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
    Step("describe", "", describe, limit=60),
    Step("build", "", build, limit=300),
    Step("smallest", "smoke", smallest, limit=60),
    Step("memcheck", "smoke", memcheck, limit=60, reserved=20),
    Step("tests", "smoke", tests, limit=90, reserved=30),
    Step("facts", "fused", facts, limit=30, reserved=10),
    Step("fused", "fused", fused, limit=math.inf, reserved=100),
    Step("kernels", "profile", kernels, limit=60, reserved=20),
    Step("nsight", "profile", nsight, limit=80, reserved=20),
    Step("baselines", "baselines", baselines, limit=math.inf, reserved=60),
    Step("precision", "precision", precision, limit=60, reserved=20),
)
PARTS = tuple(part for part, _ in groupby(STEPS, lambda step: step.part) if part)
DEFAULT_PARTS = ("smoke", "fused", "profile", "baselines")
NEEDED = "describe"  # if it fails, there is no device


def perform(run: Run) -> None:
    """Runs the steps of the chosen parts. A failure is recorded, and the next step runs."""
    steps = [step for step in STEPS if not step.part or step.part in run.parts]
    for index, step in enumerate(steps):
        reserved = sum(later.reserved for later in steps[index + 1 :])
        seconds = min(step.limit, max(run.left() - reserved, min(run.left(), step.reserved)))
        note = {"status": "running"}
        begin = run.elapsed()
        try:
            if seconds <= 0:
                raise check.Skipped("no time left")
            run.say(f"{step.name}, at most {seconds:.0f} s")
            step.do(run, seconds)
            note["status"] = "done"
        except check.Skipped as error:
            note |= {"status": "skipped", "reason": str(error)}
        except TimedOut as error:
            note |= {"status": "stopped", "reason": str(error)}
        except Failed as error:
            note |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # an error in a step must not prevent the others
            note |= {"status": "failed", "reason": describe_error(error)}
        run.note(step.name, {**note, "seconds": round(run.elapsed() - begin, 2)})
        if note["status"] != "done":
            run.say(f"{step.name} {note['status']}: {note['reason']}")
        run.write()
        if step.name == NEEDED and note["status"] != "done":
            return
