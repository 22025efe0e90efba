"""The README's figures: what stands between its two markers is written by `python -m benchmarks --readme`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .files import replace

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- python -m benchmarks --readme -->", "<!-- end -->"


def write(summary: str, plots: Sequence[Path], report: Path, readme: Path = README) -> None:
    """Puts the summary, the plots and a link to the whole report between the markers."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme.name} must hold the markers {BEGIN} and {END}, in this order")
    pictures = [f"![{path.stem}]({path.relative_to(readme.parent)})" for path in plots]
    link = (
        f"[The whole report]({report.relative_to(readme.parent)}): both orders, every rival, CPU time, memory, errors."
    )
    inside = "\n\n".join([summary.strip(), link, *pictures])
    replace(readme, f"{before}{begin}\n{inside}\n{end}{after}".removesuffix("\n"))
