"""What every sampler of tasks returns."""

from typing import NamedTuple

from torch import Tensor


class MetaBatch(NamedTuple):
    """One meta-batch, tasks first, in the order in which FusedMAML takes it: ``maml(*batch)``."""

    x_spt: Tensor  # [tasks, n_spt, ...]
    y_spt: Tensor  # [tasks, n_spt] int64 labels, or [tasks, n_spt, ...] float targets
    x_qry: Tensor  # [tasks, n_qry, ...]
    y_qry: Tensor  # [tasks, n_qry] or [tasks, n_qry, ...]
