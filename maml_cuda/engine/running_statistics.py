"""The running statistics of BatchNorm: FusedMAML.update_statistics, which alone writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from maml_cuda import batch_norm
from maml_cuda.engine import data_checks, support_sets
from maml_cuda.engine.binder import Binder, read
from maml_cuda.engine.building_blocks import inner_loop
from maml_cuda.engine.settings import Settings
from maml_cuda.engine.weighted_sets import weights_of_sets
from maml_cuda.masks import Seed
from maml_cuda.pytrees import Tree


def update_statistics(
    maml: Settings, x_spt: Tree, y_spt: Tensor, x_qry: Tree, spt_weights: Tensor | None, qry_weights: Tensor | None
) -> None:
    binding = maml._binding()
    steps, sets = maml.inner_steps, support_sets.count(maml, maml.inner_steps)
    seed = Seed()
    x, y, weights = support_sets.in_order(maml, seed, steps, x_spt, y_spt, spt_weights)
    x = support_sets.read_in_order(maml, binding, sets, x, "y_spt", y)
    x_qry = read(maml, binding, "x_qry", x_qry)
    data_checks.same_tasks(x, x_qry, sets)
    like = binding.like()
    support, query = weights_of_sets(
        maml.loss, like, ("spt_weights", weights, "x_spt", x, "y_spt", y),
        ("qry_weights", qry_weights, "x_qry", x_qry, "", None), support_sets=sets,
    )  # fmt: skip
    with _collecting(maml, maml._binder):
        fast = list(inner_loop(maml, x_spt, y_spt, steps, spt_weights, seed))
        passes = [(0, fast[0], x_qry, query)] if steps == 0 else []
        for k in range(steps):
            x_now, of_now = support_sets.part((x, support), sets, k, k + 1)
            passes += [(k, fast[k], x_now, of_now), (k, fast[k + 1], x_qry, query)]
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
