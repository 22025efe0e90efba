"""What a model's `forward` does beside its result: attributes set, lists and tensors changed, random numbers drawn.

A plan would do none of it. So a forward that does is refused, in words, and what tracing it has changed is put back.
Only the thread that traces is looked at: what others do meanwhile is neither taken for the model's nor undone.
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

from maml_cuda.engine.torch_private import memory_of

_CONTAINERS = (dict, list, set, deque)
_PLAIN = (bool, int, float, complex, str, bytes)
_REGISTRIES = ("_parameters", "_buffers", "_modules")  # whose keys are attributes


class Unfusable(Exception):
    """Why a module cannot be fused: a sentence that names it."""


def described(path: str, module: nn.Module) -> str:
    return f"{path or 'the model'} ({type(module).__name__})"


class Held:
    """What the modules of a model hold, in their attributes and the containers among them."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[str, str, Any, Any]] = []  # module, attribute, container, its content
        self._seen: set[int] = set()
        for path, module in model.named_modules():
            self._keep(described(path, module), "", vars(module))

    def _keep(self, where: str, attribute: str, container: Any) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        content = _content(container)
        self._kept.append((where, attribute, container, content))
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, _CONTAINERS):
                below = attribute or str(key)
                self._keep(where, "" if below in _REGISTRIES else below, value)

    def put_back(self, own: Container[str]) -> str:
        """Undoes every change; returns the sentence of the first, but of those to the attributes `own`."""
        sentences = []
        for where, attribute, container, content in self._kept:
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
            if list(container) != list(content):  # a key that was gone has come back as the last one
                container.clear()
                container.update(content)
            for key in changed:
                if attribute:
                    sentences.append(f"{where}: its forward changes self.{attribute}")
                elif key not in own:
                    sentences.append(f"{where}: its forward sets self.{key}")
        return f"{sentences[0]}, which a fused layer would not do" if sentences else ""


def _content(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _same(a: Any, b: Any) -> bool:
    """The very object, or a number or string like it."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in _PLAIN and a == b


class Watch(TorchDispatchMode):
    """Stops `forward` before it draws a random number, or writes to a tensor that its modules hold.

    why: the sentence, should forward have caught the exception.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.why = ""
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for path, module in model.named_modules():
            own = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
            self._tensors.update({f"{path}.{name}".lstrip("."): value for name, value in own.items()})

    def refuse(self, why: str) -> None:
        self.why = self.why or why
        raise Unfusable(why)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags:
            self._draws()
        if function._schema.is_mutable:
            for i, argument in enumerate(function._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._writes(args[i] if i < len(args) else kwargs.get(argument.name))
        return function(*args, **kwargs)

    def _draws(self) -> None:
        self.refuse("its forward draws random numbers outside of its layers, which a plan would freeze")

    def _writes(self, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for each in value:
                self._writes(each)
        elif isinstance(value, Tensor):
            for name, held in self._tensors.items():
                if memory_of(held) == memory_of(value):
                    self.refuse(f"its forward changes {name} in place, which a fused layer would not do")

    @contextmanager
    def of_python(self) -> Iterator[None]:
        """The same of Python's own generators: by a profile function, which is a thread's own. Where a profiler runs,
        by the state of the shared one before and after."""
        if sys.getprofile() is not None:
            before = random.getstate()
            try:
                yield
            finally:
                if random.getstate() != before:
                    random.setstate(before)
                    self._draws()
            return

        def look(frame: Any, event: str, called: Any) -> None:
            draw = event == "c_call" and called.__name__ in ("random", "getrandbits")
            if draw and isinstance(called.__self__, random.Random):
                self._draws()

        sys.setprofile(look)
        try:
            yield
        finally:
            sys.setprofile(None)
