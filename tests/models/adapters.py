"""Computed weights (LoRA, hypernetworks, weight and spectral norm), and contexts of a task (CAVIA, MeLU)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

# -- LoRA ------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """loralib's Linear: the frozen weight's output, and the product of two matrices of low rank beside it."""

    def __init__(self, features: int, width: int, r: int, alpha: int = 1) -> None:
        super().__init__(features, width)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(r, features)), nn.Parameter(torch.zeros(width, r))
        self.scaling, self.merged = alpha / r, False
        self.weight.requires_grad = False
        nn.init.normal_(self.lora_A, 0, 0.3)
        nn.init.normal_(self.lora_B, 0, 0.3)  # zeros at the start of training

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, bias=self.bias)
        if not self.merged:
            result += (x @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * self.scaling
        return result


class LoRAConv2d(nn.Module):
    """loralib's Conv2d: a change of low rank is added to the kernel."""

    def __init__(self, channels: int, width: int, kernel: int, r: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel)
        self.conv.weight.requires_grad = False
        self.lora_A = nn.Parameter(0.3 * torch.randn(r * kernel, channels * kernel))
        self.lora_B = nn.Parameter(0.3 * torch.randn(width * kernel, r * kernel))
        self.scaling = 1 / r

    def forward(self, x: Tensor) -> Tensor:
        change = (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling
        return self.conv._conv_forward(x, self.conv.weight + change, self.conv.bias)


# -- Hypernetworks ---------------------------------------------------------------------------------------------


class KernelGenerator(nn.Module):
    """HyperNetworks (Ha et al. 2016): an embedding gives a convolution's kernel by two matrices."""

    def __init__(self, embedding: int, width: int, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.z_dim, self.shape = embedding, (width, channels, kernel, kernel)
        self.w1 = nn.Parameter(0.3 * torch.randn(embedding, width * kernel**2))
        self.b1 = nn.Parameter(0.3 * torch.randn(width * kernel**2))
        self.w2 = nn.Parameter(0.3 * torch.randn(embedding, channels * embedding))
        self.b2 = nn.Parameter(0.3 * torch.randn(channels * embedding))

    def forward(self, z: Tensor) -> Tensor:
        h_in = (torch.matmul(z, self.w2) + self.b2).view(self.shape[1], self.z_dim)
        h_final = torch.matmul(h_in, self.w1) + self.b1
        return h_final.view(self.shape)


class Embedding(nn.Module):
    """Tiles of a kernel, one embedding each, concatenated over both of its first axes."""

    def __init__(self, rows: int, columns: int, embedding: int) -> None:
        super().__init__()
        self.z_num = rows, columns
        self.z_list = nn.ParameterList(nn.Parameter(torch.randn(embedding)) for _ in range(rows * columns))

    def forward(self, hyper_net: nn.Module) -> Tensor:
        h, k = self.z_num
        rows = [torch.cat([hyper_net(self.z_list[i * k + j]) for j in range(k)], dim=1) for i in range(h)]
        return torch.cat(rows, dim=0)


class HyperResNet(nn.Module):
    """A residual block whose two kernels come from one hypernetwork."""

    def __init__(self, width: int, embedding: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.hope = KernelGenerator(embedding, width, width)
        self.zs = nn.ModuleList([Embedding(2, 1, embedding), Embedding(1, 2, embedding)])
        self.bn2, self.bn3 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)
        self.final = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        w1, w2 = (z(self.hope) for z in self.zs)
        out = F.relu(self.bn2(F.conv2d(x, w1, stride=1, padding=1)), inplace=True)
        out = self.bn3(F.conv2d(out, w2, padding=1))
        out += x
        return self.final(F.relu(out).mean((2, 3)))


class HyperMLP(nn.Module):
    """An embedding of the task gives all weights of a small MLP (von Oswald et al. 2020)."""

    def __init__(self, sizes: list[int], embedding: int, hidden: int) -> None:
        super().__init__()
        self.shapes = list(pairwise(sizes))
        count = sum(a * b + b for a, b in self.shapes)
        self.embedding = nn.Parameter(torch.randn(embedding))
        self.generator = nn.Sequential(nn.Linear(embedding, hidden), nn.ReLU(), nn.Linear(hidden, count))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.generator(self.embedding)
        at = 0
        for i, (a, b) in enumerate(self.shapes):
            weight = weights[at : at + a * b].view(b, a)
            bias = weights[at + a * b : at + a * b + b]
            at += a * b + b
            x = F.linear(x, weight, bias)
            x = torch.tanh(x) if i < len(self.shapes) - 1 else x
        return x


# -- Reparametrised weights ------------------------------------------------------------------------------------


def weight_normed(sizes: list[int]) -> nn.Sequential:
    """Salimans and Kingma 2016: a direction and a length for each row of a weight."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [weight_norm(nn.Linear(a, b)), nn.ELU()]
    return nn.Sequential(*layers[:-1])


def spectral_normed(sizes: list[int]) -> nn.Sequential:
    """Miyato et al. 2018: weights divided by their largest singular value, from one step of the power iteration.

    In train mode each forward moves the vectors of the power iteration, which are buffers.
    """
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [spectral_norm(nn.Linear(a, b)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])


# -- CAVIA -----------------------------------------------------------------------------------------------------


class CaviaModel(nn.Module):
    """CAVIA's regression network: a context, which alone is adapted, beside the input."""

    def __init__(self, features: int, outputs: int, context: int, hidden: list[int]) -> None:
        super().__init__()
        sizes = [features + context, *hidden, outputs]
        self.fc_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.context_params = nn.Parameter(torch.zeros(context))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, self.context_params.expand(x.shape[0], -1)), dim=1)
        for k in range(len(self.fc_layers) - 1):
            x = F.relu(self.fc_layers[k](x))
        return self.fc_layers[-1](x)


