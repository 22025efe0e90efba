"""What the tests share: one body for every backend, and the comparisons with the reference."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

# Read when torch loads OpenMP: the threads of several workers on the same cores must not wait by spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from maml_cuda import FusedMAML, _core, reference
from tests import emulated

# `benchmarks` for the tests. Appended, not prepended: the checkout's maml_cuda must not hide an installed one.
sys.path.append(str(Path(__file__).parents[1]))

ROUNDING = 1e-14  # what rounding leaves of an exactly zero gradient, where the loss and all values are of order 1


def relative_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Per name: |got - expected|, beyond ROUNDING, over |expected| or over 1e-4 of the norm of all of them where that
    is larger. A conv bias before BatchNorm has a gradient of exactly zero, and rounding noise on both sides."""
    assert got.keys() == expected.keys()
    total = torch.stack([e.norm() for e in expected.values()]).norm().item()
    errors = {}
    for name, e in expected.items():
        beyond = (got[name] - e).norm().item() - ROUNDING
        scale = max(e.norm().item(), 1e-4 * total, ROUNDING)
        errors[name] = 0.0 if beyond <= 0 else beyond / scale  # a NaN stays one, and fails
    return errors


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    errors = relative_errors(got, expected)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: relative error {errors[worst]:.2e} > {tolerance:.0e}"


def run(maml: FusedMAML, data: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One meta-step: the loss and every gradient by name, under `inner_lr*` for learned rates."""
    maml.zero_grad()
    loss = maml(*data).loss
    loss.backward()
    grads = {n: p.grad for n, p in maml.model.named_parameters() if p.grad is not None}
    for name, rate in maml.named_parameters(remove_duplicate=False):  # one rate may serve several names
        if name.startswith("inner_lr") and rate.grad is not None:
            grads[name] = rate.grad
    return loss.detach(), grads


def check_meta_gradient(
    model: nn.Module, loss: str, data: list[Tensor], inner_lr: object, steps: int, backend: str = "fused",
    tolerance: float = 1e-10, **options: object,
) -> FusedMAML:  # fmt: skip
    """The fused meta-step against the reference, in the data's own dtype."""
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


def fast_parameters(model: nn.Module, tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Different parameters for every task."""
    return {
        name: p.detach() + 0.1 * torch.randn(tasks, *p.shape, dtype=p.dtype, generator=generator)
        for name, p in model.named_parameters()
    }


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class OnGpu(TorchFunctionMode):
    """Whatever a test creates, with the numbers that it has on the CPU, on the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        return made.cuda() if function in _device_constructors() and "device" not in kwargs else made


def _no_gpu() -> str:
    """Why the tests of the GPU cannot run, or nothing."""
    if _core.cuda is None:
        return "this build has no CUDA kernels"
    return "" if torch.cuda.is_available() else "there is no GPU"


MACHINES = ("cpu", "cuda_emulated", "cuda")
EMULATIONS = ("cuda_emulated", "cuda_small_tiles")  # with the tiles that ship, and with many on small shapes


@contextmanager
def _machine(name: str) -> Iterator[None]:
    """The CPU's layers, the GPU's kernels emulated on the CPU, or those on a GPU. MAML_CUDA_MACHINES names the ones
    wanted, all by default; cuda_emulated asks for both emulations."""
    asked = "cuda_emulated" if name in EMULATIONS else name
    if asked not in os.environ.get("MAML_CUDA_MACHINES", ",".join(MACHINES)).split(","):
        pytest.skip("MAML_CUDA_MACHINES does not ask for it")
    if name == "cuda" and (why_not := _no_gpu()):
        pytest.skip(why_not)
    # float32 is judged by the reference's own error in float32, which torch's convolutions by default are not in.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    small = name == "cuda_small_tiles"
    with emulated.in_place_of_a_gpu(small_tiles=small) if name in EMULATIONS else nullcontext():
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a test runs on. What it creates is there: the mode that sees to it turns a warm call's fast path off."""
    name: str = request.param
    with _machine(name), OnGpu() if name == "cuda" else nullcontext():
        yield name


@pytest.fixture(params=MACHINES)
def plain_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The same machines without a mode: the device on which the test puts its tensors itself."""
    with _machine(request.param):
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def check_passes(machine: str) -> Callable[..., None]:
    """The four passes of the layers of a model, in float64, against autograd and double backward.

    forward: predict; backward: loss_and_grad, and the backward of predict; both tangents: hvp. Per-task parameters.
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
