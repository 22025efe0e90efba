"""The options of ``maml-cuda``. Nothing here needs torch, so that help and errors of typing come at once."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from maml_cuda import __version__
from maml_cuda.rl.settings import OUTER_STEPS, RL_JOBS
from maml_cuda.train import presets
from maml_cuda.train.hints import did_you_mean
from maml_cuda.train.settings import CHOICES, JOBS

TRAIN_DESCRIPTION = """\
Meta-trains a small network with MAML so that it learns a new task from a handful of examples.

  glyphs    tell apart 5 characters of alphabets never trained on, from one image of each
  sinusoid  fit a sine curve of unknown amplitude and phase from a few points

  omniglot, mini-imagenet, cifar-fs, fc100, tiered-imagenet
            the paper's data sets and later ones, as published; --data names their folder
  FOLDER    your own images: a folder with a folder for each class

  navigation, cheetah-direction, cheetah-velocity, ant-direction, ant-velocity, ant-goal
            the paper's reinforcement learning: a policy that adapts to a new goal from a
            few episodes (the robots need the extra [rl])
"""
TRAIN_EPILOG = """\
examples:
  maml-cuda train glyphs                       learn to read new alphabets (minutes)
  maml-cuda train glyphs --iterations 150      see it learn (under a minute)
  maml-cuda train sinusoid --out runs/sine     the regression of the MAML paper
  maml-cuda train glyphs --ways 20 --shots 5   harder tasks, more examples of each class
  maml-cuda train omniglot --data ~/omniglot   the paper's 5-way 1-shot Omniglot
  maml-cuda train ~/birds --shots 5            your own images
  maml-cuda train navigation                   2D navigation of the paper (minutes)
  maml-cuda train navigation --baseline oracle  a policy that is told the goal
  maml-cuda train --resume runs/sine           go on where Ctrl-C, a crash or the last iteration ended it

A run is one folder: metrics.csv, the checkpoints last/ and best/, PNG pictures and summary.json.
"""


ELSEWHERE = ("--gpu", "--gpus", "--cuda", "--device")


class Parser(argparse.ArgumentParser):
    """Says what an unknown option may have been, and no more: the usage of ``train`` fills a screen."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            typed = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            if any(word in ELSEWHERE for word in typed):
                hint = "; the commands run on the CPU: on a GPU, FusedMAML serves in a training loop of your own"
            else:
                hint = "".join(did_you_mean(word, self._option_string_actions) for word in typed)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help has all options\n")


