"""The training loop: resumed and interrupted runs have the same bits, and validation does not affect training."""

import json
import signal

import pytest
import torch

from maml_cuda.train.algorithms import make_algorithm
from maml_cuda.train.evaluate import CHUNK, evaluate, mean_and_ci95
from maml_cuda.train.jobs import format_score, make_generator, make_maml, make_tasks, new_settings, score
from maml_cuda.train.loop import COLUMNS, Training
from maml_cuda.train.models import conv4, conv4_max_pool, image_mlp
from maml_cuda.train.report import finish, load_run
from maml_cuda.train.run_info import resumed_settings
from maml_cuda.train.settings import JOBS, Settings
from tests.train.runs import files, interrupt_at, resumed, rows, tiny, trained


@pytest.mark.parametrize("job", ["glyphs", "sinusoid"])
@pytest.mark.parametrize("learn_inner_lr", ["", "step"])
def test_a_resumed_run_has_the_same_bits(tmp_path, job: str, learn_inner_lr: str) -> None:
    settings = {"inner_steps": 2, "learn_inner_lr": learn_inner_lr}
    trained(tmp_path / "whole", tiny(job, **settings))
    trained(tmp_path / "halves", tiny(job, iterations=20, **settings))
    resumed(tmp_path / "halves", iterations=40)
    whole = files(tmp_path / "whole")
    assert whole == files(tmp_path / "halves")
    assert sorted(whole) == [
        *(f"{name}/{file}" for name in ("best", "last")
          for file in ("checkpoint.json", "model.safetensors", "training.safetensors")),
        "metrics.csv",
    ]  # fmt: skip


def test_an_interrupted_run_resumes_with_the_same_bits(tmp_path, monkeypatch) -> None:
    trained(tmp_path / "whole", tiny("sinusoid"))
    training = Training.start(tmp_path / "broken", tiny("sinusoid"))
    interrupt_at(monkeypatch, training, 13)  # in the middle of a logging and of a validation interval
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.loop()
    assert signal.getsignal(signal.SIGINT) is handler
    assert Training.resume(tmp_path / "broken", training.settings).iteration == 13
    resumed(tmp_path / "broken")
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_a_crashed_run_resumes_from_its_last_checkpoint_with_the_same_bits(tmp_path, monkeypatch) -> None:
    trained(tmp_path / "whole", tiny("sinusoid"))
    training = Training.start(tmp_path / "broken", tiny("sinusoid"))

    def crash(name: str) -> None:
        if training.iteration == 30:
            raise MemoryError
        Training.save(training, name)

    monkeypatch.setattr(training, "save", crash)
    with pytest.raises(MemoryError):
        training.loop()
    with (tmp_path / "broken" / "metrics.csv").open("a") as metrics:
        metrics.write("35,0.12")  # a row that a crash has truncated
    assert Training.resume(tmp_path / "broken", training.settings).iteration == 20
    resumed(tmp_path / "broken")
    assert files(tmp_path / "whole") == files(tmp_path / "broken")


def test_validation_does_not_affect_training(tmp_path) -> None:
    often = trained(tmp_path / "often", tiny("glyphs", iterations=12, validation_interval=2))
    never = trained(tmp_path / "never", tiny("glyphs", iterations=12, validation_interval=100))
    for name, tensor in often.algorithm.module.state_dict().items():
        assert torch.equal(tensor, never.algorithm.module.state_dict()[name])
    validated = [float(row["validation"]) for row in rows(tmp_path / "often") if row["validation"]]
    assert len(validated) == 6
    assert often.bests[0]["score"] == pytest.approx(max(validated), rel=1e-5)
    assert never.bests == []
    assert (tmp_path / "never" / "best" / "model.safetensors").is_file()


def test_metrics_have_a_row_where_one_is_due_and_learn(tmp_path) -> None:
    settings = new_settings("sinusoid", iterations=120, meta_lr=0.01, log_interval=40, validation_interval=60)
    trained(tmp_path / "run", settings)
    found = rows(tmp_path / "run")
    assert tuple(found[0]) == COLUMNS
    assert [(row["iteration"], bool(row["loss"]), bool(row["validation"])) for row in found] == [
        ("40", True, False),
        ("60", False, True),
        ("80", True, False),
        ("120", True, True),
    ]
    assert float(found[3]["loss"]) < 0.9 * float(found[0]["loss"])
    assert float(found[3]["after"]) < 0.9 * float(found[3]["before"])
    assert found[3]["loss"] == found[3]["after"]  # the sinusoid's loss is its metric


