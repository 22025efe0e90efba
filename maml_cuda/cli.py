"""The command line. Each command is a module of ``maml_cuda.commands``."""

import os
import signal
from collections.abc import Sequence
from types import ModuleType

from maml_cuda import __version__
from maml_cuda.commands import benchmark, compare, evaluate, export, info, predict, train
from maml_cuda.commands.completion import complete
from maml_cuda.commands.parser import Parser
from maml_cuda.train.hints import did_you_mean, sibling_folders
from maml_cuda.train.interrupts import exit_status, sigterm_raises
from maml_cuda.train.output import discard_broken_streams, print_error, readable_output

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "compare": compare,
    "benchmark": benchmark,
    "info": info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the words of the command line; None: ``sys.argv[1:]``.

    Returns:
        The exit status: 0 on success, 2 after an error, which is printed in one line, 130 after Ctrl-C, 143 after
            SIGTERM, 141 if standard output was closed.
    """
    try:
        with readable_output(), sigterm_raises():
            complete(commands := parser())
            options = commands.parse_args(arguments)
            status: int = COMMANDS[options.command].run(options)
            return status
    except KeyboardInterrupt as interrupt:
        print_error(f"\nmaml-cuda: {_which_process()}interrupted")
        return exit_status(interrupt)
    except BrokenPipeError:
        discard_broken_streams()
        return 128 + signal.SIGPIPE
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        lost = discard_broken_streams()  # the error does not name a stream; errors of files name the file
        print_error(f"maml-cuda: {_which_process()}error: {error}{f': {lost}' if lost else _other_checkpoints(error)}")
        return 2


def parser() -> Parser:
    """The parser of the command line, with all commands and options."""
    root = Parser(
        prog="maml-cuda",
        description="Exact second-order MAML: train a model on few-shot tasks, test it, and use it.",
    )
    root.add_argument("--version", action="version", version=f"maml-cuda {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS.values():
        command.add_parser(commands)
    return root


def _which_process() -> str:
    """The process that prints, where torchrun has started several."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def _other_checkpoints(error: Exception) -> str:
    """A hint for the user if a checkpoint cannot be used: which other checkpoint or folder there is."""
    folder = getattr(error, "folder", None)
    if folder is None:
        return ""
    from maml_cuda.train.checkpoint import locate

    run = folder.parent
    if not run.is_dir():
        return did_you_mean(str(run), sibling_folders(run))
    if folder.name != "best" and locate(run / "best"):
        return (
            f"; maml-cuda train --resume {run} --from best continues from the best checkpoint, "
            f"maml-cuda evaluate {run} tests it"
        )
    if folder.name != "last" and locate(run / "last"):
        return f"; maml-cuda evaluate {run} --checkpoint last tests the last checkpoint"
    return ""
