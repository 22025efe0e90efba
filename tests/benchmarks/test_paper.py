"""The results page: finding cells by their settings, merging results, and the text of the page."""

import json
from dataclasses import replace

import pytest

from benchmarks.paper import __main__ as paper
from benchmarks.paper import figures, results
from benchmarks.paper.cells import CELLS, TABLES
from benchmarks.paper.page import markdown
from maml_cuda.cli import main as maml_cuda
from maml_cuda.train.settings import Settings
from tests.train.runs import small, trained


def test_the_page_is_written_from_the_kept_figures() -> None:
    page = (paper.DOCS / "results.md").read_text(encoding="utf-8")
    known = results.load(paper.DOCS / "results.json")
    omniglot = "omniglot.png" if (paper.DOCS / "omniglot.png").exists() else None
    assert page == markdown(known, "sinusoid.png", "learning.png", omniglot) + "\n"


def summary(name: str, mean: float, **given) -> dict:
    """The summary.json of a run of the cell, with an invented score."""
    settings = CELLS[name].settings()
    steps = [0] if settings["told"] or settings["algorithm"] == "nearest-pixel" else list(range(11))
    accuracy = settings["job"] != "sinusoid"
    made_up = {
        "metric": "accuracy" if accuracy else "MSE",
        "steps": steps,
        "mean": [mean + count / 1000 for count in steps],
        "ci95": [0.01] * len(steps),
        "test_tasks": 600,
        "test_shots": settings["test_shots"],
        "test_queries": settings["test_queries"],
        "batch_norm": "transductive",
        "meta_iterations": settings["iterations"],
        "seconds": 120.0,
        "cpu_seconds": 60.0,
        "backend": "cpu",
        "threads": 2,
        "settings": settings | {"data": "/somewhere", "backend": "auto"},
        "commit": "abc1234",
        "machine": "a machine, 2 cores",
        "versions": {"torch": "2.13.0"},
    }
    row = min(settings["test_steps"], steps[-1])
    made_up["reported"] = {"steps": row, "mean": made_up["mean"][row], "ci95": 0.01}
    return made_up | given


def page(*runs: dict) -> str:
    return markdown(results.merged({}, runs)[0])


def test_cells_have_different_settings_and_a_command() -> None:
    assert len(CELLS) == sum(len(table.cells) for table in TABLES)  # no two of one name
    for name, cell in CELLS.items():
        settings = cell.settings()
        assert [other for other, of in CELLS.items() if of.is_of(settings)] == [name]
        assert replace(Settings(**settings), seed=1)  # checked again
        assert f"`maml-cuda {' '.join(cell.command)}`" in page()


@pytest.mark.parametrize("name", ["glyphs-5way-1shot-nearest-pixel", "sinusoid-10shot-random"])
def test_the_command_of_a_cell_produces_its_result(tmp_path, capsys, name: str) -> None:
    docs, out = tmp_path / "docs", tmp_path / "runs"
    short = ["--docs", str(docs), "--out", str(out)]
    cell = CELLS[name]
    assert cell.command[0] == "train"
    assert maml_cuda([*cell.command, "--test-tasks", "3", "--out", str(out / name)]) == 0
    run = json.loads((out / name / "summary.json").read_text())
    assert not cell.is_of(run["settings"])  # with fewer test tasks it is another run
    run["settings"]["test_tasks"] = 600
    (out / name / "summary.json").write_text(json.dumps(run))
    assert paper.main(["--run", name, *short]) == 0  # complete: only taken in
    assert "is complete" in capsys.readouterr().out
    assert list(json.loads((docs / "results.json").read_text())) == [name]
    assert run["commit"] in (docs / "results.md").read_text() or run["commit"] is None
    assert paper.main(["--list", *short]) == 0
    assert f"{name} (filled)\n" in capsys.readouterr().out


