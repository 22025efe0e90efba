"""recurrence: LSTM, GRU and RNN layers over time."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from maml_cuda import FusedMAML, _core
from maml_cuda.plan.schema import Loops, View
from tests.conftest import as_good_as_the_reference, check_meta_gradient, episode, program_of, run

CELLS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
LAST = [("lstm", "c"), *((cell, output) for cell in CELLS for output in ("last", "h"))]  # cells and outputs


class Recurrent(nn.Module):
    """A recurrent layer on sequences [n, length, features].

    Attributes:
        states: what the initial states are: "none", "zeros", "ones", "parameters" or "values".
        output: what is predicted: "all" or "last" of the sequence, or the last "h" or "c".
    """

    def __init__(
        self, cell: str, features: int = 3, hidden: int = 5, *, states: str = "none", output: str = "all",
        inner: int | None = None, head: bool = False, **options: object,
    ) -> None:  # fmt: skip
        super().__init__()
        self.before = nn.Linear(features, inner) if inner else nn.Identity()
        self.layer = CELLS[cell](inner or features, hidden, **options)
        self.states, self.output = states, output
        copies = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        self.count = 2 if cell == "lstm" else 1
        if states == "parameters":
            self.first = nn.ParameterList([nn.Parameter(torch.randn(copies, 1, hidden)) for _ in range(self.count)])
        if states == "values":
            self.first = nn.ModuleList([nn.Linear(features, copies * hidden) for _ in range(self.count)])
        self.copies, self.hidden = copies, hidden
        width = hidden * (2 if self.layer.bidirectional and output in ("all", "last") else 1)
        self.head = nn.Linear(width, 2) if head else nn.Identity()

    def initial(self, x: Tensor) -> object:
        if self.states == "none":
            return None
        n = x.shape[0]
        if self.states in ("zeros", "ones"):
            make = getattr(torch, self.states)
            states = [make(self.copies, n, self.hidden, dtype=x.dtype) for _ in range(self.count)]
        elif self.states == "parameters":
            states = [p.expand(-1, n, -1).contiguous() for p in self.first]
        else:
            states = [f(x[:, 0]).view(n, self.copies, self.hidden).transpose(0, 1) for f in self.first]
        return tuple(states) if self.count == 2 else states[0]

    def forward(self, x: Tensor) -> Tensor:
        states = self.initial(x)
        x = self.before(x)
        y, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1), states)
        y = y if self.layer.batch_first else y.transpose(0, 1)
        if self.output == "all":
            return self.head(y)
        if self.output == "last":
            return self.head(y[:, -1])
        of = last if self.count == 1 else last[0] if self.output == "h" else last[1]
        return self.head(of.transpose(0, 1))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_passes(check_passes, cell, batch_first, bias):
    check_passes(Recurrent(cell, batch_first=batch_first, bias=bias, inner=4), (6, 3), n=3)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("n", "length", "features", "hidden"), [(1, 1, 1, 1), (1, 4, 2, 3), (2, 1, 3, 17), (5, 3, 9, 8)]
)
def test_sizes(check_passes, cell, n, length, features, hidden):
    check_passes(Recurrent(cell, features, hidden, batch_first=True, inner=features), (length, features), n, tasks=1)


@pytest.mark.parametrize("hidden", [125, 180])
def test_weights_beyond_shared_memory(check_passes, hidden):
    """On a GPU one of two recurrent weights fits the shared memory of a block in float64, or none."""
    check_passes(Recurrent("rnn_tanh", 3, hidden, batch_first=True), (2, 3), 2, tasks=1)


@pytest.mark.parametrize(("cell", "output"), [*LAST, *((cell, "all") for cell in CELLS)])
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=["stacked", "bidirectional"])
def test_layers_and_directions(check_passes, cell, output, options):
    check_passes(Recurrent(cell, output=output, batch_first=True, inner=3, **options), (4, 3), n=2, tasks=1)


def test_stacked_and_bidirectional(check_passes):
    for bias in (True, False):
        check_passes(Recurrent("gru", num_layers=2, bidirectional=True, bias=bias, head=True), (4, 3), n=2, tasks=1)


@pytest.mark.parametrize(("cell", "output"), LAST)
@pytest.mark.parametrize("states", ["zeros", "ones", "parameters", "values"])
def test_initial_states(check_passes, cell, states, output):
    model = Recurrent(cell, states=states, output=output, batch_first=True, bidirectional=True)
    check_passes(model, (4, 3), n=3, tasks=1)


@pytest.mark.parametrize("cell", CELLS)
def test_tiles_of_samples(check_passes, cell):
    """More samples than go through the layers at once; the gradients of weights and of initial states add up."""
    check_passes(Recurrent(cell, states="parameters", batch_first=True), (3, 3), n=300, tasks=1)


def test_one_state_as_both_and_read_elsewhere(check_passes):
    """The cotangents of h_0, c_0 and the sequence are added into one value."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            first = x[:, 1].unsqueeze(0)
            y, _ = self.layer(x, (first, first))
            return y + x

    check_passes(Model(), (5, 3), n=3)


