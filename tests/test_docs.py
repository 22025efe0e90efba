"""README.md and docs/: every Python block runs, every command parses, every option, path and variable exists.

The Python blocks of a page run one after the other in one namespace. What a block prints is what its page says: the
comments behind its `print` calls, or the ```text block that follows it. A block that cannot run in a test has a comment
directly above it, `<!-- not run: needs ... -->`, and is compiled only. Commands in ```sh blocks and in inline code are
parsed by the parsers of the programs that they call, and not run.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from maml_cuda import cli
from maml_cuda.rl.settings import RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.settings import JOBS
from tests import peers

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
WRITTEN_BY_HAND = [name for name in PAGES if not name.startswith("docs/benchmarks/")]
LANGUAGES = {"python", "cpp", "sh", "text", "mermaid", "bibtex"}
NOT_RUN = re.compile(r"<!-- not run: ([^\n]*) -->")
FENCE = re.compile(
    rf"^(?:{NOT_RUN.pattern}\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", flags=re.DOTALL | re.MULTILINE
)
INLINE = re.compile(r"(?<!`)`((?:[^`\n]|\n(?!\n))+)`(?!`)")  # may be wrapped
OF_TOOLS = {"--strict", "--benchmark-only", "--benchmark-autosave", "--benchmark-compare"}  # mkdocs, pytest-benchmark
OF_TOOLS |= {"--nproc-per-node", "--nnodes", "--max-restarts"}  # torchrun
FOLDERS = ("csrc", "maml_cuda", "tests", "benchmarks", "docs", ".ci")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run


def blocks(text: str) -> list[Block]:
    return [Block(text.count("\n", 0, m.start("text")), m["language"], m["text"], m[1]) for m in FENCE.finditer(text)]


def prose(text: str) -> str:
    return FENCE.sub("", text)


# -- Python blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [name for name in PAGES if "```python" in PAGES[name].read_text(encoding="utf-8")])
@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
@pytest.mark.filterwarnings("ignore:.* is in eval mode with running statistics that no batch has updated")
def test_python_blocks_run_and_print_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peers.provide(page, monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nets this small gain nothing from more
    try:
        run_and_compare(page)
    finally:
        torch.set_num_threads(threads)


def run_and_compare(page: str) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    of_page = blocks(PAGES[page].read_text(encoding="utf-8"))
    for block, following in zip(of_page, [*of_page[1:], None], strict=True):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, page, "exec")  # errors name the page's own lines
        if block.reason is not None:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        said = re.findall(r"^\s*print\(.*\)  # (.*)$", block.text, flags=re.MULTILINE)
        shown = following.text if following is not None and following.language == "text" else ""
        assert printed.getvalue().split() == " ".join([*said, shown]).split(), f"{page}, line {block.line}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_and_those_not_run_a_reason(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    found = blocks(text)
    assert text.count("\n```") + text.startswith("```") == 2 * len(found), "a fence is indented or is not closed"
    for block in found:
        assert block.language in LANGUAGES, f"{page}, line {block.line}: ```{block.language}"
        if block.reason is not None:
            assert block.language == "python", f"{page}, line {block.line}: only Python blocks are run"
            assert re.fullmatch(r"needs \w.*", block.reason), f"{page}, line {block.line}: {block.reason!r}"
    marks = len(NOT_RUN.findall(text))
    assert marks == sum(block.reason is not None for block in found), "a mark does not stand directly above its block"


# -- commands --------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in ```sh blocks and of those in inline code that begin with a program's name."""
    for block in blocks(text):
        if block.language == "sh":
            for line in block.text.splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    yield words[: words.index("&&")]
                    words = words[words.index("&&") + 1 :]
                if words:
                    yield words
    for code in INLINE.findall(prose(text)):
        if code.startswith(("maml-cuda ", "python -m ", "pip install ", "pytest ")):
            yield shlex.split(code)


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_commands_parse(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(PAGES[page].read_text(encoding="utf-8")):
        words = list(command)
        while re.fullmatch(r"MAML_CUDA_\w+=\S+", words[0]):  # test_variables_exist looks at these
            del words[0]
        program, *arguments = words
        if program == "maml-cuda":
            check_maml_cuda(arguments)
        elif program == "python" and arguments[0] == "-m" and arguments[1].startswith(("benchmarks", "tests")):
            check_options(arguments[2:], options_of_module(arguments[1]))
        elif program == "python":
            assert (ROOT / arguments[0]).exists() or arguments[:2] == ["-m", "maml_cuda"], command
        elif program == "torchrun":
            at = arguments.index("-m") + 1
            assert arguments[at] == "maml_cuda", command
            check_options(arguments[:at], OF_TOOLS)
            check_maml_cuda(arguments[at + 1 :])
        elif program == "pip":
            check_pip(arguments)
        elif program == "pytest":
            check_options(arguments, OF_TOOLS)
            assert all((ROOT / word).exists() for word in arguments if "/" in word), command
        else:
            assert program == "mkdocs", f"{page}: {shlex.join(command)}"
    capsys.readouterr()


def check_maml_cuda(arguments: list[str]) -> None:
    if arguments[-1] in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            cli.parser().parse_args(arguments)
        assert ended.value.code == 0, arguments
        return
    try:
        options = cli.parser().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"maml-cuda {shlex.join(arguments)} does not parse")
    if options.command == "train" and options.resume is None and "/" not in str(options.job):
        assert options.job in {None, "FOLDER", *JOBS, *RL_JOBS}, arguments
        if options.preset is not None and options.job in JOBS:
            presets.preset_settings(options.job, options.preset)  # a ValueError where there is none


