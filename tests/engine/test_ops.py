"""The torch.library ops: schemas and fakes, torch.compile, third order, AMP and DDP."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maml_cuda import FusedMAML, PolicyTarget, reference
from maml_cuda.data import Episodes
from tests import oracle
from tests.conftest import assert_close


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """torch.compile with a graph that must not break, forgotten afterwards."""
    torch._dynamo.reset()
    yield lambda f, backend="aot_eager", **given: torch.compile(f, fullgraph=True, backend=backend, **given)
    torch._dynamo.reset()


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def episode(
    tasks: int = 2, n_support: int = 5, n_query: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    data = []
    for n in (n_support, n_query):
        data.append(torch.randn(tasks, n, 3, generator=g, dtype=dtype))
        data.append(torch.randint(4, (tasks, n), generator=g))
    return data


def rate() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.3, 0.2], dtype=torch.float64))


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def step(call: Callable[..., Any], maml: nn.Module, data: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one training step."""
    maml.zero_grad()
    loss = call(*data).loss
    loss.backward()
    return loss.detach(), grads(maml)


def same(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        assert torch.equal(a, b)


# -- schemas -------------------------------------------------------------------------------------------------


class Calls(TorchFunctionMode):
    """The first call of each of our ops, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, tuple, dict]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function).removesuffix(".default").replace(".", "::")
        if name.startswith("maml_cuda::"):
            self.seen.setdefault(name, (function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def calls() -> dict[str, tuple[Any, tuple, dict]]:
    """One call of every op, as FusedMAML makes it."""
    maml = FusedMAML(net(), rate(), 2)
    x_spt, y_spt, x_qry, y_qry = episode()
    fixed = FusedMAML(maml.model, 0.3, 2)
    with Calls() as made:
        maml(x_spt, y_spt, x_qry, y_qry)
        maml.adapt(x_spt, y_spt, differentiable=True)
        fast = maml.adapt(x_spt, y_spt)
        list(maml.inner_loop(x_spt, y_spt, 2))
        fixed.predict(fast, x_qry)
        fixed.predict({name: t.clone().requires_grad_() for name, t in fast.items()}, x_qry)
        fixed.loss_and_grad(fast, x_qry, y_qry)
        fixed.hvp(fast, x_qry, y_qry, fast)
        policy = FusedMAML(net(), 0.1, 2, loss="categorical_policy_gradient")
        actions = PolicyTarget(y_spt, torch.ones(y_spt.shape, dtype=torch.float64))
        policy.fisher_vector_product(x_spt, actions, x_qry, dict(policy.model.named_parameters()))
        Episodes(torch.zeros(3, 4, 2, 2, dtype=torch.uint8), 2, 1, 2).draw(2, seed=0)
    parameters, rates, x, y, plan, steps = made.seen["maml_cuda::adapt_forward"][1]
    cotangents = [torch.ones_like(fast[name]) for name, _ in maml.model.named_parameters()]
    backward = (parameters, rates, x, y, cotangents, plan, steps, False)
    made.seen["maml_cuda::adapt_backward"] = (torch.ops.maml_cuda.adapt_backward, backward, {})
    own, x, plan = made.seen["maml_cuda::predict_forward"][1]
    cotangent = torch.ones(2, 3, 4, dtype=torch.float64)
    made.seen["maml_cuda::predict_backward"] = (
        torch.ops.maml_cuda.predict_backward,
        (own, x, cotangent, plan),
        {},
    )
    return made.seen


OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("maml_cuda::"))


def test_every_op_is_checked() -> None:
    assert len(OPS) >= 10
    assert set(OPS) == set(calls())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    function, args, kwargs = calls()[name]
    op = function if isinstance(function, torch._ops.OpOverload) else function.default
    torch.library.opcheck(op, args, kwargs)


# -- torch.compile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
def test_a_compiled_step_is_the_same_on_the_first_call(compiled: Any, first_order: bool) -> None:
    maml = FusedMAML(net(), rate(), 2, first_order=first_order)
    expected = step(FusedMAML(maml.model, maml.inner_lr, 2, first_order=first_order), maml, episode())
    call = compiled(maml)  # nothing has warmed maml up
    same(step(call, maml, episode()), expected)
    same(step(call, maml, episode(seed=1)), step(maml, maml, episode(seed=1)))


def test_compiled_with_the_optimizer_in_the_loop(compiled: Any) -> None:
    results = []
    for wrap in (compiled, lambda f: f):
        maml = FusedMAML(net(), rate(), 2)
        optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
        call = wrap(maml)
        for seed in range(4):
            step(call, maml, episode(seed=seed))
            optimizer.step()
        results.append([p.detach().clone() for p in maml.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while inductor is imported
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # torch 2.6's own
def test_inductor(compiled: Any) -> None:
    maml = FusedMAML(net(), rate(), 2)
    same(step(compiled(maml, backend="inductor"), maml, episode()), step(maml, maml, episode()))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_other_sizes(compiled: Any, dynamic: bool | None) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    call = compiled(maml, dynamic=dynamic)
    for sizes in ((2, 5, 3), (3, 5, 3), (7, 5, 3), (3, 6, 4)):
        same(step(call, maml, episode(*sizes)), step(maml, maml, episode(*sizes)))


def test_compiled_adapt_and_predict(compiled: Any) -> None:
    maml = FusedMAML(net(), rate(), 2)
    fixed = FusedMAML(maml.model, 0.3, 2)
    data = episode()

    def own_objective(x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Tensor:
        fast = maml.adapt(x_spt, y_spt, differentiable=True)
        return F.cross_entropy(fixed.predict(fast, x_qry).flatten(0, 1), y_qry.flatten())

    results = []
    for call in (compiled(own_objective), own_objective):
        maml.zero_grad()
        loss = call(*data)
        loss.backward()
        results.append((loss.detach(), grads(maml)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_compiled_building_blocks(compiled: Any) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    x_spt, y_spt, x, y = episode()

    def blocks(x_spt: Tensor, y_spt: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        fast = maml.adapt(x_spt, y_spt)
        losses, gradient = maml.loss_and_grad(fast, x, y)
        return (losses, *gradient.values(), *maml.hvp(fast, x, y, gradient).values(), maml.predict(fast, x))

    with torch.no_grad():
        for a, b in zip(compiled(blocks)(x_spt, y_spt, x, y), blocks(x_spt, y_spt, x, y), strict=True):
            assert torch.equal(a, b)


def test_compiled_follows_the_flags() -> None:
    """A flag changed after compilation is seen, as it is without torch.compile."""
    torch._dynamo.reset()
    maml = FusedMAML(net(), 0.3, 2)
    call = torch.compile(maml, backend="aot_eager")
    same(step(call, maml, episode()), step(maml, maml, episode()))
    maml.model[0].weight.requires_grad_(False)
    maml.zero_grad()
    call(*episode()).loss.backward()
    assert maml.model[0].weight.grad is None
    maml.model[3].bias.requires_grad_(True)
    maml.model[2] = nn.ReLU()
    loss, _ = reference.meta_gradient(maml.model, "cross_entropy", *episode(), 0.3, 2)
    torch.testing.assert_close(call(*episode()).loss.detach(), loss, rtol=1e-12, atol=0)
    torch._dynamo.reset()


def test_compiled_for_another_model(compiled: Any) -> None:
    """Its plan is looked at anew, though it was the same when it was made."""
    call = compiled(lambda maml, *data: maml(*data))
    one, other = (
        FusedMAML(nn.Sequential(nn.Linear(3, 7), nn.LeakyReLU(0.2), nn.Linear(7, 4)).double(), 0.3, 2) for _ in range(2)
    )
    other.model[1].negative_slope = 0.9
    for maml in (one, other):
        out = call(maml, *episode())
        out.loss.backward()
        loss, expected = oracle.meta_gradient(maml.model, "cross_entropy", *episode(), 0.3, 2)
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-12, atol=0)
        assert_close({n: p.grad for n, p in maml.model.named_parameters()}, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_in_eval_mode() -> None:
    torch._dynamo.reset()
    maml = FusedMAML(net(), 0.3, 2)
    call = torch.compile(maml, backend="aot_eager")
    call(*episode())
    maml.eval()  # running statistics
    loss, _ = reference.meta_gradient(maml.model, "cross_entropy", *episode(), 0.3, 2)
    torch.testing.assert_close(call(*episode()).loss.detach(), loss, rtol=1e-12, atol=0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_on_the_general_path_compiles_with_breaks() -> None:
    torch._dynamo.reset()
    maml = FusedMAML(nn.Sequential(nn.Linear(3, 5), nn.Softmax(1), nn.Linear(5, 4)).double(), 0.3, 2)
    assert maml.backend == "reference"
    call = torch.compile(maml, backend="aot_eager")
    got, expected = step(call, maml, episode()), step(maml, maml, episode())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    torch._dynamo.reset()


@pytest.mark.parametrize("first", [True, False])
def test_compiled_with_data_that_does_not_fit(compiled: Any, first: bool) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    call = compiled(maml)
    if not first:
        call(*episode())
    x_spt, y_spt, x_qry, y_qry = episode()
    with pytest.raises(Exception, match=r"0 \(Linear\) expects 3 features"):
        call(x_spt[..., :2], y_spt, x_qry[..., :2], y_qry)
    with pytest.raises(ValueError, match=r"y_qry must hold labels in \[0, 4\), got 9"):
        call(x_spt, y_spt, x_qry, torch.full_like(y_qry, 9))
    same(step(call, maml, episode()), step(maml, maml, episode()))


# -- differentiated again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "adapt", "predict"])
@pytest.mark.parametrize("penalty", ["squares", "squares and parameters", "a product"])
def test_a_further_derivative_raises(call: str, penalty: str) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    x_spt, y_spt, x_qry, y_qry = episode()
    inputs = list(maml.parameters())
    if call == "forward":
        value = maml(x_spt, y_spt, x_qry, y_qry).loss
    elif call == "adapt":
        value = sum(t.square().sum() for t in maml.adapt(x_spt, y_spt, differentiable=True).values())
    else:
        fast = maml.adapt(x_spt, y_spt)
        inputs = [t.requires_grad_() for t in fast.values()]
        value = maml.predict(fast, x_qry).square().sum()
    first = torch.autograd.grad(value, inputs, create_graph=True)
    assert all(torch.isfinite(g).all() for g in first)
    total = sum((g**2).sum() for g in first)
    if penalty == "squares and parameters":
        total = total + sum(p.sum() for p in inputs)
    elif penalty == "a product":
        total = sum((g * p).sum() for g, p in zip(first, inputs, strict=True))
    for p in inputs:
        p.grad = None
    order = "second order in the model); hvp gives products" if call == "predict" else "third order in the model"
    with pytest.raises(RuntimeError, match=re.escape(order)):
        total.backward()
    assert all(p.grad is None for p in inputs)  # not even the terms that could be had


def test_a_batch_of_cotangents() -> None:
    maml = FusedMAML(net(), 0.3, 2)
    parameters = list(maml.parameters())
    plain = torch.autograd.grad(FusedMAML(maml.model, 0.3, 2)(*episode()).loss, parameters)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for _ in range(2):  # the second call goes past the dispatcher
        batched = torch.autograd.grad(maml(*episode()).loss, parameters, scales, is_grads_batched=True)
        for one, both in zip(plain, batched, strict=True):
            torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def test_create_graph_does_not_change_the_gradient() -> None:
    maml = FusedMAML(net(), rate(), 2)
    parameters = list(maml.parameters())
    plain = torch.autograd.grad(maml(*episode()).loss, parameters)
    with_graph = torch.autograd.grad(maml(*episode()).loss, parameters, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_graph, strict=True))


# -- AMP -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_ignored(backend: str, dtype: torch.dtype) -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2, backend=backend)
    data = episode(dtype=torch.float32)
    expected = step(maml, maml, data)
    with torch.autocast("cpu", dtype=dtype):
        out = maml(*data)
        fast = maml.adapt(data[0], data[1])
        blocks = blocks_of(maml, fast, data[2], data[3])
    maml.zero_grad()
    out.loss.backward()
    same((out.loss.detach(), grads(maml)), expected)
    for name, t in maml.adapt(data[0], data[1]).items():
        assert torch.equal(fast[name], t)
    for got, plain in zip(blocks, blocks_of(maml, fast, data[2], data[3]), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, plain)


def blocks_of(maml: FusedMAML, fast: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    losses, gradient = maml.loss_and_grad(fast, x, y)
    return [maml.predict(fast, x), losses, *gradient.values(), *maml.hvp(fast, x, y, gradient).values()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_backward_inside_autocast(backend: str) -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2, backend=backend)
    data = episode(dtype=torch.float32)
    expected = step(maml, maml, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(step(maml, maml, data), expected)


def test_inputs_cast_by_autocast_come_back() -> None:
    """What a layer before maml computed in bfloat16 is taken in the model's dtype."""
    maml = FusedMAML(net(torch.float32), 0.3, 2)
    data = [t.bfloat16() if t.is_floating_point() else t for t in episode(dtype=torch.float32)]
    widened = [t.float() if t.is_floating_point() else t for t in data]
    expected = step(maml, maml, widened)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(step(maml, maml, data), expected)


def test_the_scale_of_a_grad_scaler_passes() -> None:
    maml = FusedMAML(net(torch.float32), 0.3, 2)
    data = episode(dtype=torch.float32)
    _, plain = step(maml, maml, data)
    optimizer = torch.optim.SGD(maml.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    maml.zero_grad()
    scaler.scale(maml(*data).loss).backward()
    assert all(torch.equal(p.grad, g * 2**10) for p, g in zip(maml.parameters(), plain, strict=True))
    before = [p.detach().clone() for p in maml.parameters()]
    scaler.unscale_(optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(maml.parameters(), plain, strict=True))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b - g) for p, b, g in zip(maml.parameters(), before, plain, strict=True))