def test_seconds_add_up_over_resumes(tmp_path) -> None:
    run = tmp_path / "run"
    trained(run, tiny("sinusoid", iterations=10))
    path = run / "last" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    assert 1000 < resumed(run, iterations=20).seconds < 1100


def test_the_summary_says_what_was_trained_and_how_good_it_is(tmp_path) -> None:
    run = tmp_path / "run"
    trained(run, tiny("glyphs", iterations=20))
    summary = finish(run, tiny("glyphs", iterations=20))
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["task"] == "glyphs"
    assert summary["metric"] == "accuracy"
    assert summary["steps"] == list(range(11))
    assert len(summary["mean"]) == len(summary["ci95"]) == 11
    assert summary["meta_iterations"] == 20
    assert summary["tasks_per_second"] == pytest.approx(40 / summary["seconds"])
    assert Settings(**summary["settings"]) == tiny("glyphs", iterations=20)
    assert torch.__version__.startswith(summary["versions"]["torch"])  # a package may leave "+cu130" away
    assert sorted(path.name for path in run.glob("*.png")) == [
        "adaptation.png",
        "learning_curves.png",
        "task.png",
    ]
    for path in run.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_sinusoid_gets_a_picture_of_its_fits(tmp_path) -> None:
    trained(tmp_path, tiny("sinusoid", iterations=10))
    finish(tmp_path, tiny("sinusoid", iterations=10))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "adaptation.png",
        "fits.png",
        "learning_curves.png",
    ]


def test_the_best_checkpoint_is_the_one_that_validated_best(tmp_path) -> None:
    training = trained(tmp_path, tiny("sinusoid", meta_lr=0.3))  # a large rate, so that the last is not the best
    by_score = min((row for row in rows(tmp_path) if row["validation"]), key=lambda row: float(row["validation"]))
    algorithm, info = load_run(tmp_path)
    assert info["iteration"] == training.bests[0]["iteration"] == int(by_score["iteration"]) < 40
    settings = training.settings
    tasks, generator = make_tasks(settings, "validation"), make_generator(settings, "validation")
    scores = evaluate(algorithm.predictions, "sinusoid", tasks, generator, settings.validation_tasks, (1, 2))
    assert scores.double().mean().item() == training.bests[0]["score"]


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch) -> None:
    training = Training.start(tmp_path, tiny("sinusoid", iterations=30))
    scores = iter([float("nan"), 2.0, float("nan")])
    monkeypatch.setattr("maml_cuda.train.loop.evaluate", lambda *arguments: torch.full((2, 3), next(scores)))
    training.loop()
    assert training.bests == [{"iteration": 20, "score": 2.0}]


def test_evaluation_does_not_depend_on_how_many_tasks_follow() -> None:
    settings = tiny("sinusoid")
    predictions = make_algorithm(settings).predictions
    tasks = make_tasks(settings, "test")
    many, few = (
        evaluate(predictions, "sinusoid", tasks, make_generator(settings, "test"), count, (0, 3))
        for count in (CHUNK + 7, 9)
    )
    assert many.shape == (2, CHUNK + 7)
    torch.testing.assert_close(many[:, :9], few)
    assert not torch.equal(many[0], many[1])
    assert len(many[0].unique()) == CHUNK + 7  # no task twice


def test_scores_and_intervals_of_known_answer() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 4.0]]])
    assert score("glyphs", logits, torch.tensor([[0, 1, 1, 1]])).tolist() == [0.75]
    prediction = torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]]])
    assert score("sinusoid", prediction, torch.zeros(2, 2, 1)).tolist() == [2.5, 0.0]
    mean, ci95 = mean_and_ci95(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]]))
    assert mean == [2.5, 5.0]
    assert ci95 == pytest.approx([1.96 * (5 / 3) ** 0.5 / 2, 0.0])
    assert (format_score("glyphs", 0.861), format_score("sinusoid", 0.3512)) == ("86.1 %", "0.351")


