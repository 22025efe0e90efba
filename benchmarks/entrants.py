"""Who is in the benchmark, by name: we and the rivals."""

from __future__ import annotations

from .jax_rival import jax_forward, jax_reverse
from .libraries import higher, learn2learn, torchopt
from .rivals import Builder, autograd_loop, compiled, func_vmap

OURS = "maml_cuda"
RIVALS: dict[str, Builder] = {
    "autograd loop": autograd_loop,
    "learn2learn": learn2learn,
    "higher": higher,
    "TorchOpt": torchopt,
    "torch.func vmap": func_vmap,
    "torch.compile": compiled,
    "JAX": jax_reverse,
    "JAX forward-over-reverse": jax_forward,
}
COMPILED = ("torch.compile", "JAX", "JAX forward-over-reverse")  # half a minute and more before the first step
SECOND_ORDER = ("JAX forward-over-reverse",)  # the same as another without Hessian-vector products
GROWTH_SIDES = (OURS, "autograd loop", "torch.func vmap")  # none that is compiled anew for each shape
