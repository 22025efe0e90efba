"""Classifies pictures by a trained net that is given a few pictures of each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maml_cuda.data import MetaBatch
from maml_cuda.data.pictures import SupportSet
from maml_cuda.train.algorithms import Adapting, Algorithm
from maml_cuda.train.devices import CPU
from maml_cuda.train.exported import ClassProbabilities
from maml_cuda.train.report import has_batch_norm, load_run, normalise_by
from maml_cuda.train.settings import WITHOUT_INNER_LOOP, Settings

MOST_PIXELS = 2**22  # of pictures that a net with fixed statistics classifies at a time; bounds memory

ROUNDING = 1e-4  # of a probability, between fused layers and torch's


@dataclass(frozen=True)
class Classifier:
    """The algorithm of a run, ready to classify pictures.

    Attributes:
        algorithm: at a checkpoint.
        iteration: the meta-iteration of the checkpoint.
        steps: adaptation steps.
        statistics: by which BatchNorm normalises queries, see ``report.normalise_by``.
        device: of the algorithm.
    """

    algorithm: Algorithm
    iteration: int
    steps: int
    statistics: str
    device: torch.device

    @property
    def together(self) -> bool:
        """Whether a prediction depends on the other queries."""
        return self.statistics == "transductive" and has_batch_norm(self.algorithm)

    @property
    def adapts(self) -> bool:
        """Whether the algorithm has an inner loop."""
        return isinstance(self.algorithm, Adapting)

    def probabilities(self, support: SupportSet, x: Tensor) -> Tensor:
        """The probability of each class of ``support``.

        Args:
            support: a few pictures of each class.
            x: ``[pictures, channels, height, width]``.

        Returns:
            ``[pictures, classes]``, on the CPU. A net of more outputs than there are classes uses the first ones.

        Raises:
            ValueError: one picture would be normalised by itself alone, which tells nothing of its class.
        """
        if self.together and self.adapts and len(x) == 1:
            raise ValueError(
                "query must be at least 2 pictures if BatchNorm normalises them by their own statistics, got 1; "
                "--batch-norm support classifies each picture by itself"
            )
        at_once = len(x) if self.together else max(1, MOST_PIXELS // x[0].numel())
        known = support.x[None].to(self.device), support.y[None].to(self.device)
        parts = []
        for part in x.split(at_once):
            batch = MetaBatch(*known, part[None].to(self.device), known[1].new_zeros(1, len(part)))
            logits = self.algorithm.predict(batch, self.steps)[0, :, : len(support.classes)].detach().cpu()
            if self.algorithm.settings.algorithm == "nearest-pixel":  # its logits are distances
                parts.append(F.one_hot(logits.argmax(-1), logits.shape[-1]).float())
            else:
                parts.append(logits.softmax(-1))
        return torch.cat(parts)

    def program(self, support: SupportSet) -> nn.Module:
        """The net adapted to ``support``, with fixed statistics: from pictures to the probabilities of the classes.

        It is in eval mode, on the CPU.

        Raises:
            ValueError: its probabilities of the support set are not those that FusedMAML gives.
        """
        assert isinstance(self.algorithm, Adapting)
        maml, slot = self.algorithm.maml, max(self.steps - 1, 0)
        x = support.x[None].to(self.device)
        fast = maml.adapt(x, support.y[None].to(self.device), self.steps)
        net = self.algorithm.adapted_net(fast, slot, x if self.statistics == "support" else None)
        program = ClassProbabilities(net.cpu(), len(support.classes)).eval()
        expected = maml.predict(fast, x, slot=slot)[0, :, : len(support.classes)].softmax(-1).cpu()
        difference = float((program(support.x) - expected).abs().max())
        if not difference <= ROUNDING:
            raise ValueError(f"the net must give FusedMAML's probabilities, got a difference of {difference:.2g}")
        return program


def open_classifier(
    run: Path,
    settings: Settings,
    checkpoint: str = "best",
    steps: int | None = None,
    statistics: str = "transductive",
    device: torch.device = CPU,
    backend: str | None = None,
) -> Classifier:
    """Loads the algorithm of a run to classify pictures.

    Args:
        run: the folder of the run.
        settings: those of the run, with the place of its data.
        checkpoint: "best" or "last".
        steps: adaptation steps; None: as many as the run reports its score after.
        statistics: see ``report.normalise_by``.
        device: of the net.
        backend: of FusedMAML; None: that of the run.

    Raises:
        ValueError: the algorithm does not adapt by steps, or has no such statistics.
        MissingCheckpoint, DamagedCheckpoint: see ``report.load_run``.
    """
    fixed = settings.algorithm in WITHOUT_INNER_LOOP
    if steps is not None and (fixed or steps < 0):
        expected = f"left out for {settings.algorithm}, which has no inner loop" if fixed else "at least 0"
        raise ValueError(f"steps must be {expected}, got {steps}")
    given = {"data": settings.data, "cache": settings.cache} | ({"backend": backend} if backend else {})
    algorithm, info = load_run(run, checkpoint, device, **given)
    normalise_by(statistics, algorithm, settings, device)
    adapted = 0 if fixed else settings.test_steps if steps is None else steps
    return Classifier(algorithm, info["iteration"], adapted, statistics, device)


def check_classes(settings: Settings, classes: Sequence[str]) -> None:
    """Raises ValueError if the net of a run cannot tell so many classes apart."""
    if len(classes) < 2:
        raise ValueError(f"support must hold at least 2 classes, a folder each, got {len(classes)}: {classes[0]}")
    if settings.algorithm not in WITHOUT_INNER_LOOP and len(classes) > settings.ways:
        raise ValueError(
            f"support must hold at most {settings.ways} classes for this net of {settings.ways}-way tasks, whose last "
            f"layer has as many outputs, got {len(classes)}; nets of protonet and matching take any number"
        )


def proportion(right: int, of: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927)."""
    z, share = 1.96, right / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)
