"""Detects side effects of a model's `forward`: attributes set, containers or tensors changed, random numbers drawn.

A plan computes the prediction only, so a model whose forward has side effects is refused. Tracing runs forward once;
the changes that it makes are undone. Writes to tensors and random numbers are observed only in the thread that traces.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maml_cuda.torch_private import memory_of

_CONTAINERS = (dict, list, set, deque)
_PLAIN = (bool, int, float, complex, str, bytes)  # types whose values are compared by ==
_REGISTRIES = ("_parameters", "_buffers", "_modules")  # dicts of a module whose keys are its attributes


class Unfusable(Exception):
    """A module cannot be fused. The message names it and gives the reason."""


def described(path: str, module: nn.Module) -> str:
    """A module's path and type, for error messages."""
    return f"{path or 'the model'} ({type(module).__name__})"


class ModuleState:
    """A record of the attributes of a model's modules, and of the containers in these attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._records: list[tuple[str, str, Any, Any]] = []  # module, attribute, container, a copy of it
        self._seen: set[int] = set()
        for path, module in model.named_modules():
            self._record(described(path, module), "", vars(module))

    def _record(self, where: str, attribute: str, container: Any) -> None:
        """Records a container and those in it. `attribute`: whose value contains it; "": its keys are attributes."""
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        content = _content(container)
        self._records.append((where, attribute, container, content))
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, _CONTAINERS):
                below = attribute or str(key)
                self._record(where, "" if below in _REGISTRIES else below, value)

    def restore(self, ignored: Container[str]) -> str:
        """Undoes all changes.

        Args:
            ignored: attributes whose changes are undone but not reported.

        Returns:
            A sentence that reports the first change, or "" if there is none.
        """
        sentences = []
        for where, attribute, container, content in self._records:
            now = _content(container)
            if not isinstance(content, dict):
                if len(now) != len(content) or not all(map(_same, now, content)):
                    container.clear()
                    container.update(content) if isinstance(container, set) else container.extend(content)
                    sentences.append(f"{where}: its forward changes self.{attribute}")
                continue
            changed = [
                key
                for key in {**content, **now}
                if key not in content or key not in now or not _same(content[key], now[key])
            ]
            for key in changed:
                if key not in content:
                    del container[key]
            if changed:
                container.update(content)
            if list(container) != list(content):  # a deleted key is now the last one: restore the order
                container.clear()
                container.update(content)
            for key in changed:
                if attribute:
                    sentences.append(f"{where}: its forward changes self.{attribute}")
                elif key not in ignored:
                    sentences.append(f"{where}: its forward sets self.{key}")
        return f"{sentences[0]}, which a fused layer would not do" if sentences else ""


def _content(container: Any) -> Any:
    """A copy of a container, as a dict or a list."""
    return dict(container) if isinstance(container, dict) else list(container)


def _same(a: Any, b: Any) -> bool:
    """Whether a and b are the same object, or equal numbers or strings, or tuples of such."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in _PLAIN and a == b


class SideEffectMode(TorchDispatchMode):
    """A context that raises Unfusable before `forward` draws a random number or writes to a tensor of its modules.

    Attributes:
        reason: the first error's message. `forward` may catch the error, so the caller must look here too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reason = ""
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for path, module in model.named_modules():
            attributes = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
            self._tensors.update({f"{path}.{name}".lstrip("."): value for name, value in attributes.items()})

    def refuse(self, reason: str) -> None:
        """Raises Unfusable and keeps the first reason."""
        self.reason = self.reason or reason
        raise Unfusable(reason)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags:
            self._refuse_random_numbers()
        if function._schema.is_mutable:
            for i, argument in enumerate(function._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check_written(args[i] if i < len(args) else kwargs.get(argument.name))
        return function(*args, **kwargs)

    def _refuse_random_numbers(self) -> None:
        self.refuse("its forward draws random numbers outside of its layers, which a plan would make constant")

    def _check_written(self, value: Any) -> None:
        """Refuses a write to `value` if it shares memory with a tensor of the modules."""
        if isinstance(value, (list, tuple)):
            for each in value:
                self._check_written(each)
        elif isinstance(value, Tensor):
            for name, tensor in self._tensors.items():
                if memory_of(tensor) == memory_of(value):
                    self.refuse(f"its forward changes {name} in place, which a fused layer would not do")

    @contextmanager
    def python_random(self) -> Iterator[None]:
        """A context that raises Unfusable when `forward` draws a random number of Python's module `random`.

        It sets a profile function, which sees calls of this thread only. If a profiler already runs, the state of the
        module's shared generator is compared before and after instead.
        """
        if sys.getprofile() is not None:
            before = random.getstate()
            try:
                yield
            finally:
                if random.getstate() != before:
                    random.setstate(before)
                    self._refuse_random_numbers()
            return

        def check(frame: Any, event: str, called: Any) -> None:
            draws = event == "c_call" and called.__name__ in ("random", "getrandbits")
            if draws and isinstance(called.__self__, random.Random):
                self._refuse_random_numbers()

        sys.setprofile(check)
        try:
            yield
        finally:
            sys.setprofile(None)
