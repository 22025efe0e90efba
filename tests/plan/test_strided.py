"""Strided views: the addresses of their elements, and of loops over several of them, are those of torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.strided import Atom, NotAView, Step, Strided, aligned

# -- views ------------------------------------------------------------------------------------------------------------


def value(n: int, *sample: int) -> tuple[Strided, Tensor]:
    """A dense value of n samples, and a tensor whose elements are their own addresses."""
    size = math.prod(sample)
    strides = [math.prod(sample[d + 1 :]) for d in range(len(sample))]
    axes = ((Atom(None, size),), *((Atom(s, stride),) for s, stride in zip(sample, strides, strict=True)))
    return Strided(1, size, True, 0, (), n, True).with_axes(axes), torch.arange(n * size).view(n, *sample)


def weights(*shape: int, n: int = 3) -> tuple[Strided, Tensor]:
    """A dense value without samples, and a tensor whose elements are their own addresses."""
    return Strided(1, math.prod(shape), False, 0, ((Atom(math.prod(shape), 1),),), n, True).view(shape), torch.arange(
        math.prod(shape)
    ).view(shape)


def addresses(x: Strided) -> Tensor:
    """The address of each element of a view, in the view's shape."""
    found = torch.tensor(x.offset)
    for axis in x.axes:
        for size, stride in axis:
            found = found[..., None] + torch.arange(x.n if size is None else size) * stride
    return found.reshape(x.shape)


def sliced(x: Tensor, dim: int, start: int, size: int, step: int = 1) -> Tensor:
    return x.index_select(dim, start + step * torch.arange(size))


TORCH: dict[str, Callable[..., Tensor]] = {
    "view": torch.reshape,
    "permute": torch.permute,
    "unsqueeze": torch.unsqueeze,
    "expand": lambda x, shape: x.expand(shape),
    "slice": sliced,
    "select": torch.select,
}


def check(given: tuple[Strided, Tensor], *calls: tuple[Any, ...]) -> Strided:
    """Applies the same functions to a view and to a tensor of addresses, and compares them after each."""
    x, expected = given
    for name, *arguments in calls:
        x, expected = getattr(x, name)(*arguments), TORCH[name](expected, *arguments)
        assert x.shape == expected.shape, name
        assert torch.equal(addresses(x), expected), name
    return x


def samples_of(x: Strided) -> list[int]:
    """The axes that have a part of the samples."""
    return [d for d, axis in enumerate(x.axes) if any(atom.size is None for atom in axis)]


def test_a_dense_value_and_the_repr() -> None:
    x = check(value(3, 4, 5))
    assert samples_of(x) == [0]
    assert repr(x) == "a value computed from x"
    assert repr(weights(2, 3)[0]) == "a value computed from parameters"
    assert weights()[0].shape == ()


