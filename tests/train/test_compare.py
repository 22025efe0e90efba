"""``maml-cuda compare``: the table and the plot of several runs."""

import json
from pathlib import Path

from maml_cuda.cli import main


def write(folder: Path, **facts) -> str:
    folder.mkdir(parents=True)
    reported = {"steps": 1, "mean": 0.6, "ci95": 0.03}
    summary = {"task": "glyphs", "metric": "accuracy", "steps": [0, 1, 2], "mean": [0.2, 0.6, 0.7], "test_tasks": 50}
    summary |= {"ci95": [0.01, 0.03, 0.02], "reported": reported, "ways": 5, "test_shots": 1}
    (folder / "summary.json").write_text(json.dumps(summary | {"settings": {"preset": "maml"}} | facts))
    return str(folder)


def test_a_table_has_each_run_and_its_difference_from_the_first(tmp_path, capsys) -> None:
    ensemble = {"mean": [0.2, 0.65, 0.7], "ci95": [0.01] * 3, "reported": {"steps": 1, "mean": 0.65, "ci95": 0.04}}
    whole = write(tmp_path / "maml", ensemble=ensemble)
    facts = {"steps": [0], "mean": [0.5], "ci95": [0.04], "reported": {"steps": 0, "mean": 0.5, "ci95": 0.04}}
    second = write(tmp_path / "b $x$", **facts, settings={"preset": "protonet"}, ways=20)
    plot = tmp_path / "plot.png"
    assert main(["compare", whole, second, "--out", str(plot)]) == 0
    first, *rows, difference, tasks, last = capsys.readouterr().out.splitlines()
    assert first == "glyphs: accuracy, mean and 95 % interval over test tasks"
    assert [" ".join(row.split()) for row in rows] == [
        "run algorithm test tasks after 0 steps after 1 step reported difference",
        "maml maml 50 5-way 1-shot 20.0 ± 1.0 % 60.0 ± 3.0 % 60.0 ± 3.0 % (after 1 step)",
        "maml, ensemble maml 50 5-way 1-shot 20.0 ± 1.0 % 65.0 ± 1.0 % 65.0 ± 4.0 % (after 1 step) +5.0 ± 5.0 %",
        "b $x$ protonet 50 20-way 1-shot 50.0 ± 4.0 % - 50.0 ± 4.0 % (after 0 steps) -10.0 ± 5.0 %",
    ]
    assert len({row.index("maml" if "maml" in row else "protonet", 4) for row in rows[2:]}) == 1  # columns
    assert difference == "difference: of the reported accuracy from that of maml"
    assert tasks == "The runs were not tested on the same tasks: they differ in ways."
    assert last == f"{plot}: maml, b $x$"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_policies_and_curves_have_figures_of_their_own(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    policy = write(tmp_path / "policy", task="navigation", metric="return", settings={"baseline": "oracle"})
    text = json.loads((tmp_path / "policy" / "summary.json").read_text())
    for key in ("reported", "ways", "test_shots"):
        del text[key]
    (tmp_path / "policy" / "summary.json").write_text(json.dumps(text))
    assert main(["compare", policy]) == 0
    assert capsys.readouterr().out.splitlines()[2] == (
        "policy  oracle     50          0.20 ± 0.01    0.60 ± 0.03   0.70 ± 0.02 (after 2 steps)"
    )
    assert main(["compare", write(tmp_path / "sine", task="sinusoid", metric="MSE")]) == 0
    assert "0.600 ± 0.030 (after 1 step)" in capsys.readouterr().out


def test_what_is_not_a_finished_run_is_refused(tmp_path, capsys) -> None:
    whole, other = write(tmp_path / "whole"), write(tmp_path / "other", task="omniglot")
    (tmp_path / "begun").mkdir()
    for runs, message in (
        (
            [str(tmp_path / "begun")],
            "begun must be a finished run, got a folder without summary.json; maml-cuda",
        ),
        ([str(tmp_path / "whol")], f"whol must be a finished run, got no folder; did you mean {whole}?"),
        ([whole, other], f"runs must be of one job, got glyphs and omniglot ({other})"),
    ):
        assert main(["compare", *runs, "--out", str(tmp_path / "plot.png")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "plot.png").exists()
    Path(whole, "summary.json").write_text("{}")
    assert main(["compare", whole]) == 2
    assert "summary.json must be the summary of a finished run, got one without task" in capsys.readouterr().err
