"""The algorithms of ``maml-cuda train --preset``: settings that override those of the job.

Values are the authors' own if a comment names the paper. Losses are means here, so a rate that its authors apply to a
sum over N classes is multiplied by N. Reptile's authors use Adam in the inner loop; here it is SGD, which is fused. The
inner rates of Reptile and of fine-tuning are not published: on glyphs, Reptile's is the best of four by validation, and
that of fine-tuning is the job's (``benchmarks/paper/cells.py`` lists what was validated).
"""

from typing import Any

from maml_cuda.train.hints import did_you_mean

# MAML++ (Antoniou et al. 2019): five inner steps; during the first tenth of training the query loss after every step
# counts; one learned rate per layer and step; BatchNorm is not adapted and has parameters and statistics for each step;
# first order for the first half of training; a cosine schedule to 1e-5; an ensemble of the five best checkpoints.
# The authors' losses are means.
_MAML_PLUS_PLUS: dict[str, Any] = {
    "inner_steps": 5,
    "test_steps": 5,
    "learn_inner_lr": "layer",
    "adapted": "no-norm",
    "batch_norm": "per_step",
    "meta_schedule": "cosine",
    "best_checkpoints": 5,
}

IMAGE_PRESETS: dict[str, dict[str, Any]] = {
    # Finn et al. 2017. The settings of every job are for MAML.
    "maml": {},
    "fomaml": {"first_order": True},
    # Raghu et al. 2020: the inner loop adapts the last layer only.
    "anil": {"adapted": "head"},
    # Li et al. 2017: one step with a learned rate for every weight, which starts at the job's rate.
    "meta-sgd": {"learn_inner_lr": "element", "inner_steps": 1, "test_steps": 1},
    "maml++": _MAML_PLUS_PLUS,
    # Nichol et al. 2018: 5 tasks, the outer rate falls from 1 to 0. _reptile adds sizes that depend on ways and shots.
    "reptile": {
        "algorithm": "reptile",
        "test_steps": 10,
        "meta_batch": 5,
        "meta_lr": 1.0,
        "meta_schedule": "linear",
    },
    # Snell et al. 2017: one 60-way episode per iteration. Vinyals et al. 2016: as many ways as in test.
    "protonet": {"algorithm": "protonet", "train_ways": 60, "queries": 5, "meta_batch": 1},
    "matching": {"algorithm": "matching"},
    # Baselines: a classifier of all training classes that is fine-tuned with a new last layer, an untrained network,
    # and the nearest neighbour in pixel space.
    "pretrained": {"algorithm": "pretrained", "meta_batch": 64, "test_steps": 10},
    "random": {"iterations": 0},
    "nearest-pixel": {"algorithm": "nearest-pixel", "iterations": 0},
}
CURVE_PRESETS: dict[str, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"first_order": True},
    "anil": {"adapted": "head"},
    "meta-sgd": {"learn_inner_lr": "element"},
    "reptile": {
        "algorithm": "reptile",
        "inner_batch": 5,
        "inner_steps": 5,
        "meta_lr": 1.0,
        "meta_schedule": "linear",
        "iterations": 30_000,
    },
    # Baselines of section 5.1: one network for the points of all curves, one whose input includes amplitude and phase,
    # and an untrained network.
    "pretrained": {"inner_steps": 0},
    "oracle": {"inner_steps": 0, "told": True},
    "random": {"iterations": 0},
}
BASELINES = ("pretrained", "random", "oracle", "nearest-pixel")

# Settings of a preset that depend on the job.
JOB_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("omniglot", "maml++"): {
        "inner_lr": 0.1, "meta_batch": 8, "iterations": 50_000, "multi_step_iterations": 5000,
        "first_order_iterations": 25_000,
    },
    ("mini-imagenet", "maml++"): {
        "inner_lr": 0.01, "meta_batch": 2, "iterations": 50_000, "width": 48, "multi_step_iterations": 7500,
        "first_order_iterations": 25_000,
    },
    ("glyphs", "maml++"): {
        "inner_lr": 0.1, "meta_batch": 8, "multi_step_iterations": 300, "first_order_iterations": 1500,
    },
    ("omniglot", "reptile"): {"inner_lr": 0.1},
    ("mini-imagenet", "reptile"): {"inner_lr": 0.05},
    ("mini-imagenet", "protonet"): {"train_ways": 30, "queries": 15},
}  # fmt: skip


