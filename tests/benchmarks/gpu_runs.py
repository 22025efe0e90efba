"""Short runs of benchmarks.gpu on the emulated kernels."""

from __future__ import annotations

from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import (
    baseline,
    cases,
    fused,
    implementations,
    record,
    table,
    verification,
)

SINUSOID = cases.Case("sinusoid-k1", 2, 2, emulated=True)
MAML_CUDA = implementations.MAML_CUDA


def gathered(pieces):
    found = {}
    for piece in pieces:
        piece.pop("say", None)
        record.merge(found, piece)
    return found


def measured(case=SINUSOID):
    return gathered(fused.measure(case, 1e-4))


def with_baseline(method, case=SINUSOID):
    return gathered(baseline.measure(cases.Job(case, method, "float32", 60), 1e-4))


def options_of(folder, *more):
    return cli.parse(["--emulated", "--quick", "--out", str(folder), *more])


def change_gradient(monkeypatch, wrong):
    """Multiplies the gradients of maml_cuda by `wrong(dtype, precision)`."""
    right = implementations.fused

    def changed_fused(precision, cuda_graphs):
        def build(workload, model, tasks, first_order):
            step = right(precision, cuda_graphs)(workload, model, tasks, first_order)

            def changed():
                step()
                for p in model.parameters():
                    p.grad = p.grad * wrong(p.dtype, precision)

            return changed

        return build

    for module in (implementations, verification, fused):
        monkeypatch.setattr(module, "fused", changed_fused)


def statuses_of(found):
    return {(result["method"], result["precision"]): result["status"] for result in found["implementations"].values()}


def table_of(**found):
    settings = {"quick": False, "emulated": False}
    return table.markdown({"settings": settings, "machine": {}, "parts": {}, "cases": found})
