"""Faults: another branch under tracing, sizes that are burnt in, samples that are mixed, shared parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.planted.settings import add, fault

# -- another branch -----------------------------------------------------------------------------------------------

BRANCH = "another branch"


@fault(BRANCH, "mlp", "mask|mul|tanh")
def an_optional_mask(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    h = self.body(x)
    return self.head(h * h.tanh() if mask is None else h * mask)


@fault(BRANCH, "conv1d", "scales|mul")
def a_variable_number_of_arguments(self: Any, x: Tensor, *scales: float, **options: float) -> Tensor:
    h = self.body(x)
    for scale in (*scales, *options.values()):
        h = h * scale
    return self.head(h if scales or options else h * h)


@fault(BRANCH, "conv4", "grad|mul")
def whether_gradients_are_on(self: Any, h: Tensor) -> Tensor:
    return h * h if torch.is_grad_enabled() else h


@fault(BRANCH, "layer norm", "training|mul", between=lambda model: model.eval())
def the_training_flag(self: Any, h: Tensor) -> Tensor:
    return 1.5 * h if self.training else -h


@fault(BRANCH, "nested", "training|mul", between=lambda model: model.body.inner.inner.eval())
def the_training_flag_of_an_inner_module(self: Any, h: Tensor) -> Tensor:
    return 1.5 * h if self.body.inner.inner.training else -h


@fault(BRANCH, "group norm", "requires_grad|mul")
def whether_a_value_requires_grad(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if h.requires_grad else h


@fault(BRANCH, "shared", "leaf|mul")
def whether_the_weight_is_a_leaf(self: Any, h: Tensor) -> Tensor:
    """It is in the first inner step only."""
    return h * 2.5 if self.head.weight.is_leaf else h


@fault(BRANCH, "resnet", "type|mul|misread|do not compute")
def the_exact_type(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if type(h) is Tensor else h


@fault(BRANCH, "regression", "isinstance|mul|misread|do not compute")
def the_exact_type_of_a_weight(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if isinstance(self.head.weight, nn.Parameter) else h


@fault(BRANCH, "policy", "compiling|mul")
def whether_a_compiler_runs(self: Any, h: Tensor) -> Tensor:
    return h if torch.compiler.is_compiling() or torch.jit.is_tracing() else h * 2.5


@fault(BRANCH, "mlp", "sum|control flow|depends")
def a_branch_on_a_value(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if h[0].sum() > 0 else h


@fault(BRANCH, "conv1d", "max|item|control flow|depends|float")
def a_value_as_a_python_number(self: Any, h: Tensor) -> Tensor:
    return h * float(h.detach().max())


@fault(BRANCH, "layer norm", "control flow|depends|len|mul|misread|do not compute")
def an_error_that_is_caught(self: Any, h: Tensor) -> Tensor:
    try:
        scale = 2.0 if bool((h[0] > 0).any()) and len(h) else 3.0
    except Exception:
        return h
    return h * scale


@fault(BRANCH, "regression", "norm|item|float|depends")
def a_weight_as_a_python_number(self: Any, h: Tensor) -> Tensor:
    """It is another one at each inner step."""
    return h * float(self.head.weight.detach().norm())


@fault(BRANCH, "conv1d", "training|eval|norm")
def eval_mode_inside_of_forward(self: Any, x: Tensor) -> Tensor:
    self.body.eval()
    h = self.body(x)
    self.body.train()
    return self.head(h)


@fault(BRANCH, "resnet", "contiguous|stride|mul")
def whether_the_data_are_contiguous(self: Any, x: Tensor) -> Tensor:
    h = self.body(x.transpose(2, 3))
    return self.head(h if x.transpose(2, 3).is_contiguous() else h * h)


@fault(BRANCH, "policy", "device|mul", around=lambda: torch.device("cpu"))
def the_type_of_the_device(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if torch.zeros(1).device.type == "cpu" and h.device.type == "cpu" else h


@fault(BRANCH, "shared", "grad|mul")
def whether_a_parameter_has_a_gradient(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if all(p.grad is None for p in self.parameters() if p.is_leaf) else h


@fault(BRANCH, "mlp", "autocast|mul", around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
def whether_autocast_is_on(self: Any, h: Tensor) -> Tensor:
    """Calls run outside of the autocast that is around them."""
    return h if torch.is_autocast_enabled("cpu") else h * 2.5


@fault(BRANCH, "nested", "dtype|mul", around=lambda: default_dtype(torch.float64))
def the_default_dtype(self: Any, h: Tensor) -> Tensor:
    return h * torch.tensor([2.5]).dtype.itemsize if torch.get_default_dtype() == torch.float64 else h


@fault(BRANCH, "mlp", "grad|mul", around=torch.no_grad)
def whether_gradients_are_on_at_a_call_without(self: Any, h: Tensor) -> Tensor:
    """They are on inside of a model."""
    return h * h if torch.is_grad_enabled() else h


@fault(BRANCH, "regression", "inference|mul", around=torch.inference_mode)
def whether_it_is_inference(self: Any, h: Tensor) -> Tensor:
    return h * 2.5 if torch.is_inference_mode_enabled() or h.is_inference() else h * -1.5


class default_dtype:
    """A context with another default dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self.before)


