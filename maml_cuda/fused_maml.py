"""FusedMAML: arguments and delegation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from maml_cuda import batch_norm as norms
from maml_cuda import pytrees, reference, targets
from maml_cuda.engine import checks, data_checks, fallback, fast_path
from maml_cuda.engine.binding import Binding
from maml_cuda.engine.problem import joined, meta_problem
from maml_cuda.engine.trust_region import TrustRegion
from maml_cuda.functional import precision
from maml_cuda.policies import mean_of
from maml_cuda.pytrees import Tree
from maml_cuda.rates import hold, read_rates, tensors
from maml_cuda.targets import Target
from maml_cuda.torch_wrappers import unwrapped


@dataclass
class MetaOutput:
    """The result of a meta-step. `loss` is the only differentiable field.

    Attributes:
        loss: 0-d, the sum over tasks of weight times task loss (without task_weights the mean).
        task_losses: [tasks], the query losses after the inner loop.
        logits: [tasks, n_query, ...], the predictions on the query sets after the last step; of a Gaussian policy the
            means. With a loss of your own, what `predict` returns, or None where `predict` raises.
        support_losses: [tasks, inner_steps]; column k is the support loss at phi_k.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Any
    support_losses: Tensor


class FusedMAML(TrustRegion):
    """MAML on a batch of tasks: the exact meta-gradient in one call (Finn, Abbeel, Levine 2017).

    Each forward works on copies of the buffers of the model and of a loss module. Those that forward writes in train
    mode (u and v of spectral_norm, counters, moving averages) move once a call with gradients on, as in one plain
    training step: to what its first forward left, of the first task's support set at the model's own parameters. So
    they do in adapt(differentiable=True), and by nothing else. BatchNorm's running statistics are written by
    update_statistics alone.

    Args:
        model: any module; its parameters become this module's. What cannot be fused runs on the general path. Of
            `torch.compile(model)` and `nn.DataParallel(model)` the model itself is taken.
        inner_lr: the rate of the inner loop: a float or 0-d tensor; a tensor [inner_steps]; or a dict with exactly
            the adapted names -> float, 0-d, [inner_steps], the parameter's shape, or [inner_steps, *shape]. An
            nn.Parameter among them receives its exact gradient.
        inner_steps: steps of the inner loop, from 0.
        loss: "cross_entropy" (mean over samples), "mse" (mean over all elements), "gaussian_policy_gradient" (of a
            model that returns (mean, log_std)) or "categorical_policy_gradient" (of one that returns logits), whose
            targets are PolicyTargets; or (prediction, target) -> scalar (general path; a module's parameters are
            meta-learned too).
        first_order: drop the Hessian terms (FOMAML). May be changed at any time.
        adapt_params: which parameters the inner loop changes: a callable on the name, which also decides on layers that
            are added later, or names. The others still receive their exact meta-gradient.
        backend: "auto", "fused" (a ValueError where it cannot) or "reference".
        precision: of products of float32 on a GPU: "float32" (as such), "bf16x3" (relative error about 1e-5), "tf32"
            (about 6e-4) or "bfloat16" (about 5e-3); a float64 model computes in float64 whatever this says.
        cuda_graphs: on a GPU, calls of a shape that repeats are replayed as CUDA graphs.
        checkpoint: "recompute" keeps nothing of an inner step for its Hessian-vector product but its parameters (and,
            where rates are learned, its gradient), and runs the gradient pass again: less memory, a tenth to a fifth
            more arithmetic, the same bits. None: so only where the states of all steps would pass 192 MB a task. The
            general path keeps what autograd keeps.
        task_chunk: on a GPU, at most so many tasks at once, so that memory grows with them alone; None: all.
        check_labels: on a GPU, look at the labels before each call, which waits for the device. Otherwise a label out
            of range is a device-side assertion, raised at the next synchronization. The CPU always looks.
        batch_norm: "transductive": BatchNorm as the modules' training flags say, batch statistics in train mode, so
            that a task's queries are to be predicted together (`predict`).
            "per_step": as MAML++ has it, with parameters and statistics of their own for each inner step: the model's
            BatchNorm layers are replaced, in place, by PerStepBatchNorm layers of inner_steps slots (convert_per_step).
            "running": BatchNorm layers are held in eval mode, whatever train() says, and normalise by their running
            statistics, which update_statistics collects.
        query_weights: [inner_steps + 1] numbers from 0: a task's loss is the sum of weight k times its query loss at
            phi_k (the multi-step loss of MAML++). None: the query loss after the last step. May be changed at any time.

    Raises:
        ValueError, TypeError: an argument that does not fit, in words.
    """

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
    ) -> None:
        super().__init__()
        if isinstance(adapt_params, Iterable) and not isinstance(adapt_params, str):
            adapt_params = list(adapt_params)
        model = unwrapped(model)
        checks.constructor(model, inner_steps, loss, first_order, adapt_params, backend, precision)
        checks.on_device(cuda_graphs, task_chunk, check_labels)
        checks.checkpoint(checkpoint)
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
        checks.rates(tensors(inner_lr), parameters[names[0]])
        read_rates(inner_lr, {name: parameters[name].shape for name in names}, inner_steps)
        self.batch_norm = batch_norm
        self.inner_steps = inner_steps
        self.loss = loss
        self.first_order = first_order
        self._on_device = {"precision": precision, "cuda_graphs": cuda_graphs, "task_chunk": task_chunk}
        self._recompute = checkpoint is not None
        self._check_labels = check_labels
        self._adapt_params = adapt_params
        self._wanted_backend = backend
        self._warned = set()
        self._bindings = []
        self._collects = False
        with norms.put_back(model):
            if batch_norm == "per_step":
                model = norms.convert_per_step(model, max(inner_steps, 1))
            self.model = model
            self.query_weights = weights
            hold(self, inner_lr)
            self._bound = self._rebind()

    @property
    def query_weights(self) -> tuple[float, ...] | None:
        """The weights of the query losses at phi_0 .. phi_K, or None: the last one alone."""
        return self._query_weights

    @query_weights.setter
    def query_weights(self, value: Tensor | Sequence[float] | None) -> None:
        weights = checks.query_weights(value, self.inner_steps)
        parameters = [p for _, p in self.model.named_parameters()]
        self._query_weights = weights
        self._query_steps = [k for k, w in enumerate(weights or ()) if w]
        self._query_tensor = torch.tensor(weights or (), dtype=precision(parameters), device=parameters[0].device)

    def _queries(self, like: Tensor) -> tuple[Tensor | None, list[int]]:
        """The weights of the query losses as the ops take them: a tensor, and which of them are not zero."""
        if not self._query_steps:
            return None, []
        if self._query_tensor.dtype != like.dtype or self._query_tensor.device != like.device:
            self.query_weights = self._query_weights
        return self._query_tensor, self._query_steps

    def train(self, mode: bool = True) -> FusedMAML:
        """As any module's; batch_norm="running" holds BatchNorm layers in eval mode."""
        super().train(mode)
        self._hold_statistics()
        return self

    def _hold_statistics(self) -> None:
        if self.batch_norm == "running" and not self._collects:
            norms.hold_statistics(self.model)

    def _rebind(self) -> Binding:
        self._hold_statistics()  # which model.train() has set free
        return super()._rebind()

    def memory_estimate(self, x_spt: Tensor, x_qry: Tensor) -> int:
        """Bytes of workspace that a meta-step on such data takes, beside its arguments and results; on a CPU, with as
        many threads as torch has now.

        Args:
            x_spt, x_qry: as for a call; only their shapes, dtype and device count.

        Raises:
            ValueError: the model runs on the general path, whose memory nobody can tell beforehand.
        """
        binding = self._binding()
        self._read(binding, "x_spt", x_spt, None, None)
        self._read(binding, "x_qry", x_qry, None, None)
        data_checks.same_tasks(x_spt, x_qry)
        if not self._serves(binding, x_spt, x_qry):
            raise ValueError("memory_estimate must have a fused model, got one on the general path (reference)")
        _, query_steps = self._queries(binding.like())
        problem = meta_problem(binding.text, x_spt, x_qry, self.inner_steps, self.first_order, True, query_steps)
        return problem.workspace_bytes(x_spt, len(x_spt))

    # -- calls ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x_spt: Tree,
        y_spt: Target,
        x_qry: Tree,
        y_qry: Target,
        *,
        task_weights: Tensor | None = None,
    ) -> MetaOutput:
        """The query loss after the inner loop, whose backward is the exact meta-gradient.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry, y_qry: query sets, [tasks, n_query, ...]. On the general path x is what the model takes, of each task
                by itself: integers, [tasks, samples], query samples of another shape than the support samples, or a
                pytree of tensors [tasks, ...] (and None), as y is for a loss of your own.
            task_weights: [tasks]; the loss is their sum of weight times task loss. None: the mean over tasks.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or labels that do not fit; no parameter is touched.
        """
        out, flat, inputs, places = self._meta_step(x_spt, y_spt, x_qry, y_qry, task_weights)
        if flat is not None:
            if places:
                out.loss = fast_path.attached(out.loss, flat, inputs, places)
            else:
                out.loss = torch.ops.maml_cuda.attach(out.loss, flat, inputs)
        return out

    def backward(
        self,
        x_spt: Tree,
        y_spt: Target,
        x_qry: Tree,
        y_qry: Target,
        *,
        task_weights: Tensor | None = None,
    ) -> MetaOutput:
        """A call and its `loss.backward()` in one: the exact meta-gradient is added to `.grad`, with the same bits.

        Where it can it does without autograd's engine, which takes half as long as a small network's meta-step. Hooks
        of parameters run; those of calls of this module and of autograd's own nodes do not. So under
        DistributedDataParallel, and where a GradScaler scales the loss, call the module and then `loss.backward()`.

        Args:
            x_spt, y_spt, x_qry, y_qry, task_weights: as of a call.

        Returns:
            As a call, with nothing left to differentiate.

        Raises:
            RuntimeError: gradients are off.
            ValueError, TypeError: as a call does; no `.grad` is touched.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("backward must have gradients on, got them off (no_grad or inference_mode)")
        out, flat, inputs, places = self._meta_step(x_spt, y_spt, x_qry, y_qry, task_weights)
        assert flat is not None  # the adapted parameters at least have a gradient
        if places and all(map(fast_path.only_adds, inputs)):
            fast_path.add_gradient(flat, inputs, places)
        else:
            torch.ops.maml_cuda.attach(out.loss, flat, inputs).backward()
        return out

    def adapt(
        self, x_spt: Tree, y_spt: Target, steps: int | None = None, *, differentiable: bool = False
    ) -> dict[str, Tensor]:
        """The parameters after the inner loop, name -> [tasks, *shape].

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            steps: None means inner_steps; beyond the given rates the last one repeats.
            differentiable: the result has a backward, of one Hessian-vector product a step (first_order: none);
                otherwise it is detached. Parameters that are not adapted are expanded views.
        """
        steps = self.inner_steps if steps is None else steps
        binding = self._able_to_take(steps)
        x_spt = self._read(binding, "x_spt", x_spt, "y_spt", y_spt)
        differentiable = differentiable and torch.is_grad_enabled()
        if not self._serves(binding, x_spt, None):
            adapted = fallback.adapt(
                self.model, self.loss, self._rates(), x_spt, y_spt, steps, self.first_order, differentiable
            )
            return self._fast(adapted, pytrees.tasks(x_spt), differentiable)
        self._look_at_labels(binding, x_spt, y_spt=y_spt)
        parameters, rates = binding.tensors()
        if differentiable:
            adapted, _ = torch.ops.maml_cuda.adapt(
                parameters, rates, x_spt, targets.tensors(y_spt), binding.text, steps, self.first_order
            )
        else:
            adapted, _ = torch.ops.maml_cuda.adapt_forward(
                parameters, rates, x_spt, targets.tensors(y_spt), binding.text, steps
            )
        return self._fast(dict(zip(binding.adapted, adapted, strict=True)), len(x_spt), differentiable)

    def inner_loop(self, x_spt: Tree, y_spt: Target, steps: int) -> Iterator[dict[str, Tensor]]:
        """The parameters after 0, 1, ..., `steps` inner steps, detached: each as adapt(steps=k) returns it, to the bit.
        The CPU's layers take no step twice; elsewhere each of these is adapted afresh.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            steps: from 0; beyond the given rates the last one repeats.
        """
        binding = self._able_to_take(steps)
        fast = self.adapt(x_spt, y_spt, 0)
        yield fast
        x = self._read(binding, "x_spt", x_spt, "y_spt", y_spt)
        for k in range(steps):
            if self._serves(binding, x, None) and binding.backend == "cpu":
                own = [t.detach() for t in binding.own(fast, len(x), k)]
                rates = [t.detach() for t in binding.rates_at(k)]
                after = torch.ops.maml_cuda.inner_step(own, rates, x, targets.tensors(y_spt), binding.step_text())
                fast = {**fast, **dict(zip(binding.adapted, after, strict=True))}
            else:
                fast = self.adapt(x_spt, y_spt, k + 1)
            yield fast

    def update_statistics(self, x_spt: Tree, y_spt: Tensor, x_qry: Tree) -> None:
        """One update of BatchNorm's running statistics; nothing else ever writes them.

        Towards the mean over tasks and passes of the batch means and unbiased variances, with each layer's momentum
        (None: the mean over all updates), by plain forward passes with batch statistics: of the support sets at phi_k
        and the query sets at phi_{k+1}, for each inner step k. They go to slot k of a per-step layer.

        Args:
            x_spt, y_spt: support sets, [tasks, n_support, ...].
            x_qry: query sets, [tasks, n_query, ...].

        Raises:
            ValueError: no BatchNorm layer tracks running statistics; and as a call does.
        """
        binding = self._binding()
        x_spt = self._read(binding, "x_spt", x_spt, "y_spt", y_spt)
        x_qry = self._read(binding, "x_qry", x_qry, None, None)
        data_checks.same_tasks(x_spt, x_qry)
        with self._collecting():
            fast = list(self.inner_loop(x_spt, y_spt, self.inner_steps))
            passes = [(0, fast[0], x_qry)] if self.inner_steps == 0 else []
            for k in range(self.inner_steps):
                passes += [(k, fast[k], x_spt), (k, fast[k + 1], x_qry)]
            norms.update_running(self.model, passes)

    # -- helpers ----------------------------------------------------------------------------------------------

    def _meta_step(
        self, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target, task_weights: Tensor | None
    ) -> tuple[MetaOutput, Tensor | None, list[Tensor], list[fast_path.Place] | None]:
        """What a call returns, as yet without a backward; where gradients are on, the flat meta-gradient and the
        tensors that it is of; and where nobody watches, their places in it."""
        binding = self._binding()
        if torch.is_autocast_enabled(binding.on):
            x_spt, x_qry = binding.in_its_dtype(x_spt), binding.in_its_dtype(x_qry)
        watched = bool(self._query_steps) or not binding.plain
        signature = None if watched else fast_path.signature(x_spt, y_spt, x_qry, y_qry)
        key = (signature, self.first_order)
        problem = binding.problems.get(key) if signature else None
        if problem is None:
            self._check_episode(binding, x_spt, y_spt, x_qry, y_qry)
        else:
            binding.why_not = ""
        if task_weights is not None:
            data_checks.task_weights(task_weights, pytrees.tasks(x_spt), binding.like())
        if problem is None and not self._serves(binding, x_spt, x_qry):
            loss, task_losses, predictions, support_losses, reached = fallback.meta_step(
                self.model, self.loss, self._rates(), list(self.parameters()), x_spt, y_spt, x_qry, y_qry,
                self.inner_steps, self.first_order, task_weights, self.query_weights,
            )  # fmt: skip
            flat = joined([g for _, g in reached]) if reached else None
            logits: Any = mean_of(predictions) if isinstance(self.loss, str) else predictions  # type: ignore[arg-type]
            return MetaOutput(loss, task_losses, logits, support_losses), flat, [t for t, _ in reached], None
        self._look_at_labels(binding, x_spt, y_spt=y_spt, y_qry=y_qry)
        parameters, rates = binding.tensors()
        gradient = torch.is_grad_enabled()
        places = None
        if problem is not None and all(map(fast_path.is_plain, rates)):
            data = x_spt, cast(Tensor, y_spt), x_qry, cast(Tensor, y_qry)
            loss, task_losses, logits, support_losses, flat = fast_path.meta_step(
                problem, parameters, rates, data, task_weights, self.inner_steps, gradient
            )
            places = binding.places
        else:
            weights, query_steps = self._queries(parameters[0])
            loss, task_losses, logits, support_losses, flat = torch.ops.maml_cuda.meta_gradient(
                parameters, rates, x_spt, targets.tensors(y_spt), x_qry, targets.tensors(y_qry), task_weights,
                binding.text, self.inner_steps, self.first_order, gradient, weights, query_steps,
            )  # fmt: skip
        if signature and problem is None:  # the next call of its kind has nothing to check: past the dispatcher
            binding.problems[key] = meta_problem(
                binding.text, x_spt, x_qry, self.inner_steps, self.first_order, gradient
            )
        out = MetaOutput(loss, task_losses, mean_of(binding.as_returned(logits)), support_losses)
        if not gradient:
            return out, None, [], None
        return out, flat, binding.with_gradient(parameters + rates), places

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        """Inside, BatchNorm layers normalise with batch statistics, whatever batch_norm says."""
        self._collects = True
        try:
            with norms.batch_statistics(self.model):
                yield
        finally:
            self._collects = False

    def _able_to_take(self, steps: int) -> Binding:
        checks.steps(steps, "steps")
        binding = self._binding()
        if steps and not binding.can_step:
            raise ValueError(f"inner_lr must hold a rate for {steps} steps, got one of shape [0]")
        return binding

    def _check_episode(self, binding: Binding, x_spt: Tree, y_spt: Target, x_qry: Tree, y_qry: Target) -> None:
        if self._query_steps and len(self._query_tensor) != self.inner_steps + 1:
            checks.query_weights(self._query_weights, self.inner_steps)
        self._read(binding, "x_spt", x_spt, "y_spt", y_spt)
        self._read(binding, "x_qry", x_qry, "y_qry", y_qry)
        data_checks.same_tasks(x_spt, x_qry)

    def _fast(self, adapted: Mapping[str, Tensor], tasks: int, differentiable: bool) -> dict[str, Tensor]:
        """Every parameter by name: the adapted ones, and expanded views of the others."""
        fast = {}
        for name, p in self.model.named_parameters():
            theta = p if differentiable else p.detach()
            fast[name] = adapted[name] if name in adapted else theta.unsqueeze(0).expand(tasks, *p.shape)
        return fast
