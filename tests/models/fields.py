"""Fields: networks of coordinates, physics-informed networks and neural operators."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- SIREN -----------------------------------------------------------------------------------------------------


class Sine(nn.Module):
    def __init__(self, w0: float = 1.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)


def siren_init(linear: Any, w0: float, first: bool) -> None:
    """Uniform within 1 / fan_in for the first layer, sqrt(6 / fan_in) / w0 for the others (Sitzmann et al. 2020)."""
    fan_in = linear.weight.shape[1]
    bound = 1 / fan_in if first else math.sqrt(6 / fan_in) / w0
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.uniform_(linear.bias, -bound, bound)


class SirenLayer(nn.Module):
    """The layer of COIN++ and CORAL: the last one has no sine, and `shift` is added in place."""

    def __init__(self, dim_in: int, dim_out: int, w0: float, first: bool, last: bool, shift: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)
        siren_init(self.linear, w0, first)
        self.is_last, self.shift = last, shift
        self.activation = Sine(w0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.is_last:
            out += self.shift
        else:
            out = self.activation(out)
        return out


class Siren(nn.Module):
    """shift: 0 in CORAL, 0.5 in COIN++."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, layers: int, shift: float, w0: float = 30.0) -> None:
        super().__init__()
        sizes = [dim_in] + [hidden] * (layers - 1)
        steps = enumerate(pairwise(sizes))
        self.net = nn.Sequential(*[SirenLayer(a, b, w0, i == 0, False, shift) for i, (a, b) in steps])
        self.last_layer = SirenLayer(hidden, dim_out, w0, False, True, shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.net(x))


class ModulatedSiren(Siren):
    """COIN++ and CORAL: a latent of the task gives a shift, and with `scales` a scale, of each hidden feature.

    `modulated_forward` takes a batch of signals [batch, points, dim] with their latents. Here a task is one signal, and
    its points are the samples.
    """

    def __init__(
        self, dim_in: int, hidden: int, dim_out: int, layers: int, latent: int, scales: bool, w0: float = 5.0
    ) -> None:
        super().__init__(dim_in, hidden, dim_out, layers, 0.0, w0)
        self.hidden, self.modulate_scale = hidden, scales
        self.num_modulations = hidden * (layers - 1) * (2 if scales else 1)
        self.modulation_net = nn.Linear(latent, self.num_modulations)
        self.latent = nn.Parameter(0.1 * torch.randn(1, latent))

    def modulated_forward(self, x: Tensor, latent: Tensor) -> Tensor:
        shape = x.shape[:-1]
        x = x.view(x.shape[0], -1, x.shape[-1])
        modulations = self.modulation_net(latent)
        middle = self.num_modulations // 2 if self.modulate_scale else 0
        at = 0
        for module in self.net:
            scale: Any = 1.0
            if self.modulate_scale:
                scale = modulations[:, at : at + self.hidden].unsqueeze(1) + 1.0
            shift = modulations[:, middle + at : middle + at + self.hidden].unsqueeze(1)
            x = module.activation(scale * module.linear(x) + shift)
            at = at + self.hidden
        out = self.last_layer(x)
        return out.view(*shape, out.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.modulated_forward(x[None], self.latent)[0]


class LucidrainsSirenLayer(nn.Module):
    """siren-pytorch: the weight and the bias are parameters of the layer itself."""

    def __init__(self, dim_in: int, dim_out: int, w0: float, first: bool, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim_out, dim_in)), nn.Parameter(torch.zeros(dim_out))
        siren_init(self, w0, first)
        self.activation = Sine(w0) if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(F.linear(x, self.weight, self.bias))


class LucidrainsSiren(nn.Module):
    """siren-pytorch: optional modulations, a tensor for each layer."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, layers: int, w0: float = 30.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([])
        for i in range(layers):
            self.layers.append(LucidrainsSirenLayer(dim_in if i == 0 else hidden, hidden, w0, i == 0))
        self.last_layer = LucidrainsSirenLayer(hidden, dim_out, w0, False, nn.Identity())

    def forward(self, x: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        for layer, mod in zip(self.layers, mods or (None,) * len(self.layers), strict=True):
            x = layer(x)
            if mod is not None:
                x *= mod
        return self.last_layer(x)


class MetaBatchLinear(nn.Module):
    """GradNCP: one weight repeated for every signal of the batch, and a product of batches of matrices."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(dim_out, dim_in)), nn.Parameter(torch.empty(dim_out))

    def forward(self, inputs: Tensor, params: dict[str, Tensor] | None = None) -> Tensor:
        if params is None:
            weight = self.weight.unsqueeze(0).repeat(inputs.size(0), 1, 1)
            bias = self.bias.unsqueeze(0).repeat(inputs.size(0), 1)
        else:
            weight, bias = params["weight"], params["bias"]
        inputs = inputs.view(inputs.size(0), -1, inputs.size(-1))
        return torch.bmm(inputs, weight.permute(0, 2, 1)) + bias.unsqueeze(-2)


