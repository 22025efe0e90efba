"""maml_cuda: the exact MAML meta-gradient of a PyTorch model, in one fused call."""

from __future__ import annotations

from pathlib import Path

if not any(Path(__file__).parent.glob("_core.*")):
    raise ImportError(
        f"maml_cuda was imported from {Path(__file__).parent}, where its extension module is not built. In a checkout, "
        "install it in place with `pip install -e .`; an installed package is imported from any other folder."
    )

from . import _core, policies, reference
from .batch_norm import PerStepBatchNorm1d, PerStepBatchNorm2d, at_step, convert_per_step
from .fused_maml import FusedMAML, MetaOutput
from .gradcheck import gradcheck
from .targets import PolicyTarget

__version__ = _core.version

__all__ = [
    "FusedMAML",
    "MetaOutput",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "PolicyTarget",
    "at_step",
    "build_info",
    "convert_per_step",
    "gradcheck",
    "policies",
    "reference",
]


def build_info() -> dict[str, object]:
    """What this build holds and uses: version, cuda, cuda_architectures, cpu_isa, cpu_isas, compiler."""
    return {
        "version": _core.version,
        "cuda": _core.cuda,
        "cuda_architectures": _core.cuda_architectures.split(),
        "cpu_isa": _core.cpu_isa(),
        "cpu_isas": _core.instruction_sets(),
        "compiler": _core.compiler,
    }
