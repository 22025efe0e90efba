"""Algorithms by name: the settings of ``maml-cuda train --preset``, over those of the job.

Every value is the authors' own where a comment says so, on mean losses: a rate that its authors step with on a sum over
N classes stands here times N. What they did with Adam inside the loop (Reptile) is SGD here, which is what runs fused.
The inner rates of Reptile and of fine-tuning are ours: on glyphs Reptile's validated best of four, that of
fine-tuning is the job's (benchmarks/paper/cells.py has what validated best).
"""

from typing import Any

from maml_cuda.train.hints import did_you_mean

# MAML++ (Antoniou et al. 2019): five steps, every one of which the loss of the query set counts in for the first tenth
# of training; rates by layer and step; the inner loop leaves BatchNorm alone, whose affine map and statistics belong to
# a step; first order for the first half; a cosine to 1e-5; the five best checkpoints vote. Their losses are means.
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
    # Finn et al. 2017, of which every job's own settings are.
    "maml": {},
    "fomaml": {"first_order": True},
    # Raghu et al. 2020: the inner loop changes the last layer alone.
    "anil": {"adapted": "head"},
    # Li et al. 2017: one step at a rate of its own for every weight, learned from the job's rate on.
    "meta-sgd": {"learn_inner_lr": "element", "inner_steps": 1, "test_steps": 1},
    "maml++": _MAML_PLUS_PLUS,
    # Nichol et al. 2018: 5 tasks, the outer step from 1 to 0; sizes by ways and shots are _reptile's.
    "reptile": {
        "algorithm": "reptile",
        "test_steps": 10,
        "meta_batch": 5,
        "meta_lr": 1.0,
        "meta_schedule": "linear",
    },
    # Snell et al. 2017: one episode of 60 ways an iteration; Vinyals et al. 2016: of as many ways as in test.
    "protonet": {"algorithm": "protonet", "train_ways": 60, "queries": 5, "meta_batch": 1},
    "matching": {"algorithm": "matching"},
    # Baselines: a classifier of all training classes, whose features a new last layer is fine-tuned on; an
    # untrained net; no net at all.
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
    # Baselines of section 5.1: one net for the points of all curves; the net that is told amplitude and phase; none.
    "pretrained": {"inner_steps": 0},
    "oracle": {"inner_steps": 0, "told": True},
    "random": {"iterations": 0},
}
BASELINES = ("pretrained", "random", "oracle", "nearest-pixel")

# What a job's own sizes ask for.
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


# The settings that decide something in a run, by its parts.
_EVERY = {
    "job", "preset", "data", "cache", "seed", "ways", "train_ways", "iterations", "shots", "test_shots", "test_queries",
    "test_tasks", "image_size", "background", "split",
}  # fmt: skip
_NET = {"width"}
_TRAINING = {
    "meta_batch", "meta_lr", "meta_schedule", "rotations", "validation_interval", "validation_tasks",
    "best_checkpoints", "log_interval",
}  # fmt: skip
_QUERIES = {"queries"}  # of training tasks
_ADAPTED = {"inner_lr", "test_steps", "backend"}  # to test tasks
_INNER_LOOP = {"inner_steps"}  # in training
_OF_MAML = {
    "learn_inner_lr", "adapted", "batch_norm", "first_order", "first_order_iterations", "multi_step_iterations"
}  # fmt: skip
_WHOLE = _EVERY | _NET | _TRAINING | _QUERIES | _ADAPTED | _INNER_LOOP
_USED = {
    "reptile": _WHOLE | {"inner_batch"},
    "protonet": _EVERY | _NET | _TRAINING | _QUERIES,
    "matching": _EVERY | _NET | _TRAINING | _QUERIES,
    "pretrained": _EVERY | _NET | _TRAINING | _ADAPTED,
    "random": _EVERY | _NET | _ADAPTED | {"adapted", "batch_norm"},
    "nearest-pixel": _EVERY,
}
_USED_BY_CURVES = {
    "pretrained": _WHOLE | {"adapted"},
    "oracle": _EVERY | _NET | _TRAINING | _QUERIES | _INNER_LOOP | {"backend"},
    "random": _EVERY | _NET | _ADAPTED | {"adapted"},
}


def used_settings(job: str, name: str) -> set[str]:
    """The settings that decide something in a run of this job and preset; all others are ignored."""
    of_job = _USED | _USED_BY_CURVES if job == "sinusoid" else _USED
    return of_job.get(name, _WHOLE | _OF_MAML)


def preset_settings(job: str, name: str, ways: int = 5, shots: int = 1) -> dict[str, Any]:
    """What the preset sets anew in the job's settings, for tasks of so many classes and support samples of each.

    ValueError where the job has no preset of this name.
    """
    of_job = CURVE_PRESETS if job == "sinusoid" else IMAGE_PRESETS
    if name not in of_job:
        hint = did_you_mean(name, of_job)
        raise ValueError(f"preset must be one of {', '.join(of_job)} for {job}, got {name!r}{hint}")
    like = job if job in ("glyphs", "omniglot", "sinusoid") else "mini-imagenet"
    sizes = _reptile(like, ways, shots) if name == "reptile" and like != "sinusoid" else {}
    return of_job[name] | JOB_PRESETS.get((like, name), {}) | sizes


def _reptile(like: str, ways: int, shots: int) -> dict[str, Any]:
    """The sizes of Reptile's authors, by the commands of https://github.com/openai/supervised-reptile: --inner-batch,
    --inner-iters, --meta-iters, and 10 images a class of Omniglot or 15 of mini-ImageNet in training, however many are
    support samples in test (their --train-shots; here shots and queries together). Their 20-way commands serve from 20
    ways on, their 5-way ones below. What differs is test: theirs takes 50 of Adam's steps, on minibatches.
    """
    if like == "mini-imagenet":
        images, batch, steps, iterations = 15, 10, 8, 100_000
    elif ways < 20:
        images, batch, steps, iterations = 10, 10, 5, 100_000
    else:
        images, batch, steps, iterations = 10, 20, 10, 200_000
    sizes = {"queries": max(images - shots, 1), "inner_batch": batch, "inner_steps": steps}
    return sizes if like == "glyphs" else sizes | {"iterations": iterations}
