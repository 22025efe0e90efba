"""The settings of the supervised jobs of ``maml-cuda train``: their names, allowed values and defaults. Does not import
torch.

All jobs but the sinusoid classify images: the glyphs of this package, or data sets that the user has.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from maml_cuda.rl.own_jobs import registered
from maml_cuda.rl.settings import RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.hints import did_you_mean, sibling_folders

SHIPPED = ("glyphs", "sinusoid")  # jobs whose tasks are part of the package; the others need a folder
# The allowed values of settings that are words.
CHOICES = {
    "algorithm": ("maml", "reptile", "protonet", "matching", "pretrained", "nearest-pixel"),
    "adapted": ("all", "no-norm", "head"),
    "learn_inner_lr": ("", "step", "layer", "element"),
    "batch_norm": ("transductive", "per_step"),
    "net": ("conv4", "mlp"),
    "meta_schedule": ("constant", "cosine", "linear"),
    "backend": ("auto", "fused", "reference"),
}
# Integers that may be 0; the others are at least 1.
MAY_BE_0 = (
    "seed", "inner_steps", "iterations", "train_ways", "inner_batch", "multi_step_iterations", "first_order_iterations",
    "image_size",
)  # fmt: skip
# Settings that only a folder of your own images uses.
FOLDER_ONLY = ("image_size", "background", "split")
OMNIGLOT_SPLITS = ("authors", "alphabets")  # data.images.omniglot
WITHOUT_INNER_LOOP = ("protonet", "matching", "nearest-pixel")  # algorithms that take any number of classes
CHARACTERS = ("glyphs", "omniglot")  # jobs of light ink on a dark ground
# Settings that only the meta-step of MAML uses.
MAML_ONLY = (
    "learn_inner_lr",
    "adapted",
    "batch_norm",
    "first_order",
    "first_order_iterations",
    "multi_step_iterations",
)


@dataclass(frozen=True)
class Settings:
    """All settings of a run. They decide its numbers and are stored in every checkpoint.

    Raises:
        ValueError: a setting is out of range, or two settings contradict each other.
    """

    job: str
    # the tasks
    ways: int  # classes per task; 1 for the sinusoid
    shots: int  # support samples per class
    queries: int  # query samples per class
    # the inner loop
    inner_lr: float
    inner_steps: int
    # meta-training
    iterations: int
    meta_batch: int
    meta_lr: float
    width: int  # filters of a convolution, hidden units of the sinusoid's MLP
    # validation and test
    validation_interval: int
    validation_tasks: int
    test_shots: int
    test_queries: int
    test_steps: int
    log_interval: int
    test_tasks: int = 600
    rotations: int = 1  # each training class becomes this many classes, rotated by quarter turns
    # the algorithm
    preset: str = "maml"  # the preset (presets.py) whose settings these are, except for those given by the user
    algorithm: str = "maml"  # a class of algorithms.py
    net: str = "conv4"  # for images: convolutions, or the paper's fully connected net (models.py)
    adapted: str = "all"  # parameters that the inner loop adapts: all, all but BatchNorm's, or those of the last layer
    learn_inner_lr: str = ""  # one learned rate per step, per layer and step, or per element
    first_order: bool = False
    first_order_iterations: int = 0  # the number of first-order iterations at the start
    multi_step_iterations: int = 0  # the number of iterations at the start that use the query loss after every step
    batch_norm: str = "transductive"
    meta_schedule: str = "constant"  # schedule of meta_lr over the iterations
    best_checkpoints: int = 1  # best checkpoints to keep; several are an ensemble in the final test
    train_ways: int = 0  # classes per training task; 0: ``ways``
    inner_batch: int = 0  # Reptile: samples per inner step; 0: all samples of the task
    told: bool = False  # sinusoid: the input includes amplitude and phase (the oracle)
    seed: int = 0
    backend: str = "auto"
    data: str = ""  # the folder of the data set
    data_sha256: str = ""  # checksum of its files, which identifies the images wherever the folder is
    cache: str = ""  # the folder of the converted images; empty: ``data``
    # your own images: data.images.folder
    image_size: int = 0  # height and width in pixels; 0: those of the files
    background: str = "white"  # the colour behind transparent images
    # classes of TRAIN/VALIDATION/TEST; empty: the folders of the splits, or fixed shares. omniglot: authors, alphabets
    split: str = ""
    image_shape: str = ""  # channels, height and width of every image of the data set, as "3 x 84 x 84"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name != "seed" and value < (least := int(field.name not in MAY_BE_0)):
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                words = ", ".join(word or "nothing" for word in CHOICES[field.name])
                raise ValueError(f"{field.name} must be one of {words}, got {value!r}")
            if field.type is float and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive number, got {value}")
        if self.inner_steps < 1 and (self.learn_inner_lr or self.multi_step_iterations):
            raise ValueError(f"inner_steps must be at least 1, got {self.inner_steps}")
        if self.test_steps > 10:
            raise ValueError(f"test_steps must be 1 to 10, got {self.test_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to 2**32 - 1, got {self.seed}")
        for name in ("ways", "rotations"):
            if self.job == "sinusoid" and getattr(self, name) != 1:
                raise ValueError(f"{name} must be 1 for the sinusoid, which has no classes, got {getattr(self, name)}")
        for name in () if self.algorithm == "maml" else MAML_ONLY:
            if getattr(self, name) != type(self).__dict__[name]:
                raise ValueError(f"{name} must be left out for {self.algorithm}, got {getattr(self, name)}")
        if self.batch_norm == "per_step" and self.adapted == "all":
            raise ValueError(
                "adapted must be no-norm or head if batch_norm is per_step, whose parameters are not adapted, got all"
            )
        if self.adapted == "no-norm" and self.job == "sinusoid":
            raise ValueError("adapted must be all or head for the sinusoid, whose net has no BatchNorm, got no-norm")
        if self.told and self.job != "sinusoid":
            raise ValueError(f"told must be left out for {self.job}, whose tasks have no amplitude and phase")
        if self.train_ways not in (0, self.ways) and self.algorithm not in ("protonet", "matching"):
            raise ValueError(f"train_ways must equal ways, {self.ways}, for {self.algorithm}, got {self.train_ways}")
        if self.algorithm == "nearest-pixel" and self.iterations:
            raise ValueError(f"iterations must be 0 for nearest-pixel, which learns nothing, got {self.iterations}")
        if self.preset in ("pretrained", "oracle") and self.job == "sinusoid" and self.inner_steps:
            raise ValueError(
                f"inner_steps must be 0 for {self.preset}, which is trained without inner steps, got {self.inner_steps}"
            )
        if self.preset == "random" and self.iterations:
            raise ValueError(f"iterations must be 0 for random, an untrained net, got {self.iterations}")
        if self.data and self.job in SHIPPED:
            raise ValueError(f"data must be left out for {self.job}, which needs none, got {self.data}")
        if self.cache and self.job in SHIPPED:
            raise ValueError(f"cache must be left out for {self.job}, which needs no data, got {self.cache}")
        if self.data_sha256 and self.job in SHIPPED:
            raise ValueError(
                f"data_sha256 must be left out for {self.job}, which needs no data, got {self.data_sha256}"
            )
        if self.job == "omniglot" and self.split not in ("", *OMNIGLOT_SPLITS):  # empty in runs of earlier versions
            raise ValueError(f"split must be one of {', '.join(OMNIGLOT_SPLITS)} for omniglot, got {self.split!r}")
        if self.net != "conv4" and self.job == "sinusoid":
            raise ValueError(f"net must be left out for the sinusoid, whose net is an MLP of its own, got {self.net}")
        for name in () if self.job == "folder" else FOLDER_ONLY:
            if name == "split" and self.job == "omniglot":
                continue
            if getattr(self, name) != type(self).__dict__[name]:
                raise ValueError(
                    f"{name} must be left out for {self.job}, which is not a folder of your own images, "
                    f"got {getattr(self, name)}"
                )
        if self.test_tasks < 2:
            raise ValueError(f"test_tasks must be at least 2 for a confidence interval, got {self.test_tasks}")


# The inner rate applies to the mean cross-entropy. The paper's 0.4 applies to a sum over 5 classes, which is 2.0 here.
GLYPHS = Settings(
    job="glyphs",
    ways=5,
    shots=1,
    queries=5,
    inner_lr=0.4,
    inner_steps=1,
    iterations=3000,
    meta_batch=16,
    meta_lr=1e-3,
    width=32,
    validation_interval=50,
    validation_tasks=200,
    test_shots=1,
    test_queries=10,
    test_steps=3,
    log_interval=10,
    rotations=4,
)
# Finn et al. 2017, section 5.1 and the 5-shot column of table 2 in appendix C: trained with the shots of the test.
SINUSOID = Settings(
    job="sinusoid",
    ways=1,
    shots=5,
    queries=10,
    inner_lr=0.01,
    inner_steps=1,
    iterations=70_000,
    meta_batch=25,
    meta_lr=1e-3,
    width=40,
    validation_interval=2000,
    validation_tasks=600,
    test_shots=5,
    test_queries=100,
    test_steps=10,
    log_interval=500,
)
# Finn et al. 2017, section 5.2 and appendix A.1, 5-way 1-shot. The authors' loss is N times the mean cross-entropy: it
# divides by the shots only, and TensorFlow sums over the N classes. Losses are means here, so their inner rates are
# multiplied by N: 0.4 for 5-way Omniglot is 2.0 (0.1 for 20-way is 2.0 too), 0.01 for 5-way mini-ImageNet is 0.05. Test
# tasks have 15 queries per class; the authors' have as many queries as support samples.
OMNIGLOT = Settings(
    job="omniglot",
    ways=5,
    shots=1,
    queries=1,
    inner_lr=2.0,
    inner_steps=1,
    iterations=60_000,
    meta_batch=32,
    meta_lr=1e-3,
    width=64,
    validation_interval=500,
    validation_tasks=200,
    test_shots=1,
    test_queries=15,
    test_steps=3,
    log_interval=100,
    rotations=4,
    split="authors",
)
MINI_IMAGENET = Settings(
    job="mini-imagenet",
    ways=5,
    shots=1,
    queries=15,
    inner_lr=0.05,
    inner_steps=5,
    iterations=60_000,
    meta_batch=4,
    meta_lr=1e-3,
    width=32,
    validation_interval=500,
    validation_tasks=100,
    test_shots=1,
    test_queries=15,
    test_steps=10,
    log_interval=100,
)
FOLDER = replace(MINI_IMAGENET, job="folder", queries=5, test_queries=5, iterations=10_000)
JOBS = {
    "glyphs": GLYPHS,
    "sinusoid": SINUSOID,
    "omniglot": OMNIGLOT,
    "mini-imagenet": MINI_IMAGENET,
    "cifar-fs": replace(MINI_IMAGENET, job="cifar-fs"),
    "fc100": replace(MINI_IMAGENET, job="fc100"),
    "tiered-imagenet": replace(MINI_IMAGENET, job="tiered-imagenet"),
    "folder": FOLDER,
}


def is_classification(job: str) -> bool:
    """Whether a job classifies images and is scored by accuracy. Otherwise it is regression, scored by the mean squared
    error.
    """
    return job != "sinusoid"


def metric_name(job: str) -> str:
    """The name of a job's metric."""
    return "accuracy" if is_classification(job) else "MSE"


def named_settings(job: str, preset: str, **given: Any) -> Settings:
    """The settings of a job, overridden by those of a preset, overridden by ``given``.

    If ``shots`` is given for images, it is also the default of ``test_shots``.

    Raises:
        ValueError: there is no such job or preset, or a setting is invalid.
    """
    if job not in JOBS:
        raise unknown_job(job)
    if is_classification(job) and "shots" in given:
        given.setdefault("test_shots", given["shots"])
    ways, shots = (given.get(name, getattr(JOBS[job], name)) for name in ("ways", "shots"))
    return replace(JOBS[job], preset=preset, **presets.preset_settings(job, preset, ways, shots) | given)


def unknown_job(job: str) -> ValueError:
    """The error for a job that does not exist, with suggestions."""
    jobs = [*JOBS, *RL_JOBS, *registered()]
    return ValueError(
        f"job must be one of {', '.join(jobs)}, FILE.py:NAME of your own environment, or a folder of class folders, "
        f"got {job!r}"
        f"{did_you_mean(job, [*jobs, *sibling_folders(Path(job))])}"
    )
