"""The comparison of two versions: differences are named, equal versions pass, wrong arguments are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import maml_cuda
from benchmarks.same_bits import __main__ as command
from benchmarks.same_bits import alternate, compare, jobs, plans
from benchmarks.same_bits.cases import PLANS, Case
from benchmarks.same_bits.results import digest, named
from benchmarks.same_bits.version import Version
from benchmarks.worker import Failed

HERE = Path(maml_cuda.__file__).parents[1]
BEST = str(maml_cuda.build_info()["cpu_isa"])
TINY = Case("sinusoid-k1", 2, small=True)


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """This version, but that its `adapt` is off by the last bit."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(HERE / "maml_cuda", folder / "maml_cuda", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "maml_cuda" / "fused_maml.py", "a") as file:
        file.write(
            "_adapt = FusedMAML.adapt\n"
            "def _off(self, *args, **options):\n"
            "    found = _adapt(self, *args, **options)\n"
            "    return {n: t.nextafter(t + 1) for n, t in found.items()} if not options else found\n"
            "FusedMAML.adapt = _off\n"
        )
    return folder


def record(error: str = "", **hashes: str) -> dict:
    return {"hashes": hashes, "error": error}


def test_what_differs_is_named():
    old = record(loss="1", gradient="2", adapt="3")
    assert compare.difference(old, record(loss="1", gradient="2", adapt="3")) == ""
    assert (
        compare.difference(old, record(loss="1", gradient="0", adapt="0"))
        == "2 of 3 tensors differ, the first is gradient"
    )


def test_what_one_version_lacks_differs():
    both, one = record(loss="1", adapt="3"), record(loss="1")
    assert compare.difference(both, one) == "1 of 2 tensors differ, the first is adapt (not in NEW)"
    assert compare.difference(one, both) == "1 of 2 tensors differ, the first is adapt (not in OLD)"


def test_a_case_that_does_not_run_differs():
    whole, broken = record(loss="1"), record("ValueError: no", loss="1")
    assert compare.difference(whole, broken) == "NEW: ValueError: no"
    assert compare.difference(broken, whole) == "OLD: ValueError: no"
    assert compare.difference(broken, broken) == "OLD: ValueError: no; NEW: ValueError: no"


def test_report():
    outcomes = [
        compare.Outcome("avx2", Case("omniglot", 1), ""),
        compare.Outcome("avx2", Case(PLANS, number=0), ""),
        compare.Outcome("avx2", Case(PLANS, number=1), "hvp.weight"),
        compare.Outcome("baseline", Case("omniglot", 1), "predict"),
        compare.Outcome("baseline", Case(PLANS, number=0), ""),
    ]
    assert compare.report(outcomes).splitlines() == [
        "| case | avx2 | baseline |",
        "| --- | ---: | ---: |",
        "| omniglot, order 1 | same | **differs** |",
        "| plans | **1 of 2 differ** | same |",
        "",
        "- avx2, plan 1: hvp.weight",
        "- baseline, omniglot, order 1: predict",
        "3 of 5 cases have the same bits.",
    ]


def test_a_digest_is_of_every_bit():
    x = torch.zeros(2, 3)
    others = [-x, x.reshape(3, 2), x.double(), torch.full_like(x, 1e-45), x.long()]
    assert digest(x) == digest(torch.zeros(3, 2).T)
    assert len({digest(t) for t in [x, *others]}) == 1 + len(others)


def test_names_are_paths():
    x = torch.ones(())
    assert [name for name, _ in named("out", {"a": [x, None, (x, x)], "b": 3.0, "c": x})] == [
        "out.a.0", "out.a.2.0", "out.a.2.1", "out.c",
    ]  # fmt: skip


def test_command_passes_a_version_beside_itself(capsys):
    arguments = [str(HERE), str(HERE), "--quick", "--workloads", "sinusoid-k1", "--plans", "2", "--isa", "baseline"]
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "| sinusoid-k1, order 2 | same |",
        "| plans | 2 same |",
        "",
        "4 of 4 cases have the same bits.",
    ]


