"""The page docs/models.md: each model of the list, and whether it is fused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maml_cuda import FusedMAML
from tests.models.published import Published
from tests.models.zoo import FAMILIES, MODELS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = (
    "# Published models\n\n"
    "Models that people meta-train, in the structure in which they were published and at small sizes. `python -m "
    "tests.models` writes this page: it asks `explain` what serves each. A model that is not fused runs on the general "
    "path; the table has the first reason that was met. `tests/models` compares the meta-gradient of each with plain "
    "autograd, within 1e-9 in float64, and looks at whether the model is left as it was."
)


def maml_of(published: Published) -> FusedMAML:
    adapted = None if published.adapted is None else list(published.adapted)
    return FusedMAML(published.model(), published.inner_lr, 2, loss=published.loss, adapt_params=adapted)


def why_not(maml: FusedMAML, *data: Any) -> str:
    """Why the last call, or one on such data (x, y), is not fused; "" if it is."""
    return maml.explain(*data).partition("\n")[0].partition(", because ")[2]


def row(published: Published, reason: str) -> str:
    by = "the general path" if reason else "fused layers"
    return f"| `{published.name}` | {published.source} | {by} | {reason.replace('|', chr(92) + '|')} |"


def markdown(reasons: Mapping[str, str]) -> str:
    """reasons: name -> why it is not fused, "" if it is."""
    fused = sum(not reasons[name] for name in MODELS)
    parts = [HEAD, f"{fused} of {len(MODELS)} are fused."]
    for title, models in FAMILIES.items():
        rows = [row(published, reasons[published.name]) for published in models()]
        parts += [
            f"## {title}",
            "\n".join(["| model | source | served by | why not fused |", "| --- | --- | --- | --- |", *rows]),
        ]
    return "\n\n".join(parts) + "\n"
