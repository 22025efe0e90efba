"""``maml-cuda info``: prints the build, the versions, the number of threads and the devices."""

import argparse
from typing import Any

from maml_cuda import build_info


def add_parser(commands: Any) -> None:
    commands.add_parser("info", help="print the build, the versions, the number of threads and the devices")


def run(options: argparse.Namespace) -> int:
    """``maml-cuda info``: prints the build, the versions, the number of threads and the devices."""
    import torch

    from maml_cuda.train.provenance import versions

    gpus = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    machine = {"threads": torch.get_num_threads(), "devices": ", ".join(["cpu", *gpus])}
    for name, value in (build_info() | versions() | machine).items():
        print(f"{name:20} {value}")
    return 0
