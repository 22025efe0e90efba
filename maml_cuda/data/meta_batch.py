"""The tensors that every sampler of tasks returns."""

from typing import NamedTuple

from torch import Tensor

WHOLE = slice(None)  # all tasks of a draw


class MetaBatch(NamedTuple):
    """One meta-batch of tasks, in the order of FusedMAML's arguments: ``maml(*batch)``.

    Attributes:
        x_spt: support inputs ``[tasks, n_support, ...]``.
        y_spt: support labels, int64 ``[tasks, n_support]``, or targets, float ``[tasks, n_support, ...]``.
        x_qry: query inputs ``[tasks, n_query, ...]``.
        y_qry: query labels or targets, like ``y_spt``.
    """

    x_spt: Tensor
    y_spt: Tensor
    x_qry: Tensor
    y_qry: Tensor