def check_pip(arguments: list[str]) -> None:
    extras = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert extras is not None
    known = re.findall(r"^(\w+) =", extras[1], flags=re.MULTILINE)
    for word in arguments:
        for extra in re.findall(r"\w+", "".join(re.findall(r"^(?:\.|maml-cuda)\[(.*)\]$", word))):
            assert extra in known, f"{word}: pyproject.toml has no extra {extra}"


def check_options(arguments: list[str], known: set[str]) -> None:
    for word in arguments:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{shlex.join(arguments)}: no option {word}"


@cache
def options_of_module(module: str) -> set[str]:
    """The options that `python -m module --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # the module may have been imported before
        patch.setattr(sys, "argv", [module, "--help"])
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    return options_in(printed.getvalue())


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


# -- what inline code names ------------------------------------------------------------------------------------


@cache
def known_options() -> set[str]:
    """Of every program that these pages are about."""
    known = set(OF_TOOLS)
    for command in cli.COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            cli.parser().parse_args([command, "--help"])
        known |= options_in(printed.getvalue())
    for module in ("benchmarks", "benchmarks.gpu", "benchmarks.gpu.model", "benchmarks.paper"):
        known |= options_of_module(module)
    return known


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_options_exist(page: str) -> None:
    for code in INLINE.findall(prose(PAGES[page].read_text(encoding="utf-8"))):
        if code.startswith("--"):
            assert code.split()[0].partition("=")[0] in known_options(), f"{page}: {code}"


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_paths_exist(page: str) -> None:
    """Files and folders of the repository in inline code and, of the README, in links; mkdocs looks at the others."""
    text = PAGES[page].read_text(encoding="utf-8")
    for code in INLINE.findall(prose(text)):
        path = code.partition("::")[0].partition(":")[0]
        if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*", path):
            assert any(ROOT.glob(path.rstrip("/"))), f"{page}: {path}"
    if page == "README.md":
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert link.startswith("https://") or (ROOT / link).exists(), link


@cache
def sources() -> str:
    paths = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*.*"), *ROOT.glob("tests/**/*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path != Path(__file__))


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_variables_exist(page: str) -> None:
    for name in set(re.findall(r"\bMAML_CUDA_[A-Z]\w*", PAGES[page].read_text(encoding="utf-8"))):
        assert f'"{name}"' in sources() or f"{{{name}" in sources(), f"{page}: {name}"
