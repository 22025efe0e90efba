"""Shared by the tests: fixtures that run a test on every backend, random episodes, comparisons with the reference."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

# OpenMP reads this when torch loads it. With several workers on the same cores, idle threads must not spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from maml_cuda import FusedMAML, _core, reference
from maml_cuda.engine import meta_step
from maml_cuda.engine.program import Program
from tests import emulated

# Makes `benchmarks` importable. Appended, so that the checkout's maml_cuda does not shadow an installed one.
sys.path.append(str(Path(__file__).parents[1]))

ROUNDING = 1e-14  # rounding error of a gradient that is exactly zero, if the loss and all values are of order 1


def relative_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Per name: (|got - expected| - ROUNDING) / max(|expected|, 1e-4 of the norm of all gradients together).

    The lower bound is for gradients that are exactly zero, such as that of a convolution's bias before BatchNorm: both
    sides then hold rounding noise.
    """
    assert got.keys() == expected.keys()
    total = torch.stack([e.norm() for e in expected.values()]).norm().item()
    errors = {}
    for name, e in expected.items():
        beyond = (got[name] - e).norm().item() - ROUNDING
        scale = max(e.norm().item(), 1e-4 * total, ROUNDING)
        errors[name] = 0.0 if beyond <= 0 else beyond / scale  # NaN stays NaN, and fails
    return errors


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    errors = relative_errors(got, expected)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e} > {tolerance:.0e}"


