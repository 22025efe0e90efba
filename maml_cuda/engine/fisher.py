"""Fisher-vector products through the inner loop: many on the same data, whose common part is computed once."""

from __future__ import annotations

from torch import Tensor

from maml_cuda import targets
from maml_cuda.engine import data_checks
from maml_cuda.engine.problem import Problem, cut, dense, is_double, problem_of
from maml_cuda.plan.schema import plan_of


class FisherProducts:
    """Products with one Fisher matrix. For as many tasks as fit in `memory` bytes, everything that does not depend on v
    is kept from one product to the next, until a tensor changes in place. The results are the same bits without it.

    Args: as the op fisher_vector_product. The core must run on the CPU where memory is not 0.
    """

    def __init__(
        self, parameters: list[Tensor], rates: list[Tensor], x_spt: Tensor, y_spt: list[Tensor | None], x_qry: Tensor,
        weights: Tensor | None, plan: str, steps: int, first_order: bool, memory: int = 0,
        seed: Tensor | None = None,
    ) -> None:  # fmt: skip
        tasks, (_, n_support, *sample) = x_qry.shape[0], x_spt.shape

        def problem(operation: str) -> Problem:
            double = is_double(x_spt)
            return problem_of(plan, operation, tuple(sample), n_support, x_qry.shape[1], steps, first_order, double)

        self.problem, self.kept = problem("fisher"), 0
        if memory and not self.problem.core.in_lanes:  # else several tasks side by side are faster
            keeping = problem("kept_fisher")
            self.kept = min(tasks, memory // (keeping.core.task_size * x_spt.element_size()))
            if self.kept:
                self.problem = keeping
        self.state = x_spt.new_empty(self.kept * self.problem.core.task_size)
        self.seed = {} if seed is None else {"seed": int(seed)}
        self.given = parameters, rates, x_spt, y_spt, x_qry, weights
        self.trainable = [p.trainable for p in plan_of(plan).parameters]
        self.versions: list[int] | None = None
        self.read: tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor | None]]

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        """v: of each trainable parameter, in order."""
        _, _, x_spt, _, x_qry, _ = self.given
        versions = self._versions()
        prepared = versions is not None and versions == self.versions
        if not prepared:
            self._prepare()
        parameters, rates, support, query = self.read
        v = dense(v)
        products = [t.new_empty(t.shape) for t in v]
        flat = x_spt.new_empty(sum(t.numel() for t in v))
        rest = iter(v)
        given = [next(rest) if trainable else None for trainable in self.trainable]
        state = {"state": self.state, "kept": self.kept, "prepared": prepared} if self.kept else {}
        self.problem.run(
            x_spt, len(x_qry), parameters, rates, support, query, gradient=flat,
            given=given, given_strides=[0] * len(given),  # one for all tasks
            **state, **self.seed,
        )  # fmt: skip
        self.versions = versions
        for product, part in zip(products, cut(flat, v), strict=True):
            product.copy_(part)
        return products

    def _prepare(self) -> None:
        """Makes the tensors that the core reads.

        Raises:
            ValueError: a target or a weight that does not fit.
        """
        parameters, rates, x_spt, y_spt, x_qry, weights = self.given
        if weights is not None and self.problem.backend == "cpu":
            data_checks.sample_weights("weights", weights)
        scale = x_qry.new_ones(x_qry.shape[:2]) if weights is None else weights
        support = self.problem.support("y_spt", x_spt, y_spt)
        query: list[Tensor | None] = [x_qry.contiguous(), None, targets.shares(scale), None]
        self.read = dense(parameters), dense(rates), support, query

    def _versions(self) -> list[int] | None:
        """How often each tensor has been changed in place; None where inference tensors do not count it."""
        parameters, rates, x_spt, y_spt, x_qry, weights = self.given
        tensors = [t for t in (*parameters, *rates, x_spt, *y_spt, x_qry, weights) if t is not None]
        return None if any(t.is_inference() for t in tensors) else [t._version for t in tensors]
