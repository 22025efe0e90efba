"""The options of ``maml-cuda train``. Does not import torch, so that ``--help`` and errors of usage are fast."""

import argparse
from typing import Any

from maml_cuda.commands.shared_options import absolute, add_cache, add_machine
from maml_cuda.rl.settings import OUTER_STEPS, OWN, RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.settings import CHOICES, JOBS

DESCRIPTION = """\
Meta-trains a small network with MAML, so that it learns a new task from a few examples.

  glyphs    classify 5 characters of alphabets not seen in training, from one image of each
  sinusoid  fit a sine curve of unknown amplitude and phase from a few points

  omniglot, mini-imagenet, cifar-fs, fc100, tiered-imagenet
            published data sets in their published layouts; --data names their folder
  FOLDER    your own images: a folder with one folder for each class

  navigation, cheetah-direction, cheetah-velocity, ant-direction, ant-velocity, ant-goal
            reinforcement learning: a policy that adapts to a new goal from a few episodes
            (cheetah and ant need the extra [rl])
  FILE.py:NAME, module:NAME
            the same in an environment of your own (docs/reinforcement_learning.md)
"""
EPILOG = """\
examples:
  maml-cuda train glyphs                       learn to read new alphabets (minutes)
  maml-cuda train glyphs --iterations 150      a short run (under a minute)
  maml-cuda train sinusoid --out runs/sine     the regression of the MAML paper
  maml-cuda train glyphs --ways 20 --shots 5   harder tasks, more examples of each class
  maml-cuda train omniglot --data ~/omniglot   5-way 1-shot Omniglot, as in the paper
  maml-cuda train ~/birds --shots 5            your own images
  maml-cuda train navigation                   2D navigation, as in the paper (minutes)
  maml-cuda train navigation --baseline oracle  a policy that observes the goal
  maml-cuda train pendulum.py:PendulumGoal     a policy in your own environment
  maml-cuda train --resume runs/sine           continue a run that was interrupted or has ended

Several processes share the tasks of each meta-iteration:
  torchrun --nproc-per-node 2 -m maml_cuda train omniglot --data ~/omniglot

A run is one folder: metrics.csv, the checkpoints last/ and best/, PNG plots, summary.json, and config.yaml, which
repeats the run: maml-cuda train --config RUN/config.yaml
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="meta-train a classifier, a regression or a policy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "job",
        nargs="?",
        metavar="JOB",
        help=f"what to learn: {', '.join(JOBS | RL_JOBS)}, FOLDER or FILE.py:NAME (default: glyphs)",
    )

    group = parser.add_argument_group("algorithm", "the settings of a preset override those of the job")
    names = group.add_mutually_exclusive_group()
    named = [name for name in presets.IMAGE_PRESETS if name not in presets.BASELINES]
    names.add_argument("--preset", metavar="NAME", help=f"{', '.join(named)} (default: maml), or a baseline")
    names.add_argument("--baseline", dest="preset", choices=presets.BASELINES, help="a baseline to compare MAML with")

    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--data",
        type=absolute,
        metavar="PATH",
        help="folder of the data set; the converted images are stored there too",
    )
    add_cache(group)
    _setting(group, "--ways", "classes per task (not for the sinusoid)")
    _setting(group, "--shots", "support samples per class, which the model adapts to")
    _setting(group, "--queries", "query samples per class, which the meta-loss is computed on")
    _setting(group, "--train-ways", "classes per training task; 0: --ways (protonet, matching)")
    _setting(group, "--rotations", "each training class becomes so many classes, rotated by quarter turns, 1 to 4")

    group = parser.add_argument_group("your own images: FOLDER")
    _setting(group, "--image-size", "height and width in pixels to resize to; 0: all images have the same size")
    group.add_argument(
        "--background",
        metavar="COLOUR",
        help="colour behind transparent images: white, black or #rrggbb (default: white)",
    )
    group.add_argument(
        "--split",
        metavar="TRAIN/VALIDATION/TEST",
        help="numbers of classes, such as 6/3/3 (default: the folders train, val and test, or 64/16/20 %% of all); of "
        "omniglot authors (default) or alphabets",
    )

    group = parser.add_argument_group("inner loop: adaptation to one task")
    _setting(group, "--inner-lr", "inner learning rate, for the mean loss of the support set")
    _setting(group, "--inner-steps", "gradient steps in training (policies: each on new episodes)")
    _setting(group, "--every-step", "policies: use the return after every inner step, not only after the last")
    _setting(group, "--rate-decay", "policies: factor from the rate of one step to that of the next, in test too")
    _setting(group, "--learn-inner-lr", "learn the rates: one per step, per layer and step, or per element")
    _setting(group, "--adapted", "parameters to adapt: all, all but those of BatchNorm, or the last layer")
    _setting(group, "--batch-norm", "one set of BatchNorm parameters for all inner steps, or one per step (MAML++)")
    _setting(group, "--first-order", "FOMAML: leave the Hessian terms out of the meta-gradient")
    _setting(group, "--inner-batch", "Reptile: samples per inner step; 0: all")

    group = parser.add_argument_group("meta-training")
    _setting(group, "--iterations", "meta-iterations (Adam steps)")
    _setting(group, "--meta-batch", "tasks per meta-iteration")
    _setting(group, "--meta-lr", "Adam's learning rate (Reptile: the outer rate)")
    _setting(group, "--meta-schedule", "how --meta-lr falls over the iterations")
    _setting(
        group, "--multi-step-iterations", "first iterations that use the query loss after every inner step (MAML++)"
    )
    _setting(group, "--first-order-iterations", "first iterations that are first order")
    _setting(group, "--net", "images: four convolutions (default), or the paper's fully connected net")
    _setting(group, "--filters", "filters per convolution, or hidden units per layer (sinusoid, policies)", "width")
    _setting(group, "--seed", "seed of the initial weights and of all tasks; the same seed gives the same bits")

    group = parser.add_argument_group("reinforcement learning")
    _setting(group, "--episodes", "episodes per task and adaptation step")
    _setting(group, "--horizon", "greatest number of steps of an episode")
    _setting(group, "--outer", "the outer step: trpo, vpg (Adam on the meta-gradient) or clipped (as PPO and ProMP)")
    _setting(group, "--max-kl", "TRPO: bound on the KL divergence of the adapted policies")
    _setting(group, "--damping", "TRPO: added to the Fisher matrix")
    _setting(group, "--epochs", "clipped: Adam steps per batch")
    _setting(group, "--clip", "clipped: the probability ratio is clipped to 1 - CLIP and 1 + CLIP")
    _setting(group, "--discount", "discount factor of rewards")
    _setting(group, "--gae-lambda", "lambda of generalized advantage estimation")
    _setting(group, "--output-scale", "policy: factor on Xavier's initial weights of the output layer")
    _setting(group, "--start-std", "policy: initial standard deviation of actions, in half widths of the action range")

    group = parser.add_argument_group("validation and test, on classes, curves or goals not seen in training")
    _setting(group, "--validation-interval", "iterations between two validations, each of which saves last/")
    _setting(group, "--validation-tasks", "tasks per validation; the best score saves best/")
    _setting(group, "--best-checkpoints", "best checkpoints to keep; several are also tested as an ensemble")
    _setting(group, "--log-interval", "iterations between two rows of metrics.csv")
    _setting(group, "--test-tasks", "tasks of the final test of best/ after 0 to 10 steps")
    _setting(group, "--test-shots", "support samples per class in validation and test (images: as --shots)")
    _setting(group, "--test-episodes", "episodes per task and adaptation step in validation and test")
    _setting(group, "--test-queries", "query samples per class in validation and test")
    _setting(
        group, "--test-steps", "greatest number of adaptation steps in validation; the score is the mean over 1 to N"
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="options in YAML, such as config.yaml in the folder of a run; the command line overrides them",
    )
    group.add_argument(
        "--out", metavar="RUN", help="folder of the run, which must be new or empty (default: runs/<job>-<time>)"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run, with the same bits as without a stop; only --iterations, --test-tasks, --data and "
        "--cache may change",
    )
    group.add_argument(
        "--from",
        dest="resume_from",
        choices=("last", "best"),
        help="with --resume: the checkpoint to continue from; later results are removed (default: last)",
    )
    group.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="write the rows of metrics.csv for TensorBoard too (default: if the resumed run has them)",
    )
    add_machine(group)
    parser.set_defaults(device=None)  # so that --config can set it


def _setting(group: argparse._ActionsContainer, option: str, text: str, name: str | None = None) -> None:
    """Adds an option that sets a field of the settings. Its value is None if it is not given, which ``--resume`` relies
    on.
    """
    name = name or option[2:].replace("-", "_")
    jobs: dict[Any, list[str]] = {}  # default value -> jobs
    for job, settings in (JOBS | RL_JOBS | {OWN.job: OWN}).items():
        if hasattr(settings, name):
            jobs.setdefault(getattr(settings, name), []).append(job)
    first = next(iter(jobs))
    if isinstance(first, bool):
        group.add_argument(option, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    choices = CHOICES | {"outer": OUTER_STEPS}
    if name in choices:
        words = [word for word in choices[name] if word]
        optional: dict[str, Any] = {"nargs": "?", "const": words[0]} if "" in choices[name] else {}
        group.add_argument(option, dest=name, choices=words, help=text, **optional)
        return
    default = f"{first}" if len(jobs) == 1 else ", ".join(f"{value} {'/'.join(names)}" for value, names in jobs.items())
    options = [option, "--hidden"] if name == "width" else [option]
    metavar = {float: "RATE", int: "N", str: "NAME"}[type(first)]
    group.add_argument(*options, dest=name, type=type(first), metavar=metavar, help=f"{text} (default: {default})")
