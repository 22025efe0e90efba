"""Records the operations of a model while it runs on fake tensors.

Two modes of torch do this. A TorchDispatchMode sees each ATen operation below autograd, after torch has taken composite
functions apart. Derivatives are invisible there, so a TorchFunctionMode sees the calls above autograd: it names them
for messages, and it marks or refuses what stops or changes a derivative.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from maml_cuda.batch_norm import PerStepBatchNorm
from maml_cuda.capture.errors import Unfusable, described
from maml_cuda.capture.record import Operand, Operation, operands_of
from maml_cuda.formulas import CAPTURED
from maml_cuda.masks import number_of
from maml_cuda.torch_private import memory_of

RANDOM = "its forward draws random numbers that fused layers do not draw"
_OUTSIDE = "it changes a tensor outside of the model in place"


def _without_dropout(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is an operation of attention, which draws random numbers for its dropout alone, without dropout."""
    names = [argument.name for argument in function._schema.arguments]
    if "dropout_p" not in names or not function._schema.name.startswith("aten::_scaled_dot_product"):
        return False
    at = names.index("dropout_p")
    return bool((args[at] if at < len(args) else kwargs.get("dropout_p", 0)) == 0)


def _getter(name: str) -> Any:
    """The function that a TorchFunctionMode sees where an attribute of a tensor is read."""
    return getattr(Tensor, name).__get__


_DETACHES = {Tensor.detach: "detach", Tensor.detach_: "detach_", _getter("data"): ".data"}
_GRAPH = {_getter(name): name for name in ("is_leaf", "grad_fn", "grad")}  # which differ from inner step to inner step
_READS_GRAPH = ("torch.utils.checkpoint",)  # in older versions, to find out whether gradients are on
_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
_OPAQUE = {  # recorded as one operation
    F.instance_norm: "instance_norm",
    torch.instance_norm: "instance_norm",
    F.one_hot: "one_hot",
    torch.cosine_similarity: "cosine_similarity",
    torch.take_along_dim: "take_along_dim",
    Tensor.take_along_dim: "take_along_dim",
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Recorder(TorchDispatchMode):
    """Writes down every operation of the thread while it is entered.

    Attributes:
        operations: in the order in which they ran.
        written: the names of the buffers of the model that were written in place.
        reason: the first reason to refuse the model. The model may catch the exception, so the caller looks here too.
        failed: the first exception that a call of torch has raised, and a description of the call.
        left: an exception that has left a module's forward, and a description of the innermost such module.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.written: set[str] = set()
        self.reason = ""
        self.failed: tuple[BaseException, str] | None = None
        self.left: tuple[BaseException, str] | None = None
        self.root = root
        self.stack: list[tuple[str, Any]] = [("", root)]  # the modules whose forward runs
        self.function = ""  # the name of the outermost call of torch
        self.boundary = ""  # why no derivative passes through the calls that run now
        self.recording = True
        self._buffers = {name for name, _ in root.named_buffers(remove_duplicate=False)}
        self.drawn = 0  # random masks, of this pass
        self.copies: set[int] = set()  # ids of tensors that are copies of the user's, and not kept up to date
        self._operands: dict[int, Operand] = {}  # id of a tensor -> what it is now
        self._outside: set[int] = set()  # memory of views of tensors from outside, which they do not share when fake
        self._tensors: list[Tensor] = []  # keeps them alive, so that an id stays that of one tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which calls of this thread are recorded."""
        with ExitStack() as stack:
            stack.enter_context(self)
            stack.enter_context(_Calls(self))
            yield

    def refuse(self, reason: str) -> None:
        """Raises Unfusable and keeps the first reason."""
        self.reason = self.reason or reason
        raise Unfusable(reason)

    def know(self, t: Tensor, operand: Operand) -> Operand:
        """Records what a tensor is."""
        self._operands[id(t)] = operand
        self._tensors.append(t)
        return operand

    def operand(self, t: Tensor) -> Operand:
        """What a tensor is."""
        if id(t) not in self._operands:
            original = None if isinstance(t, FakeTensor) or id(t) in self.copies else t
            number = t.constant if isinstance(t, FakeTensor) else None
            self.know(t, Operand(tuple(t.shape), t.dtype, "other", tensor=original, number=number))
        return self._operands[id(t)]

    def operands(self, tree: Any) -> Any:
        """The pytree with an Operand for each tensor."""
        return pytree.tree_map_only(Tensor, self.operand, tree)

    def call(self) -> str:
        """Describes what runs now: the module, or the call in it."""
        path, module = self.stack[-1]
        what = described(path, module)
        own = type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)
        is_layer = own or isinstance(module, PerStepBatchNorm)
        return what if is_layer or not self.function else f"{self.function} in {what}"

    # -- operations ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, drawn = kwargs or {}, self.drawn
        in_model = self.stack[0][1] is self.root
        is_mask = in_model and number_of(function, args, kwargs) is not None
        self.drawn += is_mask
        if not self.recording or function.namespace == "prim":
            return function(*args, **kwargs)
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        if is_random and not is_mask and not _without_dropout(function, args, kwargs):
            self.refuse(f"{self.call()}: {RANDOM}")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self.refuse(f"{described(*self.stack[-1])}: it enables autocast inside forward")
        name = function._schema.name.partition("::")[2]
        written = list(_written(function, args, kwargs))
        for t in written:
            self._check_written(t, name)
        given, named = self.operands(args), self.operands({k: v for k, v in kwargs.items() if k != "out"})
        if name == "lift_fresh":  # torch.tensor(number)
            made = given[0]
            made.number, made.tensor = made.tensor, None
        before = [self._operands[id(t)] for t in written]
        results = function(*args, **kwargs)
        if _is_view(function) and any(o.source == "other" for o in operands_of((given, named))):
            self._outside.update(memory_of(t) for t in pytree.tree_leaves(results))
        self.record(name.removesuffix("_"), given, named, results, drawn)
        for t, operand in zip(written, before, strict=True):
            if self._operands[id(t)] is operand and not self._is_statistic(operand):  # it is not among the results
                self._operands[id(t)] = Operand(operand.shape, operand.dtype, overwritten=self.call())
            self._invalidate_views(t)
        return results

    def record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any, drawn: int) -> None:
        """Adds an operation. drawn: the number of masks before it."""
        boundary = self.boundary
        if not boundary and not torch.is_grad_enabled():
            boundary = "it disables gradients (torch.no_grad) inside forward"
        operation = Operation(name, args, kwargs, self.stack[-1][0], self.call(), boundary, drawn)
        for t in pytree.tree_leaves(results):
            if isinstance(t, Tensor):
                operation.results.append(self.know(t, Operand(tuple(t.shape), t.dtype)))
            else:  # keeps the places of the results
                operation.results.append(Operand((), torch.bool, "other"))
        self.operations.append(operation)

    def _is_statistic(self, operand: Operand) -> bool:
        """Whether it is a running statistic, which a normalisation writes and a plan does not."""
        return operand.source == "model" and isinstance(self.stack[-1][1], _NormBase)

    def _check_written(self, t: Tensor, name: str) -> None:
        """Refuses a write to the memory of a tensor that is not computed by the model. A buffer may be written, but not
        by way of a view of it."""
        self.operand(t)
        if memory_of(t) in self._outside:
            self.refuse(f"{self.call()}: {_OUTSIDE}")
        for known in self._tensors:
            operand = self._operands[id(known)]
            if operand.source is None or memory_of(known) != memory_of(t):
                continue
            if operand.source == "model":
                if self._is_statistic(operand):
                    continue
                if operand.name in self._buffers and known is t and isinstance(t, FakeTensor):
                    self.written.add(operand.name)
                    continue
                self.refuse(f"{self.call()}: it changes {operand.name} in place, which a fused layer would not do")
            if operand.source in ("x", "y"):
                what = "the model's input" if operand.source == "x" else "the target"
                self.refuse(f"{self.call()}: it changes {what} in place")
            if operand.source == "other":
                self.refuse(f"{self.call()}: {_OUTSIDE}")

    def _invalidate_views(self, t: Tensor) -> None:
        """After a write to t: other tensors with the same memory have a content that the record does not have."""
        for other in self._tensors:
            if other is not t and memory_of(other) == memory_of(t):
                before = self._operands[id(other)]
                if before.source is None and before is not self._operands[id(t)]:
                    self._operands[id(other)] = Operand(before.shape, before.dtype, overwritten=self.call())


