"""The options that several commands have, and what is done with them."""

import argparse
import os
from pathlib import Path
from typing import Any


def add_cache(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--cache",
        type=absolute,
        metavar="PATH",
        help="folder for the converted images, if the folder of the data is read-only",
    )


def add_trained_net(parser: argparse._ActionsContainer) -> None:
    """The options of the commands that use a trained net on pictures."""
    parser.add_argument("run", metavar="RUN", help="folder of a run on pictures")
    parser.add_argument(
        "--support",
        required=True,
        metavar="FOLDER",
        help="a folder for each class, named as the class, with the pictures that the net adapts to",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="(default: best)")
    parser.add_argument("--steps", type=int, metavar="N", help="adaptation steps (default: --test-steps of the run)")
    parser.add_argument(
        "--data",
        type=absolute,
        metavar="PATH",
        help="with --batch-norm running: folder of the run's data if it has moved",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier command")


def add_machine(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N: where the net and the data are; a run may change it (default: cpu)",
    )
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: all cores); results of fused layers do not depend on it"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "fused", "reference"),
        help="auto: fused if possible; fused: an error if not; reference: plain autograd, slow (default: auto)",
    )


def absolute(path: str) -> str:
    """An absolute path, because a run may be tested and resumed from another working directory."""
    return str(Path(path).expanduser().absolute())


def announce_data(data: str | None) -> None:
    if data is not None:
        print(f"opening {data}; the first time converts it, which may take minutes")


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    cores = os.cpu_count() or 1
    if threads > cores:  # torch crashes if there are far too many, such as 100000
        raise ValueError(f"threads must be at most {cores}, the cores of this machine, got {threads}")
    torch.set_num_threads(threads)


def without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
