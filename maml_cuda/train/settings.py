"""The settings of ``maml-cuda train``'s supervised jobs: what each may say, and its defaults. Nothing here needs torch.

All but the sinusoid classify images: the glyphs that ship with the package, and data sets that the user has.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from maml_cuda.rl.settings import RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.hints import did_you_mean, sibling_folders

SHIPPED = ("glyphs", "sinusoid")  # the jobs whose tasks come with the package; the others need a folder
# What a setting that is a word may say.
CHOICES = {
    "algorithm": ("maml", "reptile", "protonet", "matching", "pretrained", "nearest-pixel"),
    "adapted": ("all", "no-norm", "head"),
    "learn_inner_lr": ("", "step", "layer", "element"),
    "batch_norm": ("transductive", "per_step"),
    "meta_schedule": ("constant", "cosine", "linear"),
    "backend": ("auto", "fused", "reference"),
}
# Whole numbers of which there may be none.
MAY_BE_0 = (
    "seed", "inner_steps", "iterations", "train_ways", "inner_batch", "multi_step_iterations", "first_order_iterations",
    "image_size",
)  # fmt: skip
# What only a folder of one's own images heeds.
FOLDER_ONLY = ("image_size", "background", "split")
# What only MAML's own meta-step heeds.
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
    """Everything that decides the numbers of a run; it is stored with every checkpoint."""

    job: str
    # the tasks
    ways: int  # classes a task; 1 for the sinusoid
    shots: int  # support samples a class
    queries: int  # query samples a class
    # the inner loop
    inner_lr: float
    inner_steps: int
    # meta-training
    iterations: int
    meta_batch: int
    meta_lr: float
    width: int  # filters of a convolution, hidden units of the MLP
    # validation and test
    validation_interval: int
    validation_tasks: int
    test_shots: int
    test_queries: int
    test_steps: int
    log_interval: int
    test_tasks: int = 600
    rotations: int = 1  # quarter turns of each training class that are classes of their own
    # the algorithm
    preset: str = "maml"  # whose settings these are (presets.py), but for those that were given
    algorithm: str = "maml"  # algorithms.py
    adapted: str = "all"  # what the inner loop changes: all, all but BatchNorm's affine maps, the last layer
    learn_inner_lr: str = ""  # one rate a step, a layer and step, or an element of each parameter
    first_order: bool = False
    first_order_iterations: int = 0  # so many are first order, before the others are second order
    multi_step_iterations: int = 0  # so many take the query loss after every step, the last one ever more
    batch_norm: str = "transductive"
    meta_schedule: str = "constant"  # of meta_lr, over the iterations
    best_checkpoints: int = 1  # that are kept, and vote where there are several
    train_ways: int = 0  # classes of a training task where they are not ``ways``
    inner_batch: int = 0  # Reptile: samples of an inner step; 0: all of the task
    told: bool = False  # sinusoid: the net is given the amplitude and the phase of a curve
    seed: int = 0
    backend: str = "auto"
    data: str = ""  # the folder of a data set that does not ship with the package
    data_sha256: str = ""  # of its files: the same images, wherever the folder is
    cache: str = ""  # the folder of its converted images, where that is another one
    # your own images: data.images.folder
    image_size: int = 0  # height and width; 0: as they are
    background: str = "white"  # what shows through transparent images
    split: str = ""  # numbers of classes, TRAIN/VALIDATION/TEST; where there are none, those of its folders, or shares
    image_shape: str = ""  # of every image of the data set, as "3 x 84 x 84": channels, height, width

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
            raise ValueError("adapted must be no-norm or head with per_step BatchNorm, which no inner step changes")
        if self.adapted == "no-norm" and self.job == "sinusoid":
            raise ValueError("adapted must be all or head for the sinusoid, whose net has no BatchNorm, got no-norm")
        if self.told and self.job != "sinusoid":
            raise ValueError(f"told must be left out for {self.job}, whose tasks have no amplitude and phase")
        if self.train_ways not in (0, self.ways) and self.algorithm not in ("protonet", "matching"):
            raise ValueError(f"train_ways must be ways, {self.ways}, for {self.algorithm}, got {self.train_ways}")
        if self.algorithm == "nearest-pixel" and self.iterations:
            raise ValueError(f"iterations must be 0 for nearest-pixel, which learns nothing, got {self.iterations}")
        if self.preset in ("pretrained", "oracle") and self.job == "sinusoid" and self.inner_steps:
            raise ValueError(f"inner_steps must be 0 for {self.preset}, trained without them, got {self.inner_steps}")
        if self.preset == "random" and self.iterations:
            raise ValueError(f"iterations must be 0 for random, an untrained net, got {self.iterations}")
        if self.data and self.job in SHIPPED:
            raise ValueError(f"data must be left out for {self.job}, which needs none, got {self.data}")
        if self.cache and self.job in SHIPPED:
            raise ValueError(f"cache must be left out for {self.job}, which needs no data, got {self.cache}")
        for name in () if self.job == "folder" else FOLDER_ONLY:
            if getattr(self, name) != type(self).__dict__[name]:
                raise ValueError(
                    f"{name} must be left out for {self.job}, it is for a folder of your own images, "
                    f"got {getattr(self, name)}"
                )
        if self.test_tasks < 2:
            raise ValueError(f"test_tasks must be at least 2 for a confidence interval, got {self.test_tasks}")


# Held-out scripts, the rate on the mean cross-entropy (the paper's 0.4 is on the sum, 2.0 in our convention).
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
# The paper's section 5.1, for its 5-shot table 2 of appendix C: trained with the shots that it is tested with.
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
# The paper's section 5.2 and appendix A.1, 5-way 1-shot. Its inner rates step on N times the mean cross-entropy: the
# authors' loss divides by the shots alone, and TensorFlow sums what is left over the N classes. Our losses are means,
# so a rate of theirs stands here times N: 0.4 of 5-way Omniglot as 2.0 (0.1 of 20-way: 2.0 too), 0.01 of 5-way
# mini-ImageNet as 0.05. Test sets hold 15 queries a class; theirs hold as many as the support set.
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
    """Whether a job's tasks are classes of images, scored by their accuracy, and not curves."""
    return job != "sinusoid"


def metric_name(job: str) -> str:
    return "accuracy" if is_classification(job) else "MSE"


def named_settings(job: str, preset: str, **given: Any) -> Settings:
    """The job's defaults, over them those of the preset, over them the values of ``given``; images are classified in
    test with the shots of training."""
    if job not in JOBS:
        raise unknown_job(job)
    if is_classification(job) and "shots" in given:
        given.setdefault("test_shots", given["shots"])
    ways, shots = (given.get(name, getattr(JOBS[job], name)) for name in ("ways", "shots"))
    return replace(JOBS[job], preset=preset, **presets.preset_settings(job, preset, ways, shots) | given)


def unknown_job(job: str) -> ValueError:
    """With the jobs and folders that may have been meant."""
    jobs = [*JOBS, *RL_JOBS]
    return ValueError(
        f"job must be one of {', '.join(jobs)}, or a folder of class folders, got {job!r}"
        f"{did_you_mean(job, [*jobs, *sibling_folders(Path(job))])}"
    )