class MetaSiren(nn.Module):
    """GradNCP's SIREN of whole signals [n, points, dim]."""

    def __init__(self, dim_in: int, hidden: int, dim_out: int, layers: int, w0: float = 30.0) -> None:
        super().__init__()
        sizes = [dim_in] + [hidden] * (layers - 1) + [dim_out]
        self.layers = nn.ModuleList(MetaBatchLinear(a, b) for a, b in pairwise(sizes))
        for i, layer in enumerate(self.layers):
            siren_init(layer, w0, i == 0)
        self.activation = Sine(w0)

    def forward(self, x: Tensor, params: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, None if params is None else params[f"layers.{i}"])
            x = self.activation(x) if i < len(self.layers) - 1 else x
        return x + 0.5


# -- Fourier features and multiplicative filters ---------------------------------------------------------------


class FourierFeatures(nn.Module):
    """Tancik et al. 2020: [sin, cos] of random frequencies, which are a buffer."""

    def __init__(self, dim_in: int, size: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(size, dim_in) * scale)

    def forward(self, x: Tensor) -> Tensor:
        projected = (2.0 * math.pi * x) @ self.B.T
        return torch.cat([torch.sin(projected), torch.cos(projected)], dim=-1)


def fourier_mlp(dim_in: int, size: int, hidden: int, dim_out: int) -> nn.Sequential:
    layers = [nn.Linear(2 * size, hidden), nn.ReLU(), nn.Linear(hidden, dim_out), nn.Sigmoid()]
    return nn.Sequential(FourierFeatures(dim_in, size, 1.0), *layers)


class FilmFourierFeatures(nn.Module):
    """CORAL's network with Fourier features: frozen frequencies, FiLM of each hidden layer by a latent of the task."""

    def __init__(self, dim_in: int, size: int, hidden: int, dim_out: int, layers: int, latent: int) -> None:
        super().__init__()
        self.avals = nn.Parameter(torch.ones(size), requires_grad=False)
        self.bvals = nn.Parameter(torch.randn(size, dim_in), requires_grad=False)
        widths = [2 * size] + [hidden] * layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(hidden, dim_out)
        self.hidden = hidden
        self.modulation = nn.Linear(latent, 2 * hidden * layers)
        self.latent = nn.Parameter(0.1 * torch.randn(1, latent))

    def modulated_forward(self, x: Tensor, latent: Tensor) -> Tensor:
        angle = (2.0 * math.pi * x) @ self.bvals.T
        x = torch.cat([self.avals * torch.sin(angle), self.avals * torch.cos(angle)], dim=-1)
        scales, shifts = self.modulation(latent).reshape(latent.shape[0], 2, len(self.layers), self.hidden).unbind(1)
        for i, layer in enumerate(self.layers):
            x = F.silu((1 + scales[:, i, None]) * layer(x) + shifts[:, i, None])
        return self.last(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.modulated_forward(x[None], self.latent)[0]


class FourierFilter(nn.Module):
    def __init__(self, dim_in: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, hidden)
        self.linear.weight.data *= scale
        self.linear.bias.data.uniform_(-math.pi, math.pi)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.linear(x))


class GaborFilter(nn.Module):
    """A sine under a Gaussian window, whose exponent is the squared distance to a learned centre."""

    def __init__(self, dim_in: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, hidden)
        self.mu = nn.Parameter(2 * torch.rand(hidden, dim_in) - 1)
        self.gamma = nn.Parameter(0.2 + torch.rand(hidden))
        self.linear.weight.data *= scale * torch.sqrt(self.gamma[:, None])
        self.linear.bias.data.uniform_(-math.pi, math.pi)

    def forward(self, x: Tensor) -> Tensor:
        distance = (x**2).sum(-1)[..., None] + (self.mu**2).sum(-1)[None, :] - 2 * x @ self.mu.T
        return torch.sin(self.linear(x)) * torch.exp(-0.5 * distance * self.gamma[None, :])


class MultiplicativeFilters(nn.Module):
    """Fathony et al. 2021: each layer's linear output times a filter of the input."""

    def __init__(self, filter: Any, dim_in: int, hidden: int, dim_out: int, layers: int, scale: float) -> None:
        super().__init__()
        self.filters = nn.ModuleList(filter(dim_in, hidden, scale / math.sqrt(layers + 1)) for _ in range(layers + 1))
        self.linear = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.output_linear = nn.Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.filters[0](x)
        for i in range(1, len(self.filters)):
            out = self.filters[i](x) * self.linear[i - 1](out)
        return self.output_linear(out)


