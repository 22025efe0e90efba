"""learn2learn's MAML, for environments in which the library cannot be imported: the same operations, rewritten.

`clone` copies all modules and clones all parameters. `adapt` replaces each parameter by its sum with an update. The
interface is that of `learn2learn.algorithms.MAML`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd import grad


class MAML(nn.Module):
    def __init__(self, model: nn.Module, lr: float, first_order: bool = False) -> None:
        super().__init__()
        self.module = model
        self.lr = lr
        self.first_order = first_order

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args)

    def clone(self) -> MAML:
        return MAML(clone_module(self.module), self.lr, self.first_order)

    def adapt(self, loss: Tensor) -> None:
        second_order = not self.first_order
        grads = grad(loss, list(self.module.parameters()), retain_graph=second_order, create_graph=second_order)
        for p, g in zip(self.module.parameters(), grads, strict=True):
            p.update = -self.lr * g
        update_module(self.module)


def clone_module(module: nn.Module) -> nn.Module:
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {name: p if p is None else p.clone() for name, p in module._parameters.items()}
    clone._buffers = module._buffers.copy()
    clone._modules = {name: clone_module(child) for name, child in module._modules.items()}
    return clone


def update_module(module: nn.Module) -> None:
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = p + p.update
    for child in module._modules.values():
        update_module(child)
