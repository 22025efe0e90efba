"""Compares a plan with its model on random data.

A plan comes from reading what a model runs, and that can be misread. So before a plan is used for samples of a shape,
its results are compared with those of plain autograd on a copy of the model in float64: the prediction, the gradient of
the loss, and one Hessian-vector product.

The copy has the model's modules and training flags, but random parameters, and buffers with small random changes. With
the model's own values, a layer that is initialised to zero, or an infinite weight, could hide a difference.

A loss of the user's own is compared on several draws of random data, whose labels are of every class, because whether
it is a loss of the core is known from this comparison alone (own_loss.py).

This module does not depend on how the plan was made. It needs the model, and functions that compute the three results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from maml_cuda import pytrees
from maml_cuda.batch_norm import at_step
from maml_cuda.capture import generators, outside_state
from maml_cuda.capture.copies import copied, in_place_of, places, tensors_of
from maml_cuda.capture.errors import first_line
from maml_cuda.functional import second_derivatives
from maml_cuda.losses import Loss, called, loss_function
from maml_cuda.masks import Masks, Seed
from maml_cuda.plan.graph import Range
from maml_cuda.plan.integers import drawn, is_integer
from maml_cuda.policies import mean_of
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import Weighted
from maml_cuda.targets import PolicyTarget, Target
from maml_cuda.torch_private import no_saved_tensor_hooks
from maml_cuda.torch_wrappers import uncompiled

# The largest relative error. In 57,000 comparisons by the tests, the largest error from rounding in float64 was 2e-9,
# and all but 19 were less than 1e-10. A misread forward has an error of 1e-3 or more.
TOLERANCE = 1e-7
# The sizes of the numbers in targets of a loss of the user's own, each for one draw of random data. A term that is too
# small to be seen beside the others for numbers near 1 is seen for larger ones.
OWN_LOSS_SIZES = (1.0, 10.0, 50.0)
MOST_DRAWS = 64  # of random data for one loss of the user's own; its labels need more if classes are many
SEED = 2024  # of the masks of dropout, on both sides
SMALL = 1e-5  # a norm below this counts as this one in a relative error; values here are of order 1

Named = Mapping[str, Tensor]  # by name of a parameter or buffer


class Results(Protocol):
    """The functions that a plan provides for the comparison, in float64 on the CPU, for one task.

    fast: parameters and buffers, and parameters of the loss, name -> [1, *shape]; per-step layers are at step 0.
    x, y: [1, samples, ...], or pytrees of such tensors.
    Gradients and Hessian-vector products are name -> [1, *shape], for each trainable parameter, also of the loss.
    """

    def predict(self, fast: Named, x: Tree) -> Any: ...

    def loss_and_grad(self, fast: Named, x: Tree, y: Target) -> tuple[Tensor, Named]: ...

    def hvp(self, fast: Named, x: Tree, y: Target, v: Named) -> Named: ...


def why_not(
    model: nn.Module,
    loss: Loss | None,
    results: Results,
    likes: Any,
    second_order: bool,
    target: Any = None,
    draws: int = 1,
    classes: Mapping[int, int] | None = None,
    of_loss: Mapping[str, Tensor] | None = None,
    integers: Sequence[Range | None] = (),
) -> str:
    """The reason why a plan must not be used, or "" if its results are those of the model.

    Args:
        loss: None: the prediction and its gradient alone are compared.
        results: the plan's results.
        likes: a pytree of objects with shape and dtype, like the input of one task.
        second_order: compare a Hessian-vector product too.
        target: of a loss of the user's own, a pytree of objects with shape and dtype, like the target of one task.
        draws: of random data; of a loss of the user's own so many that their labels are of every class.
        classes: of the leaves of the target that are known to be class labels, how many there are; otherwise as many
            as the prediction has features.
        of_loss: parameters of the loss, by name.
        integers: of each element of a sample that is an integer, its range.
    """
    # A new thread has none of the caller's modes (autocast, no_grad, inference, devices, fake tensors, transforms).
    with ThreadPoolExecutor(max_workers=1) as thread:
        for seed in range(draws):
            arguments = (
                model, loss, results, likes, second_order, target, classes or {}, of_loss or {}, integers, seed,
            )  # fmt: skip
            if reason := thread.submit(_compare, *arguments).result():
                return reason
    return ""


def _compare(
    model: nn.Module, loss: Loss | None, results: Results, likes: Any, second_order: bool, target: Any,
    classes: Mapping[int, int], of_loss: Named, integers: Sequence[Range | None], seed: int,
) -> str:  # fmt: skip
    generator = Generator().manual_seed(seed)
    try:
        own = {name: _changed_buffer(t, generator).requires_grad_() for name, t in of_loss.items()}
        in_place = {id(t): own[name] for name, t in of_loss.items()}
        in_double = _InDouble() if _is_single(model) else nullcontext()
        # Compiled modules cannot be differentiated twice.
        with generators.restored(), uncompiled(), second_derivatives(), in_double, _Replaced(in_place):
            model_copy, loss_copy = copied((model, loss), {**_replacements(model, generator), **in_place})
            state = {**{name: place.tensor for name, place in places(model_copy).items()}, **own}
            fast = {name: t.detach().clone().unsqueeze(0) for name, t in state.items()}
            x = _random_input(likes, integers, generator)
            with outside_state.restored(model_copy, [loss_copy] if callable(loss_copy) else []):
                make_target = partial(_target_for, loss, target, classes, seed, generator)
                expected = _Expected(
                    model_copy, loss_copy, pytrees.mapped(Tensor.clone, x), make_target, second_order, generator, own
                )
    except Exception as error:
        return f"it could not be compared with the model on random data: {first_line(error)}"
    x, y = pytrees.mapped(lambda t: t.unsqueeze(0), (x, expected.target))
    prediction = results.predict(fast, x)
    losses, gradient = _of_prediction(results, fast, x, expected) if loss is None else results.loss_and_grad(fast, x, y)
    pairs = [
        ("prediction", _first(_parts(prediction)), _parts(expected.prediction)),
        ("loss", {"": losses[0]}, {"": expected.loss}),
        ("gradient", _first(gradient), expected.gradient),
    ]
    if second_order and loss is not None:
        v = {name: t.unsqueeze(0) for name, t in expected.direction.items()}
        pairs.append(("Hessian-vector product", _first(results.hvp(fast, x, y, v)), expected.product))
    for what, got, wanted in pairs:
        if difference := _difference(got, wanted):
            if callable(loss) and what != "prediction":
                return f"the loss is a callable of yours, unlike those of the fused layers: the {what}{difference}"
            return (
                "on random data the fused layers do not compute what forward computes: "
                f"the {what}{difference}; maml_cuda has misread the model"
            )
    return ""


class _Expected:
    """The results of a model by plain autograd, and the target and direction for which they were computed."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        x: Tree,
        make_target: Callable[[Any], Any],
        second_order: bool,
        generator: Generator,
        of_loss: Named,
    ) -> None:
        # A checkpoint would run forward again in the backward, with other masks.
        with at_step(model, 0), Masks(Seed(SEED)), no_saved_tensor_hooks():
            self.prediction = model(x)
        function = _projection if loss is None else loss_function(loss)
        of_model = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trainable = {**of_model, **of_loss}
        parameters = list(trainable.values())
        given = make_target(self.prediction)
        for form in _FORMS:  # of a target: a loss may take probabilities alone, or 0 and 1 alone
            self.target = pytree.tree_map_only(Tensor, form, given)
            try:
                self.loss = called(function, self.prediction, self.target)
                grads = torch.autograd.grad(
                    self.loss, parameters, retain_graph=True, create_graph=second_order, materialize_grads=True
                )
            except Exception:
                if form is _FORMS[-1]:
                    raise
            else:
                if _norm(grads).isfinite():
                    break
        self.gradient = dict(zip(trainable, grads, strict=True))
        if not second_order:
            return
        self.direction = {name: _normal(p.shape, generator) for name, p in of_model.items()}
        slope = torch.stack([(self.gradient[name] * v).sum() for name, v in self.direction.items()]).sum()
        product = [torch.zeros_like(p) for p in parameters]
        if slope.requires_grad:
            product = list(torch.autograd.grad(slope, parameters, materialize_grads=True))
        self.product = dict(zip(trainable, product, strict=True))


