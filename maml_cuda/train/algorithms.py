"""The algorithms that a run can train. Each one takes meta-steps and predicts on new tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from maml_cuda.data import ImageBatches, ImageTasks, MetaBatch, SinusoidTasks
from maml_cuda.fused_maml import FusedMAML
from maml_cuda.train.devices import CPU
from maml_cuda.train.fixed_statistics import NORMS, with_fixed_statistics
from maml_cuda.train.jobs import make_maml, make_model, make_tasks, score, without_head
from maml_cuda.train.ranks import ALONE, Ranks
from maml_cuda.train.settings import Settings

FINAL_META_LR = 1e-5  # where the cosine schedule of MAML++ ends
LEAST_SHARE = 0.03  # MAML++: the least weight of the query loss of a step before the last, times 1 / steps


class Algorithm:
    """Base class. Between two meta-iterations, ``module`` and ``optimizer`` hold the whole state.

    Attributes:
        module: everything that is learned, by name.
        optimizer: the optimizer of the meta-parameters; None if nothing is learned.
        steps: the numbers of adaptation steps after which the algorithm can be tested.
        backend: the backend that runs: "cpu", "cuda", "reference" or "autograd".
        ranks: the processes that train together.
    """

    settings: Settings

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    steps: Sequence[int] = range(11)
    backend: str = "autograd"
    ranks: Ranks = ALONE

    def sampler(self, tasks: ImageTasks | SinusoidTasks) -> Any:
        """The object whose ``sample`` draws the batches for ``step``: ``tasks``, or an object made from them."""
        return tasks

    def step(self, batch: Any, iteration: int) -> Tensor:
        """One meta-iteration.

        Args:
            batch: a draw of the sampler; of several processes, each has its part.
            iteration: the number of the iteration, from 1.

        Returns:
            The loss and the score of the whole batch, ``[2]``, detached.
        """
        assert self.optimizer is not None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in parameters:  # zero_grad() would take 5 % of an iteration of the sinusoid
            p.grad = None
        measured = torch.stack(self._gradients(batch, iteration))
        if self.ranks.count > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            self.ranks.average([*gradients, measured], self.settings.meta_batch)
        self.optimizer.step()
        return measured

    def _gradients(self, batch: Any, iteration: int) -> tuple[Tensor, Tensor]:
        """Leaves the gradients of ``batch`` in ``.grad``. Returns its loss and its score, 0-d and detached."""
        raise NotImplementedError

    def predict(self, batch: MetaBatch, steps: int) -> Tensor:
        """Predictions on the query sets ``[tasks, n_qry, ...]`` after ``steps`` steps on the support sets."""
        raise NotImplementedError

    def predictions(self, batch: MetaBatch, steps: Sequence[int]) -> Iterator[Tensor]:
        """The predictions after each number of ``steps``, which are in ascending order."""
        return (self.predict(batch, count) for count in steps)


class Adapting(Algorithm):
    """Base class of the algorithms with an inner loop, which adapts the net of ``maml`` to each support set.

    Attributes:
        maml: the net and its inner loop.
        support_statistics: BatchNorm normalises queries by the statistics of the support set (``fixed_statistics``).
    """

    maml: FusedMAML
    support_statistics = False

    @property
    def backend(self) -> str:  # type: ignore[override]
        return self.maml.backend

    def predict(self, batch: MetaBatch, steps: int) -> Tensor:
        return self._on_queries(self.maml.adapt(batch.x_spt, batch.y_spt, steps=steps), batch, steps)

    def predictions(self, batch: MetaBatch, steps: Sequence[int]) -> Iterator[Tensor]:
        for count, fast in enumerate(self.maml.inner_loop(batch.x_spt, batch.y_spt, max(steps))):
            if count in steps:
                yield self._on_queries(fast, batch, count)

    def _on_queries(self, fast: dict[str, Tensor], batch: MetaBatch, steps: int) -> Tensor:
        slot = max(steps - 1, 0)
        if self.support_statistics:
            nets = (self.adapted_net(fast, slot, batch.x_spt, task) for task in range(len(batch.x_qry)))
            return torch.stack([net(x) for net, x in zip(nets, batch.x_qry, strict=True)])
        prediction: Tensor = self.maml.predict(fast, batch.x_qry, slot=slot)
        return prediction

    def adapted_net(self, fast: dict[str, Tensor], slot: int, x_spt: Tensor | None, task: int = 0) -> nn.Module:
        """The net of a task by itself, with the statistics of its support set, or (None) with running statistics."""
        of_task = {name: p[task] for name, p in fast.items()}
        return with_fixed_statistics(self.maml.model, of_task, slot, None if x_spt is None else x_spt[task])


class Maml(Adapting):
    """MAML (Finn et al. 2017), and the algorithms that it becomes by its settings.

    These are FOMAML, ANIL, Meta-SGD and MAML++. Without inner steps in training it is a baseline that is trained on all
    tasks at once; with no iterations it is the random baseline.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.module = self.maml = make_maml(settings).to(device)
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=settings.meta_lr, fused=True)
        if settings.told:  # the input identifies the task, so the network is not adapted
            self.steps = (0,)

    def _gradients(self, batch: MetaBatch, iteration: int) -> tuple[Tensor, Tensor]:
        settings = self.settings
        self.maml.first_order = settings.first_order or iteration <= settings.first_order_iterations
        if settings.multi_step_iterations:
            self.maml.query_weights = multi_step_weights(settings, iteration)
        out = self.maml.backward(*batch)
        return out.loss, score(settings.job, out.logits, batch.y_qry).mean()

    def use_running_statistics(self, batches: Iterable[MetaBatch]) -> None:
        """Makes BatchNorm use running statistics, so that each query is classified independently of the others.

        The statistics are means over the inner loops of ``batches``. Per-step BatchNorm has statistics for each inner
        step.

        Raises:
            ValueError: the network has no BatchNorm layers.
        """
        norms = [m for m in self.maml.model.modules() if isinstance(m, NORMS)]
        if not norms:
            raise ValueError("running statistics need a net with BatchNorm layers, got none")
        for norm in norms:
            assert norm.weight is not None
            norm.running_mean, norm.running_var = torch.zeros_like(norm.weight), torch.ones_like(norm.weight)
            norm.num_batches_tracked = norm.weight.new_zeros(norm.weight.shape[:-1], dtype=torch.int64)
            norm.track_running_stats, norm.momentum = True, None  # the mean over all batches
        for batch in batches:
            self.maml.update_statistics(batch.x_spt, batch.y_spt, batch.x_qry)
        self.maml.batch_norm = "running"
        self.maml.train(self.maml.training)


