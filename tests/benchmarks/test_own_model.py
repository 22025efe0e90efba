"""`maml-cuda benchmark`: the sides of a user's model are proven before they are timed, and errors are said first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from maml_cuda.benchmark import baselines, measuring, report
from maml_cuda.benchmark.cases import BATCH_NORM, DROPOUT, EVAL, new_case
from maml_cuda.benchmark.options import Options
from maml_cuda.cli import main
from tests.benchmarks import broken_implementations as broken

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NETS = """
import torch
from torch import nn
from beside import WIDTH

def make_net():
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))

class Dropping(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2))

class Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.linalg.qr(self.first(x).T @ self.first(x) + torch.eye(4, dtype=x.dtype))[0][:1]
                         .expand(len(x), 4) * self.first(x))

def frozen():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    net[0].bias.requires_grad_(False)
    return net

def words():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) + torch.randn(())

class Pair(Noisy):
    def forward(self, x):
        return x, x

class Whole(Noisy):
    def forward(self, x):
        return self.linear(x).mean((0, 1))

def half(): return make_net().half()
def nothing(): return nn.Flatten()
def takes(n): return nn.Linear(n, 2)
def raises(): raise RuntimeError("a planted error")
def a_list(): return [nn.Linear(3, 2)]
def useless():
    net = nn.Linear(3, 2)
    net.spare = nn.Parameter(torch.zeros(1))
    return net