class CondConvNet(nn.Module):
    """CAVIA's convolutional network: the context enters by FiLM at the third layer, or at the last linear layer."""

    def __init__(self, filters: int, context: int, film: bool, classes: int) -> None:
        super().__init__()
        self.num_filters, self.film = filters, film
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else filters, filters, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4))
        self.fc1 = nn.Linear(filters + (0 if film else context), classes)
        if film:
            self.film3 = nn.Linear(context, 2 * filters)
        self.context_params = nn.Parameter(0.3 * torch.randn(context))

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.max_pool2d(norm(conv(x)), kernel_size=2)
            if self.film and i == 2:
                film = self.film3(self.context_params)
                gamma = film[: self.num_filters].view(1, -1, 1, 1)
                beta = film[self.num_filters :].view(1, -1, 1, 1)
                x = gamma * x + beta
            x = F.relu(x)
        x = x.view(x.size(0), -1)
        if not self.film:
            x = torch.cat((x, self.context_params.expand(x.size(0), -1)), dim=1)
        return self.fc1(x)


# -- MeLU ------------------------------------------------------------------------------------------------------


class MeLU(nn.Module):
    """MeLU: embeddings of a film and of a user, and a decision by linear layers, which alone are adapted.

    A row of integers [n, 1 + genres + directors + 2]: a rating class, indicators of genres and of directors, the user's
    gender and age. The sum of the chosen columns of a matrix, over their number, embeds the indicators.
    """

    def __init__(self, ratings: int, genres: int, directors: int, ages: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.genres, self.directors = genres, directors
        self.embedding_rate = nn.Embedding(ratings, dim)
        self.embedding_genre = nn.Linear(genres, dim, bias=False)
        self.embedding_director = nn.Linear(directors, dim, bias=False)
        self.embedding_gender, self.embedding_age = nn.Embedding(2, dim), nn.Embedding(ages, dim)
        self.fc1, self.fc2, self.linear_out = (
            nn.Linear(5 * dim, hidden),
            nn.Linear(hidden, hidden),
            nn.Linear(hidden, 1),
        )

    def forward(self, x: Tensor, training: bool = True) -> Tensor:
        middle, end = 1 + self.genres, 1 + self.genres + self.directors
        genre, director = (part.to(self.fc1.weight.dtype) for part in (x[:, 1:middle], x[:, middle:end]))
        parts = (
            self.embedding_rate(x[:, 0]),
            self.embedding_genre(genre) / torch.sum(genre, 1).view(-1, 1),
            self.embedding_director(director) / torch.sum(director, 1).view(-1, 1),
            self.embedding_gender(x[:, end]),
            self.embedding_age(x[:, end + 1]),
        )
        x = F.relu(self.fc1(torch.cat(parts, 1)))
        return self.linear_out(F.relu(self.fc2(x)))
