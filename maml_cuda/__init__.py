"""maml_cuda: the exact MAML meta-gradient of a PyTorch model, in one fused call.

Importing the package loads only its compiled core. torch, and the ``torch.library`` ops of ``maml_cuda``, are loaded at
the first use of one of the package's names.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if PathFinder.find_spec("maml_cuda._core", __path__) is None:
    raise ImportError(
        f"maml_cuda was imported from {Path(__file__).parent}, where its compiled core is not built. In a checkout, "
        "build it in place: pip install -c constraints.txt -e . ; if you installed the package by `pip install .`, run "
        "Python in a folder other than the checkout."
    )

from maml_cuda import _core
from maml_cuda.lazy_imports import lazily

if TYPE_CHECKING:
    from maml_cuda import optim, policies, reference
    from maml_cuda.batch_norm import PerStepBatchNorm1d, PerStepBatchNorm2d, at_step, convert_per_step
    from maml_cuda.diagnosis.doctoring import doctor
    from maml_cuda.diagnosis.report import Diagnosis
    from maml_cuda.fused_maml import FusedMAML, MetaOutput
    from maml_cuda.gradient_check import gradcheck
    from maml_cuda.targets import PolicyTarget
    from maml_cuda.train.trained import TrainedMAML, load
else:
    __getattr__ = lazily(
        __name__,
        {
            "Diagnosis": "diagnosis.report",
            "FusedMAML": "fused_maml",
            "MetaOutput": "fused_maml",
            "PerStepBatchNorm1d": "batch_norm",
            "PerStepBatchNorm2d": "batch_norm",
            "PolicyTarget": "targets",
            "TrainedMAML": "train.trained",
            "at_step": "batch_norm",
            "convert_per_step": "batch_norm",
            "doctor": "diagnosis.doctoring",
            "gradcheck": "gradient_check",
            "load": "train.trained",
        },
    )

__version__ = _core.version

__all__ = [
    "Diagnosis",
    "FusedMAML",
    "MetaOutput",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "PolicyTarget",
    "TrainedMAML",
    "at_step",
    "build_info",
    "convert_per_step",
    "doctor",
    "gradcheck",
    "load",
    "optim",
    "policies",
    "reference",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def build_info() -> dict[str, object]:
    """Describes the compiled core.

    Returns:
        A dict with these keys.

            - `version`: of maml_cuda.
            - `cuda`: the version of CUDA that the GPU kernels were compiled with, or None for a build without them.
            - `cuda_architectures`: the GPU architectures that the kernels were compiled for.
            - `cpu_isa`: the instruction set that the CPU backend uses in this process.
            - `cpu_isas`: the instruction sets that it was compiled for.
            - `compiler`: the C++ compiler.
    """
    return {
        "version": _core.version,
        "cuda": _core.cuda,
        "cuda_architectures": _core.cuda_architectures.split(),
        "cpu_isa": _core.cpu_isa(),
        "cpu_isas": _core.instruction_sets(),
        "compiler": _core.compiler,
    }
