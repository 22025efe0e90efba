"""What ``maml-cuda benchmark`` measures: a model with synthetic tasks that it takes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from maml_cuda.benchmark.models import first_line, own_model, shipped_model
from maml_cuda.benchmark.options import SHIPPED, WAYS, Options
from maml_cuda.functional import precision
from maml_cuda.fused_maml import FusedMAML

DROPOUT = (
    "The model draws random numbers, as dropout does. All sides are timed with them, each with its own. They are "
    "proven without: in eval mode, but for norm layers. maml_cuda is also proven with them, beside a reference that "
    "draws the same."
)
BATCH_NORM = "Norm layers are in training mode: all sides normalise by the statistics of each support and query set."
EVAL = "The model is in eval mode, as it was given."


@dataclass(frozen=True)
class Case:
    """A model and its tasks, which every side takes.

    Attributes:
        name: of the model, as it was given.
        model: on its device, with the training flags that it had; sides take copies.
        data: x_spt, y_spt, x_qry, y_qry: `[tasks, n, ...]`, labels `[tasks, n]`.
        ways: classes, or None with mse.
        quiet: the model itself if it gives the same output twice, otherwise a copy that draws no random numbers.
        notes: sentences about the model's mode.
    """

    name: str
    model: nn.Module
    data: tuple[Tensor, Tensor, Tensor, Tensor]
    loss: str
    ways: int | None
    inner_steps: int
    inner_lr: float
    quiet: nn.Module
    notes: tuple[str, ...]

    @property
    def tasks(self) -> int:
        return len(self.data[0])

    @property
    def dtype(self) -> torch.dtype:
        return precision(self.model.parameters())

    @property
    def device(self) -> torch.device:
        return self.data[0].device

    @property
    def draws(self) -> bool:
        """Whether the model draws random numbers."""
        return self.quiet is not self.model


def new_case(options: Options, device: torch.device) -> Case:
    """Loads the model, draws the tasks, and checks that the one takes the other.

    Raises:
        ValueError: the model cannot be loaded, does not take the input, or its output does not fit the loss.
    """
    loss, shape = options.loss_name, options.input
    ways = (options.ways or WAYS) if loss == "cross_entropy" else None
    if options.model in SHIPPED:
        shape = shape or SHIPPED[options.model].input
        model = shipped_model(options.model, ways or 1, shape, options.seed)
    else:
        model = own_model(options.model, options.seed)
    assert shape is not None
    model = model.to(device)
    dtype = precision(model.parameters()) if any(True for _ in model.parameters()) else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model's parameters must be float32 or float64, got {dtype}")
    generator = torch.Generator().manual_seed(options.seed)
    sets: list[Tensor] = []
    for samples in (options.support * (ways or 1), options.query * (ways or 1)):
        whole = (options.tasks, samples, *shape)
        if options.vocabulary is None:
            x = torch.randn(whole, generator=generator, dtype=dtype).to(device)
        else:
            x = torch.randint(options.vocabulary, whole, generator=generator).to(device)
        output = _output(model, x[0])
        if ways is not None:
            if output.shape != (samples, ways):
                raise ValueError(
                    f"the model's output must be [{samples}, {ways}], [samples, ways], for cross_entropy, got "
                    f"{list(output.shape)}; --ways must be the number of its outputs"
                )
            y = torch.arange(ways).repeat(options.tasks, samples // ways).to(device)
        else:
            if output.dim() < 1 or len(output) != samples:
                raise ValueError(
                    f"the model's output must have {samples} samples, as its input, got {list(output.shape)}"
                )
            y = torch.randn((options.tasks, *output.shape), generator=generator, dtype=dtype).to(device)
        sets += [x, y]
    x_spt, y_spt, x_qry, y_qry = sets
    _checked_by_maml(model, options, loss)
    quiet = _quiet(model, x_spt[0])
    notes = [
        note
        for note, holds in (
            (EVAL, not model.training),
            (BATCH_NORM, any(isinstance(m, _NormBase) and m.training for m in model.modules())),
            (DROPOUT, quiet is not model),
        )
        if holds
    ]
    data = (x_spt, y_spt, x_qry, y_qry)
    return Case(options.model, model, data, loss, ways, options.inner_steps, options.inner_lr, quiet, tuple(notes))


def _output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model returns for a set. Its layers that are lazy get their sizes here."""
    try:
        with torch.enable_grad():  # as its forward may use autograd
            output = model(x)
    except Exception as error:
        kind = "" if x.is_floating_point() else " of integers"
        raise ValueError(f"the model must take an input {list(x.shape)}{kind}, got {first_line(error)}") from error
    if not isinstance(output, Tensor):
        raise ValueError(f"the model must return a tensor, got {type(output).__name__}")
    if not output.is_floating_point():
        raise ValueError(f"the model's output must be of floating-point numbers, got {output.dtype}")
    return output.detach()


def _checked_by_maml(model: nn.Module, options: Options, loss: str) -> None:
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"the model must be one that copy.deepcopy can copy, got {first_line(error)}") from error
    try:
        FusedMAML(own, options.inner_lr, options.inner_steps, loss=loss)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _quiet(model: nn.Module, x: Tensor) -> nn.Module:
    """The model itself if it gives the same output twice; otherwise a copy in eval mode, but for norm layers.

    Raises:
        ValueError: that copy draws random numbers too.
    """
    if _repeats(model, x):
        return model
    quiet = copy.deepcopy(model)
    for m in quiet.modules():
        if not isinstance(m, _NormBase):
            m.training = False
    if not _repeats(quiet, x):
        raise ValueError("the model must give the same output twice in eval mode, got two outputs: it draws numbers")
    return quiet


def _repeats(model: nn.Module, x: Tensor) -> bool:
    outputs = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(_output(copy.deepcopy(model), x))
    return torch.equal(*outputs)