def test_a_cell_runs_and_an_interrupted_run_resumes(tmp_path, monkeypatch) -> None:
    name, called = "omniglot-5way-1shot-maml", []

    def train(arguments):
        called.append(arguments)
        return 130

    monkeypatch.setattr(paper.cli, "main", train)
    options = ["--run", name, "--data", "here", "--threads", "1", "--out", str(tmp_path), "--docs", str(tmp_path)]
    assert paper.main(options) == 130
    run = str(tmp_path / name)
    words = ["train", "omniglot", "--preset", "maml", "--shots", "1", "--data", "here", "--threads", "1", "--out", run]
    assert called == [words]
    (tmp_path / name / "last").mkdir(parents=True)
    assert paper.main(options) == 130
    assert called[1] == ["train", "--resume", run, "--data", "here", "--threads", "1"]


def test_runs_are_merged_and_unknown_runs_are_reported(tmp_path, capsys) -> None:
    docs, runs = tmp_path / "docs", tmp_path / "runs"
    for folder, run in {
        "a": summary("glyphs-5way-1shot-maml", 0.5),
        "b": summary("sinusoid-5shot-maml", 0.6),
    }.items():
        (runs / folder).mkdir(parents=True)
        (runs / folder / "summary.json").write_text(json.dumps(run))
    assert paper.main([str(runs), "--docs", str(docs)]) == 0
    assert list(json.loads((docs / "results.json").read_text())) == ["sinusoid-5shot-maml", "glyphs-5way-1shot-maml"]
    again = summary("glyphs-5way-1shot-maml", 0.9)
    (runs / "a" / "summary.json").write_text(json.dumps(again))
    stranger = summary("glyphs-5way-1shot-anil", 0.9)
    stranger["settings"]["seed"] = 7
    (runs / "b" / "summary.json").write_text(json.dumps(stranger))
    capsys.readouterr()
    assert paper.main([str(runs / "a"), str(runs / "b"), "--docs", str(docs)]) == 0
    captured = capsys.readouterr()
    assert "no cell has the settings of this run: glyphs anil" in captured.err
    assert f"2 of {len(CELLS)} cells are filled" in captured.out
    known = json.loads((docs / "results.json").read_text())
    assert known["glyphs-5way-1shot-maml"]["mean"][0] == 0.9
    assert (docs / "sinusoid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match=r"must be a run or a folder of runs, .* got none"):
        paper.main([str(docs), "--docs", str(docs)])


def test_a_row_has_score_interval_published_score_times_and_commit() -> None:
    text = page(summary("glyphs-5way-1shot-maml", 0.88), summary("sinusoid-5shot-maml", 0.6))
    assert "| MAML | 88.3 ± 1.0 | 98.7 ± 0.4 (Finn et al. 2017) | 3 | 2.0 | 1.0 | `abc1234` |" in text
    assert (
        "| MAML | 0.601 ± 0.010 | 0.605 ± 0.010 | 0.610 ± 0.010 | 0.67 / 0.38 / 0.35 (Finn et al. 2017) | 2.0 | 1.0 |"
        in text
    )
    assert "- a machine, 2 cores, 2 threads, torch 2.13.0, cpu: sinusoid-5shot-maml, glyphs-5way-1shot-maml" in text


def test_methods_without_adaptation_fill_all_columns_and_without_training_have_no_time() -> None:
    text = page(summary("sinusoid-5shot-oracle", 0.02), summary("glyphs-5way-1shot-nearest-pixel", 0.5))
    assert "| oracle, no adaptation | 0.020 ± 0.010 | 0.020 ± 0.010 | 0.020 ± 0.010 | – | 2.0 | 1.0 |" in text
    assert "| nearest pixel | 50.0 ± 1.0 | – | – | – | – | `abc1234` |" in text


def test_an_ensemble_is_shown_with_its_best_member() -> None:
    voted = {"iterations": [5, 3], "mean": [], "ci95": [], "reported": {"steps": 5, "mean": 0.91, "ci95": 0.01}}
    text = page(summary("glyphs-5way-1shot-maml++", 0.88, ensemble=voted, batch_norm="per_step"))
    assert "| MAML++, ensemble of 2, per_step BatchNorm | 91.0 ± 1.0 (best single: 88.5 ± 1.0) |" in text


@pytest.mark.parametrize(
    ("second", "first", "verdict"),
    [
        (0.80, 0.70, "Second order is better than first order: +10.0 ± 1.4 points"),
        (0.80, 0.79, "Second order and first order do **not** differ beyond the intervals: +1.0 ± 1.4 points"),
        (0.70, 0.80, "Second order is **worse** than first order: -10.0 ± 1.4 points"),
    ],
)
def test_the_page_compares_second_and_first_order(second: float, first: float, verdict: str) -> None:
    both = page(summary("glyphs-20way-1shot-maml", second), summary("glyphs-20way-1shot-fomaml", first))
    assert verdict in both
    assert "(one run each" not in page(summary("glyphs-20way-1shot-maml", second))


def test_second_and_first_order_are_compared_on_the_same_task() -> None:
    text = page(summary("mini-imagenet-5way-1shot-maml", 0.5), summary("mini-imagenet-5way-5shot-fomaml", 0.6))
    assert "(one run each" not in text


def test_the_cells_of_omniglot() -> None:
    iterations = {
        "5way-1shot-maml": 60_000, "5way-1shot-fomaml": 60_000, "5way-1shot-maml-mlp": 60_000,
        "5way-1shot-maml-seed1": 20_000, "5way-1shot-maml-seed2": 20_000, "5way-1shot-maml-alphabets": 20_000,
        "5way-1shot-maml++": 15_000, "5way-1shot-anil": 15_000, "5way-1shot-meta-sgd": 15_000,
        "5way-1shot-reptile": 15_000, "5way-1shot-protonet": 15_000, "5way-1shot-nearest-pixel": 0,
        "5way-5shot-maml": 15_000, "20way-1shot-maml": 10_000, "20way-5shot-maml": 2000,
    }  # fmt: skip
    assert {name: CELLS[f"omniglot-{name}"].settings()["iterations"] for name in iterations} == iterations
    plus = CELLS["omniglot-5way-1shot-maml++"]
    assert (plus.settings()["multi_step_iterations"], plus.settings()["first_order_iterations"]) == (1500, 7500)
    assert (plus.full_iterations, CELLS["omniglot-5way-5shot-maml"].full_iterations) == (50_000, 60_000)


def test_a_run_of_an_earlier_version_belongs_to_its_cell() -> None:
    run = summary("omniglot-5way-1shot-maml", 0.9)
    del run["settings"]["net"]
    run["settings"] |= {"split": "", "data_sha256": "bc32", "image_shape": "1 x 28 x 28"}
    assert list(results.merged({}, [run])[0]) == ["omniglot-5way-1shot-maml"]
    run["settings"]["split"] = "alphabets"
    assert results.merged({}, [run])[1] == ["omniglot maml"]


def test_rows_of_omniglot_have_four_scores_and_the_iterations() -> None:
    means = {"authors": (0.987, 0.004), "support": (0.9, 0.01), "running": (0.2, 0.01)}
    tested = {name: {"mean": mean, "ci95": ci95} for name, (mean, ci95) in means.items()}
    text = page(
        summary("omniglot-5way-1shot-maml", 0.963, protocols=tested),
        summary("omniglot-5way-5shot-maml", 0.95),
        summary("omniglot-5way-1shot-nearest-pixel", 0.5),
    )
    assert "| 15 queries | authors' queries | support | running | published | test steps | iterations |" in text
    assert (
        "| MAML, 5-way 1-shot | 96.6 ± 1.0 | 98.7 ± 0.4 | 90.0 ± 1.0 | 20.0 ± 1.0 | 98.7 ± 0.4 (Finn et al. 2017) | "
        "3 | 60,000 of 60,000 | 2.0 | 1.0 |"
    ) in text
    assert (
        "| MAML, 5-way 5-shot | 95.3 ± 1.0 | – | – | – | 99.9 ± 0.1 (Finn et al. 2017) | 3 | 15,000 of 60,000 |" in text
    )
    assert "| nearest pixel, 5-way 1-shot | 50.0 ± 1.0 | – | – | – | – | – | – | – | – |" in text
    assert "in points (15 queries less support): MAML, 5-way 1-shot +6.6." in text


@pytest.mark.parametrize("preset", ["maml", "maml++", "nearest-pixel"])
def test_a_finished_run_is_tested_as_the_authors_and_with_each_query_by_itself(tmp_path, capsys, preset: str) -> None:
    run, docs = tmp_path / "run", tmp_path / "docs"
    options = ["--protocols", str(run), "--docs", str(docs)]
    trained(run, small("glyphs", preset, iterations=2 if preset != "nearest-pixel" else 0, test_queries=5))
    with pytest.raises(FileNotFoundError, match="must be a run or a folder of runs"):
        paper.main(options)
    assert maml_cuda(["train", "--resume", str(run)]) == 0
    assert paper.main(options) == 0
    found = json.loads((run / "protocols.json").read_text())
    whole = ["--ensemble"] if preset == "maml++" else []
    expected = {"authors": ["--test-queries", "1"]}
    if preset != "nearest-pixel":
        expected |= {name: ["--batch-norm", name] for name in ("support", "running")}
    assert found.keys() == {"iterations", *expected}
    for name, words in expected.items():
        capsys.readouterr()
        assert maml_cuda(["evaluate", str(run), "--json", *words, *whole]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert found[name] == {"queries": evaluated["test_queries"]} | evaluated["reported"]
    (one,) = results.summaries([run])
    assert one["protocols"].keys() == expected.keys()
    (run / "protocols.json").write_text(json.dumps(found | {"iterations": 1}))  # the run went on since
    assert "protocols" not in results.summaries([run])[0]


def test_runs_on_curves_have_no_protocols(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    trained(run, small("sinusoid", "maml", iterations=2))
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="RUNS must be runs on pictures with --protocols, got one of sinusoid"):
        paper.main(["--protocols", str(run), "--docs", str(tmp_path)])
    with pytest.raises(SystemExit):
        paper.main(["--protocols"])
    assert "RUNS must be named with --protocols, got none" in capsys.readouterr().err


def test_the_figure_of_omniglot_needs_a_curve(tmp_path) -> None:
    known, _ = results.merged({}, [summary("omniglot-5way-1shot-anil", 0.5, curve=[[500, 0.4], [1000, 0.5]])])
    assert figures.omniglot(known, tmp_path / "omniglot.png")
    assert (tmp_path / "omniglot.png").read_bytes().startswith(b"\x89PNG")
    assert not figures.omniglot({}, tmp_path / "none.png")
    text = markdown(known, omniglot="omniglot.png")
    assert text.index("## Omniglot") < text.index("](omniglot.png)") < text.index("## mini-ImageNet")


def test_the_figure_needs_a_sinusoid(tmp_path) -> None:
    assert not figures.adaptation({}, tmp_path / "none.png")
    runs = [summary(f"sinusoid-{shots}shot-{of}", 1.0) for shots in (5, 20) for of in ("maml", "oracle")]
    assert figures.adaptation(results.merged({}, runs)[0], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_learning_curves_come_from_the_metrics_of_a_run(tmp_path) -> None:
    run, docs = tmp_path / "run", tmp_path / "docs"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(summary("glyphs-5way-1shot-anil", 0.5)))
    assert "curve" not in results.summaries([run])[0]
    lines = [f"{n},1,0.2,0.5,{n / 100 if n % 2 == 0 else ''}" for n in range(1, 101)]
    (run / "metrics.csv").write_text("\n".join(["iteration,loss,before,after,validation", *lines]) + "\n")
    curve = results.summaries([run])[0]["curve"]
    assert curve == [[4 * n, round(0.04 * n - 0.01, 5)] for n in range(1, 26)]  # the means of two validations each
    assert paper.main([str(run), "--docs", str(docs)]) == 0
    assert (docs / "learning.png").read_bytes().startswith(b"\x89PNG")
    text = (docs / "results.md").read_text()
    assert text.index("20-way 5-shot") < text.index("](learning.png)") < text.index("## Omniglot")
    assert not figures.learning({}, docs / "none.png")


def test_an_unknown_cell_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        paper.main(["--run", "poker"])
    assert "CELL must be a name that --list prints, got poker" in capsys.readouterr().err
