"""Presets: each one trains, resumes with the same bits and is tested; invalid settings are refused."""

import math
from dataclasses import replace

import pytest
import torch

from maml_cuda.train import presets
from maml_cuda.train.algorithms import make_algorithm
from maml_cuda.train.jobs import new_settings
from maml_cuda.train.loop import Training
from maml_cuda.train.report import finish
from maml_cuda.train.run_info import resumed_settings
from maml_cuda.train.settings import JOBS, named_settings
from tests.train.runs import NAMES, files, interrupt_at, small, trained


@pytest.mark.parametrize(("job", "preset"), NAMES)
def test_every_preset_trains_resumes_with_the_same_bits_and_is_tested(
    tmp_path, monkeypatch, job: str, preset: str
) -> None:
    settings = small(job, preset)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    training = trained(whole, settings)
    initial = make_algorithm(settings).module.state_dict()
    moved = any(not torch.equal(initial[name], p) for name, p in training.module.state_dict().items())
    assert moved == (settings.iterations > 0)
    if settings.iterations:
        halves = Training.start(broken, settings)
        interrupt_at(monkeypatch, halves, 3)
        with pytest.raises(KeyboardInterrupt):
            halves.loop()
        Training.resume(broken, resumed_settings(broken, {})).loop()
        assert files(whole) == files(broken)
    summary = finish(whole, settings)
    assert summary["settings"]["preset"] == preset
    assert summary["steps"] == list(training.algorithm.steps)
    assert all(map(math.isfinite, summary["mean"]))
    assert summary["reported"]["steps"] == min(settings.test_steps, summary["steps"][-1])
    assert summary["reported"]["mean"] == summary["mean"][summary["reported"]["steps"]]
    assert summary["machine"]
    assert (summary["cpu_seconds"] > 0) == (settings.iterations > 0)
    if preset == "maml++":
        assert len(summary["ensemble"]["iterations"]) == 2


@pytest.mark.parametrize("job", JOBS)
def test_every_preset_of_every_job_is_valid(job: str) -> None:
    for name in presets.CURVE_PRESETS if job == "sinusoid" else presets.IMAGE_PRESETS:
        settings = replace(JOBS[job], preset=name, **presets.preset_settings(job, name))
        assert replace(settings, ways=settings.ways) == settings  # replace() validates them again


def test_options_override_the_preset_which_overrides_the_job() -> None:
    settings = new_settings("glyphs", "fomaml", inner_lr=0.1)
    assert (settings.first_order, settings.inner_lr, settings.meta_batch) == (True, 0.1, JOBS["glyphs"].meta_batch)
    assert not new_settings("glyphs", "fomaml", first_order=False).first_order
    assert new_settings("glyphs", "reptile", shots=5).test_shots == 5


# --train-shots, --inner-batch, --inner-iters, --meta-iters of the commands in the README of supervised-reptile, by data
# set, --classes and --shots; --meta-batch 5, --meta-step 1 and --meta-step-final 0 in all of them.
REPTILE = {
    ("omniglot", 5, 1): (10, 10, 5, 100_000),
    ("omniglot", 5, 5): (10, 10, 5, 100_000),
    ("omniglot", 20, 1): (10, 20, 10, 200_000),
    ("omniglot", 20, 5): (10, 20, 10, 200_000),
    ("mini-imagenet", 5, 1): (15, 10, 8, 100_000),
    ("mini-imagenet", 5, 5): (15, 10, 8, 100_000),
}


@pytest.mark.parametrize(("job", "ways", "shots"), REPTILE)
def test_reptile_has_the_sizes_of_its_authors(job: str, ways: int, shots: int) -> None:
    s = named_settings(job, "reptile", ways=ways, shots=shots)
    assert (s.shots + s.queries, s.inner_batch, s.inner_steps, s.iterations) == REPTILE[job, ways, shots]
    assert (s.shots, s.test_shots, s.meta_batch, s.meta_lr, s.meta_schedule) == (shots, shots, 5, 1.0, "linear")


def test_reptile_on_glyphs_has_the_sizes_of_omniglot() -> None:
    for ways, shots in ((5, 1), (5, 5), (20, 1), (30, 12)):
        s = named_settings("glyphs", "reptile", ways=ways, shots=shots)
        images, batch, steps, _ = REPTILE["omniglot", min(ways, 20), 1]
        assert (s.shots + s.queries, s.inner_batch, s.inner_steps) == (max(images, shots + 1), batch, steps)
        assert s.iterations == JOBS["glyphs"].iterations


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "mamba"}, "preset must be one of maml, fomaml, anil, .* for glyphs, got 'mamba'"),
        ({"job": "sinusoid", "preset": "protonet"}, "preset must be one of maml, .*, oracle, random for sinusoid, got"),
        ({"adapted": "body"}, "adapted must be one of all, no-norm, head, got 'body'"),
        ({"learn_inner_lr": "always"}, "learn_inner_lr must be one of nothing, step, layer, element, got 'always'"),
        ({"told": True}, "told must be left out for glyphs, whose tasks have no amplitude and phase"),
        ({"train_ways": 7}, "train_ways must equal ways, 5, for maml, got 7"),
        ({"preset": "random", "iterations": 3}, "iterations must be 0 for random, an untrained net, got 3"),
        ({"preset": "nearest-pixel", "iterations": 3}, "iterations must be 0 for nearest-pixel, .*, got 3"),
        ({"preset": "reptile", "first_order": True}, "first_order must be left out for reptile, got True"),
        ({"multi_step_iterations": 3, "inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"batch_norm": "per_step"}, "adapted must be no-norm or head if batch_norm is per_step, whose parameters"),
        ({"best_checkpoints": 0}, "best_checkpoints must be at least 1, got 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_settings(**given)


def test_the_iterations_of_a_schedule_cannot_change(tmp_path) -> None:
    trained(tmp_path, small("sinusoid", "reptile"))
    with pytest.raises(ValueError, match=r"iterations must stay 6 in the resumed run .*, got 9"):
        resumed_settings(tmp_path, {"iterations": 9})
