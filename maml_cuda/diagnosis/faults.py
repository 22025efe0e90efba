"""The ten faults that doctor knows, each with how to mend it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault of a training step.

    Attributes:
        name: one of the ten in this module.
        evidence: what shows it.
        mend: what to change.
    """

    name: str
    evidence: str
    mend: str


PARAM_DATA = "param.data in the inner loop"
NO_CREATE_GRAPH = "no create_graph"
COPY_INITIAL_WEIGHTS = "copy_initial_weights=True"
FIRST_ORDER_FLAG = "first order by a flag"
DETACHED = "detached fast weights"
VMAP_BATCH_NORM = "BatchNorm under vmap"
LEAKING_STATISTICS = "BatchNorm statistics leaking between support and query"
SUMMED = "a loss summed where the rate expects a mean"
WEIGHTS_LEFT = "adapted weights of the last task left in the model"
WRONG_MODE = "evaluation in the wrong mode"

MENDS = {
    PARAM_DATA: "make new tensors, fast = {name: p - lr * g}, and call the model with torch.func.functional_call: what "
    "is written into p.data, in place under no_grad, or by torch.optim has no graph",
    NO_CREATE_GRAPH: "torch.autograd.grad(support_loss, parameters, create_graph=True) in every inner step",
    COPY_INITIAL_WEIGHTS: "higher.innerloop_ctx(model, opt, copy_initial_weights=False): the default copies the "
    "initial weights, and the gradient ends at the copy",
    FIRST_ORDER_FLAG: "first_order=False (higher: track_higher_grads=True), unless FOMAML is what you want",
    DETACHED: "keep the fast weights and the inner gradients in the graph: no detach(), nn.Parameter(...), deepcopy or "
    "no_grad() between theta and the query loss",
    VMAP_BATCH_NORM: "take the gradient of each task inside vmap, vmap(grad(task)), and then the mean; or loop over "
    "the tasks: torch's BatchNorm has wrong second derivatives where grad is outside vmap",
    LEAKING_STATISTICS: "call the model on support and query sets separately, in train mode, so that each is "
    "normalised by its own statistics",
    SUMMED: 'reduction="mean", or divide the inner rate by the number of terms',
    WEIGHTS_LEFT: "start every task from the model's own weights, and never write the adapted ones into the model",
    WRONG_MODE: "call model.train() or model.eval() once, before the step, and not between support and query sets; "
    "MAML's BatchNorm is in train mode in both",
}


def fault(name: str, evidence: str) -> Fault:
    return Fault(name, evidence, MENDS[name])
