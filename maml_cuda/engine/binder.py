"""Binds a model to what runs it: fused layers, or the general path with the reason."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from maml_cuda import batch_norm, pytrees
from maml_cuda.capture.errors import DoesNotFit
from maml_cuda.engine import checks, cuda_runner, data_checks, data_gradients, fallback, weighted_sets
from maml_cuda.engine.binding import Binding, Choice
from maml_cuda.engine.problem import features
from maml_cuda.engine.program import Program
from maml_cuda.engine.settings import Settings, adapted_names
from maml_cuda.engine.signatures import SetLike, Signature, tree_like
from maml_cuda.engine.weighted_sets import Packed, packed
from maml_cuda.losses import Loss
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import with_weights
from maml_cuda.targets import Target
from maml_cuda.warn import warn

T = TypeVar("T")

KEPT_BINDINGS = 4  # train and eval mode, each with and without batch statistics


class Set(NamedTuple):
    """A support or query set of a call, that has passed the checks which do not depend on what runs.

    x_name, y_name: of the arguments, for error messages.
    x, y: the data; y is None where a call has no target.
    weights: of the samples, [tasks, n]; None: there are none.
    """

    x_name: str
    x: Tree
    y_name: str = ""
    y: Target | None = None
    weights: Tensor | None = None

    def weighted(self) -> Target:
        """y as the general path takes it."""
        return with_weights(self.y, self.weights)

    def packed(self) -> Packed:
        """The set as fused layers take it."""
        return packed(self.x, self.y, self.weights)


class Binder:
    """Makes a Binding when it is first asked, and again whenever something changes that the plan depends on. Where no
    fused layer serves, it says why in one warning, or raises where the user asked for fused layers by name.

    Attributes:
        collects_statistics: BatchNorm layers are in train mode, though batch_norm="running" holds them in eval mode.
    """

    def __init__(self) -> None:
        self.bound: Binding | None = None
        self.collects_statistics = False
        self._kept: list[Binding] = []  # the newest first
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None, "_kept": []}  # a copy binds itself

    def bind(self, maml: Settings) -> Binding:
        """The binding that holds now."""
        if self.bound is None or not self.bound.holds(maml):
            self.hold_statistics(maml)  # model.train() may have ended it
            self.bound = next((b for b in self._kept if b.holds(maml)), None) or self._new(maml)
        return self.bound

    def hold_statistics(self, maml: Settings) -> None:
        """Puts BatchNorm layers in eval mode where batch_norm="running"."""
        if maml.batch_norm == "running" and not self.collects_statistics:
            batch_norm.hold_statistics(maml.model)

    def _new(self, maml: Settings) -> Binding:
        model = maml.model
        checks.steps(maml.inner_steps, "inner_steps")
        checks.loss(maml.loss)
        names, parameters = adapted_names(maml), dict(model.named_parameters())
        checks.adapted(names, parameters)
        checks.not_adapted(names, batch_norm.stepwise_names(model))
        checks.inner_update(
            maml.inner_optimizer, maml.inner_clip_norm, maml.inner_clip_value, maml.inner_transform,
            [parameters[name] for name in names],
        )  # fmt: skip
        binding = Binding(maml)
        if self.bound is not None and self.bound.unwatched == binding.unwatched:
            binding.checks_left = 2 * self.bound.checks_left
        self._kept = [binding, *self._kept[: KEPT_BINDINGS - 1]]
        if binding.why_never:
            self.fall_back(maml, binding.why_never)
        self._warn_of_empty_statistics(model)
        return binding

    def backend(self, binding: Binding) -> str:
        """What ran the last call, or before the first what would run a model that is fused."""
        on_general_path = binding.refused or (binding.last is not None and binding.last.program is None)
        return "reference" if on_general_path else cuda_runner.backend_of(binding.like().device)

    def settled(self, maml: Settings, binding: Binding, result: T) -> T:
        """The result of a call on the general path. What the call itself has changed of the state that is watched is
        known from now on: the binding still holds."""
        if binding is self.bound and not torch.compiler.is_compiling() and not binding.holds(maml):
            binding.watch(maml)
        return result

    def fall_back(self, maml: Settings, why_not: str) -> None:
        """Says once why the fused path cannot serve.

        Raises:
            ValueError: the user asked for it by name.
        """
        if maml._options.backend == "fused":
            raise ValueError(f'backend="fused" cannot serve this model: {why_not}')
        self._warn_once(
            "fallback",
            "maml_cuda runs this model on the general path (reference), which takes one task at a time by plain "
            f"autograd, because {why_not}",
        )

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn(text)

    def _warn_of_empty_statistics(self, model: nn.Module) -> None:
        for name, m in model.named_modules():
            if isinstance(m, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
                continue  # which never counts its batches
            tracked = getattr(m, "num_batches_tracked", None)
            if not m.training and isinstance(tracked, Tensor) and bool((tracked == 0).any()):
                self._warn_once(
                    "statistics",
                    f"{name} ({type(m).__name__}) is in eval mode with running statistics that no batch has updated",
                )

    def warn_of_single_queries(self, model: nn.Module) -> None:
        """For predict, given one query a task, where BatchNorm takes it for the whole set."""
        layers = batch_norm.with_batch_statistics(model)
        if layers:
            self._warn_once(
                "single queries",
                f"predict is given one query sample a task, which {layers[0]} normalises by its own statistics: the "
                "predictions may be no better than chance. Give all queries of a task at once, or choose "
                'batch_norm="running"',
            )

    def program(
        self,
        maml: Settings,
        binding: Binding,
        support: Set | None,
        query: Set | None,
        second_order: bool | None = None,
        of_data: tuple[str, ...] = (),
        steps: int | None = None,
    ) -> Program | None:
        """The program that runs such sets (None: there is no such set); falls back where there is none.

        second_order: whether Hessian-vector products on the support set are asked for; None: as first_order says.
        of_data: the names of data whose gradients are asked for; others must not require grad.
        steps: inner steps; None: those of maml.

        Raises:
            ValueError, TypeError: samples that do not fit the model itself, or that fused layers would lose a gradient
                of.
        """
        program, why_not = self.choice(maml, binding, support, query, second_order, of_data)
        if program is not None and program.match is not None:
            targets = [(each.y_name, each.y) for each in (support, query) if each is not None and each.y is not None]
            if isinstance(maml.loss, str):  # a cross-entropy of whole sets
                for name, y in targets:
                    data_checks.target_values(name, y, program.returned.sample[-1])
            elif why_not := data_checks.why_not_labels(program.labels, targets):
                program = None
        differentiated = data_gradients.reached(maml, of_data, maml.inner_steps if steps is None else steps)
        if program is not None and differentiated:
            sets = [given for given in (support, query) if given is not None]
            likes = [_like(given, maml.loss) for given in sets]
            if why_not := data_gradients.why_not(maml, program, differentiated, *likes):
                program = None
        if why_not:
            self.fall_back(maml, why_not)
        if not torch.compiler.is_compiling():
            binding.last = Choice(program, why_not)
        if program is not None:
            for given in (support, query):
                if given is not None:
                    if not of_data:
                        data_checks.constant(given.x_name, given.x, given.y_name, given.y)
                    if maml.loss == "mse" and given.y is not None and not program.is_direct:
                        shape = program.prediction_shape(pytrees.tensors(given.x)[0].shape[1])
                        data_checks.target(given.y_name, maml.loss, given.y, shape)
        return program

    def choice(
        self,
        maml: Settings,
        binding: Binding,
        support: Set | None,
        query: Set | None,
        second_order: bool | None = None,
        of_data: tuple[str, ...] = (),
    ) -> Choice:
        """What runs such sets."""
        if binding.refused:
            return Choice(None, binding.why_never)
        sets = [given for given in (support, query) if given is not None]
        if why_not := weighted_sets.why_not(maml, support, query):
            return Choice(None, why_not)
        why_not = next(filter(None, map(_why_not_samples, sets)), "")
        if why_not := why_not or _why_not_own(maml.loss, sets, bool(of_data)):
            return Choice(None, why_not)
        second_order = not maml.first_order if second_order is None else second_order
        if support is not None and query is not None and (got := _other_samples(support.x, query.x)):
            self._each_fits(binding, support, query)
            return Choice(None, f"support and query samples are {got}; fused layers take one for both")
        if torch.compiler.is_compiling():
            x_spt, x_qry = (None if given is None else given.x for given in (support, query))
            return binding.find_now(x_spt, x_qry, second_order)
        support_like, query_like = (None if given is None else _like(given, maml.loss) for given in (support, query))
        try:
            choice = binding.find(Signature(support_like, query_like, second_order))
        except DoesNotFit as reason:
            wrong = next(given for given in sets if _like(given, maml.loss) == reason.given)
            if reason.in_loss and wrong.y is not None:
                raise data_checks.does_not_fit_loss(wrong.y_name, wrong.y, str(reason)) from None
            raise data_checks.does_not_fit(wrong.x_name, wrong.x, binding.like(), str(reason)) from None

        return self._with_padding(binding, choice, support, query, second_order)

    def _with_padding(
        self, binding: Binding, choice: Choice, support: Set | None, query: Set | None, second_order: bool
    ) -> Choice:
        """The choice, if what it runs is the same for every number of samples that tasks have besides padding.

        Raises:
            ValueError: the model does not take one of these numbers.
        """
        program = choice.program
        for given in (support, query):
            if program is None or given is None or given.weights is None:
                continue
            if (program.match is not None and isinstance(program.loss, str)) or program.whole_sets:
                return Choice(None, "samples that depend on each other have weights")
            sizes = weighted_sets.sizes(given.weights)
            if sizes and (why_not := weighted_sets.why_not_padding(program, given.x)):
                return Choice(None, why_not)
            for n in sizes:
                like = _like(given, program.loss).of(n)
                alone = Signature(like, None, second_order) if given is support else Signature(None, like, False)
                try:
                    of_size = binding.find(alone)
                except DoesNotFit as reason:
                    why = f"of a task with {n} that count, {reason}"
                    raise data_checks.does_not_fit(given.x_name, given.x, binding.like(), why) from None
                if of_size.program is not program:
                    return Choice(None, of_size.why_not or f"the model runs something else on sets of {n} samples")
        return choice

    def _each_fits(self, binding: Binding, support: Set, query: Set) -> None:
        """Raises ValueError where samples of one of the shapes do not fit the model itself."""
        for given in (support, query):
            try:
                binding.find(Signature(None, SetLike(tree_like(given.x)), False))
            except DoesNotFit as error:
                raise data_checks.other_samples(support.x, query.x, str(error)) from None


def _why_not_samples(given: Set) -> str:
    """The reason why fused layers do not take such samples, or ""."""
    if isinstance(given.x, Tensor):
        numbers = given.x.dim() == 2 and given.x.is_floating_point()
        return "samples are numbers without axes; fused layers take samples of at least one axis" if numbers else ""
    for name, leaf in pytrees.named_leaves(given.x_name, given.x):
        if leaf is not None and 0 in leaf.shape[1:]:
            return f"{name} has no elements"
    return ""


def _other_samples(x_spt: Tree, x_qry: Tree) -> str:
    """How samples of the two sets differ, or ""."""
    if isinstance(x_spt, Tensor) and isinstance(x_qry, Tensor):
        got = list(x_spt.shape[2:]), list(x_qry.shape[2:])
        return f"of shape {got[0]} and {got[1]}" if got[0] != got[1] else ""
    support, query = (pytrees.mapped(lambda t: list(t.shape[2:]), x) for x in (x_spt, x_qry))
    return f"of shapes {support} and {query}" if support != query else ""


def _why_not_own(loss: Any, sets: list[Set], of_data: bool) -> str:
    """The reason why no loss of the core is looked for, for a loss of the user's own; or "". of_data: targets may
    require grad."""
    if isinstance(loss, str):
        return ""
    name = getattr(loss, "__name__", type(loss).__name__)
    if torch.compiler.is_compiling():
        return f"the loss {name} is a callable of yours, which is not looked at inside torch.compile"
    for given in sets:
        leaves = pytree.tree_leaves(given.y)
        if any(t is not None and (not isinstance(t, Tensor) or (t.requires_grad and not of_data)) for t in leaves):
            return f"{given.y_name} has leaves that require grad or are no tensors; fused layers take constant tensors"
    return ""


def _like(given: Set, loss: Loss) -> SetLike:
    """What a signature has of a set."""
    return SetLike(
        tree_like(given.x), None if given.y is None or isinstance(loss, str) else tree_like(given.weighted())
    )


def read(
    maml: Settings, binding: Binding, x_name: str, x: Tree, y_name: str | None = None, y: Target | None = None
) -> Tree:
    """x with its target y, checked, and inside autocast in the model's own dtype.

    Raises:
        ValueError, TypeError: they do not fit each other, the model or the loss.
    """
    x = in_the_models_dtype(binding, x)
    data_checks.data(x_name, x, y_name, y, binding.like(), binding.dtypes, maml.loss)
    if isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point():
        fallback.check_numbers(maml.model, x_name, x)
    return x


def in_the_models_dtype(binding: Binding, x: Tree) -> Tree:
    """x, inside autocast in the model's own dtype."""
    return binding.in_its_dtype(x) if torch.is_autocast_enabled(binding.on) else x


def look_at_labels(maml: Settings, program: Program, x: Tensor, **given: Target) -> None:
    """Where check_labels asks for it on a GPU. The ops of the CPU look by themselves, but later than a seed is drawn.

    Raises:
        ValueError: a label or an action out of range.
    """
    draws = program.draws and not torch.compiler.is_compiling()
    if maml._options.check_labels if program.plan.backend == "cuda" else draws:
        classes = features(program.text, x) if program.plan.loss in data_checks.OF_CLASSES else None
        for name, y in given.items():
            data_checks.target_values(name, y, classes)
