"""``maml-cuda evaluate``: tests a checkpoint of a run, on the run's data or on other images."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from maml_cuda.commands.job_kinds import checked_names, refuse_ignored, stored_run
from maml_cuda.commands.shared_options import absolute, add_cache, add_machine, announce_data, set_threads, without_none
from maml_cuda.extras import require
from maml_cuda.train.settings import Settings


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="test the model of a run on new tasks",
        description="Prints the metric after 0 to 10 adaptation steps on tasks not seen in training.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--tasks", type=int, help="test tasks (default: as in the run)")
    parser.add_argument(
        "--ways", type=int, help="classes per task, for networks without an output layer (protonet, matching)"
    )
    parser.add_argument("--shots", "--test-shots", type=int, help="support samples per class (default: as in the run)")
    parser.add_argument(
        "--test-queries",
        type=int,
        dest="queries",
        help="query samples per class (default: as in the run)",
    )
    parser.add_argument(
        "--batch-norm",
        choices=("transductive", "running", "support"),
        help="statistics of each support or query set (default); or of training tasks, or of the support set, so that "
        "a query does not depend on the others",
    )
    parser.add_argument(
        "--data",
        type=absolute,
        metavar="PATH",
        help="folder of the data set if it has moved, or of other classes to test on (default: as in the run)",
    )
    add_cache(parser)
    parser.add_argument("--seed", type=int, help="seed of the test tasks (default: as in the run)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", choices=("best", "last"), default="best", help="(default: best)")
    which.add_argument("--ensemble", action="store_true", help="test the mean prediction of the run's best checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """``maml-cuda evaluate``: tests a checkpoint of a run, on the run's data or on other images."""
    require("safetensors", extra="train")
    from maml_cuda.train.devices import device_of
    from maml_cuda.train.other_images import check_ways, other_images
    from maml_cuda.train.ranks import count

    set_threads(options.threads)
    if count() > 1:
        raise ValueError(f"processes must be 1 for maml-cuda evaluate, got {count()}")
    device = device_of(options.device)
    run = Path(options.run)
    kind, stored, info = stored_run(run, options.checkpoint)
    other: dict[str, Any] = {}
    if kind.settings is Settings and options.data is not None:
        if not options.json:
            announce_data(options.data)
        trained = info.get("classes", ())  # checkpoints of earlier versions do not have them
        if images := other_images(stored, options.data, trained, options.cache):
            other, options.data, options.cache = {"other": images}, None, None
    model = checked_names(kind, without_none(backend=options.backend, data=options.data, cache=options.cache))
    test = without_none(
        ways=options.ways,
        test_tasks=options.tasks,
        test_shots=options.shots,
        test_queries=options.queries,
        seed=options.seed,
    )
    refuse_ignored(model | checked_names(kind, test), asdict(stored))
    settings = replace(stored, **model, **test)
    if kind.settings is Settings:
        check_ways(settings, stored.ways)
    if options.ensemble:
        if kind.settings is not Settings:
            raise ValueError(f"ensemble must be left out for {stored.job}, whose runs keep one best checkpoint")
        algorithms, iterations = kind.report.load_ensemble(run, device, **model)
        tested: dict[str, Any] = {"ensemble": iterations}
    else:
        learned, info = kind.report.load_run(run, options.checkpoint, device, **model)
        algorithms, tested = [learned], {"checkpoint": options.checkpoint, "iteration": info["iteration"]}
    if options.batch_norm in ("running", "support"):
        if kind.settings is not Settings:
            raise ValueError(f"batch_norm must be left out for {stored.job}, whose policy has no BatchNorm")
        for algorithm in algorithms:
            kind.report.normalise_by(options.batch_norm, algorithm, settings, device)
        tested["batch_norm"] = options.batch_norm
    result = kind.report.test_run(algorithms, settings, device=device, **other) | tested
    print(json.dumps(result, indent=1) if options.json else kind.report.table(result))
    return 0