# The settings that each part of a run uses.
_EVERY = {
    "job", "preset", "data", "data_sha256", "cache", "seed", "ways", "train_ways", "iterations", "shots", "test_shots",
    "test_queries", "test_tasks", "image_size", "background", "split",
}  # fmt: skip
_NET = {"width", "net"}
_TRAINING = {
    "meta_batch", "meta_lr", "meta_schedule", "rotations", "validation_interval", "validation_tasks",
    "best_checkpoints", "log_interval",
}  # fmt: skip
_QUERIES = {"queries"}  # query sets in training
_ADAPTED = {"inner_lr", "test_steps", "backend"}  # adaptation in test
_INNER_LOOP = {"inner_steps"}  # adaptation in training
_OF_MAML = {
    "learn_inner_lr", "adapted", "batch_norm", "first_order", "first_order_iterations", "multi_step_iterations"
}  # fmt: skip
_ALL_PARTS = _EVERY | _NET | _TRAINING | _QUERIES | _ADAPTED | _INNER_LOOP
_USED = {
    "reptile": _ALL_PARTS | {"inner_batch"},
    "protonet": _EVERY | _NET | _TRAINING | _QUERIES,
    "matching": _EVERY | _NET | _TRAINING | _QUERIES,
    "pretrained": _EVERY | _NET | _TRAINING | _ADAPTED,
    "random": _EVERY | _NET | _ADAPTED | {"adapted", "batch_norm"},
    "nearest-pixel": _EVERY,
}
_USED_BY_CURVES = {
    "pretrained": _ALL_PARTS | {"adapted"},
    "oracle": _EVERY | _NET | _TRAINING | _QUERIES | _INNER_LOOP | {"backend"},
    "random": _EVERY | _NET | _ADAPTED | {"adapted"},
}


def used_settings(job: str, name: str) -> set[str]:
    """The settings that a run of this job and preset uses; it ignores all others."""
    of_job = _USED | _USED_BY_CURVES if job == "sinusoid" else _USED
    return of_job.get(name, _ALL_PARTS | _OF_MAML) - ({"net"} if job == "sinusoid" else set())


def preset_settings(job: str, name: str, ways: int = 5, shots: int = 1) -> dict[str, Any]:
    """The settings of a preset, which override those of the job.

    Args:
        job: the name of a supervised job.
        name: the name of a preset.
        ways: classes per task.
        shots: support samples per class.

    Raises:
        ValueError: the job has no preset of this name.
    """
    of_job = CURVE_PRESETS if job == "sinusoid" else IMAGE_PRESETS
    if name not in of_job:
        hint = did_you_mean(name, of_job)
        raise ValueError(f"preset must be one of {', '.join(of_job)} for {job}, got {name!r}{hint}")
    like = job if job in ("glyphs", "omniglot", "sinusoid") else "mini-imagenet"
    sizes = _reptile(like, ways, shots) if name == "reptile" and like != "sinusoid" else {}
    return of_job[name] | JOB_PRESETS.get((like, name), {}) | sizes


def _reptile(like: str, ways: int, shots: int) -> dict[str, Any]:
    """The sizes of Reptile's authors, from the commands of https://github.com/openai/supervised-reptile.

    They are --inner-batch, --inner-iters, --meta-iters, and the number of training images per class (their
    --train-shots, here shots plus queries): 10 for Omniglot, 15 for mini-ImageNet, whatever the shots in test. Their
    20-way commands are used from 20 ways on, their 5-way commands below. The test differs: theirs takes 50 steps of
    Adam on minibatches.
    """
    if like == "mini-imagenet":
        images, batch, steps, iterations = 15, 10, 8, 100_000
    elif ways < 20:
        images, batch, steps, iterations = 10, 10, 5, 100_000
    else:
        images, batch, steps, iterations = 10, 20, 10, 200_000
    sizes = {"queries": max(images - shots, 1), "inner_batch": batch, "inner_steps": steps}
    return sizes if like == "glyphs" else sizes | {"iterations": iterations}
