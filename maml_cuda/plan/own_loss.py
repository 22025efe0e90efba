"""Which loss of the core a loss of the user's own may be.

The losses of the core are sums over samples, `sum_n c_n l_n`: l_n is a cross-entropy, a squared error or a negative
log-probability of sample n, and c_n is a number that depends on the target alone. A loss of the user's own is written
in many ways. So it is not searched for these forms. Instead each loss of the core that fits the shapes is proposed, and
the proof (proof.py) compares value, gradient and Hessian-vector product on random predictions and targets. A loss that
is none of them is read operation by operation, as layers (COMPUTED, loss_functions.py).

For that to be safe, a loss is proposed only if each of its operations is analytic in the prediction and in the target:
two analytic functions that agree near random points agree everywhere. An operation with a kink or a threshold (clamp,
abs, Huber, a comparison) could agree near zero and differ far away, so no loss of the core is proposed for it. Labels
are discrete: the random ones are of every class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from maml_cuda.capture.errors import Unfusable
from maml_cuda.capture.record import Operand, Record, operands_of
from maml_cuda.plan.graph import Returned

_ANALYTIC = frozenset((
    # views and selections
    "view", "reshape", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "expand", "clone", "alias", "detach",
    "t", "transpose", "permute", "slice", "select", "unbind", "split", "stack", "cat", "gather", "scatter", "index",
    # functions
    "add", "sub", "rsub", "mul", "div", "neg", "pow", "square", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt",
    "reciprocal", "sigmoid", "tanh", "softplus", "log_sigmoid_forward", "_softmax", "_log_softmax", "logsumexp",
    # sums
    "mean", "sum", "cumsum", "var", "dot", "mv", "mm", "bmm", "addmm", "mse_loss", "nll_loss_forward",
    # constants
    "arange", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "one_hot", "lift_fresh", "_to_copy",
))  # fmt: skip


@dataclass(frozen=True)
class Match:
    """A loss of the core.

    Attributes:
        loss: its name.
        leaf: the number of the leaf of the target that holds labels, values or actions.
        weighted: whether the c_n are read from the user's loss at each call; otherwise they are 1 / n, and the target
            is that leaf alone.
    """

    loss: str
    leaf: int
    weighted: bool


COMPUTED = Match("computed", -1, False)  # nodes of the plan compute the loss of the user's own


def matches(record: Record, returned: Returned, features: int, y: list[Operand]) -> Iterator[Match]:
    """The losses of the core that the loss in a record may be, likely ones first.

    Args:
        returned: what the model returns.
        features: of the prediction, or of its mean.
        y: the leaves of the target.

    Raises:
        Unfusable: it is none; the message is the reason.
    """
    _check_analytic(record)
    n = record.n
    found = False
    for leaf, operand in enumerate(y):
        labels = operand.dtype == torch.int64 and operand.shape == (n,) and returned.sample == (features,)
        values = operand.dtype.is_floating_point and math.prod(operand.shape) == n * features
        values = values and operand.shape[:1] == (n,) and not returned.log_softmax
        if returned.log_std:
            names = [("gaussian_policy_gradient", True)] if values else []
        elif labels:
            names = [("cross_entropy", False), ("categorical_policy_gradient", True)]
        else:
            names = [("mse", False), ("mse", True)] if values else []
        for name, weighted in names:
            if weighted or len(y) == 1:
                found = True
                yield Match(name, leaf, weighted)
    if not found:
        raise Unfusable("the loss is a callable of yours, and no loss of the fused layers takes such targets")


def _check_analytic(record: Record) -> None:
    model = record.needed_for(record.prediction)
    of_prediction = set(map(id, model))
    depends = {id(o) for o in operands_of(record.prediction)}  # on the prediction
    inside = {id(result) for operation in model for result in operation.results} - depends
    for operation in record.needed_for(record.loss):
        if id(operation) in of_prediction:
            continue
        if any(id(o) in depends for o in operation.operands()):
            depends.update(map(id, operation.results))
        if operation.boundary and id(operation.results[0]) in depends:
            raise Unfusable(f"the loss is a callable of yours: {operation.boundary}")
        for operand in operation.operands():
            if operand.source in ("model", "other", "x") or id(operand) in inside:
                what = operand.name or "a tensor that is neither the prediction nor the target"
                raise Unfusable(f"the loss is a callable of yours that reads {what}")
            if operand.overwritten:
                raise Unfusable("the loss is a callable of yours that changes a tensor in place")
        if operation.name == "nll_loss_forward" and operation.args[-1] >= 0:
            raise Unfusable(f"the loss is a callable of yours, with ignore_index={operation.args[-1]}")
        if operation.name not in _ANALYTIC:
            raise Unfusable(f"the loss is a callable of yours, in which no fused layer serves {operation.name}")
