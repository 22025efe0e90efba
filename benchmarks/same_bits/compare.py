"""The bits of two versions: what differs in a case, in words, and the table of all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..markdown import markdown_table
from .cases import PLANS, Case
from .version import started

SIDES = ("OLD", "NEW")


@dataclass(frozen=True)
class Outcome:
    """A case on an instruction set; `difference` is "" where both versions have the same bits."""

    isa: str
    case: Case
    difference: str


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two records of one case (Version.bits) differ in; "" where they are the same and complete."""
    words = []
    hashes = old["hashes"], new["hashes"]
    names = list(dict.fromkeys([*hashes[0], *hashes[1]]))
    differing = [name for name in names if hashes[0].get(name) != hashes[1].get(name)]
    if differing:
        absent = [side for side, found in zip(SIDES, hashes, strict=True) if differing[0] not in found]
        first = f"{differing[0]}{f' (not in {absent[0]})' if absent else ''}"
        words.append(f"{len(differing)} of {len(names)} tensors differ, the first is {first}")
    words += [f"{side}: {record['error']}" for side, record in zip(SIDES, (old, new), strict=True) if record["error"]]
    return "; ".join(words)


def compare(
    folders: Sequence[Path], isa: str, cases: Iterable[Case], say: Callable[[str], None] = lambda line: None
) -> Iterator[Outcome]:
    """Each case in both versions, one after the other."""
    with started(folders, isa) as versions:
        for case in cases:
            outcome = Outcome(isa, case, difference(*(version.bits(case) for version in versions)))
            if outcome.difference or case.group != PLANS or case.number % 100 == 99:
                say(f"{isa}, {case}: {outcome.difference or 'same'}")
            yield outcome


def report(outcomes: Sequence[Outcome]) -> str:
    """A row for each workload and order, one for all plans; a column for each instruction set; below what differs."""
    cells: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        row = PLANS if outcome.case.group == PLANS else str(outcome.case)
        cells.setdefault(row, {}).setdefault(outcome.isa, []).append(outcome)
    isas = list(dict.fromkeys(outcome.isa for outcome in outcomes))
    lines = list(
        markdown_table(["case", *isas], ([row, *(cell(cells[row].get(i, [])) for i in isas)] for row in cells))
    )
    different = [outcome for outcome in outcomes if outcome.difference]
    lines += ["", *(f"- {o.isa}, {o.case}: {o.difference}" for o in different)]
    lines.append(f"{len(outcomes) - len(different)} of {len(outcomes)} cases have the same bits.")
    return "\n".join(lines)


def cell(outcomes: Sequence[Outcome]) -> str:
    different = sum(bool(outcome.difference) for outcome in outcomes)
    if len(outcomes) == 1:
        return "**differs**" if different else "same"
    return f"**{different} of {len(outcomes)} differ**" if different else f"{len(outcomes)} same" if outcomes else ""
