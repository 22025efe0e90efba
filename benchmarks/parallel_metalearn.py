"""parallel-metalearn (imported as `metalearn`), whose MAML runs all tasks by `torch.func.vmap`.

As its README says: a model in `MAML_Model`, an inner optimizer of its own, `MAML.step`. What it would do besides the
meta-gradient is left out: the metric is a constant, its outer optimizer changes nothing.

Three faults of version 0.5.6 are mended here, without which there would be nothing to measure:

- Its inner optimizers with a state raise an error, for they unpack pairs with a `tree_map` that goes into the pairs.
- Its Adam gives NaN where a gradient is exactly 0, as of a unit whose ReLU is 0 for all samples.
- Its `ModelTranslator` raises an error for BatchNorm, so its own BatchNorm layers are put in by hand. (With torch's,
  its order of `vmap` and `backward` gives wrong gradients, see `mean_gradient` in maml_cuda/benchmark/baselines.py.)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from maml_cuda import optim
from maml_cuda.benchmark.baselines import LOSSES, Step

from .workloads import Tasks, Workload


def parallel_metalearn(workload: Workload, model: nn.Module, tasks: Tasks, first_order: bool) -> Step:
    from metalearn.algorithms import MAML
    from metalearn.loss import BaseLoss
    from metalearn.model_wrappers import MAML_Model

    class Loss(BaseLoss):  # type: ignore[misc]
        def forward(
            self, out_dict: dict[str, Tensor], targets: Tensor, model_states: object = None, **_: object
        ) -> tuple[Tensor, Tensor]:
            return LOSSES[workload.loss](out_dict["logits"], targets), torch.zeros(())

    own = with_its_norms(copy.deepcopy(model))
    wrapped = MAML_Model(backbone=Named(own), head=Named(nn.Identity()))
    maml = MAML(
        model=wrapped, optimizer=Unchanging(wrapped.parameters()),
        inner_optimizer=inner_optimizer(workload, wrapped.get_fast_weights(), first_order),
        support_loss_fn=Loss(), inner_steps=workload.inner_steps, chunk_size=workload.tasks,
        device=tasks.x_spt.device,
    )  # fmt: skip
    batches = itertools.repeat((tasks.x_spt, tasks.y_spt, tasks.x_qry, tasks.y_qry))

    def step() -> None:
        maml.step(batches)

    def copy_gradient() -> None:
        for p, q in zip(model.parameters(), own.parameters(), strict=True):
            p.grad = q.grad

    step.note = "without three of its faults, see benchmarks/parallel_metalearn.py"  # type: ignore[attr-defined]
    step.copy_gradient = copy_gradient  # type: ignore[attr-defined]
    return step


class Named(nn.Module):
    """A module that is called with named arguments besides its input, which it does not need."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return self.module(x)


class Unchanging(torch.optim.SGD):
    """An outer optimizer that leaves the parameters as they are, for the benchmark repeats its step."""

    def step(self, closure: Any = None) -> None:
        pass


def with_its_norms(model: nn.Module) -> nn.Module:
    """The model with the library's BatchNorm in place of torch's; the parameters are the same."""
    from metalearn.nn_models.basic_layers.BatchNormalization import BatchNorm

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if child.track_running_stats:
                    raise NotImplementedError("this baseline has no running statistics")
                norm = BatchNorm(child.num_features, eps=child.eps, track_running_stats=False)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
    return model


def inner_optimizer(workload: Workload, fast: dict[str, Tensor], first_order: bool) -> Any:
    from metalearn.inner_optimizers import InnerAdam, InnerSGD, InnerSGDMomentum, optimizers

    optimizers.pytree = SimpleNamespace(tree_map=map_without_pairs)
    optimizers.torch = TorchWithRoot()

    given = workload.inner_optimizer
    common = {"first_order": first_order, "inner_lr": workload.inner_lr, "max_inner_steps": workload.inner_steps}
    with default_dtype(next(iter(fast.values())).dtype):  # of its hyperparameters, which are tensors
        if given is None:
            return InnerSGD(fast, learn_lr=False, **common)
        if isinstance(given, optim.SGD):
            return InnerSGDMomentum(fast, momentum=given.momentum, learn_params=False, **common)
        return InnerAdam(
            fast, beta1=given.beta1, beta2=given.beta2, eps=given.eps, learn_params=False, **common
        )  # fmt: skip


def map_without_pairs(function: Any, *trees: Any) -> Any:
    """`tree_map` that gives the function each tuple whole."""
    return _pytree.tree_map(function, *trees, is_leaf=lambda node: isinstance(node, tuple))


class TorchWithRoot:
    """Torch, with a square root whose derivative at 0 is 0."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def sqrt(x: Tensor) -> Tensor:
        at_zero = x == 0
        return x.masked_fill(at_zero, 1).sqrt().masked_fill(at_zero, 0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
