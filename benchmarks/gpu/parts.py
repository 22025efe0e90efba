"""What the command does, one part after the other, each within its share of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..worker import Failed, words
from . import check
from .cases import cases
from .record import Run

COMPILE_SMALL, COMPILE_LARGE = 40.0, 100.0  # seconds for a compiled rival: nets of Linear layers, of convolutions
CASE = 45.0  # seconds at most for proving and timing one case


@dataclass(frozen=True)
class Part:
    """`most` seconds; at least `least` are kept free for it while earlier parts run."""

    name: str
    do: Callable[[Run, float], None]
    most: float
    least: float


def describe(run: Run, seconds: float) -> None:
    if reason := run.job(run.record["machine"], ".gpu.check:describe", run.emulated, seconds=seconds):
        raise Failed(reason)


def build(run: Run, seconds: float) -> None:
    machine = run.record["machine"]
    if run.emulated:
        raise check.Skipped("the emulated kernels are built by tests/emulated.py")
    machine.update(check.build(machine["gpu"]["capability"], seconds))
    run.say(f"maml_cuda {machine['build_info']['version']}, kernels: {machine['build']}")


def tests(run: Run, seconds: float) -> None:
    backend = "cuda_emulated" if run.emulated else "cuda"
    paths = check.SMALL_TESTS if run.emulated else check.TESTS
    found = run.record["tests"] = check.tests(backend, paths, seconds)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items()) or "none ran"
    run.say("; ".join([f"tests on {backend}: {counts}", *found["notes"], *found["not_passed"]]))
    for line in found.get("last_lines", []):
        print("    " + line, flush=True)
    if found["exit_code"] or not found["counts"].get("passed"):
        raise Failed(found["notes"][-1] if found["notes"] else f"pytest ended with exit code {found['exit_code']}")


def sanitizer(run: Run, seconds: float) -> None:
    if run.emulated:
        raise check.Skipped("the emulation runs on a CPU, where compute-sanitizer sees nothing")
    found = run.record["sanitizer"] = {}
    end = run.left() - seconds
    for name in check.TOOLS:
        share = (run.left() - end) / (len(check.TOOLS) - len(found))
        found[name] = check.sanitizer(name, share)
        run.say(f"{name}: {found[name]['verdict']}; {found[name]['summary'] or 'no summary'}")
    bad = [name for name, what in found.items() if what["verdict"] != "clean"]
    if bad:
        raise Failed("; ".join(f"{name} {found[name]['verdict']}" for name in bad))


def facts(run: Run, seconds: float) -> None:
    found = run.record["facts"] = {}
    if reason := run.job(found, ".gpu.facts:facts", run.emulated, seconds=seconds):
        del found["failed"]
        raise Failed(reason)


def precision(run: Run, seconds: float) -> None:
    found = run.record["precision"] = {}
    if reason := run.job(found, ".gpu.precision:errors", run.emulated, run.quick, seconds=seconds):
        del found["failed"]
        raise Failed(reason)


def matrix(run: Run, seconds: float) -> None:
    """Cases with a target, compiled rivals of the small ones, the other cases, compiled rivals of the large ones."""
    end = run.left() - seconds
    targeted, others = cases(run.quick, run.emulated)
    heavy = [case for case in targeted if case.order == 2] if not (run.quick or run.emulated) else []
    small = [case for case in heavy if case.workload().loss == "mse"]
    large = [case for case in heavy if case not in small]
    jobs = [(case, None) for case in targeted]
    jobs += [(case, COMPILE_SMALL) for case in small]
    jobs += [(case, None) for case in others]
    jobs += [(case, COMPILE_LARGE) for case in large]
    without = []
    for case, compile_seconds in jobs:
        left = run.left() - end
        if left < 1 or (compile_seconds and left < 15):
            without.append(f"{case}{', compiled rivals' if compile_seconds else ''}")
            continue
        if compile_seconds:  # the rest of the time is for proving and timing
            compile_seconds = min(compile_seconds, left / 2)
        found: dict = {}
        run.record["cases"].append(found)
        limit = min(left, CASE + (compile_seconds or 0))
        run.job(found, ".gpu.matrix:measure", case, run.seconds, compile_seconds, seconds=limit)
    if without:
        raise Failed(f"no time was left for {'; '.join(without)}")
    bad = [found for found in run.record["cases"] if "failed" in found]
    if bad:
        raise Failed(f"{len(bad)} of {len(jobs)} cases did not come to their end")


PARTS = (
    Part("describe", describe, most=60, least=0),
    Part("build", build, most=300, least=0),
    Part("tests", tests, most=80, least=40),
    Part("sanitizer", sanitizer, most=100, least=40),
    Part("facts", facts, most=30, least=15),
    Part("precision", precision, most=40, least=15),
    Part("matrix", matrix, most=math.inf, least=200),
)
NEEDED = "describe"  # without a device there is nothing to do


def perform(run: Run) -> None:
    """All parts; what fails is recorded and the next one begins."""
    for index, part in enumerate(PARTS):
        kept_free = sum(later.least for later in PARTS[index + 1 :])
        seconds = min(part.most, max(run.left() - kept_free, min(run.left(), part.least)))
        note = run.record["parts"][part.name] = {"status": "running"}
        begin = run.elapsed()
        try:
            if seconds <= 0:
                raise check.Skipped("no time was left for it")
            run.say(f"{part.name}, at most {seconds:.0f} s")
            part.do(run, seconds)
            note["status"] = "done"
        except check.Skipped as why:
            note |= {"status": "skipped", "reason": str(why)}
        except Failed as why:
            note |= {"status": "failed", "reason": str(why)}
        except Exception as error:  # a mistake in a part must not cost the others
            note |= {"status": "failed", "reason": words(error)}
        note["seconds"] = round(run.elapsed() - begin, 2)
        if note["status"] != "done":
            run.say(f"{part.name} {note['status']}: {note['reason']}")
        run.write()
        if part.name == NEEDED and note["status"] != "done":
            return
