"""Sequences: recurrent networks, by torch's layers and written out, and temporal convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class LstmRegressor(nn.Module):
    """PyTorch-LSTM-for-RUL-Prediction: the last hidden state of an LSTM, then three linear layers.

    The initial states are zeros made in forward.
    """

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.num_layers, self.hidden_size = layers, hidden
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.fc_1, self.fc_2, self.fc = nn.Linear(hidden, 8), nn.Linear(8, 4), nn.Linear(4, 1)
        self.dropout, self.relu = nn.Dropout(0.0), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h_0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size, dtype=x.dtype)
        c_0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size, dtype=x.dtype)
        _, (hn, _) = self.lstm(x, (h_0, c_0))
        out = self.relu(self.fc_1(self.relu(hn[-1])))
        return self.fc(self.dropout(self.relu(self.fc_2(out))))


class GruRegressor(nn.Module):
    """The same task by a GRU: the last output."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gru, self.fc = nn.GRU(features, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        return self.fc(out[:, -1, :])


class Last(nn.Module):
    """A linear layer on a recurrent module's last output."""

    def __init__(self, rnn: nn.Module, size: int, classes: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out[:, -1])


def gates(count: int, features: int, hidden: int, *directions: int) -> list[nn.Parameter]:
    """The parameters w_ih, w_hh, bias_ih, bias_hh of all gates."""
    shapes = (count * hidden, features), (count * hidden, hidden), (count * hidden,), (count * hidden,)
    return [nn.Parameter(0.5 * torch.randn(*directions, *shape)) for shape in shapes]


class UniLSTM(nn.Module):
    """parallel-metalearn's LSTM: the inputs' products at once, then a loop over `unbind`, with the outputs stacked."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.w_ih, self.w_hh, self.bias_ih, self.bias_hh = gates(4, features, hidden)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if hx is None:
            hx = tuple(torch.zeros(1, x.size(0), self.hidden_dim, dtype=x.dtype) for _ in range(2))
        h_t, c_t = hx[0][0], hx[1][0]
        outputs = []
        for gi in torch.unbind(F.linear(x, self.w_ih, self.bias_ih), dim=1):
            i, f, g, o = (gi + F.linear(h_t, self.w_hh, self.bias_hh)).chunk(4, dim=1)
            c_t = torch.sigmoid(f) * c_t + torch.sigmoid(i) * torch.tanh(g)
            h_t = torch.sigmoid(o) * torch.tanh(c_t)
            outputs.append(h_t)
        return torch.stack(outputs, dim=1), (h_t.unsqueeze(0), c_t.unsqueeze(0))


class UniGRU(nn.Module):
    """parallel-metalearn's GRU."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.w_ih, self.w_hh, self.bias_ih, self.bias_hh = gates(3, features, hidden)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if hx is None:
            hx = torch.zeros(1, x.size(0), self.hidden_dim, dtype=x.dtype)
        h_t = hx[0]
        outputs = []
        for gi in torch.unbind(F.linear(x, self.w_ih, self.bias_ih), dim=1):
            i_r, i_z, i_n = gi.chunk(3, dim=1)
            h_r, h_z, h_n = F.linear(h_t, self.w_hh, self.bias_hh).chunk(3, dim=1)
            r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + r * h_n)
            h_t = (1.0 - z) * n + z * h_t
            outputs.append(h_t)
        return torch.stack(outputs, dim=1), h_t.unsqueeze(0)


class ParallelBiLSTM(nn.Module):
    """parallel-metalearn's LSTM of both directions in one loop: the second reads the flipped sequence, by einsum."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.w_ih, self.w_hh, self.bias_ih, self.bias_hh = gates(4, features, hidden, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n = x.size(0)
        h_t = torch.zeros(2, n, self.hidden_dim, dtype=x.dtype)
        c_t = torch.zeros(2, n, self.hidden_dim, dtype=x.dtype)
        both = torch.stack([x, torch.flip(x, dims=[1])], dim=0)
        inputs = torch.einsum("dbsi,dgi->dbsg", both, self.w_ih) + self.bias_ih.view(2, 1, 1, -1)
        outputs = []
        for gi in torch.unbind(inputs, dim=2):
            gh = torch.einsum("dbh,dgh->dbg", h_t, self.w_hh) + self.bias_hh.unsqueeze(1)
            i, f, g, o = (gi + gh).chunk(4, dim=-1)
            c_t = torch.sigmoid(f) * c_t + torch.sigmoid(i) * torch.tanh(g)
            h_t = torch.sigmoid(o) * torch.tanh(c_t)
            outputs.append(h_t)
        out = torch.stack(outputs, dim=2)
        return torch.cat([out[0], torch.flip(out[1], dims=[1])], dim=-1), (h_t, c_t)


class Chomp1d(nn.Module):
    """Cuts what the padding has added at the end, so that a convolution is causal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.chomp_size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp_size].contiguous()


class TemporalBlock(nn.Module):
    """TCN: twice a dilated causal convolution with weight normalisation; the layers have two names each."""

    def __init__(self, channels: int, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(channels, width, kernel, padding=padding, dilation=dilation))
        self.chomp1, self.relu1, self.dropout1 = Chomp1d(padding), nn.ReLU(), nn.Dropout(0.0)
        self.conv2 = weight_norm(nn.Conv1d(width, width, kernel, padding=padding, dilation=dilation))
        self.chomp2, self.relu2, self.dropout2 = Chomp1d(padding), nn.ReLU(), nn.Dropout(0.0)
        first = self.conv1, self.chomp1, self.relu1, self.dropout1
        self.net = nn.Sequential(*first, self.conv2, self.chomp2, self.relu2, self.dropout2)
        self.downsample = nn.Conv1d(channels, width, 1) if channels != width else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    """`log_softmax` as in TCN's mnist_pixel, without it as in its adding_problem."""

    def __init__(self, channels: int, widths: list[int], kernel: int, outputs: int, log_softmax: bool) -> None:
        super().__init__()
        sizes = zip([channels, *widths], widths, strict=False)
        self.tcn = nn.Sequential(*[TemporalBlock(a, b, kernel, 2**i) for i, (a, b) in enumerate(sizes)])
        self.linear = nn.Linear(widths[-1], outputs)
        self.log_softmax = log_softmax

    def forward(self, x: Tensor) -> Tensor:
        o = self.linear(self.tcn(x)[:, :, -1])
        return F.log_softmax(o, dim=1) if self.log_softmax else o
