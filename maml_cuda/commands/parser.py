"""The parser of every command: short errors with suggestions."""

import argparse
from typing import Any, NoReturn

from maml_cuda.train.hints import did_you_mean

DEVICE_OPTIONS = ("--gpu", "--gpus", "--cuda")  # names that other programs have for --device


class Parser(argparse.ArgumentParser):
    """Suggests options for an unknown one. Does not print the usage, which is a full screen for ``train``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            typed = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            if any(word in DEVICE_OPTIONS for word in typed):
                hint = "; --device cuda runs on a GPU"
            else:
                hint = "".join(did_you_mean(word, self._option_string_actions) for word in typed)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")
