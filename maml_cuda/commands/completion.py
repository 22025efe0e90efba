"""Completion of the command line in bash, zsh and fish, by argcomplete. Does not import torch.

The shell starts the program at each Tab, with the line so far in its environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from maml_cuda.rl.settings import RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.settings import JOBS


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process, if a shell asks for a completion; otherwise it does nothing.

    Raises:
        ModuleNotFoundError: argcomplete is not installed.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete
    from argcomplete.completers import DirectoriesCompleter

    folders = DirectoriesCompleter()

    def words_or_folders(words: list[str]) -> Callable[..., list[str]]:
        return lambda prefix, **_: [word for word in words if word.startswith(prefix)] + list(folders(prefix))

    completers: dict[str, Any] = {
        "job": words_or_folders([*JOBS, *RL_JOBS]),
        "preset": lambda **_: [*{**presets.IMAGE_PRESETS, **presets.CURVE_PRESETS}],
        "device": lambda **_: ["cpu", "cuda", "cuda:0", "cuda:1"],
    }
    completers |= dict.fromkeys(("run", "runs", "resume", "data", "cache"), folders)
    for command in _commands(parser):
        for action in command._actions:
            if action.dest in completers and not action.choices:
                action.completer = completers[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return list(commands.choices.values())
