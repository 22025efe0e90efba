"""The running statistics of BatchNorm: FusedMAML.update_statistics, which alone writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from maml_cuda import batch_norm
from maml_cuda.engine import data_checks
from maml_cuda.engine.binder import Binder, read
from maml_cuda.engine.building_blocks import inner_loop
from maml_cuda.engine.settings import Settings
from maml_cuda.engine.weighted_sets import weights_of_sets
from maml_cuda.pytrees import Tree


def update_statistics(
    maml: Settings, x_spt: Tree, y_spt: Tensor, x_qry: Tree, spt_weights: Tensor | None, qry_weights: Tensor | None
) -> None:
    binding = maml._binding()
    x_spt = read(maml, binding, "x_spt", x_spt, "y_spt", y_spt)
    x_qry = read(maml, binding, "x_qry", x_qry)
    data_checks.same_tasks(x_spt, x_qry)
    like = binding.like()
    support, query = weights_of_sets(
        maml.loss, like, ("spt_weights", spt_weights, "x_spt", x_spt, "y_spt", y_spt),
        ("qry_weights", qry_weights, "x_qry", x_qry, "", None),
    )  # fmt: skip
    steps = maml.inner_steps
    with _collecting(maml, maml._binder):
        fast = list(inner_loop(maml, x_spt, y_spt, steps, support))
        passes = [(0, fast[0], x_qry, query)] if steps == 0 else []
        for k in range(steps):
            passes += [(k, fast[k], x_spt, support), (k, fast[k + 1], x_qry, query)]
        batch_norm.update_running(maml.model, passes)


@contextmanager
def _collecting(maml: Settings, binder: Binder) -> Iterator[None]:
    """Inside, BatchNorm layers normalise with batch statistics, even where batch_norm="running"."""
    binder.collects_statistics = True
    try:
        with batch_norm.batch_statistics(maml.model):
            yield
    finally:
        binder.collects_statistics = False
