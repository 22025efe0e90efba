"""Attention and recurrent layers on the general path, which needs their second derivatives."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maml_cuda.functional import Functional
from tests.engine.general_path import check_entries, episode, maml_of


class Attends(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        if attention == "MultiheadAttention":
            self.layer: nn.Module = nn.MultiheadAttention(4, 2, batch_first=True)
        elif attention == "TransformerEncoderLayer":
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, activation="gelu")
        else:
            self.layer = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention == "MultiheadAttention":
            x = self.layer(x, x, x, need_weights=False)[0]
        elif self.attention == "TransformerEncoderLayer":
            x = self.layer(x)
        else:
            q, k, v = self.layer(x).unsqueeze(1).chunk(3, -1)
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.head(x.mean(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["scaled_dot_product", "MultiheadAttention", "TransformerEncoderLayer"])
def test_attention(attention, training):
    check_entries(Attends(attention).double().train(training), episode(5, 4))


def test_attention_in_several_threads():
    """The attention backends are a global setting of torch: two threads that change it do not disturb each other."""
    enabled = torch.backends.cuda.flash_sdp_enabled
    function = Functional(nn.Linear(1, 1))
    with function.differentiable_twice():
        thread = threading.Thread(target=lambda: maml_of(Attends("scaled_dot_product").double())(*episode(5, 4)))
        thread.start()
        thread.join()
        assert not enabled()
    assert enabled()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)
        self.cudnn: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.cudnn.add(torch.backends.cudnn.enabled)
        return self.head(self.layer(x)[0][:, -1])


def test_recurrent_layers():
    """cuDNN is off where a second derivative is taken, because its backward has none."""
    model, data = Recurrent().double(), episode(5, 2)
    before = torch.backends.cudnn.enabled
    maml_of(model, first_order=True, loss=F.mse_loss)(*data)
    assert model.cudnn == {before}
    check_entries(model, data)
    assert model.cudnn == {before, False}
    assert torch.backends.cudnn.enabled == before
    copy.deepcopy(model)


@pytest.mark.parametrize("chosen", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_the_users_choice_of_attention_comes_back(chosen):
    flags = ("flash_sdp_enabled", "math_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled")
    maml, data = maml_of(Attends("scaled_dot_product").double()), episode(5, 4)
    with sdpa_kernel(chosen):
        before = [getattr(torch.backends.cuda, name)() for name in flags]
        maml(*data).loss.backward()
        assert [getattr(torch.backends.cuda, name)() for name in flags] == before
