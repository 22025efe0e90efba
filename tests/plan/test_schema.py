"""The schema of a plan is the same on both sides, in the core and in JSON, and what the core cannot take is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from maml_cuda import FusedMAML, _core
from maml_cuda.plan.schema import Hyperparameter, Node, Parameter, Plan, RateTensor, Update, Window, plan_of
from tests.conftest import episode, program_of


def _plan() -> Plan:
    """A plan that has every part: windows, buffers, a learned rate an element and one a step."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval(), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    )
    model[1].num_batches_tracked += 1
    rates = {
        "0.weight": nn.Parameter(torch.full((3, 2, 3, 3), 0.1)),
        "5.weight": nn.Parameter(torch.tensor([0.1, 0.2])),
        "5.bias": 0.1,
    }
    maml = FusedMAML(model, rates, 2, adapt_params=list(rates), backend="fused")
    return program_of(maml, episode((2, 6, 6), dtype=torch.float32)).plan


PLAN = _plan()


def problem(plan: Any) -> Any:
    return _core.Problem(plan, "meta_gradient", [2, 6, 6], 5, 3, 2, False, False)


def put(part: type, changed: Any) -> Plan:
    """The plan with every object of a type changed."""

    def change(x: Any) -> Any:
        return changed(x) if isinstance(x, part) else x

    nodes = tuple(change(replace(n, window=n.window and change(n.window))) for n in PLAN.nodes)
    parameters = []
    for p in PLAN.parameters:
        update = p.update and change(replace(p.update, rate=change(p.update.rate)))
        parameters.append(change(replace(p, update=update)))
    return change(
        replace(PLAN, nodes=nodes, parameters=tuple(parameters), rate_tensors=tuple(map(change, PLAN.rate_tensors)))
    )


def other(x: Any, without: str = "", **extra: Any) -> Any:
    """An object like x of a class that lacks a field, or has another one."""
    values = {f.name: getattr(x, f.name) for f in fields(x) if f.name != without} | extra
    return make_dataclass(type(x).__name__, values)(**values)


def test_a_plan_is_what_its_json_says():
    assert plan_of(PLAN.text) == PLAN
    assert problem(PLAN).prediction == problem(plan_of(PLAN.text)).prediction == [4]
    assert {p.role for p in PLAN.parameters} == {"adapted", "outer", "buffer"}
    assert [r.parameter is None for r in PLAN.rate_tensors] == [False, True]


PARTS = [Plan, Node, Window, Parameter, Update, Hyperparameter, RateTensor]
# What Python alone reads of a plan.
OF_PYTHON = ("cuda_graphs", "task_chunk")


@pytest.mark.parametrize(("part", "name"), [(part, f.name) for part in PARTS for f in fields(part)])
def test_a_field_that_is_missing_is_an_error(part, name):
    lacking = put(part, lambda x: other(x, without=name))
    if name in OF_PYTHON:
        problem(lacking)
        return
    with pytest.raises(ValueError, match=f"^{part.__name__} must have the field {name}, got none$"):
        problem(lacking)


@pytest.mark.parametrize("part", PARTS)
def test_a_field_that_the_core_does_not_know_is_an_error(part):
    with pytest.raises(ValueError, match=f"^{part.__name__} has the field another, which the core does not know$"):
        problem(put(part, lambda x: other(x, another=1)))


def test_json_with_other_fields_is_an_error():
    plan = json.loads(PLAN.text)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'loss'"):
        plan_of(json.dumps({name: part for name, part in plan.items() if name != "loss"}))
    plan["nodes"][1]["window"]["dilation"] = [1, 1]
    with pytest.raises(TypeError, match="unexpected keyword argument 'dilation'"):
        plan_of(json.dumps(plan))


@pytest.mark.parametrize(
    ("part", "change", "error"),
    [
        (Node, {"kind": "conv3d"}, "unknown layer conv3d"),
        (Node, {"function": "cos2"}, "unknown function cos2"),
        (Node, {"function": "cos"}, r"node 0 \(.*\): its function is cos, which only maps have"),
        (Node, {"out_layout": "volume"}, "unknown layout volume"),
        (Node, {"inputs": ()}, r"node 0 \(.*\): inputs must hold at least 1 value, got 0"),
        (Node, {"inputs": (0,) * 5}, r"node 0 \(.*\): its inputs are 5; fused layers read at most 4"),
        (Node, {"inputs": (0, 0)}, r".* \(channels_last\) expects 1 to 1 inputs, got 2"),
        (Node, {"kind": "add"}, "Plan.prediction must be the value of a flatten, got 8"),
        (Node, {"inputs": (9,)}, r"node 0 \(.*\): its inputs must be from 0 to 0, got 9"),
        (Node, {"parameters": (None,) * 5}, r"node 0 \(.*\): its parameters are 5; fused layers read at most 4"),
        (Node, {"parameters": (-1,)}, r"node 0 \(.*\): its parameters must be from 0 to 7, got -1"),
        (Node, {"constants": (1.0,) * 4}, r"node 0 \(.*\): its constants are 4; fused functions have at most 3"),
        (Node, {"groups": "two"}, "Node.groups has a value that the core cannot read, got 'two'"),
        (Parameter, {"role": "inner"}, "unknown role inner"),
        (Parameter, {"slots": 0}, "Parameter.size must be a multiple of its slots, rows and taps, got 54"),
        (Hyperparameter, {"tensor": 2}, "Hyperparameter.tensor must be from 0 to 1, got 2"),
        (Update, {"rule": "lion"}, "unknown rule lion"),
        (Update, {"rule": "adam"}, "Update.start must hold 2 states, got 0"),
        (RateTensor, {"steps": 0}, "RateTensor.size must be a multiple of its steps, got 54"),
        (RateTensor, {"parameter": 8}, "RateTensor.parameter must be from 0 to 7, got 8"),
        (Plan, {"nodes": ()}, "Plan.nodes must hold at least 1 node, got 0"),
        (Plan, {"loss": "hinge"}, "unknown loss hinge"),
        (Plan, {"backend": "tpu"}, "this build of maml_cuda has no backend tpu"),
    ],
)
def test_what_the_core_cannot_take_is_refused_in_words(part, change, error):
    with pytest.raises(ValueError, match=f"^{error}$"):
        problem(put(part, lambda x: replace(x, **change)))


def test_one_step_of_a_plan():
    step = PLAN.of_one_step()
    assert [r.steps for r in PLAN.rate_tensors] == [1, 2]
    assert [(r.size, r.steps) for r in step.rate_tensors] == [(54, 1), (1, 1)]
    assert step.parameters == PLAN.parameters


def test_an_object_that_is_no_plan_is_an_error():
    @dataclass
    class Other:
        loss: str

    with pytest.raises(ValueError, match=r"^Other must have the field nodes, got none$"):
        problem(Other("mse"))
