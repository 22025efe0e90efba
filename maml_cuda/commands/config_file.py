"""``maml-cuda train --config FILE``: options in YAML, and the file in the folder of a run that repeats it.

A key is the name of a setting, as in summary.json, or of another option: ``inner_lr: 0.4`` is ``--inner-lr 0.4``.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from maml_cuda import __version__
from maml_cuda.commands.shared_options import absolute
from maml_cuda.rl import settings as rl_settings
from maml_cuda.rl.settings import RLSettings
from maml_cuda.train import presets
from maml_cuda.train.hints import did_you_mean
from maml_cuda.train.settings import FOLDER_ONLY, Settings

NAME = "config.yaml"
# Keys that are no settings, and settings that a preset or the data set decides.
OTHERS = {"device": str, "threads": int, "tensorboard": bool, "out": str}
DECIDED = ("algorithm", "told", "image_shape")
PATHS = ("data", "cache")
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """YAML's plain values. Unlike PyYAML, it reads 1e-3 as a number, and refuses a key that is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for number, (key, _) in enumerate(node.value):
            if any(key.value == other.value for other, _ in node.value[:number]):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} twice", key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def types() -> dict[str, type]:
    """The keys, and the types of their values."""
    settings = {field.name: field.type for kind in (Settings, RLSettings) for field in fields(kind)}
    return {name: kind for name, kind in (settings | OTHERS).items() if name not in DECIDED}  # type: ignore[misc]


def read(path: str) -> dict[str, Any]:
    """The options in a file, by the names that they have in ``argparse``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        found = yaml.load(Path(path).expanduser().read_bytes(), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        words = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{path} must be YAML without repeated keys, got {words}{line}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold lines such as inner_lr: 0.4, got {found or 'nothing'}")
    known = types()
    given = {key: _typed(path, key, value, known) for key, value in found.items()}
    if "baseline" in given and "preset" in given:
        raise ValueError(f"{path} must name a preset or a baseline, got both")
    if "baseline" in given:  # as --baseline does
        given["preset"] = given.pop("baseline")
    return given


def _typed(path: str, key: Any, value: Any, known: dict[str, type]) -> Any:
    """The value of a key, a path made absolute."""
    if key not in known:
        hint = "; did you mean width?" if key in ("filters", "hidden") else did_you_mean(str(key), known)
        raise ValueError(f"keys of {path} must be options of maml-cuda train, got {key}{hint}")
    kind = known[key]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        got = "nothing (text that begins with # must be in quotes)" if value is None else repr(value)
        hint = "; put it in quotes" if kind is str and value is not None else ""
        raise ValueError(f"{key} must be {WORDS[kind]} in {path}, got {got}{hint}")
    if kind is str and key in PATHS and value:
        return absolute(str(value))
    return str(Path(str(value)).expanduser()) if key in ("job", "out") else value


def apply(options: argparse.Namespace) -> None:
    """Adds the options of ``options.config`` to those of the command line, which have priority.

    Raises:
        OSError: see ``read``.
        ValueError: see ``read``; or the command line names another job or preset than the file, whose other settings
            are those of its own one.
    """
    given = read(options.config)
    for name in ("job", "preset"):
        typed = getattr(options, name)
        if name in given and typed not in (None, given[name]):
            raise ValueError(
                f"{name} must be {given[name]}, to which the other settings in {options.config} belong, got {typed}; "
                f"leave {name} out of the file to choose it on the command line"
            )
    for name, value in given.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def write(run: Path, settings: Settings | RLSettings, processes: int = 1, **options: Any) -> None:
    """Writes the file that repeats a run into its folder.

    Args:
        run: the run's folder.
        settings: of the run; those that it ignores are left out.
        processes: the number of processes that train it.
        options: further keys; those that are None are left out.

    Raises:
        OSError: the file cannot be written.
    """
    from maml_cuda.train.checkpoint import write_file

    if isinstance(settings, RLSettings):
        used = rl_settings.used_settings(settings.baseline, settings.outer)
        absent: Any = ("none",)
    else:
        others = {*FOLDER_ONLY} - ({*FOLDER_ONLY} if settings.job == "folder" else {"split"})
        others |= {"width"} if settings.net == "mlp" else set()
        used = presets.used_settings(settings.job, settings.preset) - others
        absent = ("",)
    values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name in used}
    values = {name: value for name, value in values.items() if value not in absent}
    values |= {name: value for name, value in options.items() if value is not None}
    program = "maml-cuda" if processes == 1 else f"torchrun --nproc-per-node {processes} -m maml_cuda"
    head = f"# Repeats this run: {program} train --config {NAME}\n# Written by maml_cuda {__version__}.\n"
    text = head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_file(run / NAME, text.encode())