NUMBER = 3
"""
SIZES = ["--ways", "2", "--support", "2", "--query", "3", "--tasks", "2", "--inner-steps", "2", "--inner-lr", "0.1"]
SIZES += ["--seconds", "0.01"]


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 5\n")
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def case_of(nets: Path, function: str, **options) -> measuring.Case:
    sizes = {"input": (3,), "support": 2, "query": 3, "tasks": 2, "inner_steps": 2, "inner_lr": 0.1}
    if options.get("loss") != "mse":
        sizes["ways"] = 2
    return new_case(Options(f"{nets}:{function}", **sizes | options), CPU)


def sides_of(record) -> dict[tuple[str, str], dict]:
    return {(side["order"], side["side"]): side for side in record["sides"]}


def test_the_sides_of_a_users_model_are_proven_and_timed(nets, capsys) -> None:
    assert main(["benchmark", "--model", f"{nets}:make_net", "--input", "3", *SIZES, "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert printed.err.startswith("proving the second-order meta-gradients against float64\nproving the first-order")
    assert (record["parameters"], record["input"], record["ways"]) == (32, [3], 2)
    assert (record["tasks"], record["support"], record["query"]) == (2, 4, 6)
    assert (record["backend"], record["why_not_fused"]) == ("cpu", None)
    assert record["explain"].startswith("backend: cpu")
    assert [*sides_of(record)] == [
        (order, name) for order in ("second", "first") for name in ("maml_cuda", "autograd loop", "torch.func vmap")
    ]
    for side in record["sides"]:
        assert side["status"] == "timed"
        assert side["error_float64"] < 1e-12 < side["error"] < 1e-4
        assert 0 < side["wall_ms"]["q1"] <= side["wall_ms"]["median"] <= side["wall_ms"]["q3"]
        assert side["steps"] >= 3
    assert record["conclusion"].startswith("Take from this: at second order ")


def test_a_model_of_this_package_in_words(capsys) -> None:
    sizes = ["--support", "2", "--query", "2", "--tasks", "1", "--inner-steps", "1", "--seconds", "0.01"]
    assert main(["benchmark", "--model", "mlp", *sizes]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "mlp: 1,761 parameters, input 1, mse, float32\n1 task, 2 support and 2 query samples each; 1 inn"
    )
    assert "maml_cuda runs this model on its fused layers (backend cpu)." in out
    assert "second  maml_cuda" in out
    assert out.splitlines()[-1].startswith("Take from this: ")


def test_what_is_not_fused_says_why(nets) -> None:
    record = measuring.measure(case_of(nets, "Sorting"), 0.01)
    assert record["backend"] == "reference"
    assert "qr" in record["why_not_fused"]
    assert sides_of(record)["second", "maml_cuda"]["status"] == "timed"
    text = report.text(record | {"conclusion": report.conclusion(record)})
    assert f"by plain autograd (the general path), because {record['why_not_fused']}." in text
    assert text.endswith(". A model whose layers are all fused would be faster.")


def test_dropout_and_batch_norm_are_proven_too(nets) -> None:
    case = case_of(nets, "Dropping")
    assert case.notes == (BATCH_NORM, DROPOUT)
    record = measuring.measure(case, 0.01)
    assert {side["status"] for side in record["sides"]} == {"timed"}, record["sides"]
    assert record["backend"] == "cpu"


@pytest.mark.parametrize(
    ("function", "options"), [("frozen", {}), ("words", {"vocabulary": 7}), ("make_net", {"loss": "mse"})]
)
def test_other_models(nets, function, options) -> None:
    case = case_of(nets, function, **options)
    assert case.notes == ((EVAL,) if function == "frozen" else ())
    record = measuring.measure(case, 0.01)
    assert {side["status"] for side in record["sides"]} == {"timed"}, record["sides"]


def test_a_side_that_is_wrong_or_fails_is_not_timed(nets, monkeypatch) -> None:
    monkeypatch.setattr(baselines, "func_vmap", broken.first_order_only)
    monkeypatch.setattr(baselines, "autograd_loop", broken.failing)
    record = measuring.measure(case_of(nets, "make_net"), 0.01)
    found = sides_of(record)
    assert found["second", "torch.func vmap"]["status"] == "wrong"
    assert "float64 meta-gradient must be within 1e-08" in found["second", "torch.func vmap"]["reason"]
    assert found["first", "torch.func vmap"]["status"] == "timed"  # which it is
    assert found["second", "autograd loop"] == {
        "order": "second", "side": "autograd loop", "status": "failed", "reason": "RuntimeError: a planted error",
    }  # fmt: skip
    text = report.text(record | {"conclusion": report.conclusion(record)})
    assert "Not timed: autograd loop, second order; failed: RuntimeError: a planted error" in text
    assert "and nothing else could be timed" in text


def test_a_side_that_fails_later_or_in_float32_is_not_timed(nets, monkeypatch) -> None:
    monkeypatch.setattr(baselines, "func_vmap", broken.wrong_in_float32)
    monkeypatch.setattr(baselines, "autograd_loop", broken.failing_later)
    found = sides_of(measuring.measure(case_of(nets, "make_net"), 0.01))
    assert "float32 meta-gradient must be within 0.001" in found["second", "torch.func vmap"]["reason"]
    assert found["second", "autograd loop"]["reason"] == "while it was timed: RuntimeError: a planted later error"


def test_vmap_is_not_tried_where_it_would_fill_the_memory(nets, monkeypatch) -> None:
    monkeypatch.setattr(measuring, "_free_memory", lambda: 2**20)
    monkeypatch.setattr(measuring, "peak_bytes", lambda step: 2**30)
    side = sides_of(measuring.measure(case_of(nets, "make_net"), 0.01))["second", "torch.func vmap"]
    assert side["status"] == "not tried"
    assert side["reason"] == "all tasks at once would take about 4.0 GiB in float64, and 0.0 GiB are free"


def record_of(ours: float | None, loop: float | None = None, first: float = 1.0, why: str | None = None):
    def side(order: str, name: str, median: float | None):
        if median is None:
            return {"order": order, "side": name, "status": "wrong", "reason": "too far off"}
        wall = {"q1": 0.99 * median, "median": median, "q3": 1.01 * median}
        return {"order": order, "side": name, "status": "timed", "wall_ms": wall}

    second = [side("second", "maml_cuda", ours), side("second", "autograd loop", loop)]
    return {"why_not_fused": why, "sides": [*second, side("first", "maml_cuda", first)]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (record_of(2.0, 9.0), "at second order maml_cuda takes 2 ms, 4.5 times as fast as autograd loop, the fastest"),
        (record_of(9.0, 2.0), "at second order autograd loop is the faster choice: it takes 2 ms, and maml_cuda 9 ms;"),
        (
            record_of(2.0, 2.01),
            "at second order maml_cuda takes 2 ms, about as long as autograd loop, the fastest other",
        ),
        (record_of(2.0), "at second order maml_cuda takes 2 ms, and nothing else could be timed;"),
        (record_of(None, 2.0), "at second order maml_cuda has no result that could be timed, for the reason above;"),
        (record_of(2.0, 9.0), "; with maml_cuda, second order takes 2.0 times as long as first."),
        (record_of(2.0, 9.0, why="no"), "as first. A model whose layers are all fused would be faster."),
    ],
)
def test_the_last_sentence(record, words) -> None:
    assert words in report.conclusion(record)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model conv5",
            "MODULE:FUNCTION or one of conv4, conv4-max-pool, mlp, got conv5; did you mean",
        ),
        ("--model nets.py", "got nets.py; did you mean nets.py:make_net?"),
        ("--model net.py:make_net --input 3", "net.py must be a Python file, got none; did you mean"),
        (
            "--model no_such_module:make --input 3",
            "no_such_module must be a module that is installed, on PYTHONPATH or in ",
        ),
        (
            "--model nets.py:make_ned --input 3",
            "nets.py must define make_ned, got a module without it; did you mean make_net?",
        ),
        (
            "--model nets.py:NUMBER --input 3",
            "model must name a function, got nets.py:NUMBER of type int",
        ),
        (
            "--model nets.py:make_net",
            "input must be the shape of one sample for a model of your own, like 3,84,84",
        ),
        ("--model nets.py:make_net --input 0", "input must be sizes of at least 1, got 0"),
        (
            "--model nets.py:takes --input 3",
            "must return a model when called without arguments, got TypeError",
        ),
        ("--model nets.py:raises --input 3", "got RuntimeError: a planted error ("),
        ("--model nets.py:a_list --input 3", "nets.py:a_list must return an nn.Module, got list"),
        ("--model nets.py:half --input 3", "the model's parameters must be float32 or float64, got torch.float16"),
        ("--model nets.py:nothing --input 2", "model must have parameters that require grad, got none"),
        ("--model nets.py:make_net --input 4", "the model must take an input [4, 4], got RuntimeError: mat1 and mat2"),
        ("--model nets.py:make_net --input 3 --vocabulary 9", "the model must take an input [4, 3] of integers, got"),
        (
            "--model nets.py:make_net --input 3 --ways 3",
            "the model's output must be [6, 3], [samples, ways], for",
        ),
        ("--model nets.py:Pair --input 3", "the model must return a tensor, got tuple"),
        (
            "--model nets.py:Whole --input 3 --loss mse",
            "the model's output must have 2 samples, as its input, got []",
        ),
        ("--model nets.py:Noisy --input 3", "the model must give the same output twice in eval mode, got two outputs"),
        ("--model nets.py:useless --input 3", "adapted parameter spare does not reach the support loss"),
        ("--model nets.py:make_net --input 3 --inner-lr 1e200", "meta-gradient in float64 must be finite and not zero"),
        (
            "--model broken.py:make --input 3",
            "broken.py must be importable, got ZeroDivisionError: division by zero (",
        ),
        ("--model conv4 --input 28,28", "input must be like 1,28,28 for conv4, got 28,28"),
        ("--model mlp --ways 3", "ways must be left out with mse, which has no classes, got 3"),
        ("--model mlp --vocabulary 3", "vocabulary must be left out for mlp, got 3"),
        ("--support 0", "support must be at least 1, got 0"),
        ("--inner-lr -1", "inner_lr must be finite and above 0, got -1.0"),
        ("--seconds nan", "seconds must be finite and above 0, got nan"),
        ("--device tpu", "device must be cpu, cuda or cuda:N, got tpu"),
    ],
)
def test_errors_come_before_anything_is_measured(nets, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(nets.parent)
    (nets.parent / "broken.py").write_text("1 / 0\n")
    ways = [] if "--ways" in words or "mlp" in words or "mse" in words else ["--ways", "2"]
    given = [*words.split(), *ways]
    sizes = {"--support": "2", "--query": "3", "--tasks": "2", "--inner-steps": "2", "--seconds": "0.01"}
    more = [text for name, size in sizes.items() if name not in given for text in (name, size)]
    assert main(["benchmark", *given, *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert "timing" not in printed.err


def test_a_shape_is_numbers(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "--input", "3xx"])
    assert "argument --input: must be sizes like 3,84,84, got 3xx" in capsys.readouterr().err


def test_a_module_instance_and_a_module_by_name(nets, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(nets.parent))
    (nets.parent / "nets_by_name.py").write_text("from torch import nn\nNET = nn.Linear(3, 2)\n")
    options = Options("nets_by_name:NET", (3,), ways=2, support=1, query=1, tasks=1)
    assert isinstance(new_case(options, CPU).model, nn.Linear)
