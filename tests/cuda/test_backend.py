"""Features of the CUDA backend alone: executors, graphs, chunks of tasks, precisions, labels checked on the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, _core, reference
from maml_cuda.engine import cuda_runner
from maml_cuda.engine.problem import problem_of
from tests.conftest import program_of, relative_errors, run
from tests.cuda.kernel_models import KERNELS, SAMPLES, conv, episodes, mlp
from tests.emulated import controls, log

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]


def runner(maml: FusedMAML, data: list[Tensor], operation: str = "meta_gradient") -> cuda_runner.Runner:
    """The runner of the meta-steps on data of these shapes."""
    x_spt, _, x_qry, _ = data
    double = x_spt.dtype == torch.float64
    key = (
        program_of(maml, data).text,
        operation,
        tuple(x_spt.shape[2:]),
        x_spt.shape[1],
        x_qry.shape[1],
        maml.inner_steps,
    )
    return problem_of(*key, maml.first_order, double, ()).runner(x_spt.device)


@pytest.mark.parametrize(("make", "executor"), [(mlp, "megakernel"), (conv, "batched")])
def test_the_plan_chooses_the_executor(make: Any, executor: str) -> None:
    maml = FusedMAML(make(), 0.1, 2, backend="fused")
    data = episodes(SAMPLES[make], torch.float64)
    maml(*data)
    assert maml.backend == "cuda"
    assert runner(maml, data).executor == executor


@pytest.mark.parametrize(
    ("widths", "samples", "executor"),
    [
        ((64,), 600, "megakernel"),  # all samples at once do not fit: tiles
        ((64, 64), 600, "chunked"),  # too much arithmetic for one block
        ((100, 100), 5, "chunked"),  # the parameters do not fit one block
        ((), 5000, "chunked"),  # too many instructions
        ((128, 128), 5, "batched"),  # nor do the weights and their direction
        ((200,), 600, "batched"),  # too wide for chunks
    ],
)
def test_what_is_too_large_for_one_block_runs_in_chunks_or_batched(
    widths: tuple[int, ...], samples: int, executor: str
) -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *widths, 4)):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    maml = FusedMAML(nn.Sequential(*layers[:-1]), 0.1, 1, backend="fused")
    x, y = torch.randn(2, samples, 3), torch.randint(4, (2, samples))
    data = [x, y, x, y]
    _, grads = run(maml, data)
    assert runner(maml, data).executor == executor
    _, expected = reference.meta_gradient(maml.model, "cross_entropy", *data, 0.1, 1)
    assert max(relative_errors(grads, expected).values()) < 1e-5


@pytest.mark.parametrize("make", [mlp, conv])
def test_a_graph_gives_the_same_bits_for_any_tensors(make: Any) -> None:
    model = make()
    plain = FusedMAML(model, 0.1, 2, cuda_graphs=False, backend="fused")
    graphs = FusedMAML(model, 0.1, 2, backend="fused")
    for seed in range(4):
        data = episodes(SAMPLES[make], torch.float64, tasks=2 + seed % 2, seed=seed)
        (loss, grads), (expected_loss, expected) = run(graphs, data), run(plain, data)
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(grads[name], expected[name]) for name in expected)
        with torch.no_grad():  # a graph reads parameters at their addresses, so it sees new values
            for p in model.parameters():
                p.mul_(0.9)
    for maml, kept in ((graphs, make is conv), (plain, False)):
        captured = [g for g in runner(maml, data)._graphs.values() if g is not None]
        assert bool(captured) is kept


def test_the_graphs_of_a_stream_share_a_workspace() -> None:
    """The largest call gives its size. A graph of the smaller workspace before it is captured again."""
    maml = FusedMAML(conv(), 0.1, 2, backend="fused")
    plain = FusedMAML(maml.model, 0.1, 2, cuda_graphs=False, backend="fused")
    batches = {tasks: episodes((2, 6, 6), torch.float64, tasks=tasks, seed=tasks) for tasks in (1, 5, 2)}
    expected = {tasks: run(plain, data) for tasks, data in batches.items()}
    for tasks in (1, 1, 5, 5, 1, 2, 2, 1, 5):
        loss, grads = run(maml, batches[tasks])
        assert torch.equal(loss, expected[tasks][0])
        assert all(torch.equal(grads[name], expected[tasks][1][name]) for name in grads)
    graphs = [g for g in runner(maml, batches[1])._graphs.values() if g is not None]
    assert len(graphs) == 3
    assert len({id(graph.workspace) for graph in graphs}) == 1
    assert graphs[0].workspace.memory.numel() == runner(maml, batches[1]).workspace(5, 5)


def test_old_graphs_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "MOST_GRAPHS", 2)
    maml = FusedMAML(conv(), 0.1, 1, backend="fused")
    for tasks in (1, 2, 3, 1, 2):
        data = episodes((2, 6, 6), torch.float64, tasks=tasks)
        maml(*data)
        assert len(runner(maml, data)._graphs) <= 2


@pytest.fixture
def emulated(machine: str) -> None:
    if machine != "cuda_emulated":
        pytest.skip("it asks the emulated device, or ends the use of a real one")


KEPT: list[Tensor] = []  # workspaces that the graphs of users_graph use


@contextmanager
def users_graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Captures on a separate stream, as torch.cuda.graph does, and appends the graph to the list.

    Workspaces are never freed, as in the memory pool of such a graph.
    """
    stream = controls().emulation_make_stream(0)
    graph: list[int] = []
    allocate = cuda_runner.Runner._allocate

    def keep(*arguments: Any) -> Tensor:
        KEPT.append(allocate(*arguments))
        return KEPT[-1]

    with monkeypatch.context() as patch:
        patch.setattr(cuda_runner, "stream_of", lambda _: stream)
        patch.setattr(cuda_runner, "is_capturing", lambda: True)
        patch.setattr(cuda_runner.Runner, "_allocate", keep)
        controls().emulation_begin_capture(stream)
        yield graph
        graph.append(controls().emulation_end_capture(stream))


