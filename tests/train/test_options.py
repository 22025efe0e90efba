"""Options of the command: none is ignored silently, and misspelt ones are answered with suggestions."""

import argparse
from dataclasses import MISSING, fields

import pytest

from benchmarks.paper.cells import CELLS
from maml_cuda.cli import main, parser
from maml_cuda.rl import settings as rl_settings
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train import presets
from maml_cuda.train.hints import did_you_mean
from maml_cuda.train.settings import Settings

NAMED = [("glyphs", name) for name in presets.IMAGE_PRESETS] + [("sinusoid", name) for name in presets.CURVE_PRESETS]


def options_of(kind: type) -> dict[str, argparse.Action]:
    """The options of ``train`` that set a field of ``kind``."""
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    names = {field.name for field in fields(kind)} - {"job", "preset", "baseline", "data"}
    return {action.dest: action for action in commands.choices["train"]._actions if action.dest in names}


def typed(action: argparse.Action) -> list[str]:
    """The option with a value that is not its default."""
    option = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [option]
    default = getattr(Settings, action.dest, None)
    return [option, next(word for word in action.choices if word != default) if action.choices else "3"]


def refusal(arguments: list[str], capsys) -> str:
    """The error of a command that is refused before it does anything."""
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("job", "name"), NAMED)
def test_an_option_that_the_preset_ignores_is_refused(tmp_path, capsys, job: str, name: str) -> None:
    used = presets.used_settings(job, name)
    assert used <= {field.name for field in fields(Settings)}
    for dest, action in options_of(Settings).items():
        if dest not in used:
            words = refusal(["train", job, "--preset", name, *typed(action), "--out", str(tmp_path / "run")], capsys)
            assert f"error: {dest} must be left out for {name}, which ignores it, got " in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("baseline", rl_settings.BASELINES)
@pytest.mark.parametrize("outer", rl_settings.OUTER_STEPS)
def test_an_option_that_a_policys_training_ignores_is_refused(tmp_path, capsys, baseline: str, outer: str) -> None:
    used = rl_settings.used_settings(baseline, outer)
    assert used <= {field.name for field in fields(RLSettings)}
    chosen = ["--baseline", baseline] if baseline != "none" else []
    if "outer" in used:
        chosen += ["--outer", outer]
    for dest, action in options_of(RLSettings).items():
        if dest not in used:
            words = refusal(["train", "navigation", *chosen, *typed(action), "--out", str(tmp_path / "run")], capsys)
            assert f"error: {dest} must be left out for navigation with outer " in words
    assert list(tmp_path.iterdir()) == []


def test_every_setting_is_used_by_some_algorithm() -> None:
    some = set().union(*(presets.used_settings(*named) for named in NAMED))
    no_options = {"algorithm", "told", "image_shape"}
    assert {field.name for field in fields(Settings)} - some == no_options
    some = set().union(
        *(rl_settings.used_settings(b, o) for b in rl_settings.BASELINES for o in rl_settings.OUTER_STEPS)
    )
    assert {field.name for field in fields(RLSettings)} - some == {"spaces"}


def test_an_option_may_turn_off_what_is_off_already(tmp_path) -> None:
    off = [field for field in fields(Settings) if field.default is not MISSING]
    assert {"first_order", "inner_batch", "adapted"} < {field.name for field in off}
    sizes = ["--iterations", "1", "--meta-batch", "1", "--ways", "2", "--filters", "2", "--test-tasks", "2"]
    words = ["--no-first-order", "--inner-batch", "0", "--adapted", "all", "--train-ways", "2"]
    assert main(["train", "glyphs", "--preset", "matching", *sizes, *words, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("name", CELLS)
def test_the_commands_of_the_papers_cells_have_no_option_that_is_ignored(name: str) -> None:
    options = parser().parse_args(CELLS[name].command)
    given = {dest for dest in options_of(Settings) if getattr(options, dest) is not None}
    assert given <= presets.used_settings(options.job, options.preset or "maml")


def test_evaluate_refuses_what_the_run_ignores(tmp_path, capsys) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "glyphs", "--baseline", "nearest-pixel", "--test-tasks", "2", "--out", run]) == 0
    words = refusal(["evaluate", run, "--backend", "fused"], capsys)
    assert "backend must be left out for nearest-pixel, which ignores it, got fused" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "--lr", "0.1"],
            "unrecognized arguments: --lr; did you mean --meta-lr, --inner-lr or --learn-inner-lr?\n",
        ),
        (["train", "--inner_lr=0.1"], "unrecognized arguments: --inner_lr=0.1; did you mean --inner-lr?\n"),
        (["train", "--itertions", "3"], "; did you mean --iterations?\n"),
        (["train", "--gpu"], "unrecognized arguments: --gpu; --device cuda runs on a GPU\n"),
        (["evaluate", "run", "--zzz"], "unrecognized arguments: --zzz\nmaml-cuda evaluate --help"),
    ],
)
def test_a_mistyped_option_is_answered_by_what_it_may_have_been(capsys, arguments, words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"maml-cuda {arguments[0]}: error: ")
    assert words in error


def test_mistyped_jobs_presets_and_folders_are_answered_too(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("birds", "runs/sine-1/best"):
        (tmp_path / folder).mkdir(parents=True)
    words = refusal(["train", "omniglt"], capsys)
    assert "ant-velocity, ant-goal, FILE.py:NAME of your own environment, or a folder of class folders, got" in words
    assert "got 'omniglt'; did you mean omniglot?" in words
    assert "; did you mean navigation?" in refusal(["train", "navigaton"], capsys)
    assert "; did you mean birds?" in refusal(["train", "bird"], capsys)
    assert f"; did you mean {tmp_path}/birds?" in refusal(["train", f"{tmp_path}/brids"], capsys)
    assert "got 'fomal'; did you mean fomaml" in refusal(["train", "glyphs", "--preset", "fomal"], capsys)
    assert "no checkpoint in runs/sin-1/last; did you mean runs/sine-1?" in refusal(["evaluate", "runs/sin-1"], capsys)
    assert "--from must be used with --resume: --resume RUN --from best" in refusal(["train", "--from", "best"], capsys)


def test_there_is_no_hint_if_no_name_is_similar() -> None:
    assert did_you_mean("poker", ["glyphs", "sinusoid"]) == ""
    assert did_you_mean("--batch-size", ["--meta-batch", "--seed"]) == "; did you mean --meta-batch?"
