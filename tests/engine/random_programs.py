"""Random programs on tensors of any shape: modules as source, with data, a loss and an inner loop."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracle
from tests.engine.random_lines import SAMPLES, Writer


@dataclass
class RandomProgram:
    """A random module with its data in float64.

    Attributes:
        source: of the module.
        model: on which every parameter has a value.
        loss: "mse" or "cross_entropy".
        data: x_spt, y_spt, x_qry, y_qry.
        inner_lr: so small that a step is shorter than 0.1.
        adapted: names of parameters that the loss depends on.
    """

    source: str
    model: nn.Module
    loss: str
    data: list[Tensor]
    inner_lr: float
    steps: int
    first_order: bool
    adapted: list[str]


def random_program(seed: int) -> RandomProgram:
    """The program of a seed: the same on every machine."""
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    n_support, n_query = random.choice([2, 3, 5]), random.choice([2, 3, 4])
    sample = [random.choice([1, 2, 3, 4, 5, n_support, n_query]) for _ in range(random.randint(1, 3))]
    x = tuple(torch.randn(n, *sample, generator=generator, dtype=torch.float64) for n in SAMPLES)
    writer = Writer(random, {"x": x}, random.random() < 0.5)
    width = random.randint(1, 5)
    writer.emit(f"x @ {writer.tensor(sample[-1], width, constant=False)} + {writer.tensor(width, constant=False)}")
    wanted = random.randint(3, 9)
    while len(writer.lines) < wanted:
        writer.operation()
    writer.lines.append(f"return {result(writer)}")
    source = source_of(writer, seed)
    names: dict[str, Any] = {"__name__": __name__, "torch": torch, "F": F, "nn": nn}
    exec(compile(source, f"<random program {seed}>", "exec"), names)
    model = names["Program"]()
    for name, value in writer.held.items():
        getattr(model, name).data.copy_(value.detach())
    return completed(source, model, random, generator, (n_support, n_query), sample)


def result(writer: Writer) -> str:
    """What the program returns: a variable with the samples in front, plus the means of those that no line has read."""
    led = [v for v in writer.values if v != "x" and writer.shape(v)[:1] == [("n", True)]]
    last = led[-1]
    others = [v for v in led if v in writer.unread and v != last]
    if not any(writer.values[v][0].requires_grad for v in (last, *others)):
        others.append("h0")
    extra = "".join(f" + {v}.reshape(n, -1).mean(1)" for v in others)
    axes = len(writer.shape(last)) - 1
    if not extra:
        return last
    ones = ", ".join(["n", *["1"] * axes])
    return f"{last} + ({extra.removeprefix(' + ')}).reshape({ones})"


def source_of(writer: Writer, seed: int) -> str:
    made = []
    for name, value in writer.held.items():
        tensor = f"torch.empty({tuple(value.shape)}, dtype=torch.float64)"
        made.append(
            f"self.{name} = nn.Parameter({tensor})" if name[0] == "p" else f'self.register_buffer("{name}", {tensor})'
        )
    parts = [
        f"class Program(nn.Module):  # seed {seed}", "    def __init__(self):", "        super().__init__()",
        *(f"        {line}" for line in made), "", "    def forward(self, x):", "        n = x.shape[0]",
        *(f"        {line}" for line in writer.lines),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def completed(
    source: str,
    model: nn.Module,
    random: Random,
    generator: torch.Generator,
    counts: tuple[int, int],
    sample: list[int],
) -> RandomProgram:
    """Adds the loss, the data and the inner loop."""
    data: list[Tensor] = []
    loss = random.choice(["mse", "cross_entropy"])
    names, parameters = zip(*model.named_parameters(), strict=True)
    for n in counts:
        x = torch.randn(2, n, *sample, generator=generator, dtype=torch.float64)
        out = model(x[0])
        if out.dim() != 2:
            loss = "mse"
        if loss == "cross_entropy":
            y = torch.randint(out.shape[1], (2, n), generator=generator)
        else:
            y = torch.randn(2, *out.shape, generator=generator, dtype=torch.float64)
        data += [x, y]
    out = model(data[0].flatten(0, 1))  # both tasks
    value = oracle.LOSSES[loss](out, data[1].flatten(0, 1))
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    length = sum(g.norm().item() for g in grads if g is not None)
    reached = [name for name, g in zip(names, grads, strict=True) if g is not None]
    adapted = reached if random.random() < 0.5 else random.sample(reached, random.randint(1, len(reached)))
    rate, steps, first_order = 0.1 / (1 + length), random.randint(1, 3), random.random() < 0.2
    return RandomProgram(source, model, loss, data, rate, steps, first_order, adapted)
