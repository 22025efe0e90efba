"""BatchNorm for MAML: per-step layers (MAML++; Antoniou, Edwards, Storkey 2019), and running statistics.

A per-step layer has parameters and statistics of its own for each inner step; those of one step are a slot. Only
`FusedMAML.update_statistics` writes running statistics; forward passes do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_cuda import pytrees
from maml_cuda.functional import Functional
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import Weighted, without_padding

LAST = 2**31 - 1  # an inner step beyond every slot, which reads the last slot

MODES = ("transductive", "per_step", "running")


class PerStepBatchNorm(nn.Module):
    """BatchNorm with one slot for each inner step. Steps beyond the last slot read the last slot.

    From MAML++ (Antoniou, Edwards, Storkey 2019). The support pass at phi_k and the query pass at phi_{k+1} both read
    slot k, as in the authors' code. `weight` and `bias` are meta-learned and not adapted.

    In train mode the layer normalises by batch statistics, and neither reads nor writes running statistics. In eval
    mode it normalises by the slot's running statistics, which `FusedMAML.update_statistics` collects.

    Args:
        num_features: channels of the input.
        steps: number of slots, at least 1.
        eps: added to the variance.
        momentum: of the running statistics; None: they are the mean over all updates.
        affine: whether there are `weight` and `bias`.
        track_running_stats: whether there are running statistics.
        device, dtype: of the parameters and buffers.

    Attributes:
        weight: gamma, `[steps, num_features]`, or None.
        bias: beta, `[steps, num_features]`, or None.
        running_mean: `[steps, num_features]`, or None.
        running_var: `[steps, num_features]`, or None.
        num_batches_tracked: updates of each slot, `[steps]`, or None.
        step: the inner step whose slot `forward` reads. FusedMAML sets it where it calls the module itself.

    Raises:
        ValueError: `steps` is less than 1; `forward` gets an input whose number of axes the class does not accept.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    ranks: tuple[int, ...] = (2, 3, 4)  # the numbers of axes that the input may have

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
    """PerStepBatchNorm of features `[n, channels]` or signals `[n, channels, length]`, in place of `BatchNorm1d`.

    Arguments and attributes are those of PerStepBatchNorm.
    """

    ranks = (2, 3)


class PerStepBatchNorm2d(PerStepBatchNorm):
    """PerStepBatchNorm of images `[n, channels, height, width]`, in place of `BatchNorm2d`.

    Arguments and attributes are those of PerStepBatchNorm.
    """

    ranks = (4,)


_PER_STEP = {nn.BatchNorm1d: PerStepBatchNorm1d, nn.BatchNorm2d: PerStepBatchNorm2d}


@contextmanager
def at_step(model: nn.Module, step: int) -> Iterator[None]:
    """Context in which the per-step layers of `model` read the slot of one inner step.

    Use it to call the model yourself, for example at adapted parameters. After k inner steps, the slot is that of step
    k - 1.

    Args:
        model: any module; one without per-step layers is not affected.
        step: inner step, from 0; steps beyond the last slot read the last slot.
    """
    layers = [m for m in model.modules() if isinstance(m, PerStepBatchNorm)]
    before = [m.step for m in layers]
    for m in layers:
        m.step = step
    try:
        yield
    finally:
        for m, step_before in zip(layers, before, strict=True):
            m.step = step_before


