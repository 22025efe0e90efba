"""The optimizers of the inner loop step by step: the same numbers as torch.optim, to rounding."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from maml_cuda import optim
from maml_cuda.rates import Rate

CASES = {
    "sgd": [
        {"momentum": m, "dampening": d, "weight_decay": w, "nesterov": n}
        for m, d, w, n in itertools.product((0, 0.9), (0, 0.3), (0, 0.1), (False, True))
        if not (n and (m == 0 or d))
    ],
    "adam": [
        {"betas": b, "eps": e, "weight_decay": w}
        for b, e, w in itertools.product(((0.9, 0.999), (0.0, 0.5), (0.5, 0.0)), (1e-8, 1e-2), (0, 0.1))
    ],
    "adamw": [{}, {"weight_decay": 0.3, "betas": (0.7, 0.8)}, {"weight_decay": 0, "eps": 1e-3}],
    "adamax": [{}, {"weight_decay": 0.3, "betas": (0.7, 0.8)}, {"eps": 1e-2}, {"betas": (0.5, 0.0)}],
    "rmsprop": [
        {"alpha": a, "weight_decay": w, "momentum": m, "centered": c}
        for a, w, m, c in itertools.product((0.99, 0.5), (0, 0.1), (0, 0.8), (False, True))
    ],
    "adagrad": [
        {"lr_decay": d, "weight_decay": w, "initial_accumulator_value": i, "eps": e}
        for d, w, i, e in itertools.product((0, 0.2), (0, 0.1), (0, 0.4), (1e-10, 1e-3))
    ],
}
OURS = {
    "sgd": optim.SGD,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "adamax": optim.Adamax,
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}
THEIRS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
STEPS = 10


def gradients(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """STEPS gradients of which some elements are zero: one at each step, one in the first steps alone."""
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(3, 4, generator=generator, dtype=dtype) for _ in range(STEPS)]
    for k, g in enumerate(grads):
        g[0, 0] = 0
        if k < 4:
            g[1, 1] = 0
    return grads


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=dtype)


def update(ours: optim.Optimizer, shape: torch.Size, rate: float | Tensor = 0.1) -> optim.Update:
    return ours.read({"p": Rate(rate)}, {"p": shape}, STEPS)["p"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("rule", "options"), [(rule, options) for rule, cases in CASES.items() for options in cases])
def test_each_step_is_that_of_torch(rule: str, options: dict, dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(start(dtype))
    theirs = THEIRS[rule]([p], lr=0.1, foreach=False, **options)
    mine = update(OURS[rule](**options), p.shape)
    phi = p.detach().clone()
    state = mine.start(phi)
    assert set(state) == set(mine.keys())
    for k, g in enumerate(gradients(dtype)):
        p.grad = g.clone()
        theirs.step()
        phi, state = mine.step(phi, g, state, k)
        torch.testing.assert_close(phi, p.detach(), rtol=1e-12, atol=1e-12)
        assert set(state) == set(mine.keys())
        for key, t in state.items():
            torch.testing.assert_close(t, theirs.state[p][key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rule", "options"), [(rule, options) for rule, cases in CASES.items() for options in cases])
def test_it_goes_on_from_a_state_of_torch(rule: str, options: dict) -> None:
    p = torch.nn.Parameter(start())
    theirs = THEIRS[rule]([p], lr=0.1, foreach=False, **options)
    grads = gradients()
    for g in grads[:4]:
        p.grad = g.clone()
        theirs.step()
    optimizer = OURS[rule](**options, state={"p": {key: copy.copy(t) for key, t in theirs.state[p].items()}})
    mine = update(optimizer, p.shape)
    phi = p.detach().clone()
    state = {key: t.clone() for key, t in mine.start(phi).items()}
    for k, g in enumerate(grads[4:]):
        p.grad = g.clone()
        theirs.step()
        phi, state = mine.step(phi, g, state, k)
        torch.testing.assert_close(phi, p.detach(), rtol=1e-12, atol=1e-12)
