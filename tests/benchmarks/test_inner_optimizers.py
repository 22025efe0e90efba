"""python -m benchmarks.inner_optimizers and benchmarks.long_inner_loops, on small shapes."""

from __future__ import annotations

import pytest

from benchmarks import inner_optimizers, long_inner_loops, readme
from benchmarks.inner_optimizers import ADAM, BESIDE_LIBRARIES, CLIPPED, MOMENTUM, SIDES, Side, prepared, variant
from maml_cuda.benchmark.timing import Timing
from tests.benchmarks import broken_implementations as broken

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [workload.shrunk() for workload in BESIDE_LIBRARIES]
SINUSOID = SMALL[0]
OURS, LOOP, HIGHER, PARALLEL = SIDES


@pytest.mark.parametrize("name", [MOMENTUM, ADAM])
@pytest.mark.parametrize("workload", SMALL, ids=[workload.name for workload in SMALL])
def test_every_side_has_the_reference_meta_gradient(workload, name):
    sides = prepared(variant(workload, name), SIDES)
    assert list(sides) == [OURS, LOOP, HIGHER, PARALLEL]
    assert sides[OURS].status == sides[LOOP].status == "verified"
    for rival, module in ((HIGHER, "higher"), (PARALLEL, "metalearn")):
        assert (sides[rival].status, sides[rival].reason) in [
            ("verified", ""),
            ("missing", f"No module named {module!r}"),
        ]


def test_clipping_changes_the_meta_gradient_and_is_verified():
    clipped = variant(SINUSOID, CLIPPED)
    assert prepared(clipped, {OURS: SIDES[OURS]})[OURS].status == "verified"
    assert prepared(clipped, {"unclipped": broken.autograd_loop})["unclipped"].status == "wrong"


def test_a_baseline_that_ignores_the_inner_optimizer_is_wrong():
    for name in (MOMENTUM, ADAM):
        assert prepared(variant(SINUSOID, name), {"plain": broken.autograd_loop})["plain"].status == "wrong"


def test_sides_without_a_result_say_why():
    builders = {OURS: SIDES[OURS], "absent": broken.missing, "off": broken.slightly_wrong, "broken": broken.failing}
    sides = prepared(SINUSOID, builders)
    inner_optimizers.timed(sides, 0.001)
    row = ("net, Adam", sides)
    (line,) = list(inner_optimizers.table([row], "net", OURS))[2:]
    name, time, *others = [cell.strip() for cell in line.strip("|").split("|")]
    assert (name, others) == ("net, Adam", ["missing", "wrong", "failed"])
    assert " to " in time
    absent, off, failed = inner_optimizers.not_timed([row])
    assert absent == "- Not timed: absent, net, Adam; missing: No module named 'absent'"
    assert off.startswith("- Not timed: off, net, Adam; wrong: torch.float64 meta-gradient must be within 1e-10 of the")
    assert failed == "- Not timed: broken, net, Adam; failed: RuntimeError: a planted error"


def side(milliseconds: float) -> Side:
    return Side("verified", step=lambda: None, timing=Timing(wall=[milliseconds / 1e3] * 3))


def test_targets():
    missing = Side("missing", "No module named 'metalearn'")
    rows = [
        ("a", {OURS: side(1), HIGHER: side(5), PARALLEL: missing}),
        ("b", {OURS: side(2), HIGHER: side(8), PARALLEL: missing}),
    ]
    assert list(inner_optimizers.library_targets(rows)) == [
        "- Target 5x over higher: met in 1 of 2 rows; missed: b (4.00).",
        "- Target 5x over parallel-metalearn: met in 0 of 0 rows.",
    ]
    rows = [("a", {"SGD": side(10), ADAM: side(13)}), ("b", {"SGD": side(10), ADAM: side(14)})]
    expected = "- Target Adam at most 1.3 times SGD: met in 1 of 2 rows; missed: b (1.40)."
    assert list(inner_optimizers.sgd_targets(rows)) == [expected]
    assert list(inner_optimizers.table(rows, "net", "SGD"))[2] == "| a | 10 (10 to 10) | 13 (13 to 13), **1.30x** |"


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(inner_optimizers, "BESIDE_LIBRARIES", BESIDE_LIBRARIES[:1])
    assert inner_optimizers.main(["--quick", "--seconds", "0.001", "--workload", "overhead", "sinusoid-k5"]) == 0
    out = capsys.readouterr().out
    rows = [line.split(" |")[0].strip("| ") for line in out.splitlines() if line.startswith("|")]
    libraries = ["second order, K = 5", "---", "sinusoid, momentum", "sinusoid, Adam"]
    assert rows == [*libraries, "maml_cuda, inner update", "---", "overhead", "sinusoid-k5"]
    assert "Quick run" in out
    assert "- Target 5x over higher: " in out
    assert "- Target Adam at most 1.3 times SGD: " in out


def test_command_fails_if_maml_cuda_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(inner_optimizers.OWN, OURS, broken.without_gradient)
    arguments = ["--quick", "--seconds", "0.001", "--table", "sgd", "--workload", "overhead"]
    assert inner_optimizers.main(arguments) == 1
    assert "| overhead | wrong | wrong | wrong | wrong |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--page", "--quick"], "--page must go with a full run, got --quick"),
        (["--page", "--table", "sgd"], "--page must go with a full run, got --quick"),
        (["--workload", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        inner_optimizers.main(arguments)
    assert message in capsys.readouterr().err


def test_the_page_has_a_place_for_the_tables(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(readme.PAGE.read_text())
    readme.between(inner_optimizers.BEGIN, "new tables", page)
    assert f"{inner_optimizers.BEGIN}\nnew tables\n{readme.END}" in page.read_text()


def test_memory_of_long_inner_loops():
    rows = list(long_inner_loops.ROWS)[2:4]
    lines = list(long_inner_loops.table(rows, [2, 9]))
    assert lines[0] == "| estimate / resident | K = 2 | K = 9 |"
    for row, line in zip(rows, lines[2:], strict=True):
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert name == row
        (estimate, resident), (more, _) = [[float(number) for number in cell.split(" / ")] for cell in cells]
        assert 0 < estimate <= more
        assert abs(resident - estimate) < 4


def test_long_inner_loops_refuses(capsys):
    with pytest.raises(SystemExit):
        long_inner_loops.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
