"""What the pages of docs/moving import: the libraries, or stand-ins in plain torch for two that cannot be installed.

learn2learn 0.2.0 does not build on Python 3.11, and torchmeta 1.8.0 needs torch < 1.10. Their stand-ins have the
functions that the pages call and are written after the published code, in plain autograd: they share nothing with
maml_cuda.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.learn2learn_algorithm import MAML
from tests.data import published

INSTALLED = {"higher": "higher", "torchopt": "torchopt", "parallel_metalearn": "metalearn"}  # page -> module


def provide(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the library of a page of docs/moving importable, or skips the test; and writes the files of its data."""
    if Path(page).parent.name != "moving":
        return
    name = Path(page).stem
    if name in INSTALLED:
        pytest.importorskip(INSTALLED[name], reason='the libraries of docs/moving are in the extra "peers"')
    elif find_spec(name) is None:
        for path, names in STAND_INS[name].items():
            module = ModuleType(path)
            module.__dict__.update(names)
            monkeypatch.setitem(sys.modules, path, module)
            parent, _, child = path.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    if name == "learn2learn":
        published.fc100(Path("data"))


# -- torchmeta -----------------------------------------------------------------------------------------------------


class MetaModule(nn.Module):
    """A module whose forward takes other parameters, by name; None: its own."""

    def get_subdict(self, params: dict[str, Tensor] | None, key: str) -> dict[str, Tensor] | None:
        if params is None:
            return None
        return {name.removeprefix(f"{key}."): p for name, p in params.items() if name.startswith(f"{key}.")}


class MetaLinear(nn.Linear, MetaModule):
    def forward(self, x: Tensor, params: dict[str, Tensor] | None = None) -> Tensor:
        params = dict(self.named_parameters()) if params is None else params
        return F.linear(x, params["weight"], params.get("bias"))


class MetaSequential(nn.Sequential, MetaModule):
    def forward(self, x: Tensor, params: dict[str, Tensor] | None = None) -> Tensor:
        for name, module in self._modules.items():
            x = module(x, params=self.get_subdict(params, name)) if isinstance(module, MetaModule) else module(x)
        return x


def gradient_update_parameters(
    model: MetaModule,
    loss: Tensor,
    params: dict[str, Tensor] | None = None,
    step_size: float = 0.5,
    first_order: bool = False,
) -> dict[str, Tensor]:
    params = dict(model.named_parameters()) if params is None else params
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
    return {name: p - step_size * g for (name, p), g in zip(params.items(), grads, strict=True)}


STAND_INS = {
    "learn2learn": {"learn2learn": {}, "learn2learn.algorithms": {"MAML": MAML}},
    "torchmeta": {
        "torchmeta": {},
        "torchmeta.modules": {"MetaLinear": MetaLinear, "MetaSequential": MetaSequential},
        "torchmeta.utils": {},
        "torchmeta.utils.gradient_based": {"gradient_update_parameters": gradient_update_parameters},
    },
}