def _is_view(function: Any) -> bool:
    """Whether an operation returns a view. lift_fresh is called on a new constant only, to which code may write."""
    returns = function._schema.returns
    return any(r.alias_info is not None for r in returns) and function is not torch.ops.aten.lift_fresh.default


def _written(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    if function._schema.is_mutable:
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                yield from (t for t in pytree.tree_leaves(given) if isinstance(t, Tensor))


# -- calls ------------------------------------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Tells a Recorder which function of torch is called, and what happens to derivatives there."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder = self._recorder
        args, kwargs = _on_the_cpu(function, args, kwargs or {})
        recorder.function = name = getattr(function, "__name__", str(function)).removeprefix("__").removesuffix("__")
        if function in _GRAPH and sys._getframe(1).f_globals.get("__name__") not in _READS_GRAPH:
            recorder.refuse(f"{recorder.call()}: it reads {_GRAPH[function]} of a tensor")
        if function in _HOOKS:
            recorder.refuse(f"{recorder.call()}: it sets a hook on a tensor")
        try:
            if function in _DETACHES:
                recorder.boundary, recorder.function = f"{_DETACHES[function]} stops derivatives", _DETACHES[function]
            if function in _OPAQUE and recorder.recording:
                return self._as_one_operation(function, args, kwargs)
            if function in CAPTURED:
                with self:  # what the formula calls is recorded like calls of the user's own
                    result = CAPTURED[function](*args, **kwargs)
                if result is not NotImplemented:
                    return result
                recorder.function = name
            return function(*args, **kwargs)
        except Exception as error:
            if recorder.failed is None or recorder.failed[0] is not error:
                recorder.failed = error, recorder.call()
            raise
        finally:
            recorder.boundary = recorder.function = ""

    def _as_one_operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self._recorder
        given, named, drawn = recorder.operands(args), recorder.operands(kwargs), recorder.drawn
        recorder.recording = False
        try:
            result = function(*args, **kwargs)
        finally:
            recorder.recording = True
        recorder.record(_OPAQUE[function], given, named, result, drawn)
        return result


def _on_the_cpu(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the CPU in place of a GPU that forward names, because a model is recorded on the CPU."""
    if function is Tensor.cuda:
        return args[:1], {}
    if function is Tensor.to:
        args = tuple("cpu" if _is_gpu(a) else a for a in args)
    if _is_gpu(kwargs.get("device")):
        kwargs = {**kwargs, "device": "cpu"}
    return args, kwargs


def _is_gpu(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


@contextmanager
def modules_named(root: nn.Module, recorder: Recorder) -> Iterator[None]:
    """A context in which the recorder knows the module of `root` whose forward runs."""

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: recorder.stack.append((path, module))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        path, _ = recorder.stack.pop()
        error = sys.exc_info()[1]
        if error is not None and (recorder.left is None or recorder.left[0] is not error):
            recorder.left = error, described(path, module)

    handles = []
    for path, module in root.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
