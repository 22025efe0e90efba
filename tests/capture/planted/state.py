"""Faults: state that changes within a call: caches, writes in place, random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.planted.settings import add, fault

# -- caches on the module -----------------------------------------------------------------------------------------

CACHE = "caches"


@fault(CACHE, "mlp", "cache")
def a_value_computed_once(self: Any, h: Tensor) -> Tensor:
    if not hasattr(self, "cache"):
        self.cache = h.detach().mean(0)
    return h * self.cache


@fault(CACHE, "conv4", "cache", plant=lambda m: setattr(m, "cache", None))
def the_last_value(self: Any, h: Tensor) -> Tensor:
    before, self.cache = self.cache, h.detach()
    return h if before is None else h * before.mean(0)


@fault(CACHE, "layer norm", "weight|cache")
def a_weight_computed_once(self: Any, h: Tensor) -> Tensor:
    """With its graph, back to the parameters of the first call."""
    if "cache" not in self.__dict__:
        self.cache = self.head.weight.sum(0)
    return h + self.cache


@fault(CACHE, "conv1d", "seen", plant=lambda m: setattr(m, "seen", []))
def a_list_that_grows(self: Any, h: Tensor) -> Tensor:
    self.seen.append(1)
    return h * (1 + len(self.seen) % 3)


@fault(CACHE, "nested", "count", plant=lambda m: setattr(m, "count", 0))
def another_branch_at_the_third_forward(self: Any, h: Tensor) -> Tensor:
    self.count += 1
    return h.tanh() * 2 if self.count >= 3 else h


@fault(CACHE, "policy", "COUNTS", plant=lambda m: COUNTS.clear())
def another_branch_at_the_ninth_forward(self: Any, h: Tensor) -> Tensor:
    """That is in the second call."""
    COUNTS.append(1)
    return h * 2 if len(COUNTS) >= 9 else h


COUNTS: list[int] = []


@fault(CACHE, "resnet", "masks", plant=lambda m: setattr(m, "masks", {}))
def a_mask_for_each_shape(self: Any, h: Tensor) -> Tensor:
    if h.shape not in self.masks:
        self.masks[h.shape] = torch.linspace(0, 1, h[0].numel(), dtype=h.dtype).view(h[0].shape)
    return h * self.masks[h.shape]


@fault(CACHE, "regression", "average", plant=lambda m: setattr(m, "average", 1.0))
def a_moving_average(self: Any, h: Tensor) -> Tensor:
    self.average = 0.5 * self.average + h.detach().abs().mean()
    return h / self.average


@fault(CACHE, "shared", "kept|mul", plant=lambda m: KEPT.clear())
def a_global_cache(self: Any, h: Tensor) -> Tensor:
    KEPT.setdefault("mean", h.detach().mean(0))
    return h * KEPT["mean"]


KEPT: dict[str, Tensor] = {}


@fault(CACHE, "group norm", "last|mul")
def a_value_that_only_a_log_reads(self: Any, h: Tensor) -> Tensor:
    self.last, self.size = h, h.shape
    return h * 1.5


@fault(CACHE, "mlp", "scaled|extra|hasattr|Linear|layer")
def a_layer_made_in_forward(self: Any, h: Tensor) -> Tensor:
    """It is no parameter of the first call."""
    if not hasattr(self, "extra"):
        torch.manual_seed(5)
        self.extra = nn.Linear(5, 5).double()
    return self.extra(h)


# -- writes in place ----------------------------------------------------------------------------------------------

WRITE = "writes in place"


def with_buffer(value: float | list[float] = 1.0) -> Any:
    return lambda model: model.register_buffer("scale", torch.tensor(value, dtype=torch.float64))


@fault(WRITE, "mlp", "scale", plant=with_buffer())
def a_buffer_that_grows(self: Any, h: Tensor) -> Tensor:
    self.scale += 0.5
    return h * self.scale


@fault(WRITE, "conv4", "scale", plant=with_buffer())
def a_buffer_assigned_anew(self: Any, h: Tensor) -> Tensor:
    self.scale = 0.5 * self.scale + h.detach().abs().mean()
    return h * self.scale


@fault(WRITE, "layer norm", "scale", plant=with_buffer([1.0, 2.0]))
def a_buffer_through_a_view(self: Any, h: Tensor) -> Tensor:
    self.scale.view(2, 1)[1].mul_(1.5)
    return h * self.scale.sum()


@fault(WRITE, "policy", "scale", plant=with_buffer([1.0, 2.0]), between=lambda m: m.scale.fill_(3.0))
def a_buffer_changed_between_calls(self: Any, h: Tensor) -> Tensor:
    return h * self.scale[0]


@fault(WRITE, "regression", "weight")
def a_weight_that_is_clipped(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.head.weight.clamp_(-0.2, 0.2)
    return h * 1.5


@fault(WRITE, "shared", "weight")
def a_weight_written_through_data(self: Any, h: Tensor) -> Tensor:
    self.head.weight.data.mul_(0.9)
    return h * 1.5


@fault(WRITE, "nested", "mul_|setitem|in place")
def a_column_of_a_value(self: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] *= 3
    return h


@fault(WRITE, "mlp", "relu_|in place")
def a_view_of_a_value_in_place(self: Any, h: Tensor) -> Tensor:
    h = h * 1
    h[:, 1:4].relu_()
    return h


@fault(WRITE, "conv1d", "relu_|in place")
def a_value_read_after_it_was_written(self: Any, h: Tensor) -> Tensor:
    a = h - 0.3
    b = F.relu(a, inplace=True)
    return a + b * 2


@fault(WRITE, "group norm", "masked_fill_|in place")
def entries_filled(self: Any, h: Tensor) -> Tensor:
    h = h + 0
    h.view(len(h), -1).masked_fill_(torch.arange(16) % 3 == 0, 0.5)
    return h


@fault(WRITE, "resnet", "empty|copy_")
def a_result_written_into_a_new_tensor(self: Any, h: Tensor) -> Tensor:
    new = torch.empty_like(h)
    new.copy_(h.square())
    return new


@fault(WRITE, "regression", "mul_|in place")
def the_data_written(self: Any, x: Tensor) -> Tensor:
    """Data of the next inner step too."""
    x.mul_(0.9)
    return self.head(self.body(x))


def two_buffers(model: Any) -> None:
    model.register_buffer("a", torch.tensor(1.0).double())
    model.register_buffer("b", torch.tensor(2.0).double())


@fault(WRITE, "mlp", r"self\.a|self\.b|swap", plant=two_buffers)
def two_buffers_swapped(self: Any, h: Tensor) -> Tensor:
    self.a, self.b = self.b, self.a
    return h * self.a


@fault(WRITE, "conv1d", "norm|running|statistic|eval", plant=lambda m: set_statistics(m, 2.0))
def statistics_of_a_norm(self: Any, h: Tensor) -> Tensor:
    return h * 1.5


def set_statistics(model: Any, variance: float) -> None:
    model.body[1].eval()
    model.body[1].running_var.fill_(variance)
    model.body[1].num_batches_tracked += 1


add(
    "statistics changed between calls", WRITE, "conv1d", "norm", plant=lambda m: set_statistics(m, 2.0),
    between=lambda m: set_statistics(m, 0.5),
)  # fmt: skip


@fault(WRITE, "policy", "mean|var|norm", plant=lambda m: with_statistics(m))
def statistics_of_a_functional_norm(self: Any, h: Tensor) -> Tensor:
    h = h - self.mean
    return F.batch_norm(h, self.mean, self.var, training=True) + self.var


def with_statistics(model: Any) -> None:
    model.register_buffer("mean", torch.zeros(5).double())
    model.register_buffer("var", torch.ones(5).double())


@fault(WRITE, "mlp", "sigma|norm|u", plant=lambda m: m.register_buffer("u", torch.ones(5).double()))
def a_power_iteration(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        v = F.normalize(self.head.weight @ self.u, dim=0)
        self.u.copy_(F.normalize(self.head.weight.mT @ v, dim=0))
    return h / (v @ self.head.weight @ self.u)


def two_activations(model: Any) -> None:
    model.a, model.b = nn.Tanh(), nn.Sigmoid()


@fault(CACHE, "layer norm", r"self\.a|self\.b|swap", plant=two_activations)
def two_layers_swapped_in_forward(self: Any, h: Tensor) -> Tensor:
    self.a, self.b = self.b, self.a
    return self.a(h)


# -- random numbers -----------------------------------------------------------------------------------------------

RANDOM = "random numbers"


@fault(RANDOM, "mlp", "random|rand")
def noise(self: Any, h: Tensor) -> Tensor:
    return h + 0.1 * torch.randn_like(h)


@fault(RANDOM, "conv4", "random|dropout")
def dropout_by_function(self: Any, h: Tensor) -> Tensor:
    return F.dropout(h, 0.25, self.training)


def with_dropout(model: Any) -> None:
    model.body.append(nn.Dropout(0.25))


add("dropout", RANDOM, "layer norm", "Dropout", plant=with_dropout)
add("dropout in eval mode at first", RANDOM, "shared", "Dropout", plant=lambda m: with_dropout(m.eval()),
    between=lambda m: m.train())  # fmt: skip


@fault(RANDOM, "conv1d", "random")
def python_random(self: Any, h: Tensor) -> Tensor:
    return h * random.random()


@fault(RANDOM, "resnet", "random")
def numpy_random(self: Any, h: Tensor) -> Tensor:
    return h * float(np.random.rand())


def with_generator(model: Any) -> None:
    model.draw = random.Random(3)


@fault(RANDOM, "regression", "random|draw", plant=with_generator)
def a_generator_of_the_model(self: Any, h: Tensor) -> Tensor:
    return h * self.draw.random()


@fault(RANDOM, "nested", "random|generator", plant=lambda m: setattr(m, "g", torch.Generator().manual_seed(3)))
def a_torch_generator_of_the_model(self: Any, h: Tensor) -> Tensor:
    return h * torch.rand((), generator=self.g).double()


@fault(RANDOM, "policy", "random|perm")
def features_permuted(self: Any, h: Tensor) -> Tensor:
    return h[:, torch.randperm(5)]


@fault(RANDOM, "group norm", "random|bernoulli|uniform|in place")
def a_mask_drawn_in_place(self: Any, h: Tensor) -> Tensor:
    return h * torch.empty(4, 1, 1, dtype=h.dtype).uniform_(0.5, 1)


@fault(RANDOM, "shared", "random|RANDOM|draw")
def a_random_number_drawn_once(self: Any, h: Tensor) -> Tensor:
    if "drawn" not in self.__dict__:
        self.drawn = 1 + random.random()
    return h * self.drawn
