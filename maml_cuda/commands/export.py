"""``maml-cuda export``: the net of a run, adapted to a support set, as a program that needs no maml_cuda."""

import argparse
import json
import os
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maml_cuda.commands.shared_options import add_machine, add_trained_net, set_threads
from maml_cuda.commands.trained_nets import check_out, described, opened_run
from maml_cuda.extras import require

if TYPE_CHECKING:
    from maml_cuda.data.pictures import Pictures, SupportSet
    from maml_cuda.train.classify import Classifier

PROGRAMS = {"pt2": "net.pt2", "onnx": "net.onnx"}
FACTS = "net.json"
MODES = {1: "grey", 3: "RGB"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a trained net, adapted to your classes, as torch.export program and ONNX",
        description="Adapts the net of a run to a few pictures of each class, and writes it as a torch.export program "
        f"({PROGRAMS['pt2']}) and as ONNX ({PROGRAMS['onnx']}, which needs the extra [export]), with the classes and "
        f"the preprocessing in {FACTS}. Each program is compared with the net before it is kept.",
    )
    add_trained_net(parser)
    parser.add_argument(
        "--batch-norm",
        choices=("support", "running"),
        default="support",
        help="the statistics that are fixed in the program: of the support set (default), or of training tasks",
    )
    parser.add_argument("--format", choices=("both", *PROGRAMS), default="both", help="(default: both)")
    parser.add_argument("--out", default="exported", metavar="FOLDER", help="of the programs (default: exported)")
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    require("safetensors", extra="train")
    require("PIL", extra="images")
    kinds = [kind for kind in PROGRAMS if options.format in (kind, "both")]
    if "onnx" in kinds:
        require("onnx", "onnxscript", "onnxruntime", extra="export")
    from maml_cuda.train.classify import check_classes
    from maml_cuda.train.exported import export_programs
    from maml_cuda.train.jobs import pictures_of
    from maml_cuda.train.settings import WITHOUT_INNER_LOOP

    set_threads(options.threads)
    names = [PROGRAMS[kind] for kind in kinds]
    out = check_out(options, *names, FACTS)
    settings, open_net = opened_run(options, "export")
    if settings.algorithm in WITHOUT_INNER_LOOP:
        raise ValueError(f"run must be of an algorithm with an inner loop to be exported, got {settings.algorithm}")
    pictures = pictures_of(settings)
    support = pictures.read_classes(options.support)
    check_classes(settings, support.classes)
    net = open_net()
    program = net.program(support)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".maml-cuda-export-", dir=out.parent) as place:
        files = {kind: Path(place, PROGRAMS[kind]) for kind in kinds}
        differences = export_programs(program, support.x, files)
        facts = _facts(options, net, support, pictures)
        facts["programs"] = {
            path.name: {"sha256": sha256(path.read_bytes()).hexdigest(), "largest_difference": differences[kind]}
            for kind, path in files.items()
        }
        Path(place, FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", errors="backslashreplace")
        out.mkdir(exist_ok=True)
        for name in [*names, FACTS]:
            os.replace(Path(place, name), out / name)

    print(described(options, settings, net, support))
    statistics = "the support set" if options.batch_norm == "support" else "training tasks"
    print(
        f"BatchNorm's statistics are fixed, those of {statistics}: each picture is classified by itself. "
        f"maml-cuda evaluate {options.run} --batch-norm {options.batch_norm} prints the accuracy of that."
    )
    for kind, name in zip(kinds, names, strict=True):
        print(f"{out / name}: differs from the net by {differences[kind]:.1e} at most")
    print(f"{out / FACTS}: the classes and how pictures are read")
    return 0


def _facts(
    options: argparse.Namespace, net: "Classifier", support: "SupportSet", pictures: "Pictures"
) -> dict[str, Any]:
    from maml_cuda.train.exported import INPUT, OUTPUT
    from maml_cuda.train.provenance import versions

    shape = [pictures.channels, pictures.height, pictures.width]
    return {
        "classes": support.classes,
        "input": {"name": INPUT, "dtype": "float32", "shape": [INPUT, *shape]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": [INPUT, len(support.classes)]},
        "preprocessing": {
            "orientation": "as EXIF says",
            "transparent_on": pictures.background,
            "colours": MODES[pictures.channels],
            "height": pictures.height,
            "width": pictures.width,
            "resampling": "Lanczos",
            "inverted_if_median_above": 127 if pictures.light_ink else None,
            "divided_by": 255,
        },
        "batch_norm": options.batch_norm,
        "run": options.run,
        "checkpoint": options.checkpoint,
        "iteration": net.iteration,
        "steps": net.steps,
        "support_pictures": len(support.x),
        "versions": versions(),
    }