class Reptile(Adapting):
    """Reptile (Nichol et al. 2018), batched: ``theta += eps * mean over tasks of (phi_K - theta)``.

    The inner loop is SGD on minibatches of a task's support and query samples together; the authors use Adam with beta1
    = 0. The outer step is SGD with rate eps along ``theta - mean(phi_K)``. In tests, ``adapt`` steps on the support
    set.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.module = self.maml = make_maml(settings).to(device)
        self.optimizer = torch.optim.SGD(self.maml.parameters(), lr=settings.meta_lr)

    def _gradients(self, batch: MetaBatch, iteration: int) -> tuple[Tensor, Tensor]:
        settings, maml = self.settings, self.maml
        x, y = torch.cat([batch.x_spt, batch.x_qry], 1), torch.cat([batch.y_spt, batch.y_qry], 1)
        fast = maml.adapt(batch.x_spt, batch.y_spt, steps=0)
        losses = []
        for rows in self._minibatches(x, iteration):
            loss, gradients = maml.loss_and_grad(fast, *(_gather_rows(part, rows) for part in (x, y)))
            fast |= {name: fast[name] - settings.inner_lr * gradient for name, gradient in gradients.items()}
            losses.append(loss.mean())
        for name, theta in maml.model.named_parameters():
            theta.grad = theta.detach() - fast[name].mean(0)
        # The inner steps have seen all samples of a task, so this is a score on training samples.
        after = maml.predict(fast, batch.x_spt)
        return torch.stack(losses).mean(), score(settings.job, after, batch.y_spt).mean()

    def _minibatches(self, x: Tensor, iteration: int) -> Sequence[Tensor]:
        """The rows of the samples of each inner step, ``[tasks, inner_batch]``.

        Each task passes through its own samples in random order. The order depends on the seed and the iteration only.
        """
        steps, samples = self.settings.inner_steps, x.shape[1]
        size = self.settings.inner_batch or samples
        generator = Generator().manual_seed(self.settings.seed << 32 | iteration)
        passes = math.ceil(steps * size / samples)
        keys = torch.rand(self.settings.meta_batch, passes, samples, generator=generator)
        order = keys[self.ranks.part(len(keys))].argsort(-1).flatten(1).to(x.device)
        batches: Sequence[Tensor] = order[:, : steps * size].split(size, 1)
        return batches


class Metric(Algorithm):
    """Networks that compare the features of queries and support samples. They have no inner loop.

    BatchNorm uses the statistics of a task's support and query samples together.
    """

    steps = (0,)
    logits: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.module = without_head(make_model(settings)).to(device)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=settings.meta_lr, fused=True)

    def _gradients(self, batch: MetaBatch, iteration: int) -> tuple[Tensor, Tensor]:
        logits = self.predict(batch, 0)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.y_qry.flatten())
        loss.backward()
        return loss.detach(), score(self.settings.job, logits.detach(), batch.y_qry).mean()

    def predict(self, batch: MetaBatch, steps: int) -> Tensor:
        return torch.stack([self._of_task(*task) for task in zip(*batch[:3], strict=True)])

    def _of_task(self, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor) -> Tensor:
        features = self.module(torch.cat([x_spt, x_qry])).flatten(1)
        return type(self).logits(features[: len(x_spt)], y_spt, features[len(x_spt) :])


class ProtoNet(Metric):
    """Prototypical networks (Snell et al. 2017): the class whose mean support feature is nearest."""

    @staticmethod
    def logits(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Negative squared distances between queries and the mean features of the classes.

        Args:
            support: features ``[n_spt, d]``.
            labels: int64 ``[n_spt]``.
            query: features ``[n_qry, d]``.

        Returns:
            ``[n_qry, ways]``.
        """
        one_hot = F.one_hot(labels).to(support.dtype)
        prototypes = one_hot.T @ support / one_hot.sum(0).unsqueeze(1)
        return -(query.unsqueeze(1) - prototypes).square().sum(-1)