CHAINS: dict[str, list[tuple[Any, ...]]] = {
    "permutation": [("permute", (2, 0, 1)), ("permute", (1, 0, 2))],
    "split of an axis": [("view", (3, 4, 2, 3)), ("permute", (0, 3, 1, 2)), ("view", (3, 12, 2))],
    "merged in another order": [("permute", (0, 2, 1)), ("view", (3, 24)), ("view", (3, 6, 4)), ("view", (3, 2, 3, 4))],
    "axes of size 1": [("view", (1, 3, 1, 4, 6, 1)), ("select", 2, 0), ("unsqueeze", 0), ("view", (3, 24))],
    "slices": [("slice", 1, 1, 3), ("slice", 2, 5, 3, -2), ("select", 1, 2)],
    "a slice backwards of a slice": [("slice", 2, 0, 3, 2), ("slice", 2, 2, 3, -1), ("slice", 2, 1, 2)],
    "a slice of one element": [("slice", 1, 2, 1), ("slice", 1, 0, 1), ("view", (3, 6))],
    "an expansion": [("unsqueeze", 1), ("expand", (3, 5, 4, 6)), ("view", (15, 4, 6)), ("view", (3, 5, 24))],
    "an expansion in front": [("expand", (2, 3, 4, 6)), ("slice", 0, 1, 1), ("select", 0, 0)],
    "all in one axis": [("view", (72,)), ("view", (3, 4, 6)), ("view", (12, 6)), ("view", (3, 2, 2, 6))],
    "samples last": [("permute", (1, 2, 0)), ("view", (24, 3)), ("slice", 0, 4, 5, 4), ("permute", (1, 0))],
    "samples between": [("permute", (1, 0, 2)), ("view", (12, 6)), ("view", (4, 3, 6)), ("select", 0, 1)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_views(name: str) -> None:
    check(value(3, 4, 6), *CHAINS[name])


@pytest.mark.parametrize("seed", range(40))
def test_random_views(seed: int) -> None:
    """Chains of functions, with samples and without, where sizes of axes are often equal."""
    draw = random.Random(seed)
    n = draw.choice([1, 2, 4])
    x, expected = (value if draw.random() < 0.8 else weights)(n, *(draw.choice([1, 2, 4, 6]) for _ in range(3)))
    done = 0
    for _ in range(40):
        name, arguments = _drawn(draw, expected.shape)
        try:
            x_next = getattr(x, name)(*arguments)
        except (NotAView, Unfusable):
            continue
        x, expected, done = x_next, TORCH[name](expected, *arguments), done + 1
        assert x.shape == expected.shape
        assert torch.equal(addresses(x), expected), (name, arguments)
        assert len(samples_of(x)) == x.samples
    assert done >= 10


def _drawn(draw: random.Random, shape: Sequence[int]) -> tuple[str, tuple[Any, ...]]:
    """One function and its arguments that torch takes for a tensor of this shape."""
    name = draw.choice([*TORCH, "view", "permute"] if shape else ["unsqueeze"])
    if name == "view":
        rest, sizes = math.prod(shape), []
        while rest > 1 or draw.random() < 0.2:
            sizes.append(draw.choice([d for d in range(1, rest + 1) if rest % d == 0]))
            rest //= sizes[-1]
        return name, (tuple(sizes[:5]) if len(sizes) <= 5 else tuple(shape),)
    if name == "permute":
        return name, (draw.sample(range(len(shape)), len(shape)),)
    if name == "unsqueeze":
        return name, (draw.randrange(len(shape) + 1),)
    if name == "expand":
        return name, ([draw.choice([1, 1, 2]) if s == 1 and math.prod(shape) < 200 else s for s in shape],)
    dim = draw.randrange(len(shape))
    start = draw.randrange(shape[dim])
    if name == "select":
        return (name, (dim, start)) if len(shape) > 3 else ("unsqueeze", (dim,))
    step = draw.choice([-2, -1, 1, 2])
    room = shape[dim] - start if step > 0 else start + 1
    return name, (dim, start, draw.randint(1, -(-room // abs(step))), step)


def test_samples_are_merged_and_split_again() -> None:
    """Also where an axis has as many elements as there are samples."""
    for n in (2, 4):
        given = value(n, 4, 6)
        back = check(given, ("view", (n * 4, 6)), ("view", (n, 4, 6)))
        assert back == given[0]
        back = check(given, ("permute", (1, 0, 2)), ("view", (4 * n, 6)), ("view", (4, n, 6)), ("permute", (1, 0, 2)))
        assert back == given[0]
        inner = check(given, ("permute", (1, 2, 0)), ("view", (4, 6 * n)))
        assert inner.axes[1] == (Atom(6, 1), Atom(None, 24))
        assert samples_of(check((inner, given[1].permute(1, 2, 0).reshape(4, -1)), ("view", (24, n)))) == [1]


def test_the_samples_of_a_set_of_one_sample() -> None:
    given = value(1, 4, 6)
    assert samples_of(check(given, ("view", (24,)))) == [0]
    assert samples_of(check(given, ("view", (4, 6, 1)))) == [0]
    assert samples_of(check(given, ("permute", (1, 2, 0)), ("view", (24,)))) == [0]
    assert samples_of(check(value(1, 1), ("view", (1,)), ("view", (1, 1)))) == [0]


def test_what_is_not_a_view() -> None:
    x, _ = value(5, 4, 6)
    turned = x.permute((0, 2, 1)).view((5, 24))
    for see in (
        lambda: turned.slice(1, 1, 5),
        lambda: turned.select(1, 3),
        lambda: turned.view((5, 8, 3)),
        lambda: x.view((6, 20)),
        lambda: value(4, 6)[0].view((2, 12)),  # a part of the samples
        lambda: x.view((4, 5, 6)),
        lambda: x.permute((1, 0, 2)).view((10, 12)),
    ):
        with pytest.raises(NotAView):
            see()


@pytest.mark.parametrize(
    ("n", "see", "words"),
    [
        (5, lambda x: x.slice(0, 0, 3), "it takes a part of the samples"),
        (5, lambda x: x.slice(0, 4, 5, -1), "it takes a part of the samples"),
        (5, lambda x: x.select(0, 0), "it takes a part of the samples"),
        (5, lambda x: x.view((20, 6)).slice(0, 0, 4), "it takes a part of the samples"),
        (1, lambda x: x.select(0, 0), "it takes one of the samples"),
        (1, lambda x: x.expand((3, 4, 6)), "it repeats the samples"),
    ],
)
def test_parts_of_the_samples(n: int, see: Callable[[Strided], Strided], words: str) -> None:
    with pytest.raises(Unfusable, match=words):
        see(value(n, 4, 6)[0])


# -- loops over several operands --------------------------------------------------------------------------------------


def visited(steps: Sequence[Step], operands: Sequence[Strided], n: int) -> list[list[int]]:
    """For each operand the addresses that loops over the steps come to."""
    found = []
    for j, x in enumerate(operands):
        at = torch.tensor(x.offset)
        for step in steps:
            at = at[..., None] + torch.arange(n if step.size is None else step.size) * step.strides[j]
        found.append(at.flatten().tolist())
    return found


N = 4
PAIRS: dict[str, tuple[Strided, Strided]] = {
    "equal": (value(N, 4, 6)[0], value(N, 4, 6)[0]),
    "a row": (value(N, 4, 6)[0], weights(1, 1, 6)[0]),
    "a column of each sample": (value(N, 4, 6)[0], value(N, 4, 1)[0]),
    "both are broadcast": (value(N, 1, 6)[0], weights(1, 4, 1)[0]),
    "another order": (value(N, 4, 6)[0], value(N, 6, 4)[0].permute((0, 2, 1))),
    "merged and whole": (value(N, 4, 6)[0].view((N, 24)), value(N, 24)[0]),
    "merged in another order": (value(N, 6, 4)[0].permute((0, 2, 1)).view((N, 24)), value(N, 24)[0]),
    "samples with another axis": (value(N, 4, 6)[0].view((N * 4, 6)), value(N, 4, 1)[0].view((N * 4, 1))),
    "samples and repeated numbers": (value(N, 4, 6)[0], weights(1, 4, 6)[0].expand((N, 4, 6))),
    "samples, merged, and repeated numbers": (
        value(N, 4, 6)[0].view((N * 4, 6)), weights(1, 6)[0].expand((N * 4, 6)),
    ),
    "backwards": (value(N, 4, 6)[0].slice(2, 5, 6, -1), value(N, 4, 6)[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_aligned(name: str) -> None:
    a, b = PAIRS[name]
    n = a.n
    b = Strided(b.number, b.size, b.samples, b.offset, b.axes, n, True)
    for operands in ((a, b), (b, a), (a, b, a)):
        steps = aligned([x.axes for x in operands], n)
        expected = torch.broadcast_tensors(*map(addresses, operands))
        assert visited(steps, operands, n) == [e.flatten().tolist() for e in expected]
        assert [step.axis for step in steps] == sorted(step.axis for step in steps)


def test_what_cannot_be_aligned() -> None:
    x, other = value(4, 4, 6)[0], weights(4, 6, n=4)[0]
    for a, b in (
        (x.view((16, 6)), other.view((24, 1)).slice(0, 0, 16)),
        (x.permute((1, 0, 2)), x),
        (x.select(1, 0), other),
    ):
        with pytest.raises(Unfusable, match="it combines the samples with another axis"):
            aligned([a.axes, b.axes], 4)
    with pytest.raises(NotAView):
        aligned([weights(*shape)[0].permute((1, 0)).view((24,)).axes for shape in ((4, 6), (3, 8))], 4)
