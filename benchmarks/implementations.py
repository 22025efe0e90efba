"""The implementations of the benchmark by name."""

from __future__ import annotations

from maml_cuda.benchmark.baselines import autograd_loop, func_vmap

from .jax_meta_step import jax_forward, jax_reverse
from .libraries import higher, learn2learn, torchopt
from .meta_steps import Builder, compiled

MAML_CUDA = "maml_cuda"
BASELINES: dict[str, Builder] = {
    "autograd loop": autograd_loop,
    "learn2learn": learn2learn,
    "higher": higher,
    "TorchOpt": torchopt,
    "torch.func vmap": func_vmap,
    "torch.compile": compiled,
    "JAX": jax_reverse,
    "JAX forward-over-reverse": jax_forward,
}
COMPILED = ("torch.compile", "JAX", "JAX forward-over-reverse")  # they compile for 30 s or more before the first step
SECOND_ORDER_ONLY = ("JAX forward-over-reverse",)  # equal to "JAX" without Hessian-vector products
GROWTH_IMPLEMENTATIONS = (MAML_CUDA, "autograd loop", "torch.func vmap")  # those that do not recompile for every shape
