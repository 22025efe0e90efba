"""An adapted net as a program that needs no maml_cuda: torch.export and ONNX. Each is compared with the net."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "pictures", "probabilities"
TOLERANCE = 1e-5  # of a probability


class ClassProbabilities(nn.Module):
    """The probability of each of the first ``classes`` outputs of a net."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net(pictures)[:, : self.classes].softmax(-1)  # type: ignore[no-any-return]


def export_programs(net: nn.Module, x: Tensor, files: dict[str, Path]) -> dict[str, float]:
    """Writes programs of a net, reads each again and compares its results with the net's.

    Args:
        net: in eval mode, on the CPU; each output depends on one picture alone.
        x: ``[pictures, channels, height, width]``, at least 2 pictures. The programs are compared on them, on the first
            one by itself, and on noise of another number of pictures.
        files: "pt2" or "onnx" -> the file to write.

    Returns:
        The largest difference of a probability, of each program.

    Raises:
        ValueError: a program gives other probabilities than the net, by more than 1e-5.
        ModuleNotFoundError: a package of the extra [export] is not installed.
    """
    noise = torch.rand(len(x) + 3, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    with _quiet(), torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim(INPUT, min=1)},))
        return {kind: _written(kind, program, path, net, [x, x[:1], noise]) for kind, path in files.items()}


def _written(kind: str, program: Any, path: Path, net: nn.Module, inputs: list[Tensor]) -> float:
    run = _pt2(program, path) if kind == "pt2" else _onnx(program, path)
    largest = 0.0
    for x in inputs:
        expected, got = net(x), run(x)
        if got.shape != expected.shape or not got.isfinite().all():
            raise ValueError(
                f"{path.name} must give finite probabilities {list(expected.shape)}, got {list(got.shape)}"
            )
        largest = max(largest, float((got - expected).abs().max()))
    if largest > TOLERANCE:
        raise ValueError(f"{path.name} must give the probabilities of the net, got a difference of {largest:.2g}")
    return largest


def _pt2(program: Any, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda x: module(x)


def _onnx(program: Any, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    torch.onnx.export(
        program, (), path, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what torch's exporters print about themselves; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
