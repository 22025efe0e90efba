"""BatchNorm with parameters and statistics of their own for each inner step (MAML++, Antoniou, Edwards, Storkey 2019),
and running statistics, which are collected when asked for and at no other time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import pytrees
from maml_cuda.functional import Functional
from maml_cuda.pytrees import Tree

LAST = 2**31 - 1  # a step beyond every slot: the last one serves it

MODES = ("transductive", "per_step", "running")


class PerStepBatchNorm(nn.Module):
    """BatchNorm with one slot an inner step; the last slot serves all later steps.

    The support pass at phi_k reads slot k, the query pass at phi_{k+1} slot k too, as in the authors' code. gamma and
    beta are meta-learned, not adapted. In train mode batch statistics are used, and running ones neither read nor
    written; in eval mode the slot's running statistics, which `FusedMAML.update_statistics` collects.

    Attributes:
        weight, bias: [steps, num_features], or None.
        running_mean, running_var: [steps, num_features], or None; num_batches_tracked: [steps].
        step: whose slot `forward` reads; the fused path does not look at it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    ranks: tuple[int, ...] = (2, 3, 4)  # axes of its input

    def __init__(
        self,
        num_features: int,
        steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.num_features, self.steps, self.eps, self.momentum = num_features, steps, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.step = steps - 1
        shape = (steps, num_features)
        for name, value, kept in (("weight", 1.0, affine), ("bias", 0.0, affine)):
            full = torch.full(shape, value, device=device, dtype=dtype) if kept else None
            self.register_parameter(name, None if full is None else nn.Parameter(full))
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            full = torch.full(shape, value, device=device, dtype=dtype) if track_running_stats else None
            self.register_buffer(name, full)
        counts = torch.zeros(steps, dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counts)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self.ranks:
            raise ValueError(
                f"{type(self).__name__} must have an input of {' or '.join(map(str, self.ranks))} axes, got {x.dim()}"
            )
        slot = min(self.step, self.steps - 1)
        weight, bias = (None if p is None else p[slot] for p in (self.weight, self.bias))
        if self.training or self.running_mean is None or self.running_var is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.running_mean[slot], self.running_var[slot], weight, bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, steps={self.steps}, eps={self.eps}, affine={self.affine}"


class PerStepBatchNorm1d(PerStepBatchNorm):
    """Of features [n, c] or sequences [n, c, length]."""

    ranks = (2, 3)


class PerStepBatchNorm2d(PerStepBatchNorm):
    """Of images [n, c, height, width]."""

    ranks = (4,)


_PER_STEP = {nn.BatchNorm1d: PerStepBatchNorm1d, nn.BatchNorm2d: PerStepBatchNorm2d}


@contextmanager
def at_step(model: nn.Module, step: int) -> Iterator[None]:
    """Inside, the per-step layers of `model` read the slot of inner step `step`."""
    layers = [m for m in model.modules() if isinstance(m, PerStepBatchNorm)]
    before = [m.step for m in layers]
    for m in layers:
        m.step = step
    try:
        yield
    finally:
        for m, step_before in zip(layers, before, strict=True):
            m.step = step_before


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    norms = (nn.modules.batchnorm._BatchNorm, PerStepBatchNorm)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, norms)]


