"""A plan of a model, with the tensors that it is of: what fused layers run for some signatures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal

from maml_cuda import pytrees, targets
from maml_cuda.capture.copies import Place
from maml_cuda.engine import fast_path, integer_inputs, own_targets
from maml_cuda.engine.signatures import SetLike
from maml_cuda.losses import Loss
from maml_cuda.masks import Seed
from maml_cuda.plan.graph import Labels, Range, Returned
from maml_cuda.plan.own_loss import COMPUTED, Match
from maml_cuda.plan.schema import Plan
from maml_cuda.pytrees import Tree
from maml_cuda.targets import Target


class Program:
    """What is known of a plan in Python.

    Attributes:
        plan, text: the plan, and its JSON text, as the ops take it.
        names: of the tensors of the model that the plan reads, in its order.
        adapted: those of them that the inner loop changes.
        slots: of each of them, the number of slots if there is one for each inner step; None otherwise.
        served_by: module path -> fused layers.
        whole_sets: whether the samples of a set depend on each other: for the core, a whole set is one sample.
        written: the names of the buffers of the model that forward writes.
        ignored: what forward does besides and fused layers do not.
        match: the loss of the core for a loss of the user's own; None for one of ours.
        labels: class labels in the target of a loss of the user's own.
        of_loss: parameters of such a loss, which receive a meta-gradient, by their names in `names`.
        identities: of all tensors that it reads and that are not the model's.
        integers: of each element of a sample, its range if it is an integer; empty: x holds none.
        returned: what the model returns for a prediction of the plan.
        features: of the prediction, or of its mean.
        dtype: of the tensors that it computes with.
        is_direct: whether the targets of the plan are those of the user.
        is_warm: whether a call like one that has passed every check needs none but those of the core.
        is_plain: whether it returns the prediction as it is.
        places: of the parameters and learned rates in the flat gradient (fast_path.places).
        draws: whether it draws masks of dropout.
        data_proofs: (which data, set) -> why it does not give their gradients, or "" (data_gradients.py).
    """

    def __init__(
        self,
        plan: Plan,
        names: list[str],
        adapted: list[str],
        slots: list[int | None],
        holders: list[Place],
        served_by: dict[str, list[str]],
        whole_sets: bool,
        written: tuple[str, ...],
        ignored: tuple[str, ...],
        returned: Returned,
        loss: Loss,
        match: Match | None,
        labels: tuple[Labels, ...],
        of_loss: dict[str, Tensor],
        identities: tuple[int, ...],
        integers: Sequence[Range | None],
    ) -> None:
        """holders: of each tensor in `names`, then of each rate tensor. match: of a loss of the user's own."""
        self.plan, self.text = plan, plan.text
        self.names, self.adapted, self.slots = names, adapted, slots
        self.whole_sets = whole_sets
        self.served_by, self.written, self.ignored, self.returned = served_by, written, ignored, returned
        self._holders = [(place.registry, place.key) for place in holders]  # plain tuples are unpacked faster
        dtypes = [owner[key].dtype for owner, key in self._holders[: len(names)]]
        self.dtype = next(d for d, p in zip(dtypes, plan.parameters, strict=True) if p.trainable)
        self._casts = any(d != self.dtype for d in dtypes)
        self._has_gradient = plan.has_gradient
        self._all_have_gradient = all(self._has_gradient)
        self._step_text = ""
        self._data_texts: dict[tuple[str, ...], str] = {}
        self.data_proofs: dict[tuple[tuple[str, ...], Any], str] = {}
        weighted = match is not None and match.weighted
        self.match, self.loss, self.labels, self.identities = match, loss, labels, identities
        self.features = math.prod(returned.sample)
        self.of_loss = of_loss
        self.is_direct = len(returned.sample) == 1 and not weighted and not whole_sets
        self.integers = integers
        is_usual = not (written or integers or whole_sets)
        self.is_warm = is_usual and (match is None or (match.loss == "mse" and not weighted))
        self.is_plain = returned == Returned(returned.sample) and self.is_direct
        self.draws = any(node.kind == "dropout" for node in plan.nodes)
        self.places = fast_path.places(self.with_gradient([owner[key] for owner, key in holders]))

    # -- its tensors --------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The plan's parameters, and its rate tensors in the model's dtype."""
        tensors = [owner[key] for owner, key in self._holders]
        count = len(self.names)
        if self._casts:  # masks, integers, and constants of another precision
            tensors = [t.to(self.dtype) for t in tensors]
        if len(tensors) == count:
            return tensors, []
        dtype = self.dtype
        return tensors[:count], [r if r.dtype == dtype else r.to(dtype) for r in tensors[count:]]

    def with_gradient(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those of parameters + rate tensors that have a place in the flat gradient."""
        if self._all_have_gradient:
            return tensors
        return [t for t, yes in zip(tensors, self._has_gradient, strict=True) if yes]

    def seed(self, of_call: Seed) -> Tensor | None:
        """The seed of a call as the ops take it: None where no mask is drawn."""
        return of_call() if self.draws else None

    # -- what goes in and comes out -----------------------------------------------------------------------------

    def samples(self, given: SetLike) -> int:
        """How many samples `input` has for a set."""
        return 1 if self.whole_sets else given.n

    def sample(self, given: SetLike) -> tuple[int, ...]:
        """The shape of a sample of `input`."""
        shapes = [like.shape if self.whole_sets else like.shape[1:] for like in given.x.tensors]
        is_one = len(shapes) == 1 and len(shapes[0]) > 0 and not self.whole_sets
        return shapes[0] if is_one else (sum(map(math.prod, shapes)),)

    def prediction_shape(self, n: int) -> tuple[int, ...]:
        """Of what the model returns for n samples of a task, or of its mean."""
        return self.returned.sample if self.whole_sets else (n, *self.returned.sample)

    def input(self, name: str, x: Tree, check: bool, dtype: torch.dtype | None = None, sets: int = 1) -> Tensor:
        """`values` of x [tasks, n, ...], whose integers are looked at.

        Args:
            name: of the argument, for error messages.
            check: look at the values of integers on a GPU too.
            dtype: in which the ops compute; None: the model's.
            sets: of each task, which follow each other.

        Raises:
            ValueError: an integer is out of range.
        """
        if self.integers:
            waits = check or self.plan.backend == "cpu"
            x = integer_inputs.numbers(name, x, dtype or self.dtype, self.integers, waits, sets)
        return self.values(x, dtype)

    def values(self, x: Tree, dtype: torch.dtype | None = None) -> Tensor:
        """x [tasks, n, ...] as the ops take it: one tensor as it is, several beside each other, integers and masks as
        numbers."""
        dtype, leaves = dtype or self.dtype, pytrees.tensors(x)
        if len(leaves) > 1 or leaves[0].dim() == 2 or self.whole_sets:
            return self._beside(leaves, dtype)
        return leaves[0] if leaves[0].is_floating_point() else leaves[0].to(dtype)

    def _beside(self, leaves: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors [tasks, n, ...] beside each other, [tasks, n, features]; of whole sets [tasks, 1, n * features].
        plan/sets.py reads them as its parts."""
        flat = [t.reshape(len(t), 1 if self.whole_sets else t.shape[1], -1).to(dtype) for t in leaves]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def target(self, y: Target, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """The tensors of a target [tasks, n, ...], as the ops take them.

        Args:
            dtype: in which the ops compute; None: the model's.
        """
        dtype = dtype or self.dtype
        if self.match == COMPUTED:
            return [self._beside(pytrees.tensors(y), dtype), None, None, None]
        if self.match is None or not self.match.weighted:
            if self.is_direct:
                return targets.tensors(y)
            return [y.reshape(len(y), 1 if self.whole_sets else y.shape[1], self.features)]
        weights = own_targets.advantages(self.match, self.loss, y, self.features, dtype, self._one_as_returned)
        values = pytrees.tensors(y)[self.match.leaf]
        labels = self.match.loss == "categorical_policy_gradient"
        return [values if labels else values.reshape(*values.shape[:2], self.features), weights, None, None]

    def as_returned(self, prediction: Tensor) -> Any:
        """A prediction [tasks, n, features] of the plan as the model returns it."""
        if self.is_plain:
            return prediction
        if self.match is not None and self.match.loss == "mse" and self.match.weighted:
            prediction = prediction[..., : self.features]
        return self._one_as_returned(prediction)

    def _one_as_returned(self, prediction: Tensor) -> Any:
        """The same for any leading axes [..., n, features]."""
        returned, log_std = self.returned, None
        if returned.log_std:
            prediction, log_std = prediction.chunk(2, -1)
            log_std = log_std if returned.log_std == "rows" else log_std[..., 0, :]
        if returned.log_softmax:
            prediction = prediction.log_softmax(-1)
        leading = prediction.shape[: -2 if self.whole_sets else -1]
        mean = prediction.reshape(*leading, *returned.sample)
        if returned.nones:
            return mean, *[None] * returned.nones
        if returned.distribution == "Categorical":
            return Categorical(logits=mean)
        if returned.distribution and log_std is not None:
            normal = Normal(mean, log_std.exp())
            return normal if returned.distribution == "Normal" else Independent(normal, 1)
        return mean if log_std is None else (mean, log_std)

    # -- at parameters that are each task's own -----------------------------------------------------------------

    def step_text(self) -> str:
        """The plan of one inner step from parameters that are each task's own, as `own` and `rates_at` give them."""
        if not self._step_text:
            self._step_text = self.plan.of_one_step().text
        return self._step_text

    def data_text(self, names: tuple[str, ...]) -> str:
        """The plan of a meta-gradient that gives gradients of these data too."""
        if not names:
            return self.text
        if names not in self._data_texts:
            self._data_texts[names] = replace(self.plan, data_gradient=names).text
        return self._data_texts[names]

    def rates_at(self, step: int) -> list[Tensor]:
        """The rate tensors of one inner step; beyond the given ones the last repeats."""
        rates = zip(self.tensors()[1], self.plan.rate_tensors, strict=True)
        return [r if d.steps == 1 else r[min(step, d.steps - 1)].contiguous() for r, d in rates]

    def own(self, given: Mapping[str, Tensor], tasks: int, slot: int) -> list[Tensor]:
        """The plan's tensors for each task, at one inner step: of `given` [tasks, *shape] by name, the slot's part
        where there are slots; others are the same for all tasks."""
        tensors, like = [], next(iter(given.values()))
        for name, slots, (owner, key) in zip(self.names, self.slots, self._holders, strict=False):
            t = given[name] if name in given else owner[key].to(like).unsqueeze(0).expand(tasks, *owner[key].shape)
            t = t if t.is_floating_point() else t.to(like.dtype)  # a mask, or integers
            tensors.append(t if slots is None else t[:, min(slot, slots - 1)])
        return tensors

    def directions(self, v: Mapping[str, Tensor], tasks: int, slot: int) -> list[Tensor]:
        """`own` of a direction, name -> [tasks, *shape], which is 0 for other tensors than those in v."""
        tensors = self.own(v, tasks, slot)
        return [t if name in v else torch.zeros_like(t) for name, t in zip(self.names, tensors, strict=True)]

    def whole(self, parts: list[Tensor], like: Mapping[str, Tensor], slot: int) -> dict[str, Tensor]:
        """The inverse of `own`, by name: zeros in the other slots."""
        whole = dict(zip(self.names, parts, strict=True))
        for name, slots in zip(self.names, self.slots, strict=True):
            if slots is not None and name in like:
                part = whole[name]
                whole[name] = part.new_zeros(like[name].shape)
                whole[name][:, min(slot, slots - 1)] = part
        return whole
