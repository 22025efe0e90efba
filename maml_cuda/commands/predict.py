"""``maml-cuda predict``: classifies pictures by a trained net that is given a few pictures of each class."""

import argparse
import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from maml_cuda.commands.shared_options import add_machine, add_trained_net, set_threads
from maml_cuda.commands.trained_nets import check_out, counted, described, opened_run
from maml_cuda.extras import require

CSV, PICTURE = "predictions.csv", "predictions.png"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify your own pictures",
        description="Adapts the net of a run to a few pictures of each class, and classifies other pictures. Writes "
        f"{CSV} (file, predicted class, probability of each class) and {PICTURE}.",
    )
    add_trained_net(parser)
    parser.add_argument(
        "--query",
        required=True,
        metavar="FOLDER",
        help="the pictures to classify: in the folder itself, or in folders that are named as the classes, whose "
        "accuracy is then printed",
    )
    parser.add_argument(
        "--batch-norm",
        choices=("transductive", "support", "running"),
        default="transductive",
        help="statistics by which BatchNorm normalises the pictures: of all of them together (default), of the support "
        "set, or of training tasks; with the last two each picture is classified by itself",
    )
    parser.add_argument("--out", default="predictions", metavar="FOLDER", help="of the results (default: predictions)")
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    require("matplotlib", "safetensors", extra="train")
    require("PIL", extra="images")
    from maml_cuda.data.pictures import find_queries
    from maml_cuda.train import plots
    from maml_cuda.train.checkpoint import write_file
    from maml_cuda.train.classify import check_classes
    from maml_cuda.train.jobs import pictures_of

    set_threads(options.threads)
    out = check_out(options, CSV, PICTURE)
    settings, open_net = opened_run(options, "predict")
    pictures = pictures_of(settings)
    support = pictures.read_classes(options.support)
    check_classes(settings, support.classes)
    queries = find_queries(options.query, support.classes)
    x = pictures.read(file for file, _ in queries)
    net = open_net()
    probabilities = net.probabilities(support, x)
    predicted = [support.classes[i] for i in probabilities.argmax(-1).tolist()]
    out.mkdir(parents=True, exist_ok=True)
    table = _table(Path(options.query), support.classes, queries, predicted, probabilities.tolist())
    shown = zip(x, [name for _, name in queries], predicted, probabilities.amax(-1).tolist(), strict=True)
    plots.predictions(list(shown), out / PICTURE)
    write_file(out / CSV, table)

    print(described(options, settings, net, support))
    if net.together:
        by_itself = "; --batch-norm support classifies each by itself" if net.adapts else ""
        print(
            f"The {len(x)} pictures are classified together: BatchNorm normalises them by their common statistics, so "
            f"that a prediction depends on the other pictures{by_itself}."
        )
    known = {file.resolve() for file in support.files}
    if twice := sum(file.resolve() in known for file, _ in queries):
        print(f"{twice} of the {len(x)} pictures are in the support set too: the net has seen them.")
    print(_summary([name for _, name in queries], predicted))
    print(f"{out / CSV} has the probabilities, {out / PICTURE} the pictures")
    return 0


def _table(
    folder: Path, classes: list[str], queries: list[tuple[Path, str]], predicted: list[str], rows: list[list[float]]
) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "class", "predicted", *(f"P({name})" for name in classes)])
    for (file, name), answer, row in zip(queries, predicted, rows, strict=True):
        writer.writerow([file.relative_to(folder).as_posix(), name, answer, *(f"{p:.6g}" for p in row)])
    return text.getvalue().encode(errors="surrogateescape")


def _summary(classes: list[str], predicted: list[str]) -> str:
    """How many pictures of known class are right, or how many of each class were found."""
    from maml_cuda.train.classify import proportion

    known = [(name, answer) for name, answer in zip(classes, predicted, strict=True) if name]
    if known:
        right = sum(name == answer for name, answer in known)
        low, high = proportion(right, len(known))
        return (
            f"accuracy {right / len(known):.1%}: {right} of {counted(len(known), 'picture')} of known class "
            f"(95 % interval {low:.0%} to {high:.0%})"
        )
    found = Counter(predicted).most_common()
    return f"{counted(len(predicted), 'picture')}: {', '.join(f'{count} of {name}' for name, count in found)}"
