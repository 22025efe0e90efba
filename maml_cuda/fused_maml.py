"""FusedMAML: its arguments, and what users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from maml_cuda import batch_norm as norms
from maml_cuda import meta_gradients, reference, torch_private
from maml_cuda.adapted_parameters import AdaptParams, as_pickled
from maml_cuda.engine import (
    building_blocks,
    checks,
    explanation,
    meta_step,
    running_statistics,
    trust_region,
)
from maml_cuda.engine.binder import Binder, Set, read
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.meta_step import MetaOutput
from maml_cuda.engine.query_weights import QueryWeights
from maml_cuda.engine.settings import Options, adapted_names, described_update, inner_update
from maml_cuda.gradient_transforms import GradientTransform
from maml_cuda.optim import Groups, Optimizer
from maml_cuda.optim import read as read_update
from maml_cuda.pytrees import Tree
from maml_cuda.rates import InnerRates, hold, tensors
from maml_cuda.targets import PolicyTarget, Target
from maml_cuda.torch_wrappers import unwrapped
from maml_cuda.updates import InnerUpdate

__all__ = ["FusedMAML", "MetaOutput"]


class FusedMAML(nn.Module):
    """MAML on a batch of tasks: the exact meta-gradient in one call (Finn, Abbeel, Levine 2017).

    Each forward works on copies of the buffers of the model and of a loss module. Those that forward writes in train
    mode (u and v of spectral_norm, counters, moving averages) move once a call with gradients on, as in one plain
    training step: to what its first forward left, of the first task's support set at the model's own parameters. So
    they do in adapt(differentiable=True), and by nothing else. BatchNorm's running statistics are written by
    update_statistics alone.

    Dropout in train mode has one mask for each task, inner step and set (masks.py), of a seed that each call draws from
    torch's default generator.

    Args:
        model: any module; its parameters become this module's. What cannot be fused runs on the general path. Of
            `torch.compile(model)` and `nn.DataParallel(model)` the model itself is taken.
        inner_lr: the rate of the inner loop: a float or 0-d tensor; a tensor [inner_steps]; or a dict with exactly
            the adapted names -> float, 0-d, [inner_steps], the parameter's shape, or [inner_steps, *shape]. An
            nn.Parameter among them receives its exact gradient.
        inner_steps: steps of the inner loop, from 0.
        loss: "cross_entropy" (mean over samples), "mse" (mean over all elements), "gaussian_policy_gradient" (of a
            model that returns (mean, log_std)) or "categorical_policy_gradient" (of one that returns logits). The
            targets of the last two are PolicyTargets. Or a function (prediction, target) -> scalar, fused if its
            operations are. Parameters of a loss module, and other leaf tensors that require grad and that the loss
            reads, are meta-learned too: each receives its exact gradient, and the inner loop does not change it.
        first_order: drop the Hessian terms (FOMAML). May be changed at any time.
        adapt_params: which parameters the inner loop changes: a callable on the name, which also decides on layers that
            are added later, or names. The others still receive their exact meta-gradient.
        backend: "auto", "fused" (a ValueError of the first call that cannot be fused) or "reference".
        precision: of products of float32 on a GPU: "float32" (as such), "bf16x3" (relative error about 1e-5), "tf32"
            (about 6e-4) or "bfloat16" (about 5e-3); a float64 model computes in float64 whatever this says.
        cuda_graphs: on a GPU, calls of a shape that repeats are replayed as CUDA graphs.
        checkpoint: "recompute" keeps nothing of an inner step for its Hessian-vector product but its parameters (and,
            where rates are learned, its gradient), and runs the gradient pass again: less memory, a tenth to a fifth
            more arithmetic, the same bits. None: so only where the states of all steps would pass 192 MB a task on the
            CPU, 1 GB on a GPU. "sqrt": the parameters too are kept of about sqrt(inner_steps) steps alone. The inner
            loop runs a second time, in segments of as many steps: for very long inner loops, with the same bits. On the
            general path both build each step's graph again (once more to run a segment), and None keeps those of the
            last steps, up to 1 GB.
        task_chunk: on a GPU, at most so many tasks at once, so that memory grows with them alone; None: all.
        check_labels: on a GPU, look at the labels, and at integers in x, before each call, which waits for the device.
            Otherwise one out of range is a device-side assertion, raised at the next synchronization. The CPU always
            looks.
        batch_norm: "transductive": BatchNorm as the modules' training flags say, batch statistics in train mode, so
            that a task's queries are to be predicted together (`predict`).
            "per_step": as MAML++ has it, with parameters and statistics of their own for each inner step: the model's
            BatchNorm layers are replaced, in place, by PerStepBatchNorm layers of inner_steps slots (convert_per_step).
            "running": BatchNorm layers are held in eval mode, whatever train() says, and normalise by their running
            statistics, which update_statistics collects.
        query_weights: [inner_steps + 1] numbers from 0: a task's loss is the sum of weight k times its query loss at
            phi_k (the multi-step loss of MAML++). None: the query loss after the last step. May be changed at any time.
        meta_gradient: "unrolled": the exact meta-gradient, through all inner steps. "truncated": through the last
            `truncate` steps alone; what the steps before add to the parameters is constant (Shaban, Cheng, Hatch, Boots
            2019). "implicit": that of the minimum of the support loss with the further term
            proximal / 2 |phi - theta|^2, for which phi_K is taken and which is part of the loss of every inner step
            (iMAML: Rajeswaran, Finn, Kakade, Levine 2019); rates cannot be learned. "reptile": theta - phi_K, without a
            gradient of the query loss, which is computed (Nichol, Achiam,
            Schulman 2018, algorithm 2); all trainable parameters must be adapted, at rates that are not learned.
        truncate: of "truncated": a number of inner steps, from 1.
        proximal: of "implicit": lambda, above 0.
        cg_steps, cg_tolerance: of "implicit": its linear system is solved by conjugate gradients, one Hessian-vector
            product a step, with at most cg_steps steps; a task whose residual is cg_tolerance times the gradient of its
            query loss takes no more.
        inner_optimizer: of the inner loop, such as `maml_cuda.optim.Adam()`, with `inner_lr` as its learning rate. Each
            task starts with a new state, and the meta-gradient goes through all states. Learned hyperparameters and
            initial states are parameters of this module. None: phi_{k+1} = phi_k - inner_lr * gradient.
        inner_clip_norm: the inner gradient of a task is scaled down to this norm over all adapted parameters, as by
            torch.nn.utils.clip_grad_norm_; the scale is differentiated too. A number above 0.
        inner_clip_value: then each of its elements is brought into [-inner_clip_value, inner_clip_value].
        inner_transform: a function of the inner gradients of a task, a dict by name, that returns such a dict; or an
            nn.Module of this form, whose parameters are meta-learned: a preconditioner or a mask. It runs first:
            gradient, transform, clip, optimizer. Those of maml_cuda.optim are fused, others on the general path.
        per_step_support: each inner step has a support set of its own, wherever there is an inner loop: x_spt and y_spt
            are [inner_steps, tasks, n_support, ...]. adapt(steps=k) takes k sets.
        support_batch: each inner step sees so many samples of a task's support set, in epochs without replacement
            (minibatches.py), of a seed that each call draws from torch's default generator. None: all samples.

    Raises:
        ValueError, TypeError: an argument that does not fit, in words.
    """

    model: nn.Module
    inner_lr: float | Tensor | InnerRates
    inner_steps: int
    loss: str | Callable[..., Tensor]
    first_order: bool
    batch_norm: str
    inner_optimizer: Optimizer | Groups | None
    inner_clip_norm: float | None
    inner_clip_value: float | None
    inner_transform: GradientTransform | None

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | Tensor | Mapping[str, float | Tensor],
        inner_steps: int = 1,
        *,
        loss: str | Callable[..., Tensor] = "cross_entropy",
        first_order: bool = False,
        adapt_params: Callable[[str], bool] | Iterable[str] | None = None,
        backend: str = "auto",
        precision: str = "float32",
        cuda_graphs: bool = True,
        checkpoint: str | None = None,
        task_chunk: int | None = None,
        check_labels: bool = False,
        batch_norm: str = "transductive",
        query_weights: Tensor | Sequence[float] | None = None,
        meta_gradient: str = "unrolled",
        truncate: int | None = None,
        proximal: float | None = None,
        cg_steps: int = 5,
        cg_tolerance: float = 1e-6,
        inner_optimizer: Optimizer | Groups | None = None,
        inner_clip_norm: float | None = None,
        inner_clip_value: float | None = None,
        inner_transform: GradientTransform | None = None,
        per_step_support: bool = False,
        support_batch: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(adapt_params, Iterable) and not isinstance(adapt_params, str):
            adapt_params = list(adapt_params)
        model = unwrapped(model)
        checks.constructor(model, inner_steps, loss, first_order, adapt_params, backend, precision)
        checks.on_device(cuda_graphs, task_chunk, check_labels)
        checks.checkpoint(checkpoint)
        checks.per_step_support(per_step_support, inner_steps)
        checks.support_batch(support_batch, per_step_support)
        parameters = dict(model.named_parameters())
        checks.one_dtype_and_device(parameters.values())
        norms.check_mode(model, batch_norm)
        names = reference.adapted_names(model, adapt_params)
        stepwise = norms.stepwise_names(model, batch_norm)
        if adapt_params is None:
            names = [name for name in names if name not in stepwise]
        checks.not_adapted(names, stepwise)
        checks.adapted(names, parameters)
        weights = checks.query_weights(query_weights, inner_steps)
        update = (inner_optimizer, inner_clip_norm, inner_clip_value, inner_transform)
        checks.inner_update(*update, [parameters[name] for name in names])
        held = [] if inner_optimizer is None else inner_optimizer.held_tensors()
        checks.rates(tensors(inner_lr) + held, parameters[names[0]])
        read_update(inner_lr, {name: parameters[name].shape for name in names}, inner_steps, *update)
        self.inner_steps = inner_steps
        self.loss = loss
        self.first_order = first_order
        self.batch_norm = batch_norm
        self._options = Options(
            adapt_params=adapt_params,
            backend=backend,
            precision=precision,
            cuda_graphs=cuda_graphs,
            task_chunk=task_chunk,
            meta_gradient=meta_gradients.read(meta_gradient, truncate, proximal, inner_steps, cg_steps, cg_tolerance),
            recompute=checkpoint is not None,
            segments=checkpoint == "sqrt",
            per_step_support=per_step_support,
            support_batch=support_batch,
            check_labels=check_labels,
        )
        self._binder = Binder()
        with norms.put_back(model):
            if batch_norm == "per_step":
                model = norms.convert_per_step(model, max(inner_steps, 1))
            self.model = model
            self.query_weights = weights
            hold(self, "inner_lr", inner_lr)
            self.inner_optimizer, self.inner_clip_norm, self.inner_clip_value, self.inner_transform = update
            self._binder.bind(self)
            meta_step.check_settings(self)

    # -- what it is -------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """What runs: "cpu", "cuda" or "reference".

        It is that of the last call. Whether a model can be fused is found out by its first call, or by explain(x, y);
        before it, this is what would run a model that can.
        """
        return self._binder.backend(self._binding())

    @property
    def precision(self) -> str:
        """How products of float32 are computed on a GPU."""
        return self._options.precision

    @property
    def meta_gradient(self) -> str:
        """How the meta-gradient is taken: "unrolled", "truncated", "implicit" or "reptile"."""
        return self._options.meta_gradient.kind

    @property
    def query_weights(self) -> tuple[float, ...] | None:
        """The weights of the query losses at phi_0 .. phi_K, or None: the last one alone."""
        return self._query_weights.values

    @query_weights.setter
    def query_weights(self, value: Tensor | Sequence[float] | None) -> None:
        weights = checks.query_weights(value, self.inner_steps)
        like = next(p for _, p in self.model.named_parameters())
        self._query_weights = QueryWeights(weights, like)

    def train(self, mode: bool = True) -> FusedMAML:
        """As any module's; batch_norm="running" holds BatchNorm layers in eval mode."""
        super().train(mode)
        self._binder.hold_statistics(self)
        return self

    def explain(self, x: Tree | None = None, y: Target | None = None) -> str:
        """A table: each module of the model, the fused layer that serves it, or the sentence why not.

        Args:
            x, y: a set as for `adapt`, or x alone; the model is captured on data like these. Without them the table is
                of the last call; before the first one it says what is known.

        Raises:
            ValueError, TypeError: as a call with such data.
        """
        binding = self._binding()
        choice = binding.last
        if x is not None:
            y_name = None if y is None else "y"
            given = Set("x", read(self, binding, "x", x, y_name, y), y_name or "", y)
            choice = self._binder.choice(self, binding, given, given)
        return explanation.table(self.model, binding, choice, described_update(self))

    def memory_estimate(self, x_spt: Tree, x_qry: Tree) -> int:
        """Bytes of workspace that a meta-step on such data takes, beside its arguments and results; on a CPU, with as
        many threads as torch has now. The gradients of x that requires grad count, of a support set one for each inner
        step.

        Args:
            x_spt, x_qry: as for a call; only their shapes, dtype and device count, and whether they require grad.

        Raises:
            ValueError: the model runs on the general path, whose memory cannot be estimated.
        """
        return meta_step.memory_estimate(self, x_spt, x_qry)

    # -- calls ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x_spt: Tree,
        y_spt: Target,
        x_qry: Tree,
        y_qry: Target,
        *,
        task_weights: Tensor | None = None,
        spt_weights: Tensor | None = None,
        qry_weights: Tensor | None = None,
    ) -> MetaOutput:
        """The query loss after the inner loop, whose backward is the exact meta-gradient.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry, y_qry: query sets, [tasks, n_query, ...].
                x may hold integers. It may be a pytree of tensors and None, such as a tuple or a dict; the model gets
                each task's part. So may y for a loss of your own. Where both sets are of one size, fused layers also
                take tensors [tasks, ...] without an axis of samples. On the general path x is what the model takes:
                also [tasks, samples], and query samples of another shape than the support samples.
                Tensors of x and y that require grad receive their exact gradients, as learned data do; at first_order
                those of the support sets have none.
            task_weights: [tasks]; the loss is their sum of weight times task loss. None: the mean over tasks.
            spt_weights, qry_weights: [tasks, n], of the samples of a set, at least 0: a task's loss is the weighted
                mean over its samples. Weight 0 is padding: what stands there counts nowhere, not in the statistics of
                BatchNorm either, which count the other samples once each; its logits are 0. With either, a loss of
                your own returns [samples]. Weights that require grad receive their exact gradient.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit; no parameter is touched.
        """
        return meta_step.forward(self, x_spt, y_spt, x_qry, y_qry, task_weights, spt_weights, qry_weights)

    def backward(
        self,
        x_spt: Tree,
        y_spt: Target,
        x_qry: Tree,
        y_qry: Target,
        *,
        task_weights: Tensor | None = None,
        spt_weights: Tensor | None = None,
        qry_weights: Tensor | None = None,
    ) -> MetaOutput:
        """A call and its `loss.backward()` in one: the exact meta-gradient is added to `.grad`, with the same bits.

        Where it can it does without autograd's engine, which takes half as long as a small network's meta-step. Hooks
        of parameters run; those of calls of this module and of autograd's own nodes do not. So under
        DistributedDataParallel, and where a GradScaler scales the loss, call the module and then `loss.backward()`.

        Args:
            x_spt, y_spt, x_qry, y_qry, task_weights, spt_weights, qry_weights: as of a call.

        Returns:
            As a call, with nothing left to differentiate.

        Raises:
            RuntimeError: gradients are off.
            ValueError, TypeError: as a call does; no `.grad` is touched.
        """
        return meta_step.backward(self, x_spt, y_spt, x_qry, y_qry, task_weights, spt_weights, qry_weights)

    def adapt(
        self,
        x_spt: Tree,
        y_spt: Target,
        steps: int | None = None,
        *,
        differentiable: bool = False,
        spt_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parameters after the inner loop, name -> [tasks, *shape].

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            steps: None means inner_steps; beyond the given rates the last one repeats.
            differentiable: the result has a backward, of one Hessian-vector product a step (first_order: none;
                meta_gradient="truncated": of the last steps); otherwise it is detached. Parameters that are not adapted
                are expanded views.
            spt_weights: of the samples, as of a call.

        Raises:
            ValueError: differentiable with meta_gradient="implicit" or "reptile"; and as a call does.
        """
        steps = self.inner_steps if steps is None else steps
        return building_blocks.adapt(self, x_spt, y_spt, steps, differentiable, spt_weights)

    def inner_loop(
        self, x_spt: Tree, y_spt: Target, steps: int, *, spt_weights: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The parameters after 0, 1, ..., `steps` inner steps, detached: each as adapt(steps=k) returns it, to the bit.
        The CPU's layers take no step twice, if the optimizer has no state; elsewhere each of these is adapted afresh.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            steps: from 0; beyond the given rates the last one repeats.
            spt_weights: of the samples, as of a call.
        """
        return building_blocks.inner_loop(self, x_spt, y_spt, steps, spt_weights)

    def update_statistics(
        self,
        x_spt: Tree,
        y_spt: Tensor,
        x_qry: Tree,
        *,
        spt_weights: Tensor | None = None,
        qry_weights: Tensor | None = None,
    ) -> None:
        """One update of BatchNorm's running statistics; nothing else ever writes them.

        Towards the mean over tasks and passes of the batch means and unbiased variances, with each layer's momentum
        (None: the mean over all updates), by plain forward passes with batch statistics: of the support sets at phi_k
        and the query sets at phi_{k+1}, for each inner step k. They go to slot k of a per-step layer.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry: query sets, [tasks, n_query, ...].
            spt_weights, qry_weights: of the samples, as of a call: those of weight 0 count nowhere.

        Raises:
            ValueError: no BatchNorm layer tracks running statistics; and as a call does.
        """
        running_statistics.update_statistics(self, x_spt, y_spt, x_qry, spt_weights, qry_weights)

    # -- building blocks: at parameters that are each task's own -----------------------------------------------

    def predict(
        self, fast: Mapping[str, Tensor], x: Tree, *, slot: int | None = None, weights: Tensor | None = None
    ) -> Any:
        """Predictions [tasks, n, ...] at each task's own parameters on its own x [tasks, n, ...]; of a model that
        returns (mean, log_std) both, for each task.

        A model that returns a pytree of tensors gives one, leaf by leaf [tasks, ...]: None, numbers and strings must be
        the same for all tasks. So does one that returns a Normal, MultivariateNormal, Beta, Categorical, Bernoulli or
        Independent distribution: of the same type, with parameters [tasks, ...].

        Differentiable in `fast`. slot: the inner step whose per-step BatchNorm is read (after k steps: k - 1); None:
        the last one. weights: [tasks, n], of the samples: those of weight 0 are padding, which does not count in
        BatchNorm, and whose predictions are 0; the others' weights do not matter here.

        Where BatchNorm uses batch statistics, a task's queries share theirs: give all of them at once. One query by
        itself is normalised by itself alone, at chance in general, and warns; with batch_norm="running" the predictions
        on a query do not depend on the others.

        Raises:
            TypeError, ValueError: what the model returns cannot be put together; and as a call does.
        """
        return building_blocks.predict(self, fast, x, slot, weights)

    def loss_and_grad(
        self,
        fast: Mapping[str, Tensor],
        x: Tree,
        y: Target,
        *,
        slot: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at each task's own parameters [tasks] and its gradient, name -> [tasks, *shape], both detached.

        slot: the inner step whose per-step BatchNorm is read; None: the last one.
        weights: [tasks, n], of the samples, as of a call.

        Raises:
            ValueError: fast, x, y or weights requires grad, which the results would lose.
        """
        return building_blocks.loss_and_grad(self, fast, x, y, slot, weights)

    def hvp(
        self,
        fast: Mapping[str, Tensor],
        x: Tree,
        y: Target,
        v: Mapping[str, Tensor],
        *,
        slot: int | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The Hessian of the loss at each task's own parameters times v, name -> [tasks, *shape], detached.

        v: name -> [tasks, *shape]; a parameter that it lacks, or that is frozen, does not move.
        slot: the inner step whose per-step BatchNorm is read; None: the last one.
        weights: [tasks, n], of the samples, as of a call.

        Raises:
            ValueError: fast, x, y, v or weights requires grad, which the result would lose.
        """
        return building_blocks.hvp(self, fast, x, y, v, slot, weights)

    # -- trust regions of adapted policies ---------------------------------------------------------------------

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
        of theta). With first_order the inner gradients are constants, so that J is the identity, but for weight decay.
        Learned rates and hyperparameters are held fixed. Through an inner optimizer, on the general path.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry: states of the adapted policies, [tasks, n_query, ...].
            v: name -> tensor of the parameter's shape, for every trainable parameter.
            weights: [tasks, n_query], at least 0: the average over samples is weighted; None: all alike.

        Returns:
            name -> tensor of the parameter's shape, detached.
        """
        return trust_region.fisher_vector_product(self, x_spt, y_spt, x_qry, v, weights)

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
        return trust_region.fisher(self, x_spt, y_spt, x_qry, weights, memory)

    # -- what its parts ask -----------------------------------------------------------------------------------

    def _binding(self) -> Binding:
        """What runs now: bound again where something has changed that the plan depends on."""
        if torch.compiler.is_compiling():
            constants: list[Any] = [self.inner_lr] if isinstance(self.inner_lr, float) else []
            constants += [c for c in (self.inner_clip_norm, self.inner_clip_value) if c is not None]
            if self.inner_optimizer is not None:
                constants += self.inner_optimizer.constants()
            torch_private.guard_while_compiling(self.model, *constants)
            self._bind_now()
            assert self._binder.bound is not None
            return self._binder.bound
        return self._binder.bind(self)

    # On a method, as torch 2.6 takes no module for an argument.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _bind_now(self) -> bool:
        """Binds while a compiler traces: what it has bound is a constant of the compiled program."""
        self._binder.bind(self)
        return True

    def _adapted(self) -> list[str]:
        return adapted_names(self)

    def _inner_update(self) -> InnerUpdate:
        return inner_update(self)

    @property
    def _adapt_params(self) -> AdaptParams:
        return self._options.adapt_params

    def __getstate__(self) -> dict[str, Any]:
        rule = self._options.adapt_params
        if callable(rule):
            rule = as_pickled(rule, dict(self.model.named_parameters()))
        return {**self.__dict__, "_options": replace(self._options, adapt_params=rule)}
