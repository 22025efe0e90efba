"""Whether a plan serves samples of a shape: its layers fit them, and it is proven on them (plan/proof.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maml_cuda import targets
from maml_cuda.engine.bounded import Bounded
from maml_cuda.engine.problem import why_not
from maml_cuda.plan import proof

if TYPE_CHECKING:
    from maml_cuda.engine.binding import Binding

MOST_KEPT = 1024  # answers; a forgotten one is found again


class Suitability:
    """The answers for one binding, each found once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._answers: Bounded[tuple[Any, ...], str] = Bounded(MOST_KEPT)  # by the arguments of why_unfit
        self._proven: Bounded[tuple[Any, ...], None] = Bounded(MOST_KEPT)  # (sample, samples, second_order)

    def why_unfit(
        self,
        binding: Binding,
        sample: tuple[int, ...],
        n_support: int,
        n_query: int,
        dtype: torch.dtype,
        second_order: bool,
    ) -> str:
        """The reason why the plan does not serve such sets of samples, or nothing. A set of no samples is absent.

        Raises:
            ValueError: they do not fit a layer of the model.
        """
        key = tuple(sample), n_support, n_query, dtype, second_order
        if key not in self._answers:
            self._answers[key] = (
                why_not(binding.text, tuple(sample), n_support, n_query, dtype)
                or self._disproof(binding, tuple(sample), n_support, second_order)
                or self._disproof(binding, tuple(sample), n_query, second_order=False)
            )
        return self._answers[key]

    def _disproof(self, binding: Binding, sample: tuple[int, ...], samples: int, second_order: bool) -> str:
        key = sample, samples, second_order
        if samples == 0 or (sample, samples, True) in self._proven or key in self._proven:
            return ""
        results = _Results(binding, self._model)
        reason = proof.why_not(self._model, str(results.loss), results, sample, samples, second_order)
        if not reason:
            self._proven[key] = None
        return reason


class _Results:
    """What the plan computes, for its proof: on the CPU, wherever the model is."""

    def __init__(self, binding: Binding, model: nn.Module) -> None:
        assert binding.plan is not None
        self._binding = binding
        self._trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self._text = replace(binding.plan, backend="cpu", precision="float32").text
        self.loss = binding.plan.loss

    def predict(self, fast: Mapping[str, Tensor], x: Tensor) -> Any:
        prediction = torch.ops.maml_cuda.predict_forward(self._own(fast), x, self._text)
        return self._binding.as_returned(prediction)

    def loss_and_grad(
        self, fast: Mapping[str, Tensor], x: Tensor, y: targets.Target
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, grads = torch.ops.maml_cuda.loss_and_grad(self._own(fast), x, targets.tensors(y), self._text)
        return losses, self._whole(grads, fast)

    def hvp(
        self, fast: Mapping[str, Tensor], x: Tensor, y: targets.Target, v: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        at_rest = {name: torch.zeros_like(t) for name, t in fast.items()}
        directions = self._own({**at_rest, **v})
        products = torch.ops.maml_cuda.hvp(self._own(fast), x, targets.tensors(y), directions, self._text)
        return self._whole(products, fast)

    def _own(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        return self._binding.own(given, 1, 0)

    def _whole(self, parts: list[Tensor], fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = {name: fast[name] for name in self._trainable}
        found = self._binding.whole(parts, like, 0)
        return {name: found.get(name, torch.zeros_like(t)) for name, t in like.items()}
