"""Python state that a model's `forward` changes: attributes of its modules, and containers in these attributes.

Fused layers compute the prediction and the loss only. So a model whose forward changes Python state is fused only if
nothing that is computed depends on that state: `Unread` takes its place to find out.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from torch import nn
from torch.utils import _pytree as pytree

from maml_cuda.capture.errors import Unfusable, described

_CONTAINERS = (dict, list, set, deque)
_PLAIN = (bool, int, float, complex, str, bytes)  # types whose values are compared by ==
REGISTRIES = ("_parameters", "_buffers", "_modules")  # dicts of a module whose keys are its attributes


class Change(NamedTuple):
    """An attribute that forward has changed.

    Attributes:
        path, module: the module.
        attribute: its name.
        how: "sets" for the attribute itself, "changes" for a container in it.
    """

    path: str
    module: nn.Module
    attribute: str
    how: str

    def __str__(self) -> str:
        return f"{described(self.path, self.module)}: its forward {self.how} self.{self.attribute}"


class _Entry(NamedTuple):
    """A container as it was.

    Attributes:
        path, module: the module.
        attribute: whose value contains it; "": its keys are attributes.
        container: the object.
        content: a copy of it.
    """

    path: str
    module: nn.Module
    attribute: str
    container: Any
    content: Any


class PythonState:
    """A record of the attributes of a model's modules, and of the containers in these attributes."""

    def __init__(self, model: nn.Module) -> None:
        self._entries: list[_Entry] = []
        self._seen: set[int] = set()
        for path, module in model.named_modules():
            self._record(path, module, "", vars(module))

    def _record(self, path: str, module: nn.Module, attribute: str, container: Any) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        content = content_of(container)
        self._entries.append(_Entry(path, module, attribute, container, content))
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, _CONTAINERS):
                below = attribute or str(key)
                self._record(path, module, "" if below in REGISTRIES else below, value)

    def restore(self) -> list[Change]:
        """Undoes all changes, and returns them."""
        changes: dict[tuple[str, str], Change] = {}
        for path, module, attribute, container, content in self._entries:
            for key in put_back(container, content):
                name, how = (attribute, "changes") if attribute else (str(key), "sets")
                changes.setdefault((path, name), Change(path, module, name, how))
        return list(changes.values())


def put_back(container: Any, content: Any) -> list[Any]:
    """Gives a container the content that it had, and returns the keys whose values had changed; of a list or set one
    key, if anything in it had."""
    now = content_of(container)
    if isinstance(content, dict):
        changed = [k for k in {**content, **now} if k not in content or k not in now or not same(content[k], now[k])]
        for key in changed:
            if key not in content:
                del container[key]
        if any(k not in now or now[k] is not value for k, value in content.items()):
            container.update(content)
        if list(container) == list(content):
            return changed
    else:
        changed = [] if len(now) == len(content) and all(map(same, now, content)) else [""]
        if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
            return changed
    container.clear()
    container.extend(content) if hasattr(container, "extend") else container.update(content)
    return changed


def content_of(container: Any) -> Any:
    """A copy of a container, as a dict or a list."""
    return dict(container) if hasattr(container, "keys") else list(container)


def same(a: Any, b: Any) -> bool:
    """Whether a and b are the same object, or equal numbers or strings, or tuples of such."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) in _PLAIN and a == b


class Unread:
    """Stands for the value that an attribute had before forward. It allows changes and refuses to be read.

    A count may go on (`self.calls += 1`), a list or a dict may grow (`self.log.append(h)`), and all may be replaced.
    Anything else could lead into the prediction and raises Unfusable.

    Args:
        what: the change that this stands for.
    """

    def __init__(self, what: Change) -> None:
        self.__dict__.update(_what=what, _read=[])

    def _goes_on(self, other: Any) -> Unread:
        return self if isinstance(other, (int, float, list, tuple, Unread)) else self._refuse()

    def append(self, *items: Any, **named: Any) -> None:
        """As of a list."""

    __add__ = __radd__ = __iadd__ = __sub__ = __isub__ = _goes_on
    add = appendleft = extend = update = append

    def __setitem__(self, key: Any, value: Any) -> None:
        """As of a dict."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        self.__dict__["_read"].append(True)
        raise Unfusable(f"{self.__dict__['_what']}, and reads what an earlier call has left there")

    __getattr__ = __setattr__ = __delattr__ = __getitem__ = __delitem__ = _refuse
    __call__ = __iter__ = __len__ = __contains__ = __bool__ = __int__ = __float__ = __index__ = __complex__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __and__ = __rand__ = __or__ = __ror__ = __rsub__ = _refuse
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __str__ = __repr__ = __format__ = _refuse
    __enter__ = __exit__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in pytree.tree_leaves((args, kwargs or {})):
            if isinstance(argument, Unread):
                argument._refuse()


def was_read(value: Unread) -> bool:
    """Whether an Unread was read. The model may have caught the exception."""
    return bool(value.__dict__["_read"])
