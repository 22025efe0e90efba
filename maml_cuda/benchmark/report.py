"""What ``maml-cuda benchmark`` prints of a record: the case, a table, and what the user should take from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maml_cuda.benchmark.measuring import ORDERS, OURS

Record = Mapping[str, Any]
Side = Mapping[str, Any]

LEGEND = (
    "median and middle half: of the time of one meta-step. memory: what a step adds at its peak. error: of the "
    "{dtype} meta-gradient, relative to the float64 reference by plain autograd."
)
SAME = 1.05  # times that differ by less are the same


def text(record: Record) -> str:
    """The whole report."""
    return "\n".join([*_case(record), "", *_table(record), "", LEGEND.format(**record), *record["notes"], "",
                      record["conclusion"]])  # fmt: skip


def _case(record: Record) -> Iterator[str]:
    shape = " x ".join(map(str, record["input"]))
    classes = f" of {record['ways']} classes" if record["ways"] else ""
    yield f"{record['model']}: {record['parameters']:,} parameters, input {shape}, {record['loss']}, {record['dtype']}"
    yield (
        f"{_count(record['tasks'], 'task')}{classes}, {record['support']} support and {record['query']} query samples "
        f"each; {_count(record['inner_steps'], 'inner step')} of {record['inner_lr']:g}"
    )
    where = "" if record["device"] == "cpu" else f" on {record['device']}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    yield f"{record['machine']}, {_count(record['threads'], 'thread')}{where}; {versions}"
    if record["why_not_fused"]:
        yield f"maml_cuda runs this model by plain autograd (the general path), because {record['why_not_fused']}."
    elif record["backend"]:
        yield f"maml_cuda runs this model on its fused layers (backend {record['backend']})."


def _table(record: Record) -> Iterator[str]:
    rows = [("order", "side", "median", "middle half", "memory", "error")]
    for side in record["sides"]:
        first = (side["order"], side["side"])
        if side["status"] == "timed":
            wall = side["wall_ms"]
            middle = f"{_number(wall['q1'])} to {_number(wall['q3'])} ms"
            times = (f"{_number(wall['median'])} ms", middle, _memory(side["peak_bytes"]), f"{side['error']:.0e}")
            rows.append((*first, *times))
        else:
            rows.append((*first, "not timed", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    for row in rows:
        left, right = row[:2], row[2:]
        cells = [cell.ljust(w) for cell, w in zip(left, widths[:2], strict=True)]
        cells += [cell.rjust(w) for cell, w in zip(right, widths[2:], strict=True)]
        yield "  ".join(cells).rstrip()
    for side in record["sides"]:
        if side["status"] != "timed":
            yield f"Not timed: {side['side']}, {side['order']} order; {side['status']}: {side['reason']}"


def conclusion(record: Record) -> str:
    """What the user should take from it, in one sentence."""
    whole = [_compared(record, order) for order in ORDERS]
    words = f"Take from this: {'; '.join(whole)}"
    second, first = (_side(record, order, OURS) for order in ORDERS)
    if second and first:
        words += f"; with maml_cuda, second order takes {_median(second) / _median(first):.1f} times as long as first"
    if record["why_not_fused"]:
        words += ". A model whose layers are all fused would be faster"
    return words + "."


def _compared(record: Record, order: str) -> str:
    """maml_cuda beside the fastest other side."""
    ours = _side(record, order, OURS)
    others = [side for side in _timed(record, order) if side["side"] != OURS]
    if ours is None:
        return f"at {order} order maml_cuda has no result that could be timed, for the reason above"
    time = f"{_number(_median(ours))} ms"
    if not others:
        return f"at {order} order maml_cuda takes {time}, and nothing else could be timed"
    best = min(others, key=_median)
    ratio = _median(best) / _median(ours)
    if max(ratio, 1 / ratio) < SAME or _overlap(ours, best):
        return f"at {order} order maml_cuda takes {time}, about as long as {best['side']}, the fastest other side"
    if ratio > 1:
        faster = f"{ratio:.1f} times as fast as {best['side']}, the fastest other side"
        return f"at {order} order maml_cuda takes {time}, {faster}"
    other = f"{_number(_median(best))} ms"
    return f"at {order} order {best['side']} is the faster choice: it takes {other}, and maml_cuda {time}"


def _timed(record: Record, order: str) -> Sequence[Side]:
    return [side for side in record["sides"] if side["order"] == order and side["status"] == "timed"]


def _side(record: Record, order: str, name: str) -> Side | None:
    return next((side for side in _timed(record, order) if side["side"] == name), None)


def _median(side: Side) -> float:
    return float(side["wall_ms"]["median"])


def _overlap(a: Side, b: Side) -> bool:
    """Whether the middle halves of two sides overlap."""
    return bool(a["wall_ms"]["q1"] <= b["wall_ms"]["q3"] and b["wall_ms"]["q1"] <= a["wall_ms"]["q3"])


def _number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1230."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _memory(peak: int | None) -> str:
    if peak is None:
        return "?"
    return f"{peak / 2**20:.0f} MiB" if peak >= 2**20 else "< 1 MiB"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