def _norm_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The BatchNorm layers of a model, per-step ones included, each with its path."""
    norms = (nn.modules.batchnorm._BatchNorm, PerStepBatchNorm)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, norms)]


def stepwise_names(model: nn.Module, mode: str = "transductive") -> set[str]:
    """Names of the parameters that belong to per-step layers: now, or after `mode` "per_step" has converted layers."""
    kinds = (PerStepBatchNorm, *_PER_STEP) if mode == "per_step" else (PerStepBatchNorm,)
    own = {id(p) for _, m in _norm_layers(model) if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


def check_mode(model: nn.Module, mode: str) -> None:
    """Checks that a model can run with this value of FusedMAML's argument `batch_norm`.

    Raises:
        ValueError: it cannot.
    """
    if mode not in MODES:
        raise ValueError(f"batch_norm must be one of {', '.join(MODES)}, got {mode!r}")
    layers = _norm_layers(model)
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
    """Replaces each BatchNorm1d and BatchNorm2d of `model`, in place, by a per-step layer (MAML++).

    Every slot starts with a copy of the layer's parameters and statistics. Convert before you make an optimizer: one
    that was made earlier holds the old parameters.

    Args:
        model: a module with BatchNorm layers.
        steps: number of slots, at least 1; normally the number of inner steps.

    Returns:
        `model`, or the new layer if `model` is itself a BatchNorm layer.

    Raises:
        ValueError: there is no BatchNorm layer; one is of another type, or has hooks; `steps` is less than 1.
    """
    check_mode(model, "per_step")
    new = {id(m): _converted(m, steps) for _, m in _norm_layers(model) if type(m) in _PER_STEP}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def _converted(m: nn.Module, steps: int) -> PerStepBatchNorm:
    """The per-step layer for a BatchNorm layer."""
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
    """Context that restores the model's submodules and training flags if its body raises."""
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
    """Descriptions of the layers that normalise by batch statistics."""
    return [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in _norm_layers(model)
        if m.training or getattr(m, "running_mean", None) is None
    ]


def hold_statistics(model: nn.Module) -> None:
    """Sets BatchNorm layers to eval mode, in which they normalise by running statistics."""
    for _, m in _norm_layers(model):
        m.eval()


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which BatchNorm layers are in train mode."""
    before = [(m, m.training) for _, m in _norm_layers(model)]
    for m, _ in before:
        m.train()
    try:
        yield
    finally:
        for m, training in before:
            m.train(training)


class _StatisticsHook:
    """A forward pre-hook that sums a layer's batch means and unbiased variances over passes, for each slot.

    A layer that is not per-step has one slot, 0.
    """

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
        """Moves the layer's running statistics towards the means over passes, with its momentum."""
        m = self.layer
        for slot, sums in self.sums.items():
            at: int | tuple[()] = slot if isinstance(m, PerStepBatchNorm) else ()
            m.num_batches_tracked[at] += 1  # type: ignore[index,operator]
            momentum = 1 / float(m.num_batches_tracked[at]) if m.momentum is None else m.momentum
            for running, total in zip((m.running_mean, m.running_var), sums, strict=True):
                running[at] += momentum * (total / self.passes[slot] - running[at])  # type: ignore[index,operator]


@torch.no_grad()
def update_running(model: nn.Module, passes: Iterable[tuple[int, Mapping[str, Tensor], Tree, Tensor | None]]) -> None:
    """Updates running statistics once, with each layer's momentum.

    The update is towards the mean, over passes and tasks, of the batch means and unbiased variances of a layer's input.

    Args:
        passes: forward passes to run, each as (inner step whose slot is updated, parameters as name ->
            [tasks, *shape], x [tasks, n, ...], weights of the samples [tasks, n] or None). Samples of weight 0 do not
            take part.

    Raises:
        ValueError: no layer tracks running statistics.
    """
    collected = [_StatisticsHook(m) for _, m in _norm_layers(model) if getattr(m, "running_mean", None) is not None]
    if not collected:
        raise ValueError("update_statistics must have BatchNorm layers that track running statistics, got none")
    function = Functional(model)
    hooks = [c.layer.register_forward_pre_hook(c) for c in collected]
    try:
        for step, fast, x, weights in passes:
            with at_step(model, step):
                for t in range(pytrees.tasks(x)):
                    of_task = pytrees.of_task(x, t)
                    if weights is not None:
                        of_task, _ = without_padding(of_task, Weighted(None, weights[t]))
                    function({n: p[t] for n, p in fast.items()}, of_task)
    finally:
        for hook in hooks:
            hook.remove()
    for c in collected:
        c.write()
