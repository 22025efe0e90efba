"""What people call who write their own training code: at parameters that are each task's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maml_cuda import pytrees, targets
from maml_cuda.engine import checks, data_checks, fallback
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.bound_model import BoundModel
from maml_cuda.pytrees import Tree
from maml_cuda.targets import Target


class BuildingBlocks(BoundModel):
    """`fast` is a mapping, parameter name -> [tasks, *shape], as FusedMAML.adapt returns it."""

    def predict(self, fast: Mapping[str, Tensor], x: Tree, *, slot: int | None = None) -> Any:
        """Predictions [tasks, n, ...] at each task's own parameters on its own x [tasks, n, ...]; of a model that
        returns (mean, log_std) both, for each task.

        A model that returns a pytree of tensors gives one, leaf by leaf [tasks, ...]: None, numbers and strings must be
        the same for all tasks. So does one that returns a Normal, MultivariateNormal, Beta, Categorical, Bernoulli or
        Independent distribution: of the same type, with parameters [tasks, ...].

        Differentiable in `fast`. slot: the inner step whose per-step BatchNorm is read (after k steps: k - 1); None:
        the last one.

        Where BatchNorm uses batch statistics, a task's queries share theirs: give all of them at once. One query by
        itself is normalised by itself alone, at chance in general, and warns; with batch_norm="running" the predictions
        on a query do not depend on the others.

        Raises:
            TypeError, ValueError: what the model returns cannot be put together; and as a call does.
        """
        slot = checks.slot(slot)
        binding, x = self._block(fast, x, None)
        if isinstance(x, Tensor) and x.shape[1] == 1:
            self._warn_of_single_queries()
        if not self._serves(binding, None, x):
            return fallback.predict(self.model, dict(fast), x, slot)
        own = binding.own(fast, len(x), slot)
        if torch.is_grad_enabled() and any(t.requires_grad for t in own):
            return binding.as_returned(torch.ops.maml_cuda.predict(own, x, binding.text))
        return binding.as_returned(torch.ops.maml_cuda.predict_forward(own, x, binding.text))

    def loss_and_grad(
        self, fast: Mapping[str, Tensor], x: Tree, y: Target, *, slot: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at each task's own parameters [tasks] and its gradient, name -> [tasks, *shape], both detached.

        slot: the inner step whose per-step BatchNorm is read; None: the last one.

        Raises:
            ValueError: fast, x or y requires grad, which the results would lose.
        """
        slot = checks.slot(slot)
        data_checks.no_graph("loss_and_grad", fast=fast, x=x, y=y)
        binding, x = self._block(fast, x, y)
        names = self._trainable()
        if not self._serves(binding, x, None):
            return fallback.loss_and_grad(self.model, self.loss, dict(fast), names, x, y, slot)
        self._look_at_labels(binding, x, y=y)
        own = [t.detach() for t in binding.own(fast, len(x), slot)]
        losses, grads = torch.ops.maml_cuda.loss_and_grad(own, x, targets.tensors(y), binding.text)
        return losses, self._trainable_of(binding.whole(grads, fast, slot), fast)

    def hvp(
        self, fast: Mapping[str, Tensor], x: Tree, y: Target, v: Mapping[str, Tensor], *, slot: int | None = None
    ) -> dict[str, Tensor]:
        """The Hessian of the loss at each task's own parameters times v, name -> [tasks, *shape], detached.

        v: name -> [tasks, *shape]; a parameter that it lacks, or that is frozen, does not move.
        slot: the inner step whose per-step BatchNorm is read; None: the last one.

        Raises:
            ValueError: fast, x, y or v requires grad, which the result would lose.
        """
        slot = checks.slot(slot)
        data_checks.no_graph("hvp", fast=fast, x=x, y=y, v=v)
        binding, x = self._block(fast, x, y)
        data_checks.fast(dict(self.model.named_parameters()), v, pytrees.tasks(x), "v", all_names=False)
        names = self._trainable()
        if not self._serves(binding, x, None, second_order=True):
            return fallback.hvp(self.model, self.loss, dict(fast), names, x, y, dict(v), slot)
        self._look_at_labels(binding, x, y=y)
        at = [t.detach() for t in binding.own(fast, len(x), slot)]
        moving = {n: v[n].detach() if n in v and n in names else torch.zeros_like(p) for n, p in fast.items()}
        directions = binding.own(moving, len(x), slot)
        products = torch.ops.maml_cuda.hvp(at, x, targets.tensors(y), directions, binding.text)
        return self._trainable_of(binding.whole(products, fast, slot), fast)

    def _block(self, fast: Mapping[str, Tensor], x: Tree, y: Target | None) -> tuple[Binding, Tree]:
        """The checks that the building blocks share."""
        binding = self._binding()
        x = self._read(binding, "x", x, None if y is None else "y", y)
        data_checks.fast(dict(self.model.named_parameters()), fast, pytrees.tasks(x), "fast", all_names=True)
        return binding, x

    def _trainable(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _trainable_of(self, found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name, for every trainable parameter: zeros for one that the prediction does not depend on."""
        return {n: found[n] if n in found else torch.zeros_like(like[n]) for n in self._trainable()}