def parser() -> Parser:
    whole = Parser(
        prog="maml-cuda",
        description="Exact second-order MAML: train on a few-shot job, test it, look inside.",
    )
    whole.add_argument("--version", action="version", version=f"maml-cuda {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_train(
        commands.add_parser(
            "train",
            help="meta-train a model on glyphs, sinusoids, images of yours, or a policy",
            description=TRAIN_DESCRIPTION,
            epilog=TRAIN_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_evaluate(
        commands.add_parser(
            "evaluate",
            help="test the model of a run on unseen tasks",
            description="Prints the metric after 0 to 10 adaptation steps on unseen tasks.",
        )
    )
    _add_compare(commands.add_parser("compare", help="put the test results of several runs in one plot"))
    commands.add_parser("info", help="print how this installation was built, versions and threads")
    return whole


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", nargs="?", metavar="JOB", help=f"what to learn: {', '.join(JOBS | RL_JOBS)} or FOLDER (default: glyphs)"
    )

    group = parser.add_argument_group("algorithm", "a preset's settings take the place of the job's own")
    names = group.add_mutually_exclusive_group()
    named = [name for name in presets.IMAGE_PRESETS if name not in presets.BASELINES]
    names.add_argument("--preset", metavar="NAME", help=f"{', '.join(named)} (default: maml), or a baseline")
    names.add_argument("--baseline", dest="preset", choices=presets.BASELINES, help="what MAML is to be better than")

    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--data", type=absolute, metavar="PATH", help="folder that holds the data set; its conversion is kept there"
    )
    _add_cache(group)
    _setting(group, "--ways", "classes a task (not for the sinusoid)")
    _setting(group, "--shots", "support samples a class: what the model adapts to")
    _setting(group, "--queries", "query samples a class: what the meta-loss is taken on")
    _setting(group, "--train-ways", "classes a training task, where they are not --ways (protonet, matching)")
    _setting(group, "--rotations", "quarter turns of each training class that are classes of their own, 1 to 4")

    group = parser.add_argument_group("your own images: FOLDER")
    _setting(group, "--image-size", "height and width to which they are resized; 0: they are of one size")
    group.add_argument(
        "--background", metavar="COLOUR", help="of transparent ones: white, black or #rrggbb (default: white)"
    )
    group.add_argument(
        "--split",
        metavar="TRAIN/VALIDATION/TEST",
        help="numbers of classes, such as 6/3/3 (default: by folders train, val and test, or 64/16/20 %% of them)",
    )

    group = parser.add_argument_group("inner loop: adaptation to one task")
    _setting(group, "--inner-lr", "inner learning rate, on the mean loss of the support set")
    _setting(group, "--inner-steps", "gradient steps in training (policies: each on fresh episodes)")
    _setting(group, "--every-step", "policies: the return after every inner step counts, not after the last alone")
    _setting(group, "--rate-decay", "policies: each step's rate is so many times that of the step before, in test too")
    _setting(group, "--learn-inner-lr", "learn rates from --inner-lr on: one a step, a layer and step, or an element")
    _setting(group, "--adapted", "what the inner loop changes: all, all but BatchNorm's affine maps, the last layer")
    _setting(group, "--batch-norm", "one affine map for all inner steps, or one a step (MAML++)")
    _setting(group, "--first-order", "FOMAML: leave the Hessian terms out of the meta-gradient")
    _setting(group, "--inner-batch", "Reptile: samples of an inner step, 0: all")

    group = parser.add_argument_group("meta-training")
    _setting(group, "--iterations", "meta-iterations (Adam steps)")
    _setting(group, "--meta-batch", "tasks a meta-iteration")
    _setting(group, "--meta-lr", "Adam's learning rate (Reptile: the outer step)")
    _setting(group, "--meta-schedule", "how it falls over the iterations")
    _setting(group, "--multi-step-iterations", "so many take the query loss after every inner step (MAML++)")
    _setting(group, "--first-order-iterations", "so many are first order, before the others are second order")
    _setting(
        group,
        "--filters",
        "filters of each convolution, also --hidden: units a layer (sinusoid)",
        "width",
    )
    _setting(group, "--seed", "decides the initial weights and every task; same seed, same run, to the bit")

    group = parser.add_argument_group("reinforcement learning")
    _setting(group, "--episodes", "episodes of each task and adaptation step")
    _setting(group, "--horizon", "most steps of an episode")
    _setting(group, "--outer", "the outer step: trpo, vpg (Adam on the meta-gradient) or clipped (as PPO and ProMP)")
    _setting(group, "--max-kl", "TRPO: bound on the KL divergence of the adapted policies")
    _setting(group, "--damping", "TRPO: added to the Fisher matrix")
    _setting(group, "--epochs", "clipped: Adam steps on each batch")
    _setting(group, "--clip", "clipped: how far a probability ratio counts")
    _setting(group, "--discount", "of rewards")
    _setting(group, "--gae-lambda", "of generalized advantage estimation")
    _setting(group, "--output-scale", "policy: the weights of its output layer start at so many times Xavier's")
    _setting(group, "--start-std", "policy: standard deviation of its actions at the start, in half sides of the box")

    group = parser.add_argument_group("validation and test, on unseen classes or curves")
    _setting(group, "--validation-interval", "iterations between two validations, each of which saves last/")
    _setting(group, "--validation-tasks", "tasks a validation; the best score saves best/")
    _setting(group, "--best-checkpoints", "so many are kept, and vote in the final test where there are several")
    _setting(group, "--log-interval", "iterations between two rows of metrics.csv")
    _setting(group, "--test-tasks", "tasks of the final test of best/ after 0 to 10 steps")
    _setting(group, "--test-shots", "support samples a class in validation and test (images: as --shots)")
    _setting(group, "--test-episodes", "episodes of each task and adaptation step in validation and test")
    _setting(group, "--test-queries", "query samples a class in validation and test")
    _setting(group, "--test-steps", "most adaptation steps in validation, which scores the mean over 1 to N")

    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="RUN", help="folder of the run, a new one (default: runs/<job>-<time>)")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run as if it had never stopped; only --iterations, --test-tasks, --data, --cache may change",
    )
    group.add_argument(
        "--from",
        dest="resume_from",
        choices=("last", "best"),
        help="with --resume: the checkpoint to go on from; what was written after it is taken back (default: last)",
    )
    _add_machine(group)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--tasks", type=int, help="test tasks (default: as in the run)")
    parser.add_argument("--ways", type=int, help="classes a task, for nets without a last layer (protonet, matching)")
    parser.add_argument("--shots", "--test-shots", type=int, help="support samples a class (default: as in the run)")
    parser.add_argument(
        "--test-queries",
        type=int,
        dest="queries",
        help="query samples a class (default: as in the run)",
    )
    parser.add_argument(
        "--batch-norm",
        choices=("transductive", "running"),
        help="statistics of the support or query set at hand (default), or of training tasks: a query by itself",
    )
    parser.add_argument(
        "--data",
        type=absolute,
        metavar="PATH",
        help="folder that holds the data set now, or a folder of other classes to test on (default: as in the run)",
    )
    _add_cache(parser)
    parser.add_argument("--seed", type=int, help="draws other test tasks (default: as in the run)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", choices=("best", "last"), default="best", help="(default: best)")
    which.add_argument("--ensemble", action="store_true", help="the mean prediction of the best checkpoints of the run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_machine(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs of one job")
    parser.add_argument("--labels", metavar="A,B", help="one for each run (default: the folders' names)")
    parser.add_argument("--out", default="compare.png", metavar="PNG", help="(default: compare.png)")


def _add_cache(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--cache", type=absolute, metavar="PATH", help="folder for the conversion, where that of the data is read-only"
    )


def _add_machine(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: all cores); fused results do not depend on it"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "fused", "reference"),
        help="auto: fused wherever possible; reference: plain autograd, slow (default: auto)",
    )


def _setting(group: argparse._ActionsContainer, option: str, text: str, name: str | None = None) -> None:
    """An option that sets a field of Settings; None where it is not given, which --resume needs to know."""
    name = name or option[2:].replace("-", "_")
    jobs: dict[Any, list[str]] = {}  # by their default
    for job, settings in (JOBS | RL_JOBS).items():
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


def absolute(path: str) -> str:
    """A run is tested and resumed from any folder."""
    return str(Path(path).expanduser().absolute())
