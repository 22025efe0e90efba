"""``maml-cuda benchmark``: first and second order for a model of the user's own, beside plain torch."""

import argparse
import json
from typing import Any

from maml_cuda.benchmark.options import LOSSES, SHIPPED, Options
from maml_cuda.commands.shared_options import set_threads
from maml_cuda.train.output import print_error

DESCRIPTION = """\
Times a meta-step of your own model on tasks of random numbers: maml_cuda, a plain loop of autograd and torch.func's
vmap, at second and at first order. Each is first compared with a float64 reference; a wrong one is not timed.

The model is what a function returns that is called without arguments, in a file or a module.
"""
EPILOG = """\
examples:
  maml-cuda benchmark                                        a model of this package: conv4, 5-way 5-shot
  maml-cuda benchmark --model net.py:make_net --input 3,84,84 --support 1 --query 15
  maml-cuda benchmark --model my_package.nets:Regressor --input 12 --loss mse --support 10 --query 10
  maml-cuda benchmark --model lm.py:make_net --input 32 --vocabulary 1000 --ways 2
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="time a meta-step of your own model, beside plain autograd and vmap",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    named = ", ".join(SHIPPED)
    add("--model", default="conv4", help=f"FILE.py:FUNCTION, MODULE:FUNCTION, {named} (default: conv4)")
    add("--input", type=_shape, metavar="SIZES", help="shape of one sample, like 3,84,84; has a default for " + named)
    add("--vocabulary", type=int, metavar="N", help="samples are integers from 0 to N - 1, for embeddings")
    add("--loss", choices=LOSSES, help="(default: cross_entropy; mlp: mse)")
    add("--ways", type=int, metavar="N", help="classes per task, for cross_entropy (default: 5)")
    add("--support", type=int, default=5, metavar="N", help="support samples, per class if there are any (default: 5)")
    add("--query", type=int, default=15, metavar="N", help="query samples, per class if there are any (default: 15)")
    add("--tasks", type=int, default=4, metavar="N", help="tasks of a meta-step (default: 4)")
    add("--inner-steps", type=int, default=5, metavar="N", help="(default: 5)")
    add("--inner-lr", type=float, default=0.01, metavar="RATE", help="(default: 0.01)")
    add("--seconds", type=float, default=2.0, help="for which each side is timed at each order (default: 2)")
    add("--seed", type=int, default=0, metavar="N", help="of the model and of the data (default: 0)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """``maml-cuda benchmark``: proves and times the sides, and prints the table."""
    names = ("model", "input", "vocabulary", "loss", "ways", "support", "query", "tasks", "inner_steps", "inner_lr")
    given = Options(**{name: getattr(options, name) for name in (*names, "seed")})
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"seconds must be finite and above 0, got {options.seconds}")
    set_threads(options.threads)
    from maml_cuda.benchmark.cases import new_case
    from maml_cuda.benchmark.measuring import measure
    from maml_cuda.benchmark.report import conclusion, text
    from maml_cuda.train.devices import device_of

    case = new_case(given, device_of(options.device))
    record = measure(case, options.seconds, print_error)
    record["conclusion"] = conclusion(record)
    print(json.dumps(record, indent=1) if options.json else text(record))
    return 0


def _shape(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be sizes like 3,84,84, got {words}") from None
