"""doctor: no false alarm on correct loops, what it cannot judge, what it leaves unchanged, its errors."""

import copy
import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import maml_cuda
from benchmarks.learn2learn_algorithm import MAML
from maml_cuda import FusedMAML, doctor
from maml_cuda.diagnosis import faults
from tests.conftest import episode
from tests.diagnosis import loops
from tests.diagnosis.loops import LR, STEPS
from tests.diagnosis.test_faults import MEANT, data, of_higher


def learn2learn():
    return pytest.importorskip("learn2learn", reason="learn2learn is not installed").algorithms.MAML


CORRECT = {
    "plain": lambda: loops.plain,
    "plain with backward": lambda: loops.plain_with_backward,
    "sum over tasks": lambda: loops.sum_over_tasks,
    "torch.func": lambda: loops.of_torch_func,
    "higher": lambda: of_higher(copy_initial_weights=False),
    "learn2learn": lambda: partial(loops.of_learn2learn, maml_class=learn2learn()),
    "learn2learn's algorithm": lambda: partial(loops.of_learn2learn, maml_class=MAML),
    "FusedMAML": lambda: loops.fused,
}
NETS = {
    "tanh": loops.net,
    "relu": loops.relu_net,
    "BatchNorm": partial(loops.batch_norm_net, track_running_stats=False),
}


@pytest.mark.parametrize("meant", [MEANT, {}], ids=["with inner_lr", "without"])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("case", CORRECT)
def test_no_false_alarm(case, net, meant) -> None:
    found = doctor(CORRECT[case](), NETS[net](), *data(), **meant)
    assert found.healthy is True, found
    assert not found.faults
    assert "exact" in found.verdict
    assert max(row.finite_difference_error for row in found.parameters) <= 1e-5 or case == "sum over tasks"
    if meant and case != "sum over tasks":
        assert max(row.reference_error for row in found.parameters) < 1e-8


@pytest.mark.parametrize("case", ["plain", "higher", "learn2learn's algorithm", "FusedMAML"])
def test_no_false_alarm_with_running_statistics(case) -> None:
    assert doctor(CORRECT[case](), loops.batch_norm_net(), *data(), **MEANT).healthy is True


def test_vmap_with_grad_outside_is_right_without_batch_norm() -> None:
    assert doctor(loops.vmap_inside, loops.net(), *data(), **MEANT).healthy is True


def test_regression_adapted_parameters_and_an_inner_optimizer() -> None:
    model, episodes = loops.net(), episode((4,), tasks=2, n=(5, 6), target=(3,))
    for options in (
        {"adapt_params": ["2.weight", "2.bias"]},
        {"inner_optimizer": maml_cuda.optim.Adam()},
    ):

        def step(model, *data, options=options):
            out = FusedMAML(model, 0.1, 2, loss="mse", **options)(*data)
            out.loss.backward()
            return out

        found = doctor(step, model, *episodes, inner_lr=0.1, inner_steps=2, loss="mse", **options)
        assert found.healthy is True, found


@pytest.mark.parametrize(
    ("first", "second"),
    list(itertools.combinations(
        [{"create_graph": False}, {"detach": True}, {"reduction": "sum"}, {"query_reduction": "sum"},
         {"query_mode": False}, {"together": True}], 2,
    )),
    ids=str,
)  # fmt: skip
def test_two_faults_at_once_are_not_healthy(first, second) -> None:
    found = doctor(partial(loops.loop, **first, **second), loops.batch_norm_net(), *data(), **MEANT)
    assert found.healthy is False, found
    assert found.faults


def test_both_of_two_faults_are_named() -> None:
    step = partial(loops.loop, create_graph=False, reduction="sum")
    names = [f.name for f in doctor(step, loops.net(), *data(), **MEANT).faults]
    assert names == [faults.NO_CREATE_GRAPH, faults.SUMMED]
    step = partial(loops.loop, detach=True, together=True)
    names = [f.name for f in doctor(step, loops.batch_norm_net(), *data(), **MEANT).faults]
    assert names == [faults.DETACHED, faults.LEAKING_STATISTICS]


# -- forms of a step -------------------------------------------------------------------------------------------


def test_forms_of_a_step() -> None:
    model, double = loops.net(), data(torch.float64)
    single = data()
    for step, given in (
        (lambda model, data: loops.plain(model, *data), double),
        (lambda model: loops.plain(model, *double), []),
        (lambda model: loops.plain(model, *single), []),
        (lambda: loops.plain(model, *double), []),
        (lambda: loops.plain(model, *single), []),
        (lambda _: loops.plain_with_backward(model, *single), []),  # uses another model than the one that it is given
    ):
        found = doctor(step, model, *given)
        assert found.healthy is True, found
        assert all(p.grad is None for p in model.parameters())
    assert doctor(lambda: loops.no_create_graph(model, *single), model).healthy is False


