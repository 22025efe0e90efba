"""The fully connected net in runs: fused, with every BatchNorm, and runs of earlier versions that do not name a net."""

import json

import pytest
import torch
from torch.nn import functional as F

from maml_cuda.cli import main
from maml_cuda.train.algorithms import make_algorithm
from maml_cuda.train.jobs import make_generator, make_maml, make_tasks, new_settings
from maml_cuda.train.report import load_run, normalise_by
from maml_cuda.train.run_info import resumed_settings, with_checksum
from maml_cuda.train.settings import JOBS, Settings
from tests.train.runs import small, trained


@pytest.mark.parametrize("preset", ["maml", "maml++", "anil", "reptile"])
def test_the_fully_connected_net_is_fused(preset: str) -> None:
    settings = small("glyphs", preset, net="mlp", backend="fused")
    algorithm = make_algorithm(settings)
    batch = algorithm.sampler(make_tasks(settings, "train")).sample(2, make_generator(settings, "train"))
    assert algorithm.step(batch, 1).isfinite().all()
    assert algorithm.backend == "cpu"
    if preset in ("maml++", "anil"):
        (fast,) = list(algorithm.maml.inner_loop(batch.x_spt, batch.y_spt, 1))[1:]
        moved = {name for name, p in algorithm.maml.model.named_parameters() if not torch.equal(fast[name][0], p)}
        assert "classifier.weight" in moved
        assert not any("block" in name if preset == "anil" else "norm" in name for name in moved)


def test_the_meta_gradient_of_the_fully_connected_net_is_that_of_autograd() -> None:
    settings = small("glyphs", "maml", net="mlp", backend="fused", inner_lr=0.3, shots=5, queries=5)
    maml = make_maml(settings)
    batch = make_tasks(settings, "train").sample(2, make_generator(settings, "train"))
    maml.backward(*batch)
    theta = {name: p.detach().double().requires_grad_() for name, p in maml.model.named_parameters()}

    def loss(w, x, y):
        x = x.double().flatten(1)
        for n in (1, 2, 3, 4):
            x = F.linear(x, w[f"block{n}.linear.weight"], w[f"block{n}.linear.bias"])
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
            x = (x * w[f"block{n}.norm.weight"] + w[f"block{n}.norm.bias"]).relu()
        return F.cross_entropy(F.linear(x, w["classifier.weight"], w["classifier.bias"]), y)

    losses = []
    for x_spt, y_spt, x_qry, y_qry in zip(*batch, strict=True):
        grads = torch.autograd.grad(loss(theta, x_spt, y_spt), list(theta.values()), create_graph=True)
        fast = {name: p - 0.3 * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        losses.append(loss(fast, x_qry, y_qry))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    scale = max(float(g.abs().max()) for g in expected)
    for (name, p), g in zip(maml.model.named_parameters(), expected, strict=True):
        assert p.grad is not None, name
        assert (p.grad - g).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("preset", ["maml", "maml++"])
def test_each_query_by_itself(tmp_path, preset: str) -> None:
    """Running and support statistics classify a query as it is among others; those of the support set are its own."""
    settings = small("glyphs", preset, net="mlp", iterations=2, validation_interval=1)
    run = tmp_path / "run"
    trained(run, settings)
    batch = make_tasks(settings, "test").sample(2, make_generator(settings, "test"))
    first = batch._replace(x_qry=batch.x_qry[:, :1], y_qry=batch.y_qry[:, :1])
    for statistics in ("running", "support"):
        algorithm, _ = load_run(run)
        together = algorithm.predict(batch, 2)
        normalise_by(statistics, algorithm, settings)
        alone = algorithm.predict(batch, 2)
        assert not torch.allclose(alone, together, atol=1e-3)
        torch.testing.assert_close(algorithm.predict(first, 2), alone[:, :1], rtol=1e-4, atol=1e-4)
    on_support = batch._replace(x_qry=batch.x_spt, y_qry=batch.y_spt)
    expected = load_run(run)[0].predict(on_support, 2)
    torch.testing.assert_close(algorithm.predict(on_support, 2), expected, rtol=1e-3, atol=1e-3)


def test_runs_without_a_net_in_their_settings_have_convolutions(tmp_path) -> None:
    run = tmp_path / "run"
    trained(run, small("glyphs", "maml", iterations=2))
    for path in run.rglob("checkpoint*.json"):
        info = json.loads(path.read_text())
        assert info["settings"].pop("net") == "conv4"
        del info["info_sha256"]
        path.write_text(json.dumps(with_checksum(info)))
    assert resumed_settings(run, {}).net == "conv4"
    assert main(["train", "--resume", str(run), "--iterations", "3", "--net", "conv4"]) == 0
    with pytest.raises(ValueError, match="net must stay conv4 in the resumed run"):
        resumed_settings(run, {"net": "mlp"})


def test_nets_that_a_job_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="net must be left out for the sinusoid, whose net is an MLP of its own"):
        new_settings("sinusoid", net="mlp")
    with pytest.raises(ValueError, match="net must be one of conv4, mlp, got 'resnet'"):
        new_settings("glyphs", net="resnet")


def test_runs_on_omniglot_of_earlier_versions_have_the_split_of_the_authors() -> None:
    assert JOBS["omniglot"].split == "authors"
    assert Settings(**{**vars(JOBS["omniglot"]), "split": ""}).split == ""