class MatchingNet(Metric):
    """Matching networks (Vinyals et al. 2016) without full-context embeddings: attention over the support samples."""

    @staticmethod
    def logits(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logarithm of the attention on each class: ``softmax(cosine(query, support))``, summed over the support
        samples of a class.

        Shapes are those of ``ProtoNet.logits``.
        """
        attention = (F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).T).softmax(-1)
        return (attention @ F.one_hot(labels).to(support.dtype)).log()


class Pretrained(Adapting):
    """The fine-tuning baseline.

    A classifier of all training classes is trained. On a task, its last layer is replaced by a new one, initialised to
    zero, and all parameters take gradient steps on the support set.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.maml = make_maml(settings).to(device)
        model = self.maml.model
        assert isinstance(model, nn.Sequential)
        head = model[-1]
        assert isinstance(head, nn.Linear)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            classifier = nn.Linear(head.in_features, self.sampler(make_tasks(settings, "train")).classes)
        classifier.to(device)
        self.net = nn.Sequential(without_head(model), classifier)
        self.module = nn.ModuleDict({"maml": self.maml, "classifier": classifier})
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=settings.meta_lr, fused=True)

    def sampler(self, tasks: ImageTasks | SinusoidTasks) -> ImageBatches:
        assert isinstance(tasks, ImageTasks)
        return ImageBatches(tasks)

    def _gradients(self, batch: tuple[Tensor, Tensor], iteration: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss.detach(), score(self.settings.job, logits.detach(), y)


class NearestPixel(Algorithm):
    """Predicts the class of the support image with the nearest pixels (Euclidean distance). Nothing is learned."""

    steps = (0,)

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.module = nn.Module()

    def predict(self, batch: MetaBatch, steps: int) -> Tensor:
        distances = torch.cdist(batch.x_qry.flatten(2), batch.x_spt.flatten(2))  # [tasks, n_qry, n_spt]
        ways = int(batch.y_spt.max()) + 1
        of_class = F.one_hot(batch.y_spt, ways).bool().unsqueeze(1)  # [tasks, 1, n_spt, ways]
        return -distances.unsqueeze(-1).masked_fill(~of_class, math.inf).amin(2)


ALGORITHMS: dict[str, Callable[[Settings, torch.device], Algorithm]] = {
    "maml": Maml,
    "reptile": Reptile,
    "protonet": ProtoNet,
    "matching": MatchingNet,
    "pretrained": Pretrained,
    "nearest-pixel": NearestPixel,
}


def make_algorithm(settings: Settings, device: torch.device = CPU) -> Algorithm:
    """A new algorithm on a device, initialised from the seed of ``settings``."""
    return ALGORITHMS[settings.algorithm](settings, device)


def multi_step_weights(settings: Settings, iteration: int) -> Tensor | None:
    """Weights of the query loss after each inner step (Antoniou et al. 2019, the authors' code).

    At first the weights of phi_1 to phi_K are equal. Those before the last fall linearly, to 3 % of that at least, and
    the last one grows by the same amount. phi_0 has weight 0.

    Returns:
        ``[inner_steps + 1]``, which sums to 1; None after ``multi_step_iterations``, when only the last step counts.
    """
    if iteration > settings.multi_step_iterations:
        return None
    steps = settings.inner_steps
    share = max(1 - (iteration - 1) / settings.multi_step_iterations, LEAST_SHARE) / steps
    return torch.tensor([0.0] + [share] * (steps - 1) + [1 - (steps - 1) * share])


def meta_lr(settings: Settings, iteration: int) -> float:
    """The outer learning rate of an iteration, counted from 1."""
    done = (iteration - 1) / settings.iterations
    if settings.meta_schedule == "cosine":
        return FINAL_META_LR + (settings.meta_lr - FINAL_META_LR) * (1 + math.cos(math.pi * done)) / 2
    if settings.meta_schedule == "linear":
        return settings.meta_lr * (1 - done)
    return settings.meta_lr


def _gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``rows[t, i]`` of ``x[t]``: ``[tasks, rows, ...]``."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), rows]
