"""Random lines of a forward, each an operation on tensors of any shape as people write it.

The writer evaluates each line as it goes, with 11 and with 13 samples: a result's axes that differ count samples. Lines
that raise, grow or are not finite are drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLES = 11, 13  # of the two evaluations: no other size is a multiple of them
MOST_ELEMENTS, LARGEST = 2000, 30.0
SMOOTH = [
    "torch.sin({})", "torch.cos({})", "torch.tanh({})", "{}.sigmoid()", "F.gelu({})", "F.silu({})",
    "(0.3 * {}).exp()", "({0} * {0} + 0.5).sqrt()", "torch.rsqrt({0} ** 2 + 0.5)", "{} ** 2", "torch.pow({}, 3)",
    "({0} * {0} + 0.5) ** 0.7", "torch.log1p({0} * {0})", "-{}", "1 - {}", "2 * {} + 0.1", "{} / 3",
    "1 / ({0} * {0} + 1)", "F.softplus({})", "torch.erf({})",
]  # fmt: skip
KINKED = [
    "{}.abs()", "F.relu({})", "{}.clamp(-0.5, 0.5)", "torch.clamp({}, min=0.1)", "F.leaky_relu({}, 0.2)",
    "torch.where({0} > 0, {0}, 0.3 * {0})", "{}.clamp(max=0.4)",
]  # fmt: skip
SMOOTH_PAIRS = [
    "{} + {}", "{} - {}", "{} * {}", "{0} / ({1} * {1} + 1)", "torch.add({}, {}, alpha=0.5)",
    "({0} * {0} + 0.5) ** torch.sigmoid({1})",
]  # fmt: skip
KINKED_PAIRS = ["torch.maximum({}, {})", "torch.minimum({}, {})", "torch.where({0} > {1}, {0}, {1} * 0.5)"]


@dataclass
class Writer:
    """Writes the lines of a forward, and remembers the values of its variables.

    Attributes:
        values: variable -> its value with 11 and with 13 samples.
        held: parameters and buffers by name.
        kinks: functions with kinks may be drawn. A normalised constant is rounding noise, at which a kink takes either
            side: therefore a program has kinks or normalisations, never both.
    """

    random: Random
    values: dict[str, tuple[Tensor, Tensor]]
    kinks: bool
    held: dict[str, Tensor] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)

    # -- lines ------------------------------------------------------------------------------------------------

    def emit(self, text: str) -> bool:
        """Writes a line for an expression; False if it is not fit."""
        try:
            results = tuple(self.evaluate(text, i) for i in range(2))
            axes = [axis_of(*sizes) for sizes in zip(results[0].shape, results[1].shape, strict=True)]
        except (RuntimeError, IndexError, ValueError, TypeError, UserWarning):
            return False
        fits = all(0 < r.numel() <= MOST_ELEMENTS and r.isfinite().all() and r.abs().max() < LARGEST for r in results)
        if not fits or sum(axis[1] for axis in axes) > 1 or len(axes) > 5:
            return False
        name = f"h{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        self.unread -= {v for v in self.values if v in words(text)}
        self.unread.add(name)
        self.values[name] = results
        return True

    def evaluate(self, text: str, which: int) -> Tensor:
        variables = {name: pair[which] for name, pair in self.values.items()}
        return eval(
            text, {"torch": torch, "F": F, "self": SimpleNamespace(**self.held), "n": SAMPLES[which], **variables}
        )

    def operation(self) -> bool:
        """Draws a line; False if what was drawn is not fit. Parameters that were made for it go with it."""
        held = dict(self.held)
        draw: Callable[[str], str] = self.random.choices(
            [
                self.function, self.pair, self.view, self.parts, self.joined, self.reduced, self.product, self.own,
                self.image, self.indexed,
            ],
            [3, 4, 4, 2, 2, 2, 4, 2, 1, 2],
        )[0]  # fmt: skip
        done = self.emit(draw(self.variable()))
        if not done:
            self.held = held
        return done

    # -- operands ---------------------------------------------------------------------------------------------

    def variable(self) -> str:
        """One of the variables, an unread one by preference, or a parameter."""
        names = list(self.values)
        kind = self.random.random()
        if kind < 0.1:
            return f"self.{self.random.choice([*self.held])}"
        return self.random.choice(sorted(self.unread) if kind < 0.75 and self.unread else names)

    def shape(self, v: str) -> list[tuple[str, bool]]:
        """The size of each axis as text, and whether it counts samples."""
        a, b = self.evaluate(v, 0), self.evaluate(v, 1)
        return [axis_of(*sizes) for sizes in zip(a.shape, b.shape, strict=True)]

    def axis(self, v: str) -> int:
        """An axis of v: seldom that of the samples."""
        axes = [i for i, (_, samples) in enumerate(self.shape(v)) if not samples]
        if not axes or self.random.random() < 0.03:
            axes = list(range(len(self.shape(v))))
        return self.random.choice(axes or [0])

    def spelled(self, v: str, axis: int) -> int:
        """The axis, or the same counted from the end."""
        return axis - len(self.shape(v)) if self.random.random() < 0.4 else axis

    def tensor(self, *shape: int, constant: bool | None = None) -> str:
        """A new parameter or buffer."""
        constant = self.random.random() < 0.25 if constant is None else constant
        name = f"{'c' if constant else 'p'}{len(self.held)}"
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        value = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(max(1, *shape[-1:], 1))
        self.held[name] = value.requires_grad_(not constant)
        return f"self.{name}"

    def beside(self, v: str) -> str:
        """An operand that may broadcast against v: a variable, a new tensor or a number."""
        kind = self.random.random()
        if kind < 0.45:
            shape = [1 if samples or self.random.random() < 0.3 else int(size) for size, samples in self.shape(v)]
            return self.tensor(*shape[self.random.randint(0, len(shape)) if self.random.random() < 0.5 else 0 :])
        if kind < 0.55:
            return str(round(self.random.uniform(-2, 2), 2))
        fitting = [u for u in self.values if self.broadcasts(u, v)]
        return self.random.choice(fitting or [v])

    def broadcasts(self, u: str, v: str) -> bool:
        try:
            torch.broadcast_shapes(self.evaluate(u, 0).shape, self.evaluate(v, 0).shape)
        except RuntimeError:
            return False
        return True

    # -- expressions ------------------------------------------------------------------------------------------

    def function(self, v: str) -> str:
        return self.random.choice(SMOOTH + KINKED if self.kinks else SMOOTH).format(v)

    def pair(self, v: str) -> str:
        operands = [v, self.beside(v)]
        text = self.random.choice(SMOOTH_PAIRS + KINKED_PAIRS if self.kinks else SMOOTH_PAIRS)
        if not any(w in operands[1] for w in ("self", "h", "x")) and "torch" in text:
            text = "{} * {}"
        elif self.random.random() < 0.3:
            operands.reverse()
        return text.format(*operands)

    def view(self, v: str) -> str:
        """A tensor of the same elements, or an expanded one."""
        axes, r = self.shape(v), self.random
        i = self.axis(v)
        sizes = [size for size, _ in axes]
        kind = r.choice(
            ["permute", "transpose", "unsqueeze", "squeeze", "expand", "merge", "split", "flatten", "movedim"]
        )
        if kind == "permute":
            order = list(range(len(axes)))
            fixed = [0] if axes and axes[0][1] and r.random() < 0.8 else []
            rest = [a for a in order if a not in fixed]
            r.shuffle(rest)
            return f"{v}.permute({', '.join(map(str, fixed + rest))})"
        if kind in ("transpose", "movedim"):
            return f"{v}.{kind}({self.spelled(v, i)}, {self.axis(v)})"
        if kind == "unsqueeze":
            return f"{v}.unsqueeze({r.choice([1, -1, len(axes)])})"
        if kind == "squeeze":
            return f"{v}.squeeze({self.spelled(v, i)})"
        if kind == "expand":
            wide = [str(r.randint(2, 4)) if size == "1" else r.choice([size, "-1"]) for size in sizes]
            return f"{v}.expand({', '.join(wide)})"
        if kind == "merge" and len(axes) > 1:
            i = r.randrange(0 if r.random() < 0.2 else min(1, len(axes) - 2), len(axes) - 1)
            merged = "-1" if r.random() < 0.5 else f"{sizes[i]} * {sizes[i + 1]}"
            return f"{v}.{r.choice(['reshape', 'view'])}({', '.join([*sizes[:i], merged, *sizes[i + 2 :]])})"
        if kind == "split" and axes and sizes[i].isdigit():
            factor = r.choice([f for f in range(1, int(sizes[i]) + 1) if int(sizes[i]) % f == 0])
            parts = [str(factor), r.choice(["-1", str(int(sizes[i]) // factor)])]
            return f"{v}.reshape({', '.join([*sizes[:i], *parts, *sizes[i + 1 :]])})"
        return f"{v}.flatten(1)" if r.random() < 0.5 else f"torch.flatten({v}, {min(1, len(axes) - 1)})"

    def parts(self, v: str) -> str:
        """Some of the elements."""
        axes, r = self.shape(v), self.random
        i = self.axis(v)
        size = int(axes[i][0]) if axes and axes[i][0].isdigit() else 1
        colons, dim = ":, " * i, self.spelled(v, i)
        start, stop = r.randint(0, size - 1), r.randint(1, size)
        return r.choice(
            [
                f"{v}[{colons}{start}:{stop}:{r.randint(1, 3)}]",
                f"{v}[{colons}{-stop}:]",
                f"{v}[..., ::2]",
                f"{v}[{colons}{r.choice([start, start - size])}]",
                f"{v}.select({dim}, {start})",
                f"{v}.narrow({dim}, {start}, 1)",
                f"{v}.chunk({r.randint(1, 3)}, dim={dim})[{r.randint(0, 1)}]",
                f"{v}.split({r.randint(1, min(2, size))}, dim={dim})[-1]",
                f"torch.unbind({v}, {dim})[{start}]",
            ]
        )

    def indexed(self, v: str) -> str:
        """Elements in the places of an index, sums in these places, or elements in order."""
        axes, r = self.shape(v), self.random
        i = self.axis(v)
        if not axes or not axes[i][0].isdigit():
            return self.function(v)
        size, dim, colons = int(axes[i][0]), self.spelled(v, i), ":, " * i
        places = [r.randrange(size) for _ in range(size if r.random() < 0.4 else r.randint(1, 4))]
        index = f"torch.tensor({places})"
        in_its_axis = f"{index}.reshape({', '.join('-1' if a == i else '1' for a in range(len(axes)))})"
        wide = f"{in_its_axis}.expand({', '.join('-1' if a == i else s for a, (s, _) in enumerate(axes))})"
        part = f"{v}.narrow({dim}, 0, {min(size, len(places))})"
        few = f"torch.tensor({places[:size]})"
        texts = [
            f"{v}[{colons}{[p - r.choice([0, size]) for p in places]}]",
            f"{v}[{colons}torch.tensor([{places}, {places[::-1]}])]",
            f"{v}.index_select({dim}, {index})",
            f"torch.take_along_dim({v}, {in_its_axis}, {dim})",
            f"{v}.gather({dim}, {wide})",
            f"{v}.index_add({dim}, {few}, 0.5 * {part})",
            f"torch.zeros_like({v}).scatter_add({dim}, {wide}.narrow({dim}, 0, {min(size, len(places))}), {part})",
            f"F.embedding(torch.tensor({places}), {self.tensor(size, 3, constant=False)}) * {v}.mean()",
        ]
        if self.kinks:
            descending = r.choice([True, False])
            texts += [
                f"{v}.sort({dim}, descending={descending})[0]",
                f"{v}.topk({r.randint(1, size)}, {dim}, largest={descending})[0]",
                f"({v} * {v}).gather({dim}, {v}.argsort({dim}))",
            ]
        return r.choice(texts)

    def joined(self, v: str) -> str:
        """Elements in another order, several times, or together with others."""
        axes, r = self.shape(v), self.random
        dim = self.spelled(v, self.axis(v))
        others = [u for u in self.values if len(self.shape(u)) == len(axes)]
        u = r.choice(others) if others and r.random() < 0.6 else f"torch.tanh({v})"
        repeats = ", ".join("1" if samples else str(r.randint(1, 2)) for _, samples in axes)
        widths = [r.randint(0, 2) for _ in range(2 * r.randint(1, max(1, min(2, len(axes) - 1))))]
        return r.choice(
            [
                f"torch.cat([{v}, {u}], dim={dim})",
                f"torch.cat(({u}, {v}, {v}), {dim})",
                f"torch.stack([{v}, {u}], dim={r.choice([1, -1])})",
                f"{v}.flip({dim})",
                f"torch.roll({v}, {r.choice([-1, 1, 2])}, {dim})",
                f"{v}.repeat({repeats})",
                f"F.pad({v}, {tuple(widths)})",
                f"F.pad({v}, {tuple(widths)}, value=0.5)",
            ]
        )

    def reduced(self, v: str) -> str:
        axes, r = self.shape(v), self.random
        some = sorted({self.axis(v) for _ in range(r.randint(1, 2))})
        dim = f"{self.spelled(v, some[0])}" if len(some) == 1 else f"{tuple(some)}"
        keep = r.choice(["", ", keepdim=True"])
        texts = [f"{v}.sum({dim}{keep})", f"{v}.mean({dim}{keep})", f"torch.mean({v}, dim={dim}{keep})"]
        if self.kinks:
            texts += [f"{v}.amax({dim}{keep})", f"torch.amin({v}, {dim}{keep})", f"{v}.max({some[0]}{keep})[0]"]
        elif all(axes[i][0] != "1" for i in some if i < len(axes)):
            texts += [
                f"{v}.var({dim}, unbiased={r.choice([True, False])}{keep})",
                f"({v}.var({dim}{keep}) + 0.2).sqrt()",
            ]
        return r.choice(texts)

    def product(self, v: str) -> str:
        axes, r = self.shape(v), self.random
        last = int(axes[-1][0]) if axes and axes[-1][0].isdigit() else 1
        width = r.randint(1, 5)
        kind = r.choice(["linear", "right", "left", "own", "values", "einsum", "einsum", "bmm"])
        if kind == "linear":
            bias = f", {self.tensor(width, constant=False)}" if r.random() < 0.6 else ""
            return f"F.linear({v}, {self.tensor(width, last, constant=False)}{bias})"
        if kind == "right":
            return f"{v} @ {self.tensor(last, width)}"
        if kind == "left" and len(axes) > 2 and axes[-2][0].isdigit():
            return f"torch.matmul({self.tensor(width, int(axes[-2][0]))}, {v})"
        if kind == "own" and len(axes) > 2:
            return f"{v} @ {v}.transpose(-1, -2)" if r.random() < 0.5 else f"torch.matmul({v}.mT, {v})"
        if kind == "bmm" and len(axes) == 3 and axes[0][1]:
            weight = self.tensor(last, width)
            return f"torch.bmm({v}, {weight}.expand(n, -1, -1))" if r.random() < 0.5 else f"torch.bmm({v}, {v}.mT)"
        if kind == "values" and axes:
            others = [u for u in self.values if len(self.shape(u)) > 1 and self.shape(u)[-2][0] == axes[-1][0]]
            return f"{v} @ {r.choice(others)}" if others else f"({v} * {v}).sum(-1)"
        return self.einsum(v)

    def einsum(self, v: str) -> str:
        """A product with a new tensor or a variable, over some of the axes that both have."""
        axes, r = self.shape(v), self.random
        letters = "abcde"[: len(axes)]
        kept = [letter for letter, (_, samples) in zip(letters, axes, strict=True) if samples]
        mine = [letter for letter in letters if letter not in kept]
        shared = [letter for letter in mine if r.random() < 0.7] or mine
        sizes = {letter: size for letter, (size, _) in zip(letters, axes, strict=True)}
        others = [u for u in self.values if self.shape(u) == axes and u != v]
        if others and r.random() < 0.4:
            other, its = r.choice(others), list(letters)
        else:
            width = r.randint(1, 4)
            its = [*shared, "k"]
            r.shuffle(its)
            other = self.tensor(*(width if letter == "k" else int(sizes[letter]) for letter in its))
        free = [letter for letter in dict.fromkeys([*mine, *its]) if letter not in kept]
        out = [letter for letter in free if letter not in shared or r.random() < 0.4]
        r.shuffle(out)
        return f'torch.einsum("{letters},{"".join(its)}->{"".join(kept + out)}", {v}, {other})'

    def own(self, v: str) -> str:
        """Softmax, attention, normalisation and detach."""
        axes, r = self.shape(v), self.random
        dim = self.spelled(v, self.axis(v))
        kind = r.choice(["softmax", "log_softmax", "attention", "norm", "written norm", "detach"])
        if kind == "detach" or self.kinks:
            return f"{v} * {v}.detach()" if r.random() < 0.8 else f"{v}.detach()"
        if kind == "softmax":
            return r.choice([f"{v}.softmax({dim})", f"F.softmax({v}, dim={dim})"])
        if kind == "log_softmax":
            return f"F.log_softmax({v}, dim={dim})"
        if kind == "attention" and len(axes) > 2 and not axes[-2][1] and not axes[-1][1]:
            return self.attention(v)
        if kind == "norm":
            sizes = [int(size) for size, samples in axes if not samples][-r.randint(1, 2) :]
            affine = f", {self.tensor(*sizes)}, {self.tensor(*sizes)}" if r.random() < 0.6 else ""
            return f"F.layer_norm({v}, {tuple(sizes)}{affine or ', None, None'}, 0.1)"
        mean, var = f"{v}.mean({dim}, keepdim=True)", f"{v}.var({dim}, keepdim=True, unbiased=False)"
        return f"({v} - {mean}) / ({var} + 0.1).sqrt()"

    def attention(self, v: str) -> str:
        """Of queries with keys and values that may be other variables, with or without a mask or a bias."""
        axes, r = self.shape(v), self.random
        others = [u for u in self.values if self.shape(u) == axes] or [v]
        k, values = r.choice(others), r.choice([*others, f"{r.choice(others)}.flip(-2)"])
        count = int(axes[-2][0])
        bias = self.tensor(count, count)
        if r.random() < 0.5:
            option = r.choice(["", ", is_causal=True", f", attn_mask={bias}", ", scale=0.4"])
            return f"F.scaled_dot_product_attention({v}, {k}, {values}{option})"
        below = f"torch.ones({count}, {count}).tril()"
        scores = f"{v} @ {k}.mT"
        change = r.choice(
            [
                f"({scores}) / 2",
                f"0.5 * ({scores}) + {bias}",
                f"({scores}).masked_fill({below} == 0, float('-inf'))",
                f"torch.where({below} > 0, 0.3 * ({scores}), -torch.inf)",
            ]
        )
        return f"({change}).softmax(-1) @ {values}"

    def image(self, v: str) -> str:
        """A layer of signals [n, channels, length] and images."""
        axes, r = self.shape(v), self.random
        sizes = [int(size) for size, samples in axes if not samples]
        if not axes or not axes[0][1] or len(axes) not in (3, 4):
            return self.function(v)
        spatial, channels = len(axes) - 2, sizes[0]
        kernel = r.randint(1, min(3, *sizes[1:]))
        kind = r.choice(["conv", "conv", "avg", "max" if self.kinks else "norm", "mean"])
        if kind == "conv":
            weight = self.tensor(r.randint(1, 4), channels, *[kernel] * spatial, constant=False)
            return f"F.conv{spatial}d({v}, {weight}, stride={r.randint(1, 2)}, padding={r.randint(0, 1)})"
        if kind in ("avg", "max"):
            return f"F.{kind}_pool{spatial}d({v}, {kernel}, {r.randint(1, 2)})"
        if kind == "norm":
            affine = f"{self.tensor(channels, constant=False)}, {self.tensor(channels, constant=False)}"
            batch = f"F.batch_norm({v}, None, None, {affine}, training=True, eps=0.1)"
            return r.choice([batch, f"F.group_norm({v}, 1, {affine}, 0.1)"])
        return f"{v}.mean({tuple(range(2, len(axes)))}, keepdim={r.choice([True, False])})"


def axis_of(a: int, b: int) -> tuple[str, bool]:
    """The size of an axis as text, and whether it counts samples, from its sizes with 11 and with 13 samples."""
    if a == b:
        return str(a), False
    times, rest = divmod(a, SAMPLES[0])
    if rest or b != times * SAMPLES[1]:
        raise ValueError(f"{a} and {b} are no multiples of the numbers of samples")
    return ("n" if times == 1 else f"n * {times}"), True


def words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() or c in "_." else " " for c in text).replace(".", " ").split())