# -- sizes that are burnt in --------------------------------------------------------------------------------------

SIZE = "burnt-in sizes"
LARGER = {"sizes": ((4, 3), (6, 5))}


@fault(SIZE, "mlp", "len|mul|div|query set", **LARGER)
def divided_by_the_number_of_samples(self: Any, h: Tensor) -> Tensor:
    return h / len(h)


@fault(SIZE, "conv4", "shape|mul|query set", **LARGER)
def another_branch_for_more_samples(self: Any, h: Tensor) -> Tensor:
    return h * 2 if h.shape[0] > 4 else h * -1.5


@fault(SIZE, "layer norm", "range|arange|mul|div|query set", **LARGER)
def weights_that_count_the_samples(self: Any, h: Tensor) -> Tensor:
    return h * torch.arange(1, len(h) + 1).view(-1, 1) / len(h)


@fault(SIZE, "regression", "stack|select|getitem|range|control flow|torch.fx|query set", **LARGER)
def a_loop_over_samples(self: Any, h: Tensor) -> Tensor:
    return torch.stack([h[i] * (1 + i) for i in range(len(h))])


@fault(SIZE, "conv1d", "numel|sum|div|mul|query set", **LARGER)
def a_mean_by_hand(self: Any, h: Tensor) -> Tensor:
    return h * (h.sum() / h.numel())


@fault(SIZE, "nested", "size|mul|view|reshape|pow|query set", **LARGER)
def the_number_of_samples_as_an_exponent(self: Any, h: Tensor) -> Tensor:
    return h.view(h.size(0), -1) ** (h.size(0) / 4)


@fault(
    SIZE,
    "resnet",
    "table|slice|getitem|mul|query set",
    **LARGER,
    plant=lambda m: setattr(m, "table", torch.rand(9, 1, 1, 1).double()),
)
def positions_of_samples(self: Any, h: Tensor) -> Tensor:
    return h * self.table[: len(h)]


@fault(SIZE, "shared", "ones|matmul|mm|div|query set", **LARGER)
def averaged_by_a_matrix(self: Any, h: Tensor) -> Tensor:
    return h + torch.ones(len(h), len(h), dtype=h.dtype) @ h / h.shape[0]


@fault(SIZE, "group norm", "expand|linspace|mul|query set", **LARGER)
def a_ramp_over_samples(self: Any, h: Tensor) -> Tensor:
    return h * torch.linspace(0, 1, len(h), dtype=h.dtype).view(-1, 1, 1, 1).expand_as(h)


# -- samples that are mixed ---------------------------------------------------------------------------------------

MIXED = "mixed samples"


@fault(MIXED, "mlp", "mean|sub|sample")
def centred_over_samples(self: Any, h: Tensor) -> Tensor:
    return h - h.mean(0)


@fault(MIXED, "conv1d", "view|reshape|mul|sample")
def a_view_with_other_rows(self: Any, h: Tensor) -> Tensor:
    rows = h.reshape(-1, 2)
    return (rows * rows.mean(0)).reshape(h.shape)


@fault(MIXED, "layer norm", "flip|sample")
def samples_reversed(self: Any, h: Tensor) -> Tensor:
    return h + 0.5 * h.flip(0)


@fault(MIXED, "nested", r"\bt\b|transpose|sample|add", sizes=((5, 5), (5, 5)))
def transposed_where_samples_are_as_many_as_features(self: Any, h: Tensor) -> Tensor:
    return h + 0.5 * h.t()


@fault(MIXED, "regression", "softmax|sample|mul")
def a_softmax_over_samples(self: Any, h: Tensor) -> Tensor:
    return h * h.softmax(0)


