"""The target of the core for a loss of the user's own that is a sum over samples, sum_n c_n l_n (plan/own_loss.py).

The c_n depend on the target alone. They are read from the gradient of the user's loss at one prediction, where that of
each l_n is known. In the core the loss is then a policy-gradient loss with advantages n c_n, or -n c_n.

A weighted squared error is a Gaussian policy gradient too: with log_std = -log(2 pi) / 2 the negative log-probability
of a is pi (a - mean)^2, without a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees
from maml_cuda.engine.fallback import apart
from maml_cuda.losses import Loss, loss_function
from maml_cuda.plan.graph import Graph, Read
from maml_cuda.plan.own_loss import Match

LOG_STD = -math.log(2 * math.pi) / 2
LOG_STD_NAME = "log_std of the loss"  # of the tensor that holds LOG_STD, in a plan


def with_unit_precision(graph: Graph) -> Graph:
    """The graph with a log_std of LOG_STD beside its prediction, for a weighted squared error."""
    number = len(graph.nodes)
    features = math.prod(graph.returned.sample)
    last = replace(graph.nodes[-1], name="the loss", in_layouts=("features",))  # the flatten of the prediction
    append = replace(
        last, kind="append", inputs=(number,), parameters=(len(graph.reads),), out_layout=None, in_features=features,
        out_features=2 * features, constants=(-math.inf,),
    )  # fmt: skip
    flatten = replace(last, inputs=(number + 1,))
    nodes, reads = [*graph.nodes, append, flatten], [*graph.reads, Read(LOG_STD_NAME, 1, 1, 1)]
    return replace(graph, nodes=nodes, reads=reads, prediction=len(nodes))


@apart
def advantages(
    match: Match, loss: Loss, y: Any, features: int, dtype: torch.dtype, as_returned: Callable[[Tensor], Any]
) -> Tensor:
    """n c_n with the sign of an advantage, [tasks, n].

    Args:
        y: the target [tasks, n, ...].
        features: of the prediction, or of its mean.
        dtype: of the prediction.
        as_returned: makes what the model returns of a prediction [n, features] or, for a Gaussian policy,
            [n, 2 * features].
    """
    return torch.stack(
        [_advantages(match, loss, pytrees.of_task(y, t), features, dtype, as_returned) for t in range(pytrees.tasks(y))]
    )


def _advantages(
    match: Match, loss: Loss, y: Any, features: int, dtype: torch.dtype, as_returned: Callable[[Tensor], Any]
) -> Tensor:
    """The same for one task."""
    of_samples = pytrees.tensors(y)[match.leaf]
    n = len(of_samples)
    with torch.enable_grad():
        if match.loss == "categorical_policy_gradient":
            z = torch.zeros(n, features, dtype=dtype, device=of_samples.device, requires_grad=True)
            prediction = as_returned(z)
        else:  # the derivative of a squared error, and of a log-probability, is known at a distance of 1
            z = (of_samples.detach().reshape(n, features) + (1 if match.loss == "mse" else -1)).requires_grad_()
            log_std = torch.zeros_like(z)
            prediction = as_returned(z if match.loss == "mse" else torch.cat([z, log_std], -1))
        (slope,) = torch.autograd.grad(loss_function(loss)(prediction, y), z)
    if match.loss == "categorical_policy_gradient":  # the slope at the label is c_n (1 / features - 1)
        return slope.gather(-1, of_samples.unsqueeze(-1)).squeeze(-1) * (n * features / (1 - features))
    if match.loss == "mse":  # 2 c_n
        return slope[:, 0] * (n / (2 * math.pi))
    return slope[:, 0] * -n
