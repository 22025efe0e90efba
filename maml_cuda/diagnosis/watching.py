"""What a step calls: its uses of autograd, of `.data` and detach, of BatchNorm, dropout and losses, and its flags.

A TorchFunctionMode sees every call of torch's Python interface. Whether something is a fault is not decided here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Code that is not the user's own: what it does with .data and detach() is no evidence.
LIBRARIES = {"torch", "higher", "learn2learn", "torchopt", "maml_cuda", "copy", "contextlib"}
FIRST_ORDER = {"first_order": True, "fomaml": True, "fo": True, "second_order": False}
FIRST_ORDER |= {"track_higher_grads": False, "_track_higher_grads": False}
COPIES = {"copy_initial_weights": True}
IN_PLACE = {"sub_", "add_", "copy_", "__isub__", "__iadd__", "addcdiv_", "set_", "lerp_", "mul_"}
ARITHMETIC = {"sub", "add", "__sub__", "__add__", "rsub", "__rsub__", "__radd__"}
LOSSES = {
    f: name
    for name, f in vars(F).items()
    if callable(f) and not name.startswith("_") and (name.endswith("_loss") or "cross_entropy" in name)
}


@dataclass
class BatchNormCall:
    training: bool
    own_flags: bool  # called with running statistics, so that a module's flag chose `training`
    samples: int
    batched: bool
    statistics: int | None  # identity of the running mean


@dataclass
class Watch(TorchFunctionMode):
    """What was seen. Values are evidence in words, or what judgement.py compares.

    Attributes:
        shapes: of the model's parameters.
    """

    shapes: set[torch.Size]
    differentiated: list[tuple[bool, str]] = field(default_factory=list)  # create_graph, where; in order
    data: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    detached_leaves: list[str] = field(default_factory=list)  # also where weights are only saved
    first_order: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)
    batch_norms: list[BatchNormCall] = field(default_factory=list)
    dropouts: list[bool] = field(default_factory=list)
    optimizers: list[tuple[int, str]] = field(default_factory=list)  # derivatives before, whose step

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._look(func, args, kwargs, sys._getframe(1))
        return func(*args, **kwargs)

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None) -> None:
        name = getattr(func, "__name__", "")
        if frame is not None and not self.first_order and _module(frame).startswith("maml_cuda."):
            self._flags(frame)  # FusedMAML calls no autograd
        if func is torch.autograd.grad or name == "backward":
            self._flags(frame)
            given = kwargs.get("create_graph", args[4] if func is torch.autograd.grad and len(args) > 4 else False)
            self.differentiated.append((bool(given), f"{name}() in {_place(frame)}"))
        elif name in ("__get__", "__set__") and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
            if self._like_parameter(args[:1]) and _users(frame):
                self._flags(frame)
                self.data.append(f".data in {_place(frame)}")
        elif name in ("detach", "detach_"):
            if self._like_parameter(args[:1]):
                self._flags(frame)
                if _users(frame):
                    found = self.detached_leaves if args[0].is_leaf else self.detached
                    found.append(f"{name}() in {_place(frame)}")
        elif func is F.batch_norm:
            self._batch_norm(args, kwargs)
        elif func in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout):
            self.dropouts.append(bool(kwargs.get("training", args[2] if len(args) > 2 else True)))
        elif func in LOSSES:
            if kwargs.get("reduction") == "sum":
                self.sums.append(f'{LOSSES[func]}(reduction="sum") in {_place(frame)}')
        elif not torch.is_grad_enabled() and name in IN_PLACE | ARITHMETIC and self._like_parameter(args[:1]):
            self._without_gradients(name, args[0], frame)

    def _without_gradients(self, name: str, first: Tensor, frame: FrameType | None) -> None:
        if not _users(frame):
            return
        if name in IN_PLACE:
            self.data.append(f"{name}() under no_grad in {_place(frame)}")
        elif first.requires_grad:
            self.detached.append(f"arithmetic under no_grad in {_place(frame)}")

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer of torch.optim takes a step, in place."""
        words = f"torch.optim.{type(optimizer).__name__}.step() in {_place(sys._getframe(1))}"
        self.optimizers.append((len(self.differentiated), words))

    def _batch_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = dict(zip(names, args, strict=False)) | kwargs
        x, mean = given["input"], given.get("running_mean")
        self.batch_norms.append(
            BatchNormCall(bool(given.get("training")), mean is not None, x.shape[0], _is_batched(x),
                          None if mean is None else id(mean))
        )  # fmt: skip

    def _like_parameter(self, args: tuple[Any, ...]) -> bool:
        return bool(args) and isinstance(args[0], Tensor) and args[0].shape in self.shapes

    def _flags(self, frame: FrameType | None) -> None:
        for found in _user_frames(frame):
            for flags, seen in ((FIRST_ORDER, self.first_order), (COPIES, self.copies)):
                for name, value in _values(found, flags):
                    evidence = f"{name.lstrip('_')}={value} in {_place(found)}"
                    if value is flags[name] and evidence not in seen:
                        seen.append(evidence)


def _values(frame: FrameType, names: dict[str, bool]) -> list[tuple[str, Any]]:
    """The flags that a frame has: as variables that its code reads, and as attributes of its variables."""
    found = [(name, frame.f_locals[name]) for name in names if name in frame.f_locals]
    read = frame.f_code.co_names
    found += [(name, frame.f_globals[name]) for name in names if name in read and name in frame.f_globals]
    globals_read = [frame.f_globals[name] for name in read if name in frame.f_globals]
    for name in names:
        if name in read:
            for holder in [*frame.f_locals.values(), *globals_read]:
                attributes = getattr(holder, "__dict__", None)
                if isinstance(attributes, dict) and name in attributes:
                    found.append((name, attributes[name]))
    return [(name, value) for name, value in found if isinstance(value, bool)]


def _user_frames(frame: FrameType | None) -> list[FrameType]:
    """The frames of a step, from the inside, without torch's and ours."""
    frames = []
    while frame is not None and not _module(frame).startswith("maml_cuda.diagnosis"):
        if _module(frame).partition(".")[0] != "torch":
            frames.append(frame)
        frame = frame.f_back
    return frames


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _users(frame: FrameType | None) -> bool:
    """Whether the user's own code calls."""
    return frame is not None and _module(frame).partition(".")[0] not in LIBRARIES


def _place(frame: FrameType | None) -> str:
    """Function and line of the innermost frame of the user's own code."""
    for found in _user_frames(frame):
        if _users(found):
            return f"{found.f_code.co_name}, line {found.f_lineno}"
    return "the step"


def _is_batched(t: Tensor) -> bool:
    """Whether a tensor, or what transforms have wrapped in it, belongs to a vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False
