"""Random combinations of what an inner loop may have, on the fused and on the general path, against an unrolled loop.

Of each case the outputs, the gradients of everything that requires grad, and `adapt` are compared in float64. What is
refused, and what runs on the general path, must be what the documentation says. MAML_CUDA_FUZZ sets the number of
cases, of which a quarter is run here. A failure prints the case, whose number makes it again.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maml_cuda import FusedMAML
from tests.conftest import relative_errors
from tests.engine import inner_loop_oracle as oracle
from tests.engine.inner_loop_cases import Case
from tests.engine.random_inner_loops import random_inner_loop
from tests.given_masks import next_seed

CASES = int(os.environ.get("MAML_CUDA_FUZZ", "500")) // 4
ON_A_GPU = CASES // 10
TOLERANCE = 1e-9


def errors(got: list[Tensor], expected: list[Tensor]) -> float:
    found = relative_errors(dict(enumerate(got)), dict(enumerate(expected))).values()  # type: ignore[arg-type]
    return max((float("inf") if e != e else e for e in found), default=0.0)


def close(what: str, got: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    assert [g.shape for g in got] == [e.shape for e in expected], what
    error = errors(got, expected)
    assert error <= tolerance, f"{what}: relative error {error:.1e}\n{got}\n{expected}"


def gradients(case: Case) -> list[Tensor]:
    found = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in case.wanted()]
    for t in case.wanted():
        t.grad = None
    return found


def flat(of: dict[str, Tensor]) -> list[Tensor]:
    return [of[name] for name in sorted(of)]


def check_adapt(maml: FusedMAML, case: Case) -> None:
    steps = min(case.adapt_steps, case.steps) or 1 if case.per_step else case.adapt_steps
    x, y, w = (
        t[:steps] if case.per_step and t is not None else t for t in (*case.poisoned()[:2], case.spt_weights)
    )  # fmt: skip
    differentiable = case.kind in ("unrolled", "truncated") and case.number % 2 == 0
    if x.requires_grad:  # which fused layers refuse
        x, differentiable = x.detach(), False
    torch.manual_seed(case.number)
    seed = next_seed()
    if w is None and case.loss.weighted and not isinstance(case.loss.given, str):  # which returns that of each sample
        w = torch.ones_like(y if y.dim() == 2 + case.per_step else y[..., 0], dtype=torch.float64)
    w_of = w.detach() if w is not None and not differentiable else w
    fast = maml.adapt(x, y, steps, differentiable=differentiable, spt_weights=w_of)
    paths = [oracle.inner_loop(case, task, steps, seed)[0][-1] for task in range(len(case.data[2]))]
    expected = {name: torch.stack([path[name] for path in paths]) for name in paths[0]}
    assert fast.keys() == expected.keys()
    close("adapt", flat(fast), [t.detach() for t in flat(expected)])
    if differentiable:
        generator = torch.Generator().manual_seed(case.number)
        cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in flat(fast)]
        wanted = case.wanted()
        sums = [
            sum((t * c).sum() for t, c in zip(flat(of), cotangents, strict=True)) for of in (fast, expected)
        ]  # fmt: skip
        got, truth = (
            torch.autograd.grad(s, wanted, allow_unused=True, materialize_grads=True) for s in sums
        )  # fmt: skip
        close("adapt(differentiable=True)", list(got), list(truth))


def check(maml: FusedMAML, case: Case, truth: oracle.Expected) -> str:
    """Two calls and `adapt`. Returns what ran the calls."""
    torch.manual_seed(case.number)
    out = maml(*case.poisoned(), **case.call())
    out.loss.backward()
    got = gradients(case)
    torch.manual_seed(case.number)
    again = maml.backward(*case.poisoned(), **case.call())
    twice = gradients(case)
    for one, two in zip([out.loss.detach(), *got], [again.loss, *twice], strict=True):
        assert torch.equal(one, two), "forward and backward give other bits"
    outputs = [out.loss.detach(), out.task_losses, out.support_losses, out.logits]
    close("outputs", outputs, [truth.loss, truth.task_losses, truth.support_losses, truth.logits])
    close("gradients", got, truth.gradients)
    path = "general" if maml.backend == "reference" else "fused"
    check_adapt(maml, case)
    return path


def refused(case: Case, backend: str) -> None:
    """Asserts that a case is refused in its words, and leaves no gradient."""
    caught = ""
    try:
        maml = FusedMAML(case.model, backend=backend, **case.options())
        torch.manual_seed(case.number)
        maml(*case.poisoned(), **case.call())
    except (ValueError, TypeError) as error:
        caught = str(error)
    assert any(text in caught for text in case.refusals), f"{caught or 'no error'} is none of {case.refusals}"
    assert all(t.grad is None for t in case.wanted())


def late_refusals(case: Case) -> list[str]:
    """Minibatches without a sample that counts, or with one that BatchNorm cannot normalise."""
    if case.support_batch is None or case.spt_weights is None or case.refusals:
        return []
    torch.manual_seed(case.number)
    seed, found = next_seed(), []
    for task in range(len(case.data[2])):
        for _, _, w in oracle.support(case, task, max(case.steps, 1), seed):
            assert w is not None
            count = int((w > 0).sum())
            found += ["positive sum"] * (count == 0)
            found += ["more than 1 value per channel"] * (case.made.one_is_too_few and count == 1)
    return found


def ill_conditioned(case: Case, truth: oracle.Expected, seed: int) -> bool:
    """Whether the oracle itself has no number to this tolerance: with its samples in another order it gives another."""
    other = oracle.meta_gradient(replace(case, backwards=True), seed)
    return errors(other.gradients, truth.gradients) > TOLERANCE / 10


def run(number: int, machine: str, counts: Counter[str]) -> None:
    case = random_inner_loop(number)
    case.refusals += late_refusals(case)
    if case.refusals:
        for backend in ("auto", "reference"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "maml_cuda runs this model on the general path")
                refused(case, backend)
        counts["refused"] += 1
        return
    torch.manual_seed(number)
    seed = next_seed()
    truth = oracle.meta_gradient(case, seed)
    for backend in ("auto", "reference"):
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                path = check(FusedMAML(case.model, backend=backend, **case.options()), case, truth)
        except AssertionError:
            if not ill_conditioned(case, truth, seed):
                raise
            counts["ill-conditioned"] += 1
            return
        falls_back = ["maml_cuda runs this model on the general path" in str(warning.message) for warning in said]
        assert all(falls_back), [str(warning.message) for warning in said]
        if backend == "auto":
            assert falls_back or path == "fused", "no warning says that it falls back"
            assert case.path(machine) in ("", path), f"{path} runs it"
            counts[path] += 1


def numbered(number: int, machine: str, counts: Counter[str]) -> None:
    try:
        run(number, machine, counts)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n\n{random_inner_loop(number)}") from error


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("machine", "cases"), [("cpu", CASES), ("cuda_emulated", ON_A_GPU)], indirect=["machine"])
def test_random_inner_loops(machine: str, cases: int) -> None:
    counts: Counter[str] = Counter()
    for number in range(cases):
        numbered(number, machine, counts)
    if cases < 100:  # which are too few to count
        return
    share = {name: count / cases for name, count in counts.items()}
    for name, least in (("fused", 0.5), ("general", 0.02), ("refused", 0.02)):
        assert share.get(name, 0) > least, counts
    assert share.get("ill-conditioned", 0) < 0.02, counts


def test_a_number_is_one_case() -> None:
    shown = [str(random_inner_loop(number)) for number in (3, 4, 3)]
    assert shown[0] == shown[2] != shown[1]
