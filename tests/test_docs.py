"""README.md and docs/: every Python block runs, every command parses, every option, path and variable exists.

The Python blocks of a page run one after the other in one namespace. What a block prints is what its page says: the
comments behind its `print` calls, or the ```text block that follows it. Numbers of the gallery, which are results of
training, may differ by a fifth: another instruction set rounds otherwise.

A block that needs what not every machine has, has a comment directly above it, `<!-- not run: needs ... -->`: it runs
where that is there (NEEDED), and is compiled elsewhere. What a page takes for granted is in `given`.

Commands in ```sh blocks and in inline code are parsed by the parsers of the programs that they call.
test_docs_commands.py runs those that take seconds.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import runpy
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import maml_cuda
from maml_cuda import FusedMAML, cli
from maml_cuda.rl.settings import RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.settings import JOBS
from tests import peers
from tests.data import published

ROOT = Path(__file__).parents[1]
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = {str(path.relative_to(ROOT)): path for path in [*OUTSIDE, *sorted((ROOT / "docs").rglob("*.md"))]}
WRITTEN_BY_HAND = [  # test_project_files.py looks at CONTRIBUTING.md
    name for name in PAGES if not name.startswith("docs/benchmarks/") and name != "CONTRIBUTING.md"
]
LANGUAGES = {"python", "cpp", "sh", "yaml", "text", "mermaid", "bibtex"}
NOT_RUN = re.compile(r"<!-- not run: needs ([^\n]*) -->")
FENCE = re.compile(
    rf"^(?:{NOT_RUN.pattern}\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", flags=re.DOTALL | re.MULTILINE
)
INLINE = re.compile(r"(?<!`)`((?:[^`\n]|\n(?!\n))+)`(?!`)")  # may be wrapped
OF_TOOLS = {"--strict", "--benchmark-only", "--benchmark-autosave", "--benchmark-compare"}  # mkdocs, pytest-benchmark
OF_TOOLS |= {"--nproc-per-node", "--nnodes", "--max-restarts"}  # torchrun
TOOLS = {"mkdocs", "ruff", "mypy", "clang-format", "pre-commit", "python3", "."}  # other programs, not parsed
FOLDERS = ("csrc", "maml_cuda", "tests", "benchmarks", "docs", ".ci")


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    need: str | None


def blocks(text: str) -> list[Block]:
    return [Block(text.count("\n", 0, m.start("text")), m["language"], m["text"], m[1]) for m in FENCE.finditer(text)]


def prose(text: str) -> str:
    return FENCE.sub("", text)


# -- what pages need ----------------------------------------------------------------------------------------------

QUOTED = "its file"  # lines of a file of this repository: tests/test_adding_a_layer.py compares them with it
# By the word behind "not run: needs": whether this machine has it. Any other word is a package.
NEEDED: dict[str, Callable[[], bool]] = {"a GPU": torch.cuda.is_available, QUOTED: lambda: False}


def is_here(need: str) -> bool:
    return NEEDED[need]() if need in NEEDED else find_spec(need.replace("-", "_")) is not None


@contextlib.contextmanager
def given(page: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What a reader of this page has: names, and files in the working directory."""
    names: dict[str, object] = {"__name__": "__main__"}
    if page == "docs/datasets.md":
        published.mini_imagenet_pickles(Path("data", "mini-imagenet"), dump=pickle.dumps, images=16)
    if page in ("docs/training.md", "CONTRIBUTING.md"):
        maml = FusedMAML(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), inner_lr=0.1, loss="mse")
        sets = torch.rand(3, 5, 2), torch.rand(3, 5, 1), torch.rand(3, 7, 2), torch.rand(3, 7, 1)
        names |= {"maml": maml, "batches": [sets, sets], "maml_cuda": maml_cuda, "nn": nn}
        names |= dict(zip(("x_spt", "y_spt", "x_qry", "y_qry"), sets, strict=True))
    if page == "CONTRIBUTING.md":
        names["print"] = str  # what is printed there depends on the reader's model
    if page in ("README.md", "docs/trained_nets.md"):
        trained_on_birds()
    if page == "docs/trained_nets.md" and is_here("onnxruntime"):
        assert cli.main(["export", "runs/birds", "--support", "support"]) == 0
    if page != "docs/training.md":
        yield names
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    for name, value in (place | {"GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, str(value))  # as torchrun sets them
    try:
        yield names
    finally:
        torch.distributed.destroy_process_group()


def trained_on_birds() -> None:
    """The run runs/birds, and pictures of two classes in the folders support and query."""
    published.birds(Path("birds"), classes=9)
    options = "--ways 3 --split 3/3/3 --image-size 16 --filters 2 --queries 1 --test-queries 1 --inner-steps 1"
    options += " --iterations 1 --meta-batch 1 --validation-tasks 2 --test-tasks 2 --out runs/birds"
    assert cli.main(["train", "birds", *options.split()]) == 0
    for number, name in enumerate(["support/beech/1.jpg", "support/oak/1.jpg", "query/a.jpg", "query/oak/b.jpg"]):
        published.write(Path(name), published.encoded(published.pixels(number, 20, 18, 3), "jpeg"))


# -- Python blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [name for name in PAGES if "```python" in PAGES[name].read_text(encoding="utf-8")])
@pytest.mark.filterwarnings("ignore:maml_cuda runs this model on the general path")
@pytest.mark.filterwarnings("ignore:.* is in eval mode with running statistics that no batch has updated")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own call
def test_python_blocks_run_and_print_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peers.provide(page, monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nets this small gain nothing from more
    try:
        with given(page, monkeypatch) as names:
            run_and_compare(page, names)
    finally:
        torch.set_num_threads(threads)


def run_and_compare(page: str, names: dict[str, object]) -> None:
    of_page = blocks(PAGES[page].read_text(encoding="utf-8"))
    for block, following in zip(of_page, [*of_page[1:], None], strict=True):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, page, "exec")  # errors name the page's own lines
        if block.need is not None and not is_here(block.need):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        said = re.findall(r"^\s*print\(.*\)  # (.*)$", block.text, flags=re.MULTILINE)
        shown = following.text if following is not None and following.language == "text" else ""
        expected = " ".join([*said, shown]).split()
        got = printed.getvalue().split()
        same = page.startswith("docs/gallery/") and len(got) == len(expected) and all(map(about, got, expected))
        assert same or got == expected, f"{page}, line {block.line}"


def about(got: str, expected: str) -> bool:
    """Whether two words are the same, or numbers that differ by a fifth or by one of the last digit."""
    number = re.fullmatch(r"-?\d+(?:\.(\d+))?(%?)", expected)
    if got == expected or number is None or not re.fullmatch(r"-?\d+(\.\d+)?%?", got):
        return got == expected
    value = float(expected.rstrip("%"))
    allowed = max(abs(value) / 5, 1.01 * 10.0 ** -len(number[1] or ""))
    return got.endswith("%") == bool(number[2]) and abs(float(got.rstrip("%")) - value) <= allowed


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_language_and_those_not_run_a_reason(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    found = blocks(text)
    assert text.count("\n```") + text.startswith("```") == 2 * len(found), "a fence is indented or is not closed"
    for block in found:
        assert block.language in LANGUAGES, f"{page}, line {block.line}: ```{block.language}"
        if block.need is not None:
            assert block.language == "python", f"{page}, line {block.line}: only Python blocks are run"
            known = block.need in NEEDED or re.fullmatch(r"[a-z][\w-]*", block.need)
            assert known, f"{page}, line {block.line}: neither a package nor in NEEDED: {block.need!r}"
    marks = len(NOT_RUN.findall(text))
    assert marks == sum(block.need is not None for block in found), "a mark does not stand directly above its block"


# -- commands --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    line: int
    words: list[str]
    inline: bool = False  # in a line of prose, not in a ```sh block

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def commands(text: str) -> Iterator[Command]:
    """The commands of ```sh blocks, and those in inline code that begin with a program's name."""
    for block in blocks(text):
        if block.language == "sh":
            for number, line in enumerate(block.text.splitlines(), block.line + 1):
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    yield Command(number, words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                if words:
                    yield Command(number, words)
    lines = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)  # prose, each line where it is
    for code in INLINE.finditer(lines):
        if code[1].startswith(("maml-cuda ", "python -m ", "pip install ", "pytest ")):
            yield Command(lines.count("\n", 0, code.start()) + 1, shlex.split(code[1]), inline=True)


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_commands_parse(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(PAGES[page].read_text(encoding="utf-8")):
        check(f"{page}, line {command.line}: {command.text}", command.words)
    capsys.readouterr()


def check(where: str, words: list[str]) -> None:
    """Fails, with `where`, if a command does not parse."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # test_variables_exist looks at those of this project
        words = words[1:]
    program, *arguments = words
    if program == "maml-cuda":
        check_maml_cuda(where, arguments)
    elif program == "python" and arguments[0] == "-m" and arguments[1].startswith(("benchmarks", "tests")):
        check_options(where, arguments[2:], options_of_module(arguments[1]))
    elif program == "python":
        assert (ROOT / arguments[0]).exists() or arguments[0] == "-m", where
    elif program == "torchrun":
        at = arguments.index("-m") + 1
        assert arguments[at] == "maml_cuda", where
        check_options(where, arguments[:at], OF_TOOLS)
        check_maml_cuda(where, arguments[at + 1 :])
    elif program == "pip":
        check_pip(where, arguments)
    elif program == "pytest":
        check_options(where, arguments, OF_TOOLS)
        assert all((ROOT / word).exists() for word in arguments if "/" in word), where
    else:
        assert program in TOOLS, where


def check_maml_cuda(where: str, arguments: list[str]) -> None:
    if arguments[-1] in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            cli.parser().parse_args(arguments)
        assert ended.value.code == 0, where
        return
    try:
        options = cli.parser().parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{where} does not parse")
    if options.command == "train" and options.resume is None and not {"/", ":"} & {*str(options.job)}:
        assert options.job in {None, "FOLDER", *JOBS, *RL_JOBS}, where
        if options.preset is not None and options.job in JOBS:
            presets.preset_settings(options.job, options.preset)  # a ValueError where there is none


def check_pip(where: str, arguments: list[str]) -> None:
    extras = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert extras is not None
    known = re.findall(r"^(\w+) =", extras[1], flags=re.MULTILINE)
    for word in arguments:
        for extra in re.findall(r"\w+", "".join(re.findall(r"^(?:\.|maml-cuda)\[(.*)\]$", word))):
            assert extra in known, f"{where}: pyproject.toml has no extra {extra}"


def check_options(where: str, arguments: list[str], known: set[str]) -> None:
    for word in arguments:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{where}: no option {word}"


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
    for module in (
        "benchmarks",
        "benchmarks.gpu",
        "benchmarks.gpu.model",
        "benchmarks.paper",
        "benchmarks.paper.curve",
    ):
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