@pytest.mark.usefixtures("emulated")
def test_a_user_graph_has_no_random_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 4)).double()
    maml = FusedMAML(model, 0.1, 1, backend="fused")
    x, y = torch.randn(2, 5, 3, dtype=torch.float64), torch.randint(4, (2, 5))
    maml(x, y, x, y)
    monkeypatch.setattr(cuda_runner, "is_capturing", lambda: True)
    with pytest.raises(ValueError, match="must have no call with dropout in train mode, got one"):
        maml(x, y, x, y)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(("make", "sends"), [(mlp, 0), (conv, 1)])
def test_a_user_graph_reads_the_plan_and_does_not_write_it(
    make: Any, sends: int, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without an earlier call. A replay uses only the addresses of its call, and outlives the caches."""
    maml = FusedMAML(make(), 0.1, 5, backend="fused")
    data = [d.contiguous() for d in episodes(SAMPLES[make], torch.float64)]
    _, expected = run(maml, data)
    parameters = list(maml.parameters())
    if not warm:
        problem_of.cache_clear()
    with users_graph(monkeypatch) as graph:
        maml.zero_grad()
        out = maml.backward(*data)
    assert graph[0] is not None
    assert not any(runner(maml, data)._graphs.values())
    problem_of.cache_clear()
    with log() as logged:
        for _ in range(2):
            with torch.no_grad():
                for p in parameters:
                    p.grad.fill_(float("nan"))
            controls().emulation_replay(graph[0])
            assert all(torch.equal(p.grad, expected[name]) for name, p in maml.model.named_parameters())
        launches = logged()
    assert out.loss.isfinite()
    assert sum("unpack_parcel" in launch["kernel"] for launch in launches) == 2 * sends


def test_static_shared_memory_counts_towards_the_limit_of_a_launch() -> None:
    """A task takes 48,192 bytes and the kernel declares some 3 KB: together more than the default limit of 48 KB."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    rate = nn.Parameter(torch.tensor(0.01))  # learned: the kernel of plain perceptrons does not serve it
    maml = FusedMAML(model, rate, 1, loss="mse", backend="fused")
    data = list(torch.randn(4, 2, 5, 1))
    _, grads = run(maml, data)
    assert runner(maml, data).executor == "megakernel"
    _, expected = reference.meta_gradient(model, "mse", *data, 0.01, 1)
    assert max(relative_errors({name: grads[name] for name in expected}, expected).values()) < 1e-5


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("weights", [False, True])
def test_chunks_of_tasks_change_the_memory_and_no_bit(make: Any, weights: bool) -> None:
    model = make()
    data = episodes(SAMPLES[make], torch.float64, tasks=5)
    weight = torch.rand(5, dtype=torch.float64) if weights else None
    results, memory = [], []
    for chunk in (None, 5, 2, 1):
        maml = FusedMAML(model, 0.1, 2, task_chunk=chunk, backend="fused")
        for _ in range(3):
            maml.zero_grad()
            out = maml(*data, task_weights=weight)
            out.loss.backward()
        results.append(
            [out.loss.detach(), out.logits, out.support_losses, *(p.grad.clone() for p in model.parameters())]
        )
        memory.append(maml.memory_estimate(data[0], data[2]))
        fast = maml.adapt(*data[:2])
        results[-1] += [*fast.values(), maml.predict(fast, data[2])]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert memory[0] == memory[1]
    assert memory[1] > memory[2] > memory[3]


def test_the_estimate_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    allocate = cuda_runner.Runner._allocate

    def spy(self: cuda_runner.Runner, like: Tensor, tasks: int, at_once: int) -> Tensor:
        workspace = allocate(self, like, tasks, at_once)
        sizes.append(workspace.numel() * workspace.element_size())
        return workspace

    monkeypatch.setattr(cuda_runner.Runner, "_allocate", spy)
    maml = FusedMAML(conv(), 0.1, 2, task_chunk=2, backend="fused")
    data = episodes((2, 6, 6), torch.float64)
    expected = maml.memory_estimate(data[0], data[2])
    maml(*data)
    assert sizes == [expected]


def test_out_of_memory_error_names_the_bytes_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    maml = FusedMAML(conv(), 0.1, 2, backend="fused")
    data = episodes((2, 6, 6), torch.float64, tasks=8)
    monkeypatch.setattr(
        cuda_runner.Runner, "workspace", lambda self, tasks, at_once: 1 << 50 if at_once > 2 else 1 << 20
    )

    class Full(Tensor):
        def new_empty(self, *_: Any, **__: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    data[0] = data[0].as_subclass(Full)
    text = problem_of(program_of(maml, data).text, "meta_gradient", (2, 6, 6), 5, 4, 2, False, True)
    words = (
        r"maml_cuda wants 8589934592 MB of workspace on .* for 8 tasks at once .* task_chunk=2 would take 8 MB, "
        r'and checkpoint="recompute" keeps the states of one inner step$'
    )
    with pytest.raises(torch.OutOfMemoryError, match=words):
        text.runner(data[0].device)._allocate(data[0], 8, 8)
    maml = FusedMAML(conv(), 0.1, 2, checkpoint="recompute", backend="fused")
    text = problem_of(program_of(maml, data).text, "meta_gradient", (2, 6, 6), 5, 4, 2, False, True)
    with pytest.raises(torch.OutOfMemoryError, match=r"task_chunk=2 would take 8 MB$"):
        text.runner(data[0].device)._allocate(data[0], 8, 8)


def test_memory_estimate_is_for_fused_models() -> None:
    maml = FusedMAML(mlp(), 0.1, 1, backend="reference")
    data = episodes((3,), torch.float64)
    with pytest.raises(ValueError, match="memory_estimate must have a fused model, got one on the general path"):
        maml.memory_estimate(data[0], data[2])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("bad", [-1, 4, -100])
def test_a_wrong_label_is_an_assertion_on_the_device(make: Any, bad: int, capfd: pytest.CaptureFixture[str]) -> None:
    maml = FusedMAML(make(), 0.1, 1, backend="fused")
    data = episodes(SAMPLES[make], torch.float64)
    data[3][2, 1] = bad
    with pytest.raises(RuntimeError):
        maml(*data)
    printed = capfd.readouterr().out
    assert f"cross_entropy: the label of sample 1 of task 2 is {bad}, expected 0 to 3 for 4 classes" in printed


@pytest.mark.parametrize("make", [mlp, conv])
def test_check_labels_checks_before_the_launch(make: Any) -> None:
    maml = FusedMAML(make(), 0.1, 1, check_labels=True, backend="fused")
    data = episodes(SAMPLES[make], torch.float64)
    data[3][2, 1] = 4
    with pytest.raises(ValueError, match=r"y_qry must hold labels in \[0, 4\), got 4 \(task 2, sample 1\)"):
        maml(*data)


BANDS = {"float32": (0, 3e-6), "bf16x3": (3e-7, 3e-4), "tf32": (2e-5, 2e-2), "bfloat16": (3e-4, 0.3)}


def test_each_precision_has_its_error(allow_precision: None) -> None:
    """On a smooth net, whose derivatives have no jumps. Bands have a lower end: else an unused precision would pass."""
    model, data = conv(), episodes((2, 6, 6), torch.float64)
    _, expected = reference.meta_gradient(model, "cross_entropy", *data, 0.1, 2)
    single, data32 = model.float(), [t.float() if t.is_floating_point() else t for t in data]
    for precision, (least, most) in BANDS.items():
        maml = FusedMAML(single, 0.1, 2, precision=precision, backend="fused")
        assert maml.precision == precision
        _, grads = run(maml, data32)
        total = torch.stack([e.norm() for e in expected.values()]).norm()
        error = torch.stack([(grads[n].double() - e).norm() for n, e in expected.items()]).norm() / total
        assert least <= error <= most, f"{precision}: {error:.1e}"


class Gram(nn.Module):
    """Its only products of matrices are of two values, neither of which is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return (x.transpose(1, 2) @ x).flatten(1) / x.shape[1]


def test_each_precision_has_its_error_in_products_of_two_values(allow_precision: None) -> None:
    torch.manual_seed(0)
    model, x, y = Gram(), torch.randn(2, 4, 24, 16).double(), torch.randn(2, 4, 256).double()
    data = [x[:, :2], y[:, :2], x[:, 2:], y[:, 2:]]
    _, expected = reference.meta_gradient(model, "mse", *data, 0.1, 2)
    single, data32 = model.float(), [t.float() for t in data]
    for precision, (least, most) in BANDS.items():
        _, grads = run(FusedMAML(single, 0.1, 2, loss="mse", precision=precision, backend="fused"), data32)
        error = (grads["scale"].double() - expected["scale"]).norm() / expected["scale"].norm()
        assert least <= error <= most, f"{precision}: {error:.1e}"


def test_float64_is_float64_whatever_the_precision(allow_precision: None) -> None:
    model, data = conv(), episodes((2, 6, 6), torch.float64)
    _, expected = run(FusedMAML(model, 0.1, 2, backend="fused"), data)
    expected = {name: g.clone() for name, g in expected.items()}
    _, grads = run(FusedMAML(model, 0.1, 2, precision="bfloat16", backend="fused"), data)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("emulated")
def test_a_build_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "cuda", None)
    assert cuda_runner.why_not(torch.device("cpu")) == ""
    assert "this build of maml_cuda has no CUDA kernels" in cuda_runner.why_not(torch.device("cuda"))
    assert cuda_runner.why_not(torch.device("xpu")) == "maml_cuda has no fused layers for xpu"
