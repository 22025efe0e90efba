"""Short runs of benchmarks.gpu on the emulated kernels."""

from __future__ import annotations

from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import (
    cases,
    ours,
    proof,
    record,
    rivals,
    sides,
    table,
)

SINUSOID = cases.Case("sinusoid-k1", 2, 2, emulated=True)
OURS = sides.OURS


def gathered(pieces):
    found = {}
    for piece in pieces:
        piece.pop("say", None)
        record.merge(found, piece)
    return found


def measured(case=SINUSOID):
    return gathered(ours.measure(case, 1e-4))


def beside(who, case=SINUSOID):
    return gathered(rivals.measure(cases.Job(case, who, "float32", 60), 1e-4))


def options_of(folder, *more):
    return cli.parse(["--emulated", "--quick", "--out", str(folder), *more])


def spoil(monkeypatch, wrong):
    """Ours, with a gradient that is off by a factor of `wrong(dtype, precision)`."""
    right = sides.ours

    def spoiled_ours(precision, cuda_graphs):
        def build(workload, model, tasks, first_order):
            step = right(precision, cuda_graphs)(workload, model, tasks, first_order)

            def spoiled():
                step()
                for p in model.parameters():
                    p.grad = p.grad * wrong(p.dtype, precision)

            return spoiled

        return build

    for module in (sides, proof, ours):
        monkeypatch.setattr(module, "ours", spoiled_ours)


def statuses_of(found):
    return {(side["who"], side["precision"]): side["status"] for side in found["sides"].values()}


def table_of(**found):
    settings = {"quick": False, "emulated": False}
    return table.markdown({"settings": settings, "machine": {}, "parts": {}, "cases": found})