# -- Physics-informed networks ---------------------------------------------------------------------------------


def pinn(sizes: list[int]) -> nn.Sequential:
    """The network of PINNs: tanh between linear layers."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Burgers(nn.Module):
    """u and the residual of the Burgers equation u_t + u u_x = nu u_xx, from derivatives by the coordinates."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.dnn = pinn(sizes)
        self.nu = 0.01 / math.pi

    def net_u(self, x: Tensor, t: Tensor) -> Tensor:
        return self.dnn(torch.cat([x, t], dim=1))

    def net_f(self, x: Tensor, t: Tensor) -> Tensor:
        def derivative(u: Tensor, by: Tensor) -> Tensor:
            return torch.autograd.grad(u, by, torch.ones_like(u), retain_graph=True, create_graph=True)[0]

        u = self.net_u(x, t)
        u_x = derivative(u, x)
        return derivative(u, t) + u * u_x - self.nu * derivative(u_x, x)

    def forward(self, inputs: Tensor) -> Tensor:
        x, t = (part.detach().requires_grad_(True) for part in (inputs[:, 0:1], inputs[:, 1:2]))
        return torch.cat([self.net_u(x, t), self.net_f(x, t)], dim=1)


# -- Neural operators ------------------------------------------------------------------------------------------


def mlp(sizes: list[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))


class DeepONet(nn.Module):
    """CORAL's DeepONet: a function's values [n, m] and points [n, p, dim] give the operator's values [n, p, 1]."""

    def __init__(self, branch: list[int], trunk: list[int]) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(branch), mlp(trunk)
        self.bias = nn.Parameter(torch.zeros([1]))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x_branch, x_trunk = inputs
        for layer in self.trunk:
            x_trunk = torch.tanh(layer(x_trunk))
        for i, layer in enumerate(self.branch):
            x_branch = layer(x_branch) if i == len(self.branch) - 1 else torch.tanh(layer(x_branch))
        x_branch = x_branch.unsqueeze(dim=1).expand(x_trunk.shape)
        return torch.sum(x_branch * x_trunk, dim=-1, keepdim=True) + self.bias


class DeepONetCartesian(nn.Module):
    """DeepXDE's DeepONetCartesianProd: n functions at the same p points, [n, p], by einsum. The points are a buffer."""

    def __init__(self, branch: list[int], trunk: list[int], points: int) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(branch), mlp(trunk)
        self.b = nn.ParameterList([nn.Parameter(torch.tensor(0.0))])
        self.register_buffer("points", torch.randn(points, trunk[0]))

    @staticmethod
    def run(layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers[:-1]:
            x = torch.tanh(layer(x))
        return layers[-1](x)

    def forward(self, x_func: Tensor) -> Tensor:
        x_loc = torch.tanh(self.run(self.trunk, self.points))
        x = torch.einsum("bi,ni->bn", self.run(self.branch, x_func), x_loc)
        x += self.b[0]
        return x


class SpectralConv2d(nn.Module):
    """FNO's layer: the lowest modes of the Fourier transform, times complex weights."""

    def __init__(self, channels: int, width: int, modes: int) -> None:
        super().__init__()
        self.width, self.modes = width, modes
        shape = (channels, width, modes, modes)
        self.weights1 = nn.Parameter(torch.rand(shape, dtype=torch.complex128) / (channels * width))
        self.weights2 = nn.Parameter(torch.rand(shape, dtype=torch.complex128) / (channels * width))

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        x_ft = torch.fft.rfft2(x)
        out_ft = torch.zeros(n, self.width, height, width // 2 + 1, dtype=torch.cdouble)
        m = self.modes
        out_ft[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, :m, :m], self.weights1)
        out_ft[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[:, :, -m:, :m], self.weights2)
        return torch.fft.irfft2(out_ft, s=(height, width))


class FNO2d(nn.Module):
    """The Fourier neural operator on [n, height, width, channels], to which coordinates are appended."""

    def __init__(self, channels: int, width: int, modes: int, layers: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(channels + 2, width)
        self.spectral = nn.ModuleList(SpectralConv2d(width, width, modes) for _ in range(layers))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, _ = x.shape
        rows = torch.linspace(0, 1, height, dtype=x.dtype).reshape(1, height, 1, 1).repeat(n, 1, width, 1)
        columns = torch.linspace(0, 1, width, dtype=x.dtype).reshape(1, 1, width, 1).repeat(n, height, 1, 1)
        x = self.fc0(torch.cat((x, rows, columns), dim=-1)).permute(0, 3, 1, 2)
        for i, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise, strict=True)):
            x = spectral(x) + pointwise(x)
            x = F.gelu(x) if i < len(self.spectral) - 1 else x
        return self.fc2(F.gelu(self.fc1(x.permute(0, 2, 3, 1))))