@fault(MIXED, "resnet", "roll|sample|add")
def samples_rolled(self: Any, h: Tensor) -> Tensor:
    return h + torch.roll(h, 1, 0)


@fault(MIXED, "shared", "matmul|mm|softmax|sample|transpose|mT")
def attention_across_samples(self: Any, h: Tensor) -> Tensor:
    return (h @ h.mT).softmax(-1) @ h


@fault(MIXED, "group norm", "getitem|select|slice|sample|add")
def the_first_sample_added_to_each(self: Any, h: Tensor) -> Tensor:
    return h + h[:1]


@fault(MIXED, "conv4", "cumsum|sample|div")
def a_running_sum_over_samples(self: Any, h: Tensor) -> Tensor:
    return h.cumsum(0) / 3


@fault(MIXED, "policy", "sort|sample")
def samples_sorted(self: Any, h: Tensor) -> Tensor:
    return h + h.sort(0).values


@fault(MIXED, "mlp", "batch_norm|sample")
def a_normalisation_over_samples(self: Any, h: Tensor) -> Tensor:
    return F.batch_norm(h.unsqueeze(0).flatten(0, 1), None, None, training=True)


@fault(MIXED, "regression", "linear|matmul|mm|sample|transpose|mT|eye|view|reshape|getattr")
def a_sample_axis_folded_into_features(self: Any, h: Tensor) -> Tensor:
    return h + h.reshape(1, -1).cumsum(-1).view(h.shape) / 10


# -- shared parameters --------------------------------------------------------------------------------------------

SHARED = "shared parameters"


def tied_to_its_transpose(model: Any) -> None:
    model.back = nn.Linear(5, 3, bias=False).double()
    model.back.weight = nn.Parameter(model.body[0].weight.detach().t())  # the same memory, another parameter


add(
    "two parameters in one memory", SHARED, "mlp", "memory|back|mul|tanh", plant=tied_to_its_transpose,
    methods={"middle": lambda self, h: F.linear(torch.tanh(self.back(h)), self.body[0].weight)},
)  # fmt: skip
add(
    "a layer under two names", SHARED, "nested", "twin", plant=lambda m: setattr(m, "twin", m.body.inner),
    methods={"middle": lambda self, h: h + self.twin.inner[1](self.twin.inner[0](h[:, :3]))},
)  # fmt: skip


def aliased(model: Any) -> None:
    model.body[2] = nn.Linear(5, 5).double()
    model.body[4].weight, model.body[4].bias = model.body[2].weight, model.body[2].bias


add("one parameter in two layers", SHARED, "shared", "body|weight", plant=aliased)


@fault(SHARED, "mlp", "list|kept|linear|weight|mul", plant=lambda m: setattr(m, "kept", [m.head.weight]))
def a_parameter_in_a_plain_list(self: Any, h: Tensor) -> Tensor:
    """The list holds the parameter before the inner loop."""
    return h * self.kept[0].mean(0)


@fault(SHARED, "regression", "unregistered|linear|weight", plant=lambda m: hide(m, nn.Linear(6, 6).double()))
def a_layer_that_is_not_registered(self: Any, h: Tensor) -> Tensor:
    return self.unregistered[0](h)


def hide(model: Any, layer: nn.Module) -> None:
    model.unregistered = [layer]


@fault(SHARED, "policy", "closure|mul|STD|log_std|add", plant=lambda m: STD.append(m.head.log_std))
def a_parameter_in_a_global_list(self: Any, h: Tensor) -> Tensor:
    return h * STD[-1].exp().sum()


STD: list[Tensor] = []


def moved(model: Any) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


add("a parameter replaced between calls", SHARED, "mlp", "weight", between=moved)
add(
    "layers tied between calls", SHARED, "shared", "weight",
    between=lambda m: setattr(m.body[0], "bias", m.body[2].bias),
)  # fmt: skip
add(
    "one parameter as weight and as bias", SHARED, "layer norm", "bias|weight|body|head",
    plant=lambda m: setattr(m.body[1], "bias", m.body[1].weight),
)  # fmt: skip


def without_the_last(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for name, p in nn.Module.named_parameters(self, *args, **kwargs):
        if name != "head.bias":
            yield name, p


add(
    "parameters left out by an override", SHARED, "mlp", "head.bias|parameter",
    methods={"named_parameters": without_the_last},
)  # fmt: skip
