"""Why a model is not fused, and why data does not fit it."""

from __future__ import annotations

from typing import Any


class Unfusable(Exception):
    """A module cannot be fused. The message names it and gives the reason."""


class DoesNotFit(Exception):
    """The model itself, or the user's own loss, raises an exception for such data. The message names what raises it
    and repeats the reason.

    Attributes:
        in_loss: the loss raises it, on a prediction that the model does make.
        given: the set of data, as the caller describes it.
    """

    def __init__(self, reason: str, in_loss: bool = False) -> None:
        super().__init__(reason, in_loss)
        self.in_loss = in_loss
        self.given: Any = None

    def __str__(self) -> str:
        return str(self.args[0])


def described(path: str, module: Any) -> str:
    """A module's path and type, for error messages."""
    return f"{path or 'the model'} ({type(module).__name__})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
