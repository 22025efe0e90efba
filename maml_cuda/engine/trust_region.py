"""What a trust region of adapted policies asks for (TRPO, Schulman et al. 2015): products with their Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from maml_cuda import targets
from maml_cuda.engine import checks, data_checks, fallback
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.building_blocks import BuildingBlocks
from maml_cuda.engine.fisher import FisherProducts
from maml_cuda.targets import PolicyTarget


class TrustRegion(BuildingBlocks):
    """Of policies: its loss is one of theirs."""

    first_order: bool

    def fisher_vector_product(
        self,
        x_spt: Tensor,
        y_spt: PolicyTarget,
        x_qry: Tensor,
        v: Mapping[str, Tensor],
        *,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The Hessian-vector product of the KL divergence between adapted policies, for trust regions (TRPO).

        The mean over tasks of J^T F J v: J is the Jacobian of the adapted parameters in the model's own, through the
        inner loop, F the Fisher matrix of the adapted policy averaged over the query samples. That is the Hessian, at
        theta = the model's parameters, of the mean over tasks and samples of KL(adapted policy now || adapted policy
        of theta). With first_order J is the identity. Learned inner rates are held fixed.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry: states of the adapted policies, [tasks, n_query, ...].
            v: name -> tensor of the parameter's shape, for every trainable parameter.
            weights: [tasks, n_query], at least 0: the average over samples is weighted; None: all alike.

        Returns:
            name -> tensor of the parameter's shape, detached.
        """
        binding, serves, x_spt, x_qry = self._read_fisher(x_spt, y_spt, x_qry, weights)
        names, parameters = self._trainable(), dict(self.model.named_parameters())
        data_checks.direction({n: parameters[n] for n in names}, v)
        if not serves:
            return fallback.fisher_vector_product(
                self.model, str(self.loss), self._rates(), names, x_spt, y_spt, x_qry, dict(v), weights,
                self.inner_steps, self.first_order,
            )  # fmt: skip
        own, rates = binding.tensors()
        reached = [n for n in binding.names if n in names]
        products = torch.ops.maml_cuda.fisher_vector_product(
            own, rates, x_spt, targets.tensors(y_spt), x_qry, weights, [v[n].detach() for n in reached], binding.text,
            self.inner_steps, self.first_order,
        )  # fmt: skip
        return self._trainable_of(dict(zip(reached, products, strict=True)), parameters)

    def fisher(
        self,
        x_spt: Tensor,
        y_spt: PolicyTarget,
        x_qry: Tensor,
        *,
        weights: Tensor | None = None,
        memory: int = 1 << 30,
    ) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """`fisher_vector_product` as a function of v, for many v on the same data: to the bit the same products.

        On a CPU, whatever does not depend on v (adapted parameters, activations, cotangents) is computed by the first
        product and kept as long as the function is, at most `memory` bytes of it: tasks beyond that compute it anew
        each time, as do `checkpoint="recompute"`, small networks on few samples, and every other backend. Products are
        those of the model's parameters and of the data as they are when they are asked for; after a change in place the
        next one computes everything.

        Args:
            x_spt, y_spt, x_qry, weights: as in fisher_vector_product.
            memory: bytes, at least 0.
        """
        checks.steps(memory, "memory")
        binding, serves, x_spt, x_qry = self._read_fisher(x_spt, y_spt, x_qry, weights)
        if not serves or binding.backend != "cpu" or self._recompute:
            return lambda v: self.fisher_vector_product(x_spt, y_spt, x_qry, v, weights=weights)
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        reached = [n for n in binding.names if n in parameters]
        own, rates = binding.tensors()
        products = FisherProducts(
            own, rates, x_spt, targets.tensors(y_spt), x_qry, weights, binding.text, self.inner_steps, self.first_order,
            memory,
        )  # fmt: skip

        def product(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            data_checks.direction(parameters, v)
            found = dict(zip(reached, products([v[n].detach() for n in reached]), strict=True))
            return {n: found[n] if n in found else torch.zeros_like(p) for n, p in parameters.items()}

        return product

    def _read_fisher(
        self, x_spt: Tensor, y_spt: PolicyTarget, x_qry: Tensor, weights: Tensor | None
    ) -> tuple[Binding, bool, Tensor, Tensor]:
        """Whether fused layers serve a Fisher-vector product on these data, and x as they are read."""
        checks.policy_loss(self.loss, "fisher_vector_product")
        data_checks.one_tensor("x_spt", x_spt, "fisher_vector_product")
        data_checks.one_tensor("x_qry", x_qry, "fisher_vector_product")
        binding = self._binding()
        x_spt = self._read(binding, "x_spt", x_spt, "y_spt", y_spt)
        x_qry = self._read(binding, "x_qry", x_qry, None, None)
        data_checks.same_tasks(x_spt, x_qry)
        if weights is not None:
            data_checks.query_sample_weights(weights, x_qry, binding.like())
        serves = self._serves(binding, x_spt, x_qry)
        if serves and any(slots is not None for slots in binding.slots):
            self._fall_back("a Fisher-vector product knows no parameters with a slot for each step")
            serves = False
        if serves:
            self._look_at_labels(binding, x_spt, y_spt=y_spt)
            if self._check_labels and weights is not None:
                data_checks.sample_weights("weights", weights)
        return binding, serves, x_spt, x_qry