def run(maml: FusedMAML, data: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One meta-step: the loss, and the gradients by name. Learned rates are named `inner_lr` or `inner_lr.<name>`."""
    maml.zero_grad()
    loss = maml(*data).loss
    loss.backward()
    grads = {n: p.grad for n, p in maml.model.named_parameters() if p.grad is not None}
    for name, rate in maml.named_parameters(remove_duplicate=False):  # several names may share one rate
        if name.startswith("inner_lr") and rate.grad is not None:
            grads[name] = rate.grad
    return loss.detach(), grads


def program_of(maml: FusedMAML, data: list[Tensor]) -> Program:
    """The program that runs meta-steps on such data."""
    program = meta_step.program_of(maml, data[0], data[2])
    assert program is not None
    return program


def check_meta_gradient(
    model: nn.Module, loss: str, data: list[Tensor], inner_lr: object, steps: int, backend: str = "fused",
    tolerance: float = 1e-10, **options: object,
) -> FusedMAML:  # fmt: skip
    """Compares the fused meta-step with the reference, in the dtype of the data. Returns the FusedMAML."""
    maml = FusedMAML(model, inner_lr, steps, loss=loss, backend=backend, **options)
    value, grads = run(maml, data)
    expected_value, expected = reference.meta_gradient(
        model,
        loss,
        *data,
        maml.inner_lr,
        steps,
        options.get("first_order", False),
        options.get("adapt_params"),
    )
    assert abs(value.item() - expected_value.item()) <= tolerance * max(1.0, abs(expected_value.item()))
    assert_close(grads, expected, tolerance)
    return maml


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


def as_good_as_the_reference(model: nn.Module, data: list[Tensor], steps: int, first_order: bool = False) -> None:
    """The float32 rule: an error of the meta-gradient of at most 2 * own + 2e-6, relative to the float64 truth.

    own is the largest float32 error of the reference over 8 random orders of the samples.
    """
    double = [d.double() if d.is_floating_point() else d for d in data]
    exact = copy.deepcopy(model).double()
    truth = flat(reference.meta_gradient(exact, "cross_entropy", *double, 0.1, steps, first_order)[1])

    def error(g):
        return ((g.double() - truth).norm() / truth.norm()).item()

    own = 0.0
    for _ in range(8):
        s, q = torch.randperm(data[0].shape[1]), torch.randperm(data[2].shape[1])
        shuffled = [data[0][:, s], data[1][:, s], data[2][:, q], data[3][:, q]]
        own = max(
            own,
            error(flat(reference.meta_gradient(model, "cross_entropy", *shuffled, 0.1, steps, first_order)[1])),
        )
    ours = error(flat(run(FusedMAML(model, 0.1, steps, first_order=first_order, backend="fused"), data)[1]))
    assert ours <= 2 * own + 2e-6


def episode(
    sample: tuple[int, ...] = (3,),
    *,
    tasks: int = 3,
    n: tuple[int, int] = (5, 3),
    classes: int = 4,
    target: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int | None = None,
) -> list[Tensor]:
    """Random x_spt, y_spt, x_qry, y_qry.

    Args:
        sample: shape of a sample, so that x is [tasks, n, *sample].
        n: samples a task in the support set and in the query set.
        target: None for labels [tasks, n] in [0, classes); otherwise y is real, [tasks, n, *target].
        seed: None draws from torch's global generator, which every test starts at seed 0.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    data = []
    for count in n:
        data.append(torch.randn(tasks, count, *sample, generator=generator, dtype=dtype))
        if target is None:
            data.append(torch.randint(classes, (tasks, count), generator=generator))
        else:
            data.append(torch.randn(tasks, count, *target, generator=generator, dtype=dtype))
    return data


def fast_parameters(model: nn.Module, tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters [tasks, *shape] that differ from task to task."""
    return {
        name: p.detach() + 0.1 * torch.randn(tasks, *p.shape, dtype=p.dtype, generator=generator)
        for name, p in model.named_parameters()
    }


def pytest_collection_finish() -> None:
    """What is there now stays: tests that look at all objects need not look at modules and at thousands of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch runs on one thread: tensors this small gain nothing from more, and lose when other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class OnGpu(TorchFunctionMode):
    """Creates tensors on the CPU and moves them to the GPU, so that random numbers are the same on both."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        return made.cuda() if function in _device_constructors() and "device" not in kwargs else made


def _no_gpu() -> str:
    """Why tests cannot run on a GPU; "" if they can."""
    if _core.cuda is None:
        return "this build has no CUDA kernels"
    return "" if torch.cuda.is_available() else "there is no GPU"


MACHINES = ("cpu", "cuda_emulated", "cuda")
EMULATIONS = ("cuda_emulated", "cuda_small_tiles")  # with the tile sizes of a GPU, and with small tiles


@contextmanager
def _machine(name: str) -> Iterator[None]:
    """Selects where a test runs: the CPU backend, the CUDA kernels emulated on the CPU, or a GPU.

    MAML_CUDA_MACHINES lists the machines to test (default: all); cuda_emulated stands for both emulations.
    """
    asked = "cuda_emulated" if name in EMULATIONS else name
    if asked not in os.environ.get("MAML_CUDA_MACHINES", ",".join(MACHINES)).split(","):
        pytest.skip("not in MAML_CUDA_MACHINES")
    if name == "cuda" and (why_not := _no_gpu()):
        pytest.skip(why_not)
    # The tolerance is the reference's own float32 error, but torch computes convolutions in TF32 by default.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    small = name == "cuda_small_tiles"
    with emulated.in_place_of_a_gpu(small_tiles=small) if name in EMULATIONS else nullcontext():
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The machine of a test, where the tensors that it creates are. On a GPU the mode disables the fast path."""
    name: str = request.param
    with _machine(name), OnGpu() if name == "cuda" else nullcontext():
        yield name


@pytest.fixture(params=MACHINES)
def plain_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The same machines without a torch function mode: the test moves its tensors to this device itself."""
    with _machine(request.param):
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def check_passes(machine: str) -> Callable[..., None]:
    """A function that checks the four passes of a model's layers in float64, with different parameters per task.

    forward: `predict`. backward: `loss_and_grad`, and the backward of `predict`. Both tangents: `hvp`, against double
    backward.
    """

    def check(model: nn.Module, sample: tuple[int, ...], n: int, tasks: int = 2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        model = model.double()
        maml = FusedMAML(model, 0.1, 1, loss="mse", backend="fused")
        oracle = FusedMAML(model, 0.1, 1, loss="mse", backend="reference")
        x = torch.randn(tasks, n, *sample, dtype=torch.float64, generator=generator)
        fast = fast_parameters(model, tasks, generator)
        v = fast_parameters(model, tasks, generator)
        prediction = oracle.predict(fast, x)
        y = torch.randn(prediction.shape, dtype=torch.float64, generator=generator)
        assert_close({"prediction": maml.predict(fast, x)}, {"prediction": prediction}, 1e-12)
        losses, grads = maml.loss_and_grad(fast, x, y)
        expected_losses, expected = oracle.loss_and_grad(fast, x, y)
        assert_close({"losses": losses}, {"losses": expected_losses}, 1e-12)
        assert_close(grads, expected, 1e-11)
        assert_close(maml.hvp(fast, x, y, v), oracle.hvp(fast, x, y, v), 1e-10)

        leaves = {name: p.clone().requires_grad_() for name, p in fast.items()}
        (maml.predict(leaves, x) * y).sum().backward()
        twins = {name: p.clone().requires_grad_() for name, p in fast.items()}
        (oracle.predict(twins, x) * y).sum().backward()
        assert_close(
            {n: p.grad for n, p in leaves.items()}, {n: p.grad for n, p in twins.items()}, 1e-11
        )  # fmt: skip

    return check
