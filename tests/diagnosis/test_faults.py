"""Each of the ten faults, planted in a loop of loops.py, is found by its name; with the data of the inner loop that is
meant, and where its own finite differences can show it also without."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad_and_value, vmap

from benchmarks.learn2learn_algorithm import MAML
from maml_cuda import doctor
from maml_cuda.diagnosis import faults
from tests.conftest import episode
from tests.diagnosis import loops
from tests.diagnosis.loops import LR, STEPS

MEANT = {"inner_lr": LR, "inner_steps": STEPS}


def data(dtype=torch.float32):
    return episode((4,), tasks=3, n=(5, 7), classes=3, dtype=dtype)


def of_higher(**flags):
    pytest.importorskip("higher", reason="higher is not installed")
    return partial(loops.of_higher, **flags)


PLANTED = {
    "param.data": (lambda: loops.param_data, loops.net, faults.PARAM_DATA),
    "torch.optim": (lambda: loops.torch_optimizer, loops.net, faults.PARAM_DATA),
    "no create_graph": (lambda: loops.no_create_graph, loops.net, faults.NO_CREATE_GRAPH),
    "copy_initial_weights": (lambda: of_higher(), loops.net, faults.COPY_INITIAL_WEIGHTS),
    "flag of higher": (
        lambda: of_higher(copy_initial_weights=False, track_higher_grads=False), loops.net, faults.FIRST_ORDER_FLAG
    ),
    "flag of a script": (lambda: loops.flag_of_a_script, loops.net, faults.FIRST_ORDER_FLAG),
    "flag of learn2learn": (
        lambda: partial(loops.of_learn2learn, maml_class=MAML, first_order=True), loops.net, faults.FIRST_ORDER_FLAG
    ),
    "flag of ours": (lambda: loops.flag_of_ours, loops.net, faults.FIRST_ORDER_FLAG),
    "detached": (lambda: loops.detached, loops.net, faults.DETACHED),
    "detached gradients": (lambda: loops.detached_gradients, loops.net, faults.DETACHED),
    "vmap": (
        lambda: loops.vmap_inside, partial(loops.batch_norm_net, track_running_stats=False), faults.VMAP_BATCH_NORM
    ),
    "weights left": (lambda: loops.weights_left, loops.net, faults.WEIGHTS_LEFT),
}  # fmt: skip
OF_THE_LOSS = {  # the gradient is the exact derivative of another loss
    "together": (loops.normalised_together, loops.batch_norm_net, faults.LEAKING_STATISTICS),
    "summed": (loops.summed, loops.net, faults.SUMMED),
    "query summed": (loops.query_summed, loops.net, faults.SUMMED),
    "query in eval mode": (loops.query_in_eval_mode, loops.batch_norm_net, faults.WRONG_MODE),
    "one learner": (loops.one_learner, loops.net, faults.WEIGHTS_LEFT),
}


@pytest.mark.parametrize("meant", [MEANT, {}], ids=["with inner_lr", "without"])
@pytest.mark.parametrize("case", PLANTED)
def test_found_where_the_gradient_is_wrong(case, meant) -> None:
    step, net, name = PLANTED[case]
    found = doctor(step(), net(), *data(), **meant)
    assert found.healthy is False, found
    assert name in [f.name for f in found.faults], found
    assert name in found.verdict
    assert name in str(found)


@pytest.mark.parametrize("case", OF_THE_LOSS)
def test_found_where_the_loss_is_another(case) -> None:
    step, net, name = OF_THE_LOSS[case]
    found = doctor(step, net(), *data(), **MEANT)
    assert found.healthy is False, found
    assert name in [f.name for f in found.faults], found
    assert name in found.verdict


@pytest.mark.parametrize("case", ["together", "summed", "query summed", "query in eval mode"])
def test_suspected_without_the_inner_loop_that_is_meant(case) -> None:
    step, net, name = OF_THE_LOSS[case]
    found = doctor(step, net(), *data())
    # Running statistics depend on the weights, and autograd does not see it: in eval mode the gradient is wrong too.
    assert found.healthy is (False if case == "query in eval mode" else None), found
    assert name in [f.name for f in found.faults], found


def test_batch_norm_under_vmap_inside_grad_of_torch_func() -> None:
    def step(model, *data):
        theta = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p):
            return vmap(lambda *task: loops.task_loss(model, p, *task))(*data).mean()

        gradients, value = grad_and_value(loss)(theta)
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        return value

    found = doctor(step, loops.batch_norm_net(track_running_stats=False), *data(), **MEANT)
    assert found.healthy is False
    assert [f.name for f in found.faults] == [faults.VMAP_BATCH_NORM]
    assert doctor(step, loops.net(), *data(), **MEANT).healthy is True


def test_support_statistics_for_query_sets() -> None:
    def step(model, *data):
        """A backward for each task, with queries in eval mode."""
        total = 0.0
        for t in range(len(data[0])):
            loss = loops.query_in_eval_mode(model, *(d[t : t + 1] for d in data)) / len(data[0])
            loss.backward()
            total += loss.item()
        return total

    found = doctor(step, loops.batch_norm_net(), *data(), **MEANT)
    assert found.healthy is False
    assert [f.name for f in found.faults] == [faults.WRONG_MODE, faults.LEAKING_STATISTICS]


@pytest.mark.parametrize("restored", [False, True])
def test_data_of_the_model_itself(restored) -> None:
    def step(model, *data):
        saved = [p.detach().clone() for p in model.parameters()]
        total = 0.0
        for xs, ys, xq, yq in zip(*data, strict=True):
            for _ in range(STEPS):
                loss = F.cross_entropy(model(xs), ys)
                grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
                for p, g in zip(model.parameters(), grads, strict=True):
                    p.data -= LR * g
            loss = F.cross_entropy(model(xq), yq) / len(data[0])
            loss.backward()
            total += loss.item()
            if restored:
                for p, before in zip(model.parameters(), saved, strict=True):
                    p.data.copy_(before)
        return total

    found = doctor(step, loops.net(), *data(), **MEANT)
    assert found.healthy is False
    expected = [] if restored else [faults.WEIGHTS_LEFT]
    assert [f.name for f in found.faults] == [*expected, faults.PARAM_DATA]


def test_only_what_was_planted_is_named() -> None:
    for case in ("no create_graph", "flag of a script", "detached gradients", "vmap"):
        step, net, name = PLANTED[case]
        assert [f.name for f in doctor(step(), net(), *data(), **MEANT).faults] == [name]
    for case in ("together", "summed", "query summed", "one learner"):
        step, net, name = OF_THE_LOSS[case]
        assert [f.name for f in doctor(step, net(), *data(), **MEANT).faults] == [name]