def test_a_step_that_holds_float32_data_runs_in_float64() -> None:
    model, single = loops.net(), data()
    for step in (lambda model: loops.plain(model, *single), lambda: loops.plain(model, *single)):
        found = doctor(step, model)
        assert found.healthy is True, found
        assert max(row.finite_difference_error for row in found.parameters) < 1e-7
    assert all(t.dtype == torch.float32 for t in (single[0], single[2], *model.parameters()))


def test_a_step_that_runs_in_its_own_precision_alone() -> None:
    model, single = loops.net(), data()
    maml = FusedMAML(model, LR, STEPS)

    def step():
        return maml(*single).loss

    found = doctor(step, model)
    assert found.healthy is True, found
    assert any("own precision" in note for note in found.notes)
    maml.first_order = True
    assert doctor(step, model).healthy is False


def test_a_step_that_ends_with_the_outer_optimizer() -> None:
    model, episodes = loops.net(), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loops.plain(model, *episodes).backward()
    optimizer.step()
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())

    def step():
        optimizer.zero_grad()
        loss = loops.plain(model, *episodes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    found = doctor(step, model)
    assert found.healthy is True, found
    assert any("optimizer's step" in note for note in found.notes)
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    for key, part in state["state"].items():
        assert all(torch.equal(part[name], after[key][name]) for name in part)


# -- what is left unchanged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["on a copy", "on the model"])
def test_the_model_and_the_generators_are_as_before(form) -> None:
    model, episodes = loops.batch_norm_net(), data()
    model[1].eval()
    loops.plain(model, *episodes).backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    storages = [p.data_ptr() for p in model.parameters()]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def step(m=model):
        torch.rand(3), np.random.rand(), random.random()
        loops.weights_left(m, *episodes)
        m.train()
        m.zero_grad(set_to_none=False)
        return loops.plain(m, *episodes)

    doctor(step if form == "on the model" else (lambda m: step(m)), model)
    assert {name: t.dtype for name, t in model.state_dict().items()} == {name: t.dtype for name, t in before.items()}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for p, (grad, value), storage in zip(model.parameters(), grads, storages, strict=True):
        assert p.grad is grad
        assert torch.equal(p.grad, value)
        assert p.data_ptr() == storage
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_the_model_is_as_before_where_the_step_raises() -> None:
    model, episodes = loops.net(), data()
    before = copy.deepcopy(model.state_dict())

    def step():
        loops.weights_left(model, *episodes)
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        doctor(step, model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


# -- what cannot be judged -------------------------------------------------------------------------------------


def test_a_step_that_draws_other_tasks_each_time_cannot_be_judged() -> None:
    generator = torch.Generator().manual_seed(1)

    def step(model):
        x = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64)
        y = torch.zeros(2, 5, dtype=torch.long)
        return loops.plain(model, x, y, x, y)

    found = doctor(step, loops.net())
    assert found.healthy is None
    assert "cannot judge" in found.verdict
    assert any("different losses" in note for note in found.notes)


def test_tasks_of_torchs_generator_are_drawn_again() -> None:
    def step(model):
        x, y = torch.rand(2, 5, 4), torch.randint(3, (2, 5))
        return loops.plain(model, x, y, x, y)

    assert doctor(step, loops.net()).healthy is True


def test_a_step_without_a_loss_is_judged_by_the_reference_alone() -> None:
    def step(model, *data):
        loops.plain_with_backward(model, *data)

    found = doctor(step, loops.net(), *data())
    assert found.healthy is None
    assert any("returned no loss" in note for note in found.notes)
    assert doctor(step, loops.net(), *data(), **MEANT).healthy is True


def test_kinks_are_not_judged() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)  # every unit stands at its kink
    found = doctor(loops.plain, model, *data())
    assert found.healthy is None, found
    assert any("kink" in note for note in found.notes)
    assert doctor(loops.plain, model, *data(), **MEANT).healthy is True


def test_dropout_is_judged_by_finite_differences() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    found = doctor(loops.plain, model, *data(), **MEANT)
    assert found.healthy is True, found
    assert any("Dropout" in note for note in found.notes)
    assert doctor(loops.no_create_graph, model, *data(), **MEANT).healthy is False
    found = doctor(loops.query_in_eval_mode, model, *data(), **MEANT)
    assert found.healthy is None
    assert [f.name for f in found.faults] == [faults.WRONG_MODE]


