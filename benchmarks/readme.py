"""Writes the benchmark results into README.md and docs/benchmarks.md: `python -m benchmarks --readme`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .files import replace

README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- python -m benchmarks --readme -->", "<!-- end -->"


def write(summary: str, plots: Sequence[Path], report: Path, page: Path) -> None:
    """Puts the summary, the plots and a link to the whole report between the markers of the page."""
    pictures = [f"![{path.stem}]({path.relative_to(page.parent)})" for path in plots]
    path = report.relative_to(page.parent)
    link = f"[The whole report]({path}): both orders, all baselines, CPU time, memory, errors."
    between(BEGIN, "\n\n".join([summary.strip(), link, *pictures]), page)


def between(begin: str, inside: str, page: Path) -> None:
    """Puts a text between the marker `begin` of a page and the END that follows."""
    before, found, rest = page.read_text().partition(begin)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise ValueError(f"{page.name} must hold the markers {begin} and {END}, in this order")
    replace(page, f"{before}{begin}\n{inside}\n{end}{after}".removesuffix("\n"))