def stepwise_names(model: nn.Module, mode: str = "transductive") -> set[str]:
    """Names of the parameters that have a slot for each step, or will have one once `mode` is "per_step"."""
    kinds = (PerStepBatchNorm, *_PER_STEP) if mode == "per_step" else (PerStepBatchNorm,)
    own = {id(p) for _, m in _layers(model) if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


def check_mode(model: nn.Module, mode: str) -> None:
    """Whether `apply_mode` can do it.

    Raises:
        ValueError: the sentence why not.
    """
    if mode not in MODES:
        raise ValueError(f"batch_norm must be one of {', '.join(MODES)}, got {mode!r}")
    layers = _layers(model)
    if mode != "transductive" and not layers:
        raise ValueError(f"batch_norm={mode!r} must have a model with BatchNorm layers, got none")
    for name, m in layers:
        what = f"{name or 'the model'} ({type(m).__name__})"
        if mode == "running" and getattr(m, "running_mean", None) is None:
            raise ValueError(f'batch_norm="running" must have layers that track running statistics, got {what}')
        if mode == "per_step" and not isinstance(m, PerStepBatchNorm):
            if type(m) not in _PER_STEP:
                raise ValueError(f'batch_norm="per_step" converts BatchNorm1d and BatchNorm2d, got {what}')
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
                raise ValueError(f'batch_norm="per_step" would lose the hooks of {what}')


def convert_per_step(model: nn.Module, steps: int) -> nn.Module:
    """`model` with a PerStepBatchNorm of `steps` slots in place of each BatchNorm1d and BatchNorm2d, in place.

    Every slot starts with the layer's own parameters and statistics. An optimizer made before holds the old parameters.

    Returns:
        model, or its replacement where it is itself a BatchNorm.
    """
    check_mode(model, "per_step")
    new = {id(m): _converted(m, steps) for _, m in _layers(model) if type(m) in _PER_STEP}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def _converted(m: nn.Module, steps: int) -> PerStepBatchNorm:
    like = next((t for t in (m.weight, m.running_mean) if isinstance(t, Tensor)), None)
    place = {} if like is None else {"device": like.device, "dtype": like.dtype}
    new = _PER_STEP[type(m)](m.num_features, steps, m.eps, m.momentum, m.affine, m.running_mean is not None, **place)  # type: ignore[index,arg-type]
    with torch.no_grad():
        for name, t in [*new.named_parameters(), *new.named_buffers()]:
            old = getattr(m, name)
            t.copy_(old)
            t.requires_grad_(old.requires_grad)
    return new.train(m.training)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Where its body raises, the model's layers and their modes are again what they were."""
    before = [(m, dict(m._modules), m.training) for m in model.modules()]
    try:
        yield
    except BaseException:
        for m, children, training in before:
            m._modules.clear()
            m._modules.update(children)
            m.training = training
        raise


def with_batch_statistics(model: nn.Module) -> list[str]:
    """The layers that normalise by the statistics of the set at hand."""
    return [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in _layers(model)
        if m.training or getattr(m, "running_mean", None) is None
    ]


def hold_statistics(model: nn.Module) -> None:
    """BatchNorm layers into eval mode: they normalise by their running statistics."""
    for _, m in _layers(model):
        m.eval()


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers are in train mode."""
    before = [(m, m.training) for _, m in _layers(model)]
    for m, _ in before:
        m.train()
    try:
        yield
    finally:
        for m, training in before:
            m.train(training)


class _Collected:
    """Means over passes of a layer's batch means and unbiased variances, for each slot."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.sums: dict[int, list[Tensor]] = {}
        self.passes: dict[int, int] = {}

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        axes = [a for a in range(x.dim()) if a != 1]
        slot = min(layer.step, layer.steps - 1) if isinstance(layer, PerStepBatchNorm) else 0
        moments = [x.mean(axes), x.var(axes)]
        so_far = self.sums.get(slot, [torch.zeros_like(t) for t in moments])
        self.sums[slot] = [a + b for a, b in zip(so_far, moments, strict=True)]
        self.passes[slot] = self.passes.get(slot, 0) + 1

    def write(self) -> None:
        m = self.layer
        for slot, sums in self.sums.items():
            at: int | tuple[()] = slot if isinstance(m, PerStepBatchNorm) else ()
            m.num_batches_tracked[at] += 1  # type: ignore[index,operator]
            momentum = 1 / float(m.num_batches_tracked[at]) if m.momentum is None else m.momentum
            for running, total in zip((m.running_mean, m.running_var), sums, strict=True):
                running[at] += momentum * (total / self.passes[slot] - running[at])  # type: ignore[index,operator]


@torch.no_grad()
def update_running(model: nn.Module, passes: Iterable[tuple[int, Mapping[str, Tensor], Tree]]) -> None:
    """One update of the running statistics, with each layer's momentum, towards the mean over passes of the batch means
    and unbiased variances of its input.

    Args:
        passes: (inner step whose slot is meant, parameters name -> [tasks, *shape], x [tasks, n, ...]).

    Raises:
        ValueError: no layer tracks running statistics.
    """
    collected = [_Collected(m) for _, m in _layers(model) if getattr(m, "running_mean", None) is not None]
    if not collected:
        raise ValueError("update_statistics must have BatchNorm layers that track running statistics, got none")
    function = Functional(model)
    hooks = [c.layer.register_forward_pre_hook(c) for c in collected]
    try:
        for step, fast, x in passes:
            with at_step(model, step):
                for t in range(pytrees.tasks(x)):
                    function({n: p[t] for n, p in fast.items()}, pytrees.of_task(x, t))
    finally:
        for hook in hooks:
            hook.remove()
    for c in collected:
        c.write()