def test_a_sum_over_tasks_and_one_over_queries_are_told_apart_or_not_judged() -> None:
    equal = episode((4,), tasks=3, n=(5, 3), classes=3)

    def step(model, *data):
        return len(data[0]) * loops.plain(model, *data)

    assert doctor(step, loops.net(), *data(), **MEANT).healthy is True
    found = doctor(step, loops.net(), *equal, **MEANT)
    assert found.healthy is None
    assert "another number of tasks" in found.verdict
    found = doctor(loops.query_summed, loops.net(), *equal, **MEANT)
    assert [f.name for f in found.faults] == [faults.SUMMED]


def test_an_unknown_fault_is_wrong_and_has_no_name() -> None:
    def step(model, *data):
        return loops.plain(model, *data, lr=0.2)

    found = doctor(step, loops.net(), *data(), **MEANT)
    assert found.healthy is False
    assert not found.faults
    assert "none of the ten" in found.verdict


def test_the_model_left_in_another_mode() -> None:
    def step(model, *data):
        loss = loops.plain(model, *data)
        model.eval()
        return loss

    found = doctor(step, loops.batch_norm_net(), *data(), **MEANT)
    assert found.healthy is False
    assert [f.name for f in found.faults] == [faults.WRONG_MODE]
    assert doctor(step, loops.net(), *data(), **MEANT).healthy is True  # no layer of it reads the flag


def test_batch_norm_in_eval_mode_with_statistics_of_no_batch() -> None:
    model = loops.batch_norm_net().eval()
    for meant in (MEANT, {}):
        found = doctor(loops.plain, model, *data(), **meant)
        assert found.healthy is None
        assert [f.name for f in found.faults] == [faults.WRONG_MODE]
    model.train()
    model(torch.randn(20, 4))
    assert doctor(loops.plain, model.eval(), *data(), **MEANT).healthy is True


def test_what_is_kept_from_call_to_call() -> None:
    kept = []

    def step(model, *data):
        names, theta = zip(*model.named_parameters(), strict=True)
        phi = kept.pop() if kept else theta
        loss = loops.F.cross_entropy(loops.functional_call(model, dict(zip(names, phi, strict=True)), (data[0][0],)),
                                     data[1][0])  # fmt: skip
        grads = torch.autograd.grad(loss, phi)
        kept.append([(p - LR * g).detach().requires_grad_() for p, g in zip(phi, grads, strict=True)])
        return loops.plain(model, *data) + loss.detach()

    found = doctor(step, loops.net(), *data())
    assert found.healthy is None
    assert any("from call to call" in note for note in found.notes)


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "step must be callable, got int", lambda m, d: doctor(3, m)),
        (TypeError, "model must be an nn.Module, got str", lambda m, d: doctor(loops.plain, "m")),
        (ValueError, "parameters that require grad, got none", lambda m, d: doctor(loops.plain, nn.ReLU())),
        (ValueError, "must be given together, got 2 of them", lambda m, d: doctor(loops.plain, m, *d[:2])),
        (ValueError, "given with inner_lr, got none", lambda m, d: doctor(lambda model: 0.0, m, inner_lr=0.1)),
        (TypeError, "got a FusedMAML", lambda m, d: doctor(loops.plain, FusedMAML(m, 0.1), *d, inner_lr=0.1)),
        (ValueError, "same number of tasks", lambda m, d: doctor(loops.plain, m, *d[:3], d[3][:1], inner_lr=0.1)),
        (TypeError, "without data, got one with 5 arguments", lambda m, d: doctor(lambda a, b, c, d, e: 0.0, m)),
        (TypeError, "got one with 3 arguments", lambda m, d: doctor(lambda a, b, c: 0.0, m, *d)),
        (TypeError, r"one real number, got a tensor \[2\]", lambda m, d: doctor(lambda model: torch.ones(2), m)),
        (TypeError, "the meta-loss or None, got str", lambda m, d: doctor(lambda model: "loss", m)),
        (ValueError, "inner_steps must be", lambda m, d: doctor(loops.plain, m, *d, inner_lr=0.1, inner_steps=-1)),
        (ValueError, "loss must be one of", lambda m, d: doctor(loops.plain, m, *d, inner_lr=0.1, loss="l1")),
    ],
)  # fmt: skip
def test_errors(error, words, call) -> None:
    with pytest.raises(error, match=words):
        call(loops.net(), data())


def test_print() -> None:
    found = doctor(loops.no_create_graph, loops.net(), *data(), **MEANT)
    text = str(found).splitlines()
    assert text[0] == found.verdict
    assert text[1].startswith("- no create_graph: grad() in loop, line ")
    assert text[2].startswith("  To mend it: ")
    assert text[-5].split() == ["parameter", "norm", "finite", "differences", "reference"]
    assert [line.split()[0] for line in text[-4:]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