def test_command_finds_one_bit(changed, capsys):
    arguments = [str(HERE), str(changed), "--quick", "--workloads", "sinusoid-k1", "--plans", "0"]
    assert command.main([*arguments, "--isa", BEST]) == 1
    report = capsys.readouterr().out
    assert f"- {BEST}, sinusoid-k1, order 2: " in report
    assert "tensors differ, the first is adapt.0.weight" in report
    assert report.endswith("0 of 2 cases have the same bits.\n")


def test_a_version_from_elsewhere_is_refused(tmp_path):
    version = Version(tmp_path)
    with pytest.raises(Failed, match=f"maml_cuda must be imported from {tmp_path}, got"):
        version.instruction_sets()
    version.stop()


def test_an_error_ends_the_results_and_not_the_process():
    version = Version(HERE, BEST)
    found = version.bits(Case("nothing"))
    assert found == {"hashes": {}, "error": "KeyError: 'nothing'"}
    assert version.bits(TINY)["error"] == ""
    version.stop()
    assert "not-an-isa" in Version(HERE, "not-an-isa").bits(TINY)["error"]


def test_emulation_must_have_a_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"emulated must have a checkout with tests/.*, got {tmp_path}"):
        jobs.emulation(tmp_path)


def test_plans_are_drawn_by_their_number():
    for number in range(20):
        plan, again, other = (plans.draw(n) for n in (number, number, number + 1000))
        assert str(plan.model) == str(again.model)
        assert str(plan.options) == str(again.options)
        assert all(map(torch.equal, plan.model.parameters(), again.model.parameters()))
        pairs = zip(named("", plan.data), named("", again.data), strict=True)
        assert all(torch.equal(x, y) for (_, x), (_, y) in pairs)
        assert str(plan.model) + str(plan.options) != str(other.model) + str(other.options)


def test_plans_have_every_layer_and_option():
    drawn = [plans.draw(number) for number in range(150)]
    layers = {type(m) for plan in drawn for m in plan.model.modules()}
    assert layers >= {
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d,
        nn.InstanceNorm2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d, nn.Flatten, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU,
        nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Identity,
    }  # fmt: skip
    assert {plan.options["loss"] for plan in drawn} == set(plans.LOSSES)
    assert {plan.options["inner_steps"] for plan in drawn} == {0, 1, 2, 3}
    assert {plan.data[0].dtype for plan in drawn} == {torch.float32, torch.float64}
    options = {name for plan in drawn for name in plan.options}
    assert options >= {"checkpoint", "query_weights", "batch_norm", "adapt_params"}


def test_versions_are_timed_in_turn():
    times = alternate.alternate([HERE, HERE], BEST, TINY, False, 0.04)
    assert len(times.old) == len(times.new) == alternate.ROUNDS
    assert min(times.old + times.new) > 0
    assert alternate.report([times]).count("\n") == 2


def test_slower_needs_most_rounds():
    def times(*ratios: float) -> alternate.Times:
        return alternate.Times("avx2", TINY, True, [1e-3] * len(ratios), [1e-3 * r for r in ratios])

    assert times(1.02, 1.05, 1.05, 1.06).slower
    assert not times(1.00, 1.00, 1.05, 1.06).slower
    assert not times(1.0, 1.0, 1.0, 9.0).slower
    assert alternate.row(times(1.5, 1.5)) == [
        "sinusoid-k1, order 2, through autograd", "avx2", "1 (1 to 1)", "1.5 (1.5 to 1.5)", "1.5 (1.5 to 1.5)",
        "**slower**",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", str(HERE)], "OLD and NEW must be folders that hold a package maml_cuda, got nowhere"),
        ([str(HERE), str(HERE), "--plans", "-1"], "--plans must be at least 0, got -1"),
        ([str(HERE), str(HERE), "--time", "0"], "--time must be above 0, got 0"),
        ([str(HERE), str(HERE), "--isa", "mmx"], "invalid choice: 'mmx'"),
        ([str(HERE), str(HERE), "--plans", "0", "--workloads"], "--workloads must name some, got none"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
