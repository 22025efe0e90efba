"""Each algorithm against its published formula; schedules and ensembles."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maml_cuda import reference
from maml_cuda.cli import main
from maml_cuda.data import ImageBatches, ImageTasks, MetaBatch, SinusoidTasks
from maml_cuda.data.image_tasks import ImageClasses
from maml_cuda.train import report
from maml_cuda.train.algorithms import MatchingNet, ProtoNet, make_algorithm, meta_lr, multi_step_weights
from maml_cuda.train.jobs import make_generator, make_model, make_tasks, new_settings, without_head
from maml_cuda.train.report import ensemble_predictions, finish, load_ensemble, load_run
from tests.train.runs import NAMES, small, trained


def tasks_of(n: int, ways: int, shots: int, queries: int, seed: int = 0) -> MetaBatch:
    generator = torch.Generator().manual_seed(seed)
    y_spt, y_qry = (torch.arange(ways).repeat_interleave(k).repeat(n, 1) for k in (shots, queries))
    draw = [torch.rand(n, y.shape[1], 1, 28, 28, generator=generator) for y in (y_spt, y_qry)]
    return MetaBatch(draw[0], y_spt, draw[1], y_qry)


def test_prototypical_logits_are_the_formula() -> None:
    support, query = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    logits = ProtoNet.logits(support, labels, query)
    for q in range(3):
        for c in range(3):
            prototype = sum(support[i] for i in range(6) if labels[i] == c) / 2
            distance = sum((query[q, d] - prototype[d]) ** 2 for d in range(4))
            assert logits[q, c].item() == pytest.approx(-distance.item())


def test_matching_logits_are_the_formula() -> None:
    support, query = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 2, 1])
    probabilities = MatchingNet.logits(support, labels, query).exp()
    for q in range(3):
        cosines = [float(query[q] @ s) / math.sqrt(float(query[q] @ query[q]) * float(s @ s)) for s in support]
        total = sum(map(math.exp, cosines))
        for c in range(3):
            expected = sum(math.exp(a) for a, label in zip(cosines, labels, strict=True) if label == c) / total
            assert probabilities[q, c].item() == pytest.approx(expected)


@pytest.mark.parametrize("preset", ["protonet", "matching"])
def test_the_loss_of_episodes_is_the_cross_entropy_of_features_normalised_together(preset: str) -> None:
    algorithm = make_algorithm(small("glyphs", preset))
    batch = tasks_of(2, 3, 2, 4)
    expected = []
    for x_spt, y_spt, x_qry, y_qry in zip(*batch, strict=True):
        features = algorithm.module(torch.cat([x_spt, x_qry])).flatten(1)
        logits = type(algorithm).logits(features[:6], y_spt, features[6:])
        expected.append(-logits.log_softmax(-1)[torch.arange(12), y_qry].mean())
    loss, score = algorithm.step(batch, 1)
    torch.testing.assert_close(loss, torch.stack(expected).mean().detach())
    assert 0 <= float(score) <= 1


def test_reptile_moves_by_the_mean_of_sgd_on_minibatches() -> None:
    settings = small("glyphs", "reptile", inner_batch=4, inner_steps=3, inner_lr=0.1, meta_lr=0.5)
    algorithm = make_algorithm(settings)
    model = make_algorithm(settings).module.model.double()
    algorithm.module.double()
    batch = MetaBatch(*(part.double() if part.is_floating_point() else part for part in tasks_of(2, 3, 1, 2)))
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.cat([batch.x_spt, batch.x_qry], 1), torch.cat([batch.y_spt, batch.y_qry], 1)
    rows = algorithm._minibatches(x, 5)
    assert [r.shape for r in rows] == [(2, 4)] * 3
    seen = torch.cat(rows, 1)
    assert seen[:, :9].sort().values.equal(torch.arange(9).repeat(2, 1))  # the first pass: every sample once
    ends = []
    for t in range(2):
        model.load_state_dict(theta)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for r in rows:
            sgd.zero_grad()
            F.cross_entropy(model(x[t, r[t]]), y[t, r[t]]).backward()
            sgd.step()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for group in algorithm.optimizer.param_groups:
        group["lr"] = 0.5
    algorithm.step(batch, 5)
    for name, p in algorithm.module.model.named_parameters():
        expected = theta[name] + 0.5 * (torch.stack([end[name] for end in ends]).mean(0) - theta[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


def test_anil_adapts_the_last_layer_alone() -> None:
    algorithm = make_algorithm(small("glyphs", "anil"))
    batch = tasks_of(2, 3, 1, 2)
    fast = algorithm.module.adapt(batch.x_spt, batch.y_spt)
    theta = dict(algorithm.module.model.named_parameters())
    moved = {name for name, p in fast.items() if not torch.equal(p, theta[name].expand_as(p))}
    assert moved == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(("learned", "steps"), [("step", 3), ("layer", 2), ("element", 1)])
def test_learned_rates_start_at_the_inner_rate_and_change(learned: str, steps: int) -> None:
    settings = small("glyphs", "maml", learn_inner_lr=learned, inner_steps=steps, inner_lr=0.3)
    algorithm = make_algorithm(settings)
    rates = {name: p for name, p in algorithm.module.named_parameters() if name.startswith("inner_lr")}
    model = dict(algorithm.module.model.named_parameters())
    for name, rate in rates.items():
        of = name.removeprefix("inner_lr.")
        shape = (steps,) if learned != "element" else tuple(model[of].shape)
        assert tuple(rate.shape) in (shape, (steps, *model[of].shape)) if learned != "step" else shape
        assert torch.equal(rate, torch.full_like(rate, 0.3))
    before = {name: p.detach().clone() for name, p in rates.items()}
    algorithm.step(tasks_of(2, 3, 1, 2), 1)
    still = {name.removeprefix("inner_lr.") for name, p in rates.items() if torch.equal(before[name], p)}
    assert still == ({f"block{n}.conv.bias" for n in range(1, 5)} if learned != "step" else set())  # before BatchNorm


def test_as_many_steps_as_elements_gives_one_rate_per_element_and_step() -> None:
    algorithm = make_algorithm(small("glyphs", "maml", learn_inner_lr="layer", inner_steps=3))  # of 3 classes
    shapes = {name: tuple(p.shape) for name, p in algorithm.module.named_parameters() if name.startswith("inner_lr")}
    assert shapes["inner_lr.classifier.bias"] == (3, 3)
    assert shapes["inner_lr.classifier.weight"] == (3,)


def test_the_multi_step_weights_are_those_of_the_authors() -> None:
    settings = new_settings("glyphs", inner_steps=5, multi_step_iterations=10)
    for iteration in range(1, 11):  # the authors count epochs from 0
        weights = [1 / 5] * 5
        decay = 1 / 5 / 10
        for i in range(4):
            weights[i] = max(weights[i] - (iteration - 1) * decay, 0.03 / 5)
        weights[4] = min(weights[4] + (iteration - 1) * 4 * decay, 1 - 4 * 0.03 / 5)
        assert multi_step_weights(settings, iteration).tolist() == pytest.approx([0, *weights])
    assert multi_step_weights(settings, 11) is None


def test_the_outer_rate_follows_its_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        settings = new_settings("glyphs", meta_schedule=schedule, meta_lr=0.1, iterations=4)
        return [meta_lr(settings, iteration) for iteration in range(1, 6)]

    assert rates("constant") == [0.1] * 5
    assert rates("linear") == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    cosine = [1e-5 + (0.1 - 1e-5) * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert rates("cosine") == pytest.approx(cosine)


def test_derivative_order_is_annealed() -> None:
    settings = small("glyphs", "maml", first_order_iterations=2)
    algorithm = make_algorithm(settings)
    orders = []
    for iteration in (1, 2, 3):
        algorithm.step(tasks_of(2, 3, 1, 2), iteration)
        orders.append(algorithm.module.first_order)
    assert orders == [True, True, False]


@pytest.mark.parametrize(("job", "preset"), NAMES)
def test_predictions_run_the_inner_loop_once(job: str, preset: str) -> None:
    settings = small(job, preset)
    algorithm = make_algorithm(settings)
    batch = make_tasks(settings, "test").sample(3, make_generator(settings, "test"))
    steps = [count for count in algorithm.steps if count in (0, 1, 3, 4)]
    walked = list(algorithm.predictions(batch, steps))
    assert len(walked) == len(steps)
    assert all(torch.equal(p, algorithm.predict(batch, count)) for p, count in zip(walked, steps, strict=True))


@pytest.mark.parametrize("given", [{}, {"batch_norm": "per_step", "adapted": "no-norm", "inner_steps": 2}])
def test_with_running_statistics_a_query_is_classified_by_itself(given) -> None:
    settings = small("glyphs", "maml", **given)
    algorithm = make_algorithm(settings)
    batch = tasks_of(2, 3, 1, 2)
    alone = batch._replace(x_qry=batch.x_qry[:, :1])
    with pytest.warns(UserWarning, match="predict is given one query sample a task"):
        by_its_own_statistics = algorithm.predict(alone, 2)
    assert not torch.allclose(algorithm.predict(batch, 2)[:, :1], by_its_own_statistics, atol=1e-3)
    report.collect_statistics(algorithm, settings, batches=3)
    norm = algorithm.maml.model.block1.norm
    assert norm.num_batches_tracked.flatten().tolist() == [3] * norm.num_batches_tracked.numel()
    torch.testing.assert_close(algorithm.predict(batch, 2)[:, :1], algorithm.predict(alone, 2))


@pytest.mark.parametrize(
    ("job", "preset", "message"),
    [
        ("sinusoid", "maml", "running statistics need a net with BatchNorm layers, got none"),
        ("glyphs", "protonet", "running statistics need MAML's inner loop, got protonet"),
    ],
)
def test_running_statistics_of_nothing_are_refused(job: str, preset: str, message: str) -> None:
    settings = small(job, preset)
    with pytest.raises(ValueError, match=message):
        report.collect_statistics(make_algorithm(settings), settings)


def test_the_nearest_pixel_is_found() -> None:
    batch = tasks_of(2, 3, 2, 4)
    logits = make_algorithm(small("glyphs", "nearest-pixel")).predict(batch, 0)
    for t in range(2):
        for q in range(12):
            distances = [float((batch.x_qry[t, q] - x).square().sum()) for x in batch.x_spt[t]]
            nearest = min(range(6), key=distances.__getitem__)
            assert int(logits[t, q].argmax()) == int(batch.y_spt[t, nearest])


def test_a_classifier_is_trained_on_every_class_and_a_new_last_layer_on_a_task() -> None:
    settings = small("glyphs", "pretrained")
    algorithm = make_algorithm(settings)
    sampler = algorithm.sampler(make_tasks(settings, "train"))
    assert isinstance(sampler, ImageBatches)
    assert algorithm.net[-1].out_features == sampler.classes == 4 * len(sampler.tasks.count)
    head = algorithm.maml.model[-1]
    before = algorithm.maml.model.block1.conv.weight.detach().clone()
    algorithm.step(sampler.sample(8, make_generator(settings, "train")), 1)
    assert not torch.equal(before, algorithm.maml.model.block1.conv.weight)
    assert not head.weight.any()
    batch = tasks_of(1, 3, 1, 2)
    assert not algorithm.predict(batch, 0).any()  # the new last layer starts at zero
    assert algorithm.predict(batch, 1).any()


def test_batches_of_images_come_with_their_class_and_its_turn() -> None:
    images = torch.arange(3 * 2 * 2, dtype=torch.uint8).view(3, 1, 2, 2)
    tasks = ImageTasks(ImageClasses("images", images, torch.tensor([3]), ["one"]), 2, 1, 1, rotations=2)
    x, y = ImageBatches(tasks).sample(200, torch.Generator().manual_seed(0))
    assert sorted(set(y.tolist())) == [0, 1]
    for image, label in zip(x, y.tolist(), strict=True):
        found = [(image * 255 - of.float().rot90(label, (-2, -1))).abs().max() < 0.01 for of in images]
        assert sum(found) == 1
    seen = {tuple(image.flatten().tolist()) for image in x}
    assert len(seen) == 6  # every image at every rotation


def test_the_inputs_of_the_oracle_include_amplitude_and_phase() -> None:
    told, plain = (SinusoidTasks(3, 4, oracle=t).sample(5, torch.Generator().manual_seed(0)) for t in (True, False))
    assert told.x_qry.shape == (5, 4, 3)
    assert torch.equal(told.x_qry[..., :1], plain.x_qry)
    assert torch.equal(told.y_qry, plain.y_qry)
    amplitude, phase = told.x_qry[..., 1:2], told.x_qry[..., 2:]
    assert torch.equal(told.y_qry, torch.sin(told.x_qry[..., :1] - phase) * amplitude)
    assert make_algorithm(small("sinusoid", "oracle")).predict(told, 0).shape == (5, 4, 1)


def test_pretraining_on_all_tasks_is_one_regression() -> None:
    algorithm = make_algorithm(small("sinusoid", "pretrained"))
    batch = SinusoidTasks(5, 10).sample(4, torch.Generator().manual_seed(0))
    model = algorithm.module.model
    expected = F.mse_loss(model(batch.x_qry.flatten(0, 1)), batch.y_qry.flatten(0, 1))
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    out = algorithm.module(*batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_an_ensemble_predicts_the_mean_probability(tmp_path) -> None:
    settings = small("glyphs", "maml", iterations=8, validation_interval=1, best_checkpoints=3)
    training = trained(tmp_path, settings)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "best", "best-1", "best-2", "best-3", "last"
    ]  # fmt: skip
    assert len({best["checkpoint"] for best in training.bests}) == 3
    scores = [best["score"] for best in training.bests]
    assert scores == sorted(scores, reverse=True)
    algorithms, iterations = load_ensemble(tmp_path)
    assert iterations == [best["iteration"] for best in training.bests]
    for algorithm, best in zip(algorithms, training.bests, strict=True):
        again, info = load_run(tmp_path, best["checkpoint"])
        assert info["iteration"] == best["iteration"]
        for name, p in again.module.state_dict().items():
            assert torch.equal(p, algorithm.module.state_dict()[name])
    assert load_run(tmp_path)[1]["iteration"] == iterations[0]
    batch = tasks_of(2, 3, 1, 4)
    expected = sum(algorithm.predict(batch, 1).softmax(-1) for algorithm in algorithms) / 3
    torch.testing.assert_close(*ensemble_predictions(algorithms, "glyphs")(batch, [1]), expected.detach())
    summary = finish(tmp_path, settings)
    assert summary["ensemble"]["iterations"] == iterations
    assert summary["ensemble"]["mean"] == report.test_run(algorithms, settings)["mean"]


def test_evaluate_with_other_test_settings(tmp_path, capsys) -> None:
    sizes = ["--ways", "3", "--meta-batch", "2", "--filters", "3", "--queries", "2", "--iterations", "4"]
    sizes += ["--validation-interval", "2", "--validation-tasks", "2", "--test-tasks", "3", "--best-checkpoints", "2"]
    assert main(["train", "glyphs", "--preset", "fomaml", *sizes, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--ensemble", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mean"] == summary["ensemble"]["mean"]
    assert result["ensemble"] == summary["ensemble"]["iterations"]
    assert main(["evaluate", str(tmp_path / "run"), "--test-queries", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_queries"] == 1
    assert main(["train", "sinusoid", "--baseline", "random", "--test-tasks", "2", "--out", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "r"), "--ensemble"]) == 2
    assert "an ensemble needs a run that keeps several checkpoints (--best-checkpoints), got" in (
        capsys.readouterr().err
    )


def test_meta_sgd_is_its_gradient_by_double_backward() -> None:
    algorithm = make_algorithm(small("glyphs", "meta-sgd"))
    maml = algorithm.module.double()
    batch = MetaBatch(*(part.double() if part.is_floating_point() else part for part in tasks_of(2, 3, 1, 2)))
    maml(*batch).loss.backward()
    _, gradients = reference.meta_gradient(maml.model, "cross_entropy", *batch, maml.inner_lr, maml.inner_steps)
    for name, p in maml.named_parameters():
        expected = gradients[name.removeprefix("model.")]
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)


def test_features_are_the_input_of_the_last_layer() -> None:
    model = make_model(small("glyphs", "maml"))
    features = without_head(model)
    x = torch.rand(4, 1, 28, 28)
    assert isinstance(model[-1], nn.Linear)
    assert torch.equal(model(x), model[-1](features(x)))