def test_the_nets_have_the_parameters_of_the_paper() -> None:
    omniglot, mini_imagenet = conv4(5, 64), conv4_max_pool(5, 32, 3, 84, 84)
    # Without the parameters of BatchNorm, which the authors count separately.
    assert sum(p.numel() for p in omniglot.parameters()) == 111_749 + 8 * 64
    assert sum(p.numel() for p in mini_imagenet.parameters()) == 32_645 + 8 * 32
    assert mini_imagenet(torch.zeros(2, 3, 84, 84)).shape == (2, 5)
    assert conv4_max_pool(5, 2, 1, 16, 33)(torch.zeros(2, 1, 16, 33)).shape == (2, 5)
    fully_connected = image_mlp(5, 784)
    layers = [m for m in fully_connected.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == [256, 128, 64, 64, 5]
    assert fully_connected(torch.rand(2, 1, 28, 28)).shape == (2, 5)
    with pytest.raises(ValueError, match="images must have at least 16 x 16 pixels for four max-pools, got 20 x 15"):
        conv4_max_pool(5, 32, 3, 20, 15)


@pytest.mark.parametrize(("job", "ways", "authors"), [("omniglot", 5, 0.4), ("mini-imagenet", 5, 0.01)])
def test_inner_rates_of_the_authors_are_multiplied_by_the_ways(job: str, ways: int, authors: float) -> None:
    assert JOBS[job].ways == ways
    assert JOBS[job].inner_lr == pytest.approx(ways * authors)


def test_the_splits_draw_from_streams_of_their_own() -> None:
    settings = tiny("sinusoid")
    states = {
        bytes(make_generator(tiny("sinusoid", seed=seed), split).get_state().numpy())
        for seed in (0, 1, 2)
        for split in ("train", "validation", "test")
    }
    assert len(states) == 9
    state = torch.random.get_rng_state()
    first = make_maml(settings).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    other = make_maml(tiny("sinusoid", seed=1)).state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in make_maml(settings).state_dict().items())
    assert not any(torch.equal(first[name], tensor) for name, tensor in other.items())


def test_a_run_folder_is_never_overwritten(tmp_path) -> None:
    trained(tmp_path / "run", tiny("sinusoid", iterations=2))
    before = files(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"run exists already: choose another --out, or continue"):
        Training.start(tmp_path / "run", tiny("sinusoid"))
    assert files(tmp_path / "run") == before


def test_a_resumed_run_keeps_its_settings(tmp_path) -> None:
    trained(tmp_path, tiny("sinusoid", iterations=10))
    with pytest.raises(ValueError, match=r"meta_lr must stay 0.001 in the resumed run .*, got 0.1"):
        resumed_settings(tmp_path, {"meta_lr": 0.1})
    with pytest.raises(ValueError, match=r"job must stay sinusoid in the resumed run .*, got glyphs"):
        resumed_settings(tmp_path, {"job": "glyphs"})
    assert resumed_settings(tmp_path, {"meta_lr": 0.001, "iterations": 30}) == tiny("sinusoid", iterations=30)
    with pytest.raises(ValueError, match="iterations must be at least 10, which the run has done, got 9"):
        Training.resume(tmp_path, resumed_settings(tmp_path, {"iterations": 9}))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        resumed_settings(tmp_path / "nowhere", {})


def test_a_run_that_diverges_stops_with_an_error(tmp_path) -> None:
    training = Training.start(tmp_path, tiny("sinusoid", inner_lr=1e30))
    with pytest.raises(ValueError, match=r"the loss must be finite, got (nan|inf) before iteration 7: lower --meta-lr"):
        training.loop()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iterations": -1}, "iterations must be at least 0, got -1"),
        ({"meta_batch": -2}, "meta_batch must be at least 1, got -2"),
        ({"inner_lr": 0.0}, "inner_lr must be a positive number, got 0.0"),
        ({"meta_lr": float("nan")}, "meta_lr must be a positive number, got nan"),
        ({"inner_steps": -1}, "inner_steps must be at least 0, got -1"),
        ({"inner_steps": 0, "learn_inner_lr": "step"}, "inner_steps must be at least 1, got 0"),
        ({"test_steps": 11}, "test_steps must be 1 to 10, got 11"),
        ({"test_tasks": 1}, "test_tasks must be at least 2 for a confidence interval, got 1"),
        ({"seed": -1}, r"seed must be 0 to 2\*\*32 - 1, got -1"),
        (
            {"job": "poker"},
            "job must be one of glyphs, sinusoid, omniglot, .*, or a folder of class folders, got 'poker'",
        ),
        ({"job": "omniglot"}, "data must name the folder that holds omniglot: --data PATH"),
        ({"data": "somewhere"}, "data must be left out for glyphs, which needs none, got somewhere"),
        (
            {"job": "sinusoid", "ways": 5},
            "ways must be 1 for the sinusoid, which has no classes, got 5",
        ),
    ],
)
def test_bad_settings_are_refused(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_settings(**given)


def test_glyphs_are_tested_with_the_shots_of_training() -> None:
    assert new_settings("glyphs", shots=5).test_shots == 5
    assert new_settings("glyphs", shots=5, test_shots=2).test_shots == 2
    assert new_settings("sinusoid", shots=20).test_shots == 5
