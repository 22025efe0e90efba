"""The files around the code agree with one another, and with what they describe."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_pre_commit_has_the_versions_of_constraints() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = re.findall(r"repo: https://\S+/(?:mirrors-)?([\w-]+?)(?:-pre-commit)?\n    rev: v(\S+)", text)
    assert [name for name, _ in hooks] == ["ruff", "clang-format"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in hooks:
        assert f"{name}=={version}" in constraints


def test_one_version_everywhere() -> None:
    version = re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "docs" / "releases" / f"{version[1]}.md").exists()
    released = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version[1]


def test_wheels_are_for_the_pythons_that_the_package_names() -> None:
    named = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT)
    assert f'\nbuild = "cp3{{{",".join(named)}}}-manylinux_' in PYPROJECT


def test_the_changelog_starts_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    introduction, first, *others = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    assert first == "[Unreleased]"
    assert "\n- " not in introduction
    versions = others[1::2]
    assert versions
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions)


def test_contributing_lists_the_steps_of_ci() -> None:
    *steps, last = re.findall(r'^step "(.*)"$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert last == "done"
    table = CONTRIBUTING.split("| step | ")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\w.*?) \|", table, re.MULTILINE)
    assert [step for row, step in zip(rows, steps, strict=True) if not step.startswith(row)] == []


def test_contributing_names_what_exists() -> None:
    links = re.findall(r"\]\(([^)]+)\)", CONTRIBUTING)
    named = re.findall(r"[ `]((?:tests|csrc|maml_cuda|benchmarks|\.ci)/[\w./]+)", CONTRIBUTING)
    assert len(links) > 3
    assert len(named) > 10
    assert [path for path in {*links, *named} if not (ROOT / path).exists()] == []


def test_contributing_names_variables_that_are_read() -> None:
    names = set(re.findall(r"MAML_CUDA_\w+", CONTRIBUTING))
    readers = [ROOT / "setup.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    text = "".join(path.read_text() for path in readers if path != Path(__file__))
    options = re.findall(r"^(?:set|option)\((MAML_CUDA_\w+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert names
    assert {name for name in names if f'"{name}"' not in text} <= set(options)


def test_the_first_change_of_contributing(check_passes: Callable[..., None]) -> None:
    (example,) = re.findall(r"```python\n(def test_.*?)```", CONTRIBUTING, re.DOTALL)
    names: dict[str, Callable[..., None]] = {}
    exec(compile("from torch import nn\n" + example, "CONTRIBUTING.md", "exec"), names)
    (name,) = re.findall(r"def (test_\w+)", example)
    names[name](check_passes)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_the_source_distribution_holds_every_tracked_file(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (sources,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    tracked = {path for path in listed.stdout.splitlines() if (ROOT / path).exists()}
    assert tracked - set(sources.read_text().splitlines()) == set()
