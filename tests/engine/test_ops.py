"""The torch.library ops: opcheck, higher derivatives that must raise, batched cotangents."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from maml_cuda import FusedMAML, PolicyTarget
from maml_cuda.data import Episodes
from tests.engine.nets import episode, learned, net

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls(TorchFunctionMode):
    """Records the first call of each of maml_cuda's ops, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, tuple, dict]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(function).removesuffix(".default").replace(".", "::")
        if name.startswith("maml_cuda::"):
            self.seen.setdefault(name, (function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def calls(padded: bool = False) -> dict[str, tuple[Any, tuple, dict]]:
    """One call of every op, with the arguments that FusedMAML passes; those of sets with padding where they take it."""
    maml = FusedMAML(net(), learned(0.3, 0.2), 2)
    x_spt, y_spt, x_qry, y_qry = episode()
    fixed = FusedMAML(maml.model, 0.3, 2)
    spt, qry = (torch.ones(y.shape, dtype=torch.float64) if padded else None for y in (y_spt, y_qry))
    if padded:
        spt[1, 3:] = qry[2, 0] = 0
    with Calls() as made:
        maml(x_spt, y_spt, x_qry, y_qry, spt_weights=spt, qry_weights=qry)
        maml.adapt(x_spt, y_spt, differentiable=True, spt_weights=spt)
        fast = maml.adapt(x_spt, y_spt, spt_weights=spt)
        list(maml.inner_loop(x_spt, y_spt, 2, spt_weights=spt))
        fixed.predict(fast, x_qry, weights=qry)
        fixed.predict({name: t.clone().requires_grad_() for name, t in fast.items()}, x_qry, weights=qry)
        fixed.loss_and_grad(fast, x_qry, y_qry, weights=qry)
        fixed.hvp(fast, x_qry, y_qry, fast, weights=qry)
        policy = FusedMAML(net(), 0.1, 2, loss="categorical_policy_gradient")
        actions = PolicyTarget(y_spt, torch.ones(y_spt.shape, dtype=torch.float64))
        policy.fisher_vector_product(x_spt, actions, x_qry, dict(policy.model.named_parameters()))
        words = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Flatten(), torch.nn.Linear(8, 4)).double()
        FusedMAML(words, 0.1).adapt(torch.randint(7, (*y_spt.shape, 2)), y_spt)
        FusedMAML(net(), 0.1, 2)(x_spt.clone().requires_grad_(), y_spt, x_qry, y_qry)
        Episodes(torch.zeros(3, 4, 2, 2, dtype=torch.uint8), 2, 1, 2).draw(2, seed=0)
    parameters, rates, x, y, plan, steps, seed = made.seen["maml_cuda::adapt_forward"][1]
    cotangents = [torch.ones_like(fast[name]) for name, _ in maml.model.named_parameters()]
    backward = (parameters, rates, x, y, cotangents, plan, steps, False, seed)
    made.seen["maml_cuda::adapt_backward"] = (torch.ops.maml_cuda.adapt_backward, backward, {})
    own, x, plan, seed, counts = made.seen["maml_cuda::predict_forward"][1]
    cotangent = torch.ones(3, 3, 4, dtype=torch.float64)
    made.seen["maml_cuda::predict_backward"] = (
        torch.ops.maml_cuda.predict_backward,
        (own, x, cotangent, plan, seed, counts),
        {},
    )
    return made.seen


OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("maml_cuda::"))


def test_every_op_is_checked() -> None:
    assert len(OPS) >= 10
    assert set(OPS) == set(calls())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by torch 2.14
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, padded: bool) -> None:
    function, args, kwargs = calls(padded)[name]
    op = function if isinstance(function, torch._ops.OpOverload) else function.default
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("call", ["forward", "adapt", "predict"])
@pytest.mark.parametrize("penalty", ["squares", "squares and parameters", "a product"])
def test_a_further_derivative_raises(call: str, penalty: str) -> None:
    maml = FusedMAML(net(), 0.3, 2)
    x_spt, y_spt, x_qry, y_qry = episode()
    inputs = list(maml.parameters())
    if call == "forward":
        value = maml(x_spt, y_spt, x_qry, y_qry).loss
    elif call == "adapt":
        value = sum(t.square().sum() for t in maml.adapt(x_spt, y_spt, differentiable=True).values())
    else:
        fast = maml.adapt(x_spt, y_spt)
        inputs = [t.requires_grad_() for t in fast.values()]
        value = maml.predict(fast, x_qry).square().sum()
    first = torch.autograd.grad(value, inputs, create_graph=True)
    assert all(torch.isfinite(g).all() for g in first)
    total = sum((g**2).sum() for g in first)
    if penalty == "squares and parameters":
        total = total + sum(p.sum() for p in inputs)
    elif penalty == "a product":
        total = sum((g * p).sum() for g, p in zip(first, inputs, strict=True))
    for p in inputs:
        p.grad = None
    order = "second order in the model); hvp gives products" if call == "predict" else "third order in the model"
    with pytest.raises(RuntimeError, match=re.escape(order)):
        total.backward()
    assert all(p.grad is None for p in inputs)  # not even the terms that can be computed


