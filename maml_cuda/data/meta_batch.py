"""What every sampler of tasks returns."""

from typing import NamedTuple

from torch import Tensor


class MetaBatch(NamedTuple):
    """One meta-batch, tasks first, in the order in which FusedMAML takes it: ``maml(*batch)``.

    Attributes:
        x_spt: [tasks, n_support, ...].
        y_spt: [tasks, n_support] int64 labels, or [tasks, n_support, ...] float targets.
        x_qry: [tasks, n_query, ...].
        y_qry: [tasks, n_query], or [tasks, n_query, ...].
    """

    x_spt: Tensor
    y_spt: Tensor
    x_qry: Tensor
    y_qry: Tensor
