"""maml_cuda.policies against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal
from torch.distributions import kl_divergence as distribution_kl

from maml_cuda import policies

SHAPES = [(4,), (3, 4), (2, 3, 4)]  # of states


def gaussian(states: tuple[int, ...], by_state: bool):
    mean = torch.randn(*states, 2).double()
    return mean, torch.randn(*(states if by_state else states[:-1]), 2).double()


def distribution(policy):
    if not isinstance(policy, tuple):
        return Categorical(logits=policy)
    mean, log_std = policy
    log_std = log_std if log_std.dim() == mean.dim() else log_std.unsqueeze(-2)
    return Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)


def make(kind: str, states: tuple[int, ...]):
    if kind == "categorical":
        return torch.randn(*states, 5).double(), torch.randint(5, states)
    return gaussian(states, kind == "by state"), torch.randn(*states, 2).double()


@pytest.mark.parametrize("states", SHAPES)
@pytest.mark.parametrize("kind", ["categorical", "gaussian", "by state"])
def test_formulas(kind, states):
    (policy, actions), (other, _) = make(kind, states), make(kind, states)
    truth = distribution(policy)
    torch.testing.assert_close(policies.log_prob(policy, actions), truth.log_prob(actions))
    torch.testing.assert_close(policies.entropy(policy), truth.entropy())
    torch.testing.assert_close(policies.kl_divergence(policy, other), distribution_kl(truth, distribution(other)))
    torch.testing.assert_close(policies.kl_divergence(policy, policy), torch.zeros(states).double())


def test_one_log_std_for_all_tasks():
    mean, log_std = torch.randn(2, 3, 4).double(), torch.randn(4).double()
    actions = torch.randn(2, 3, 4).double()
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
    torch.testing.assert_close(policies.log_prob((mean, log_std), actions), expected)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_samples(kind):
    """Shapes and dtypes; the same generator state gives the same draws; mean and variance are the policy's."""
    policy, like = make(kind, (2, 3))
    drawn = policies.sample(policy, torch.Generator().manual_seed(0))
    assert drawn.shape == like.shape
    assert drawn.dtype == like.dtype
    assert torch.equal(drawn, policies.sample(policy, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    if kind == "categorical":
        many = policies.sample(policy.unsqueeze(2).expand(2, 3, 20000, 5), generator)
        shares = torch.nn.functional.one_hot(many, 5).double().mean(2)
        torch.testing.assert_close(shares, policy.softmax(-1), rtol=0, atol=0.02)
    else:
        mean, log_std = policy
        many = policies.sample((mean.unsqueeze(0).expand(20000, 2, 3, 2), log_std), generator)
        torch.testing.assert_close(many.std(0), log_std.exp().unsqueeze(-2).expand_as(mean), rtol=0.05, atol=0)
        torch.testing.assert_close(many.mean(0), mean, rtol=0, atol=0.2)