def test_a_batch_of_cotangents() -> None:
    maml = FusedMAML(net(), 0.3, 2)
    parameters = list(maml.parameters())
    plain = torch.autograd.grad(FusedMAML(maml.model, 0.3, 2)(*episode()).loss, parameters)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for _ in range(2):  # the second call takes the fast path
        batched = torch.autograd.grad(maml(*episode()).loss, parameters, scales, is_grads_batched=True)
        for one, both in zip(plain, batched, strict=True):
            torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def test_create_graph_does_not_change_the_gradient() -> None:
    maml = FusedMAML(net(), learned(0.3, 0.2), 2)
    parameters = list(maml.parameters())
    plain = torch.autograd.grad(maml(*episode()).loss, parameters)
    with_graph = torch.autograd.grad(maml(*episode()).loss, parameters, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_graph, strict=True))


# -- dtypes of targets, whose memory the core reads ------------------------------------------------------------------

WITH_TARGET = {
    "meta_gradient": 3,
    "adapt_forward": 3,
    "adapt_backward": 3,
    "inner_step": 3,
    "loss_and_grad": 2,
    "hvp": 2,
}


@pytest.mark.parametrize("name", WITH_TARGET)
def test_labels_of_another_dtype(name: str) -> None:
    function, args, kwargs = calls()[f"maml_cuda::{name}"]
    at = WITH_TARGET[name]
    wrong = [args[at][0].to(torch.int32), *args[at][1:]]
    with pytest.raises(TypeError, match=r"^y(_spt)? must be torch.int64 for cross_entropy, got torch.int32$"):
        function(*args[:at], wrong, *args[at + 1 :], **kwargs)


@pytest.mark.parametrize("name", WITH_TARGET)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_an_input_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    function, args, kwargs = calls()[f"maml_cuda::{name}"]
    at = WITH_TARGET[name] - 1
    with pytest.raises(TypeError, match=rf"^x must be torch.float32 or torch.float64, got {dtype}$"):
        function(*args[:at], args[at].to(dtype), *args[at + 1 :], **kwargs)


@pytest.mark.parametrize("loss", ["mse", F.huber_loss], ids=["mse", "computed"])
def test_values_of_another_dtype(loss: Any) -> None:
    maml, x = FusedMAML(net(), 0.3, 2, loss=loss), torch.randn(3, 5, 3).double()
    y = torch.randn(3, 5, 4).double()
    with Calls() as made:
        maml(x, y, x, y)
    function, args, kwargs = made.seen["maml_cuda::meta_gradient"]
    words = r"^y_qry must be torch.float64 like x for (mse|computed), got torch.float32$"
    with pytest.raises(TypeError, match=words):
        function(*args[:5], [args[5][0].float()], *args[6:], **kwargs)


@pytest.mark.parametrize("field", ["actions", "advantages", "weights"])
def test_a_field_of_a_policy_target_of_another_dtype(field: str) -> None:
    maml = FusedMAML(net(), 0.1, 2, loss="categorical_policy_gradient")
    x, labels, _, _ = episode()
    ones = torch.ones(labels.shape, dtype=torch.float64)
    y = PolicyTarget(labels, ones, weights=ones)
    with Calls() as made:
        maml(x, y, x, y)
    function, args, kwargs = made.seen["maml_cuda::meta_gradient"]
    at = PolicyTarget._fields.index(field)
    wrong = [t.float() if i == at else t for i, t in enumerate(args[3])]
    expected = "torch.int64" if field == "actions" else "torch.float64 like x"
    words = f"^y_spt.{field} must be {expected} for categorical_policy_gradient, got torch.float32$"
    with pytest.raises(TypeError, match=words):
        function(*args[:3], wrong, *args[4:], **kwargs)


def test_a_target_in_the_dtype_of_a_frozen_parameter() -> None:
    """A model may have frozen parameters of another dtype. The target of its loss must be in that of x."""
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Identity())
    model[1].table = nn.Parameter(torch.ones(2), requires_grad=False)
    maml, x, y = FusedMAML(model, 0.1, 2, loss="mse"), torch.randn(3, 5, 3).double(), torch.randn(3, 5, 4).double()
    maml(x, y, x, y)
    assert maml.backend == "cpu"
    with pytest.raises(TypeError, match=r"y_spt must be torch.float64 like x for mse, got torch.float32"):
        maml(x, y.float(), x, y)
