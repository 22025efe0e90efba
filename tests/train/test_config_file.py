"""Options in YAML: every run writes the file that repeats it, and bad files are refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from maml_cuda.cli import main
from maml_cuda.commands import config_file
from maml_cuda.commands.job_kinds import checked_names, job_kind, refuse_ignored
from maml_cuda.rl import settings as rl_settings
from maml_cuda.rl.settings import new_rl_settings
from maml_cuda.train import presets
from maml_cuda.train.jobs import new_settings
from tests.data import published
from tests.train.runs import NAMES, small

SINUSOID = "sinusoid --iterations 20 --meta-batch 2 --hidden 5 --validation-interval 10 --validation-tasks 3"
SINUSOID += " --test-tasks 4 --test-queries 4 --log-interval 5 --learn-inner-lr --inner-lr 0.02 --seed 3"
NAVIGATION = "navigation --iterations 2 --meta-batch 2 --episodes 2 --horizon 4 --hidden 4 --validation-interval 2"
NAVIGATION += " --validation-tasks 2 --test-tasks 2 --test-episodes 2 --test-steps 1 --outer trpo --max-kl 1e-3"
BIRDS = "--iterations 2 --ways 2 --meta-batch 2 --filters 3 --queries 2 --test-queries 2 --validation-interval 2"
BIRDS += " --validation-tasks 2 --test-tasks 2 --inner-steps 2"


@pytest.fixture(autouse=True)
def untested(monkeypatch) -> None:
    """Leaves out the test and the pictures at the end of a run, which take most of the time."""
    for report in ("maml_cuda.train.report", "maml_cuda.rl.report"):
        monkeypatch.setattr(f"{report}.finish", lambda *_: {})
        monkeypatch.setattr(f"{report}.table", lambda _: "")


def settings_of(run: Path) -> dict[str, object]:
    return json.loads((run / "last" / "checkpoint.json").read_text())["settings"]


def bits(run: Path) -> dict[str, bytes]:
    paths = [run / "metrics.csv", run / "config.yaml", *run.rglob("*.safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def settings_in(path: Path):
    """The settings that `maml-cuda train --config` makes of a file."""
    given = config_file.read(str(path))
    kind = job_kind(given["job"])
    given = checked_names(kind, {name: value for name, value in given.items() if name not in config_file.OTHERS})
    refuse_ignored(given, given)
    return kind.new_settings(**given)


@pytest.mark.parametrize(("job", "preset"), NAMES)
def test_the_file_has_the_settings_of_every_preset(tmp_path, job: str, preset: str) -> None:
    used = presets.used_settings(job, preset)
    settings = new_settings(**{name: value for name, value in vars(small(job, preset)).items() if name in used})
    config_file.write(tmp_path, settings, device="cpu", threads=None)
    assert settings_in(tmp_path / "config.yaml") == settings
    assert {"threads", "image_size", "background", "algorithm"}.isdisjoint(config_file.read(tmp_path / "config.yaml"))


@pytest.mark.parametrize("baseline", rl_settings.BASELINES)
@pytest.mark.parametrize("outer", rl_settings.OUTER_STEPS)
def test_the_file_has_the_settings_of_every_policy(tmp_path, baseline: str, outer: str) -> None:
    settings = new_rl_settings("ant-direction", baseline=baseline, start_std=0.3)
    if "outer" in rl_settings.used_settings(baseline, outer):
        settings = new_rl_settings("ant-direction", baseline=baseline, outer=outer, start_std=1e-7)
    config_file.write(tmp_path, settings, processes=2)
    assert settings_in(tmp_path / "config.yaml") == settings
    assert "torchrun --nproc-per-node 2 -m maml_cuda train --config" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("words", [SINUSOID, NAVIGATION])
def test_a_run_is_repeated_to_the_bit(tmp_path, words: str) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(["train", *words.split(), "--threads", "1", "--out", str(first)]) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--out", str(again)]) == 0
    assert bits(first) == bits(again)
    written = yaml.safe_load((first / "config.yaml").read_text())
    assert (written["device"], written["threads"]) == ("cpu", 1)


def test_the_file_of_a_resumed_run_repeats_all_of_it(tmp_path) -> None:
    halves, whole = tmp_path / "halves", tmp_path / "whole"
    assert main(["train", *SINUSOID.split(), "--iterations", "10", "--out", str(halves)]) == 0
    assert main(["train", "--resume", str(halves), "--iterations", "20", "--test-tasks", "5"]) == 0
    assert main(["train", "--config", str(halves / "config.yaml"), "--out", str(whole)]) == 0
    assert bits(halves) == bits(whole)
    assert settings_of(whole)["test_tasks"] == 5


def test_a_run_on_own_images_is_repeated_where_they_are_the_same(tmp_path, capsys) -> None:
    data, first, again = tmp_path / "birds", tmp_path / "first", tmp_path / "again"
    published.birds(data)
    assert main(["train", str(data), *BIRDS.split(), "--background", "#00ff00", "--out", str(first)]) == 0
    written = yaml.safe_load((first / "config.yaml").read_text())
    assert (written["job"], written["data"], written["background"]) == ("folder", str(data), "#00ff00")
    moved = data.rename(tmp_path / "moved")
    repeat = ["train", "--config", str(first / "config.yaml")]
    assert main([*repeat, "--data", str(moved), "--out", str(again)]) == 0
    assert {**bits(first), "config.yaml": b""} == {**bits(again), "config.yaml": b""}
    (moved / "bird 01" / "0.png").write_bytes(published.encoded(published.pixels(99, 20, 18, 3)))
    assert main([*repeat, "--data", str(moved), "--out", str(tmp_path / "other")]) == 2
    words = capsys.readouterr().err
    assert f"{moved} must hold the images of data_sha256, {written['data_sha256']}, got " in words
    assert "; leave data_sha256 out to train on other images" in words
    assert not (tmp_path / "other").exists()


def test_the_command_line_overrides_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "inner_lr: 5e-2  # a comment\nfirst_order: yes\nmeta_lr: 1\ndevice: cuda\nout: mine\n"
    Path("some.yaml").write_text(text)
    words = [*SINUSOID.split(), "--config", "some.yaml", "--device", "cpu", "--no-first-order"]
    assert main(["train", *words]) == 0
    settings = settings_of(Path("mine"))
    assert (settings["inner_lr"], settings["meta_lr"], settings["first_order"]) == (0.02, 1.0, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner-lr: 0.4", "keys of c.yaml must be options of maml-cuda train, got inner-lr; did you mean inner_lr?"),
        ("itertions: 4", "got itertions; did you mean iterations?"),
        ("filters: 4", "got filters; did you mean width?"),
        ("algorithm: reptile", "keys of c.yaml must be options of maml-cuda train, got algorithm"),
        ("3: 4", "keys of c.yaml must be options of maml-cuda train, got 3"),
        ("ways: 5.0", "ways must be an integer in c.yaml, got 5.0"),
        ("ways: true", "ways must be an integer in c.yaml, got True"),
        ("inner_lr: fast", "inner_lr must be a number in c.yaml, got 'fast'"),
        ("inner_lr: '0.4'", "inner_lr must be a number in c.yaml, got '0.4'"),
        ("first_order: 1", "first_order must be true or false in c.yaml, got 1"),
        ("data: 2024", "data must be text in c.yaml, got 2024; put it in quotes"),
        ("background: #fff000", "background must be text in c.yaml, got nothing (text that begins with # must be in"),
        ("ways: 5\nshots: 1\nways: 6", "c.yaml must be YAML without repeated keys, got ways twice in line 3"),
        ("ways: [5", "c.yaml must be YAML without repeated keys, got expected ',' or ']', but got '<stream end>' in"),
        ("a: \x00", "c.yaml must be YAML without repeated keys, got unacceptable character"),
        ("- ways", "c.yaml must hold lines such as inner_lr: 0.4, got ['ways']"),
        ("", "c.yaml must hold lines such as inner_lr: 0.4, got nothing"),
        ("preset: maml\nbaseline: random", "c.yaml must name a preset or a baseline, got both"),
        ("ways: 0", "ways must be at least 1, got 0"),
        ("job: poker", "or a folder of class folders, got 'poker'"),
        ("job: navigation\nways: 5", "ways must be left out for this job, which has no such setting, got 5"),
        ("preset: protonet\ninner_lr: 0.3", "inner_lr must be left out for protonet, which ignores it, got 0.3"),
        ("data_sha256: abc", "data_sha256 must be left out for glyphs, which needs no data, got abc"),
    ],
)
def test_a_bad_file_is_refused_in_words(tmp_path, monkeypatch, capsys, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    assert main(["train", "--config", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("maml-cuda: error: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_another_job_or_preset_than_the_file_has_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("job: glyphs\nbaseline: random\nwidth: 4\n")
    for words in (["sinusoid"], ["--preset", "maml"]):
        assert main(["train", *words, "--config", "c.yaml"]) == 2
    errors = capsys.readouterr().err
    assert "job must be glyphs, to which the other settings in c.yaml belong, got sinusoid; leave job out of" in errors
    assert "preset must be random, to which the other settings in c.yaml belong, got maml; leave preset out" in errors
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "No such file or directory: 'nowhere.yaml'" in capsys.readouterr().err