# -- DDP -----------------------------------------------------------------------------------------------------

# In interpreters of their own: a process that has run gloo or OpenMP threads must not be forked.
WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", processes), rank=rank, world_size=processes)
maml, data = torch.load(f"{folder}/input", weights_only=False)
if rank == 1:  # DDP sends rank 0's parameters to all
    with torch.no_grad():
        for p in maml.parameters():
            p.add_(1)
share = len(data[0]) // processes
parallel = DistributedDataParallel(maml)
parallel(*[t[share * rank : share * (rank + 1)] for t in data]).loss.backward()
torch.save([p.grad for p in maml.parameters()], f"{folder}/gradients{rank}")
print("done", flush=True)
sys.stdin.read()  # until killed: a rank that leaves first may cut the other one short
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_ddp_averages_the_tasks(processes: int, tmp_path: Path) -> None:
    model, inner_lr = net(), rate()
    torch.save((FusedMAML(model, inner_lr, 2), episode(4)), tmp_path / "input")
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(processes), str(tmp_path)], stdin=pipe, stdout=pipe, text=True
        )
        for rank in range(processes)
    ]
    deadline = threading.Timer(120, lambda: [worker.kill() for worker in workers])
    deadline.start()
    try:
        assert [worker.stdout.readline() for worker in workers] == ["done\n"] * processes
    finally:
        deadline.cancel()
        for worker in workers:
            worker.kill()
            worker.communicate()
    _, truth = reference.meta_gradient(model, "cross_entropy", *episode(4), inner_lr, 2)
    expected = [truth["inner_lr"], *(truth[name] for name, _ in model.named_parameters())]
    for rank in range(processes):
        for got, g in zip(torch.load(tmp_path / f"gradients{rank}"), expected, strict=True):
            torch.testing.assert_close(got, g, rtol=1e-10, atol=1e-14)
