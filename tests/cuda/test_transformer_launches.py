"""A transformer: sums with the LayerNorm behind them, and the cotangents of an attention, are one launch each."""

from __future__ import annotations

import pytest
import torch

from benchmarks.modern_nets import Transformer
from maml_cuda import FusedMAML
from tests.conftest import check_meta_gradient
from tests.cuda.kernel_models import KERNELS, check_bits_of_chunks, episodes, kernels

pytestmark = [KERNELS, pytest.mark.usefixtures("machine")]

SAMPLE = (5, 3)  # tokens


def net() -> Transformer:
    torch.manual_seed(0)
    return Transformer(4, inputs=3, tokens=5, width=8, hidden=12).double()


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradients_are_exact(first_order: bool) -> None:
    data = episodes(SAMPLE, torch.float64, tasks=2)
    maml = check_meta_gradient(net(), "cross_entropy", data, 0.1, 2, first_order=first_order)
    assert maml.backend == "cuda"


def test_launches(machine: str) -> None:
    if machine == "cuda":
        pytest.skip("the emulation logs the kernels")
    maml = FusedMAML(net(), 0.1, 2, backend="fused", cuda_graphs=False)
    launched = kernels(maml, episodes(SAMPLE, torch.float64, tasks=1))
    # Two inner steps, the query and two products: three backward passes and two of tangents, of two blocks with two
    # norms each.
    assert (launched["group_norm_backward"], launched["group_norm_backward_tangent"]) == (12, 8)
    assert launched["attention_cotangents_kernel"] == 10
    assert launched["clear_kernel"] == 0


def test_bits_do_not_depend_on_the_number_of_tasks() -> None:
    check_bits_of_chunks(net(), episodes(SAMPLE, torch.float64), 1)