def _projection(prediction: Any, cotangents: Named) -> Tensor:
    """The product of a prediction with cotangents."""
    return torch.stack([(t * cotangents[name]).sum() for name, t in _parts(prediction).items()]).sum()


def _of_prediction(results: Results, fast: Named, x: Tree, expected: _Expected) -> tuple[Tensor, dict[str, Tensor]]:
    """The product of a plan's prediction with cotangents, [1], and its gradient."""
    at = {name: t.requires_grad_(name in expected.gradient) for name, t in fast.items()}
    value = _projection(results.predict(at, x), {name: t.unsqueeze(0) for name, t in expected.target.items()})
    wanted = [at[name] for name in expected.gradient]
    grads = torch.autograd.grad(value, wanted, materialize_grads=True)
    return value.detach().unsqueeze(0), dict(zip(expected.gradient, grads, strict=True))


def _replacements(model: nn.Module, generator: Generator) -> dict[int, Tensor]:
    """For a copy in float64 on the CPU: random parameters, and other tensors with small random changes."""
    found: dict[int, Tensor] = {}
    for t in tensors_of(model):
        of = _random_parameter if isinstance(t, nn.Parameter) else _changed_buffer
        found[id(t)] = in_place_of(t, of(t, generator))
    return found


class _InDouble(TorchFunctionMode):
    """Inside, what code makes or asks for in float32 is float64, as for a copy in float64 of a model in float32."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only((torch.dtype, Tensor), self._double, (args, kwargs or {}))
        result = (Tensor.double if function is Tensor.float else function)(*args, **kwargs)
        return result.double() if isinstance(result, Tensor) and result.dtype == torch.float32 else result

    @staticmethod
    def _double(given: Any) -> Any:
        if isinstance(given, Tensor):  # of float32: one that is not the model's, such as the weights of classes
            return given.double() if given.dtype == torch.float32 else given
        return torch.float64 if given == torch.float32 else given


class _Replaced(TorchFunctionMode):
    """Inside, other tensors take the place of those that code may hold in a closure."""

    def __init__(self, replaced: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._replaced = replaced

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: self._replaced.get(id(t), t), (args, kwargs or {}))
        return function(*args, **kwargs)


def _is_single(model: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters())


def _random_input(likes: Any, integers: Sequence[Range | None], generator: Generator) -> Tree:
    """A pytree of random inputs: of integers in their ranges; of a mask half along the last axis, so that no row of it
    is empty or full."""
    leaves, structure = pytree.tree_flatten(likes)
    x: list[Tensor | None] = []
    start = 0
    for like in leaves:
        end = start if like is None else start + math.prod(like.shape[1:])
        if like is None:
            x.append(None)
        elif like.dtype == torch.bool:
            order = torch.rand(like.shape, generator=generator).argsort(-1)
            x.append(torch.lt(2 * order, like.shape[-1]))
        elif is_integer(like.dtype):
            x.append(drawn(like.shape, like.dtype, [r for r in integers[start:end] if r is not None], generator))
        else:
            x.append(_normal(like.shape, generator))
        start = end
    return pytree.tree_unflatten(x, structure)


def _random_parameter(p: Tensor, generator: Generator) -> Tensor:
    """Random values for a parameter.

    Weights are scaled so that outputs have the size of inputs. Other parameters, which may be scales or shifts, have
    mean 0.5 and standard deviation 0.5.
    """
    if p.dim() > 1:
        root: float = max(1, p[0].numel()) ** 0.5
        return _normal(p.shape, generator) / root
    return 0.5 + 0.5 * _normal(p.shape, generator)


def _changed_buffer(t: Tensor, generator: Generator) -> Tensor:
    """The values of a buffer with small random changes. Numbers that are at least 0, such as variances, stay so."""
    t = t.detach().cpu()
    if not t.is_floating_point():
        return t.clone()
    t = t.double()
    relative, absolute = (torch.rand(t.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return torch.where(t.isfinite(), t * (1 + relative / 4) + absolute / 10, 1 + relative)


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _target(loss: str, prediction: Any, generator: Generator) -> Target:
    """A target [n, ...] for a prediction."""
    mean = mean_of(prediction)
    if loss == "mse":
        return _normal(mean.shape, generator)
    classes = torch.randint(mean.shape[-1], mean.shape[:1], generator=generator)
    if loss == "cross_entropy":
        return classes
    actions = classes if loss == "categorical_policy_gradient" else _normal(mean.shape, generator)
    return PolicyTarget(actions, _normal(mean.shape[:1], generator))


def _target_for(
    loss: Loss | None, likes: Any, classes: Mapping[int, int], seed: int, generator: Generator, prediction: Any
) -> Any:
    """A random target for a prediction.

    Args:
        likes: of a loss of the user's own, what its target is like.
        classes: by the number of a leaf.
        seed: the number of the draw. With it the sizes of numbers change, and the labels go through the classes.
    """
    parts = _parts(prediction)
    if loss is None:  # cotangents
        return {name: _normal(t.shape, generator) for name, t in parts.items()}
    if isinstance(loss, str):
        return _target(loss, prediction, generator)
    features = next(iter(parts.values())).shape[-1]

    def leaf(number: int, like: Any) -> Any:
        if like.dtype.is_floating_point:
            size = OWN_LOSS_SIZES[seed % len(OWN_LOSS_SIZES)]
            return size * (2 * _normal(like.shape, generator) + 1)
        count = math.prod(like.shape)
        labels = (torch.randperm(count, generator=generator) + seed * count) % classes.get(number, features)
        return labels.view(like.shape).to(like.dtype)

    leaves, structure = pytree.tree_flatten(likes)
    numbers = iter(range(len(leaves)))
    made = [None if like is None else leaf(next(numbers), like) for like in leaves]
    target = pytree.tree_unflatten(made, structure)
    return target._replace(weights=target.weights.abs() + 0.1) if isinstance(target, Weighted) else target


def _as_it_is(t: Tensor) -> Tensor:
    return t


def _between_0_and_1(t: Tensor) -> Tensor:
    return t.sigmoid() if t.is_floating_point() else t


def _0_or_1(t: Tensor) -> Tensor:
    return (t > 0).to(t.dtype) if t.is_floating_point() else t


_FORMS = (_as_it_is, _between_0_and_1, _0_or_1)


def _parts(prediction: Any) -> dict[str, Tensor]:
    """The tensors of a prediction, by name."""
    if isinstance(prediction, Tensor):
        return {"": prediction}
    given: dict[Any, Any] = dict(enumerate(prediction)) if isinstance(prediction, tuple) else {}
    if isinstance(prediction, Distribution):
        given = pytrees.arguments_of("the prediction", prediction)
    return {f"{key} {name}": t for key, part in given.items() for name, t in _parts(part).items()}


def _first(by_task: Named) -> dict[str, Tensor]:
    """The tensors of the first task."""
    return {name: t[0] for name, t in by_task.items()}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """That of all tensors together."""
    norm: Tensor = torch.stack([t.detach().norm() for t in tensors]).norm()
    return norm


def _difference(got: Named, expected: Named) -> str:
    """Text that says how two results differ by more than rounding, or ""."""
    total = _norm(expected.values()).item()
    for name, e in expected.items():
        g, e = got[name].detach(), e.detach()
        of = f" of {name}" if name and len(expected) > 1 else ""
        if g.shape != e.shape:
            return f"{of} has shape {list(g.shape)}, not {list(e.shape)}"
        error = (g - e).norm().item() / max(e.norm().item(), 1e-4 * total, SMALL)
        if not error <= TOLERANCE:  # in this form, a NaN is a difference too
            return f"{of} is off by {100 * error:.2g} %"
    return ""