def test_of_a_part_in_another_order(check_passes):
    """Sequences that are views: a part in time, reversed, and features that are not contiguous."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = nn.Linear(6, 6), nn.GRU(6, 3)
            self.other, self.head = nn.LSTM(4, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            part = x[:, 1:5].flip(1)
            a, _ = self.layer(part.transpose(0, 1))
            b, _ = self.other(x[:, :4].permute(2, 0, 1))  # time and features exchanged
            return self.head(torch.cat([a[-1], b[-1]], 1))

    check_passes(Model(), (7, 6), n=3)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("adapted", ["head.weight", "layer.weight_hh_l0", "layer.bias_ih_l0", "layer.weight_ih_l0"])
def test_some_parameters_are_adapted(machine, cell, adapted):
    model = Recurrent(cell, output="last", batch_first=True, head=True, inner=3).double()
    model.layer.bias_hh_l0.requires_grad_(False)
    data = episode((4, 3), tasks=2, n=(3, 2), target=(2,))
    check_meta_gradient(model, "mse", data, 0.1, 2, adapt_params=[adapted])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("checkpoint", [None, "recompute"])
def test_meta_gradient(machine, cell, checkpoint):
    model = Recurrent(cell, output="last", batch_first=True, head=True).double()
    data = episode((6, 3), tasks=2, n=(4, 3), target=(2,))
    check_meta_gradient(model, "mse", data, 0.1, 3, checkpoint=checkpoint)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_float32(cell):
    model = Recurrent(cell, 4, 20, output="last", batch_first=True, head=True)
    data = [x.float() if x.is_floating_point() else x for x in episode((12, 4), n=(5, 5), classes=2)]
    as_good_as_the_reference(model, data, 3)


def test_thread_counts_give_equal_bits():
    """One large task, whose products and steps the threads share."""
    model = Recurrent("lstm", 30, 70, output="last", batch_first=True, head=True)
    data = [x.float() for x in episode((9, 30), tasks=1, n=(50, 40), target=(2,))]
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(FusedMAML(copy.deepcopy(model), 0.1, 2, loss="mse", backend="fused"), data))
    torch.set_num_threads(threads)
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(grads[name], g) for name, g in results[0][1].items())


def test_errors_of_the_core():
    model = Recurrent("gru", batch_first=True).double()
    data = episode((4, 3), target=(4, 5))
    plan = program_of(FusedMAML(model, 0.1, loss="mse", backend="fused"), data).plan
    own = [p.detach().expand(3, *p.shape) for p in model.parameters()]
    (index,) = [i for i, node in enumerate(plan.nodes) if node.kind == "recurrence"]
    node = plan.nodes[index]

    def run_with(**changes: object) -> None:
        nodes = [*plan.nodes]
        nodes[index] = replace(node, **changes)
        torch.ops.maml_cuda.predict_forward(own, data[0], replace(plan, nodes=tuple(nodes)).text)

    run_with()
    with pytest.raises(ValueError, match="unknown cell elman"):
        run_with(cell="elman")
    words = r"expects a sequence \[samples, length, features\], states \[samples, hidden\] and four parameters"
    for changes in ({"cell": "lstm"}, {"parameters": node.parameters[:3]}, {"inputs": (0, 0), "loops": node.loops * 2}):
        with pytest.raises(ValueError, match=words):
            run_with(**changes)


def test_offsets_beyond_int32_are_refused():
    model = Recurrent("lstm", 1, 5, batch_first=True)
    plan = program_of(
        FusedMAML(model, 0.1, loss="mse", backend="fused"), episode((4, 1), target=(4, 5), dtype=torch.float32)
    ).plan
    (index,) = [i for i, node in enumerate(plan.nodes) if node.kind == "recurrence"]
    length, hidden = 400_000, 1000
    size = (length + 1) * hidden
    loops = Loops((None, length, 1), (View(length, True, 0, (length, 1, 1)),), View(size, True, 0, (size, hidden, 0)))
    nodes = [*plan.nodes[:index], replace(plan.nodes[index], loops=(loops,)), *plan.nodes[index + 1 :]]
    sizes = {20: 4 * hidden, 100: 4 * hidden * hidden}  # of the small and the large plan
    parameters = tuple(replace(p, size=sizes[p.size], rows=1) for p in plan.parameters)
    own = [torch.empty(1, p.size) for p in parameters]
    text = replace(plan, nodes=tuple(nodes), parameters=parameters).text
    with pytest.raises(_core.Unsupported, match=r"saves 2400000000 values a task; fused are fewer than 2\^31"):
        torch.ops.maml_cuda.predict_forward(own, torch.empty(1, 1, length, 1), text)


def why_not(model: nn.Module, sample: tuple[int, ...]) -> str:
    maml = FusedMAML(model, 0.1, loss="mse")
    x = torch.randn(2, 3, *sample)
    return maml.explain(x).splitlines()[0]


def test_refusals():
    assert "proj_size is not fused" in why_not(nn.Sequential(Recurrent("lstm", proj_size=2, batch_first=True)), (4, 3))
    stacked = Recurrent("gru", num_layers=2, dropout=1.0, batch_first=True)
    assert "dropout=1 between its layers is not fused" in why_not(stacked, (4, 3))
    assert why_not(stacked.eval(), (4, 3)) == "backend: cpu"


def test_packed_sequence_is_refused():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [4] * x.shape[0], batch_first=True)
            return self.layer(packed)[1][0]

    assert "_pack_padded_sequence in the model (Packed): what it computes depends on values" in why_not(
        Packed(), (4, 3)
    )


def test_time_on_the_axis_of_samples_is_refused():
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    assert "whose batch axis is not that of the samples" in why_not(Unbatched(), (3,))
