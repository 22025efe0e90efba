"""Streams and devices of the caller, errors of failed launches, and CUDA_LAUNCH_BLOCKING=1."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML
from maml_cuda.engine import cuda_runner
from maml_cuda.engine.problem import problem_of
from tests import emulated
from tests.conftest import run
from tests.cuda.kernel_models import KERNELS, SAMPLES, conv, episodes, mlp

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

both_executors = pytest.mark.parametrize("make", [mlp, conv])


def steps(model: nn.Module, data: list[Tensor], count: int = 3) -> list[dict[str, Tensor]]:
    """The meta-gradients of some calls; the second call is captured as a graph if the executor has graphs."""
    maml = FusedMAML(model, 0.1, 2, backend="fused")
    found = []
    for _ in range(count):
        _, grads = run(maml, data)
        found.append({name: g.clone() for name, g in grads.items()})
    return found


def same(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(grads[name].cpu(), expected[name].cpu()) for grads in found for name in expected)


@pytest.fixture
def own_stream(machine: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context manager in which the thread uses a new stream."""
    if machine == "cuda":
        return lambda: torch.cuda.stream(torch.cuda.Stream())
    current = threading.local()
    monkeypatch.setattr(cuda_runner, "stream_of", lambda _: current.stream)

    @contextmanager
    def on_a_stream() -> Iterator[None]:
        current.stream = emulated.controls().emulation_make_stream(0)
        yield

    return on_a_stream


@both_executors
def test_two_streams_at_once(make: Any, own_stream: Callable[[], Any], machine: str) -> None:
    """Two threads with a stream each share a plan and its caches, and get the same bits as one thread alone."""
    tasks = [episodes(SAMPLES[make], torch.float64, seed=seed) for seed in (1, 2)]
    model = make()
    with own_stream():
        expected = [steps(copy.deepcopy(model), data, 1)[0] for data in tasks]
    models = [copy.deepcopy(model) for _ in tasks]
    if machine == "cuda":
        torch.cuda.synchronize()
    found: list[list[dict[str, Tensor]]] = [[], []]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        with own_stream():
            barrier.wait(60)
            found[index] = steps(models[index], tasks[index], 4)
            if machine == "cuda":
                torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(found[index]) == 4
        assert same(found[index], expected[index])


@pytest.fixture
def second_device(machine: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device other than the current one."""
    if machine == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU")
        yield torch.device("cuda", 1)
        return
    core = emulated.load()
    make_runner = core.CudaRunner
    monkeypatch.setattr(core, "CudaRunner", lambda problem, _: make_runner(problem, 1))
    controls = emulated.controls()
    controls.emulation_set_devices(2)
    stream = controls.emulation_make_stream(1)
    monkeypatch.setattr(cuda_runner, "stream_of", lambda _: stream)
    before = [controls.emulation_launches(i) for i in range(2)]
    yield torch.device("cpu")
    launched = [controls.emulation_launches(i) - before[i] for i in range(2)]
    assert launched[0] == 0
    assert launched[1] > 0
    assert controls.emulation_device() == 0
    controls.emulation_set_devices(1)


@both_executors
def test_the_device_of_the_tensors_is_used_and_the_current_one_stays(make: Any, second_device: torch.device) -> None:
    model = make()
    data = episodes(SAMPLES[make], torch.float64)
    (expected,) = steps(copy.deepcopy(model).cpu(), [t.cpu() for t in data], 1) if second_device.index else [None]
    found = steps(model.to(second_device), [t.to(second_device) for t in data])
    if expected is None:
        expected = found[0]
    else:
        assert torch.cuda.current_device() == 0
        assert all(g.device == second_device for g in found[0].values())
        assert max((found[0][n].cpu() - e).norm() / e.norm() for n, e in expected.items()) < 1e-9
        expected = found[0]
    assert same(found, expected)


@both_executors
def test_a_launch_that_fails_names_its_kernel(make: Any, machine: str) -> None:
    """Each launch of a first call, and of a call that is captured, fails in turn; the next call is right again."""
    if machine != "cuda_emulated":
        pytest.skip("a GPU does not fail when it is told to")
    controls = emulated.controls()
    model, data = make(), episodes(SAMPLES[make], torch.float64)

    def after(calls: int) -> FusedMAML:
        problem_of.cache_clear()
        maml = FusedMAML(model, 0.1, 2, backend="fused")
        for _ in range(calls):
            run(maml, data)
        return maml

    names: set[str] = set()
    for calls in (0, 1):
        maml = after(calls)
        before = controls.emulation_launches(0)
        _, grads = run(maml, data)
        expected = {name: g.clone() for name, g in grads.items()}
        launches = controls.emulation_launches(0) - before
        for launch in range(0, launches, 1 if make is mlp else 5):
            maml = after(calls)
            controls.emulation_fail_launch(launch)
            try:
                with pytest.raises(RuntimeError, match=r": too many resources requested for launch$") as failed:
                    run(maml, data)
            finally:
                controls.emulation_fail_launch(-1)
            names.add(re.sub(":.*", "", str(failed.value)))
            _, grads = run(maml, data)
            assert same([grads], expected)
    assert names >= {"small mlp", "add up"} if make is mlp else len(names) > 4


def test_blocking_launches(machine: str) -> None:
    """With CUDA_LAUNCH_BLOCKING=1 every launch waits: both executors, called directly and through a graph."""
    if machine != "cuda":
        pytest.skip("needs the CUDA driver")
    program = "from benchmarks.gpu import smallest as s; import torch; print(s.meta_steps(torch.device('cuda'), True))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}, cwd=emulated.ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
