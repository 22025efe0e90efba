"""Selections by indices: one method for each ATen operation that reads or writes at the places that a tensor of
integers holds, or sorts.

Where an index is a part of the model's input, its range is noted, and checked in every call (integers.py). Any other
index that is out of range gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.integers import note_range
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.lookups import Place, gathered, order_along, scattered
from maml_cuda.plan.strided import Strided


class Indexing:
    """Reads selections by indices.

    Attributes:
        to: writes the graph.
    """

    to: Layers

    def _index(self, index: Any, size: int, negative: bool = False) -> Strided:
        """An index of [0, size); with `negative`, of [-size, size), which counts from the end."""
        x = self.to.strided(index)
        note_range(self.to.graph, x, -size if negative else 0, size)
        if not negative:
            return x
        is_negative = self.to.map("lt", x, 0.0)
        return self.to.map("where", is_negative, self.to.map("affine", x, constants=(1.0, float(size))), x)

    def _selected(self, table: Strided, dim: int, index: Strided) -> Strided:
        """table[:, ..., index, ...]: all axes of the index in the place of one of the table."""
        before, after = dim, len(table.axes) - dim - 1
        index = index.with_axes([*[()] * before, *index.axes, *[()] * after])
        return gathered(self.to, table, index, Place(dim, len(index.axes) - before - after))

    def embedding(
        self, weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
    ) -> Strided:
        """The rows of a table. No derivative passes to the row `padding_idx`."""
        if scale_grad_by_freq or sparse:
            option = "scale_grad_by_freq" if scale_grad_by_freq else "sparse"
            raise Unfusable(f"an embedding with {option}=True is not fused")
        table = self.to.strided(weight)
        index = self._index(indices, table.shape[0])
        y = self._selected(table, 0, index)
        if padding_idx < 0 or not y.learned:
            return y
        is_padding = self.to.map("eq", index.unsqueeze(len(index.axes)), float(padding_idx))
        return self.to.map("where", is_padding, self.to.stop(y), y)

    def index_select(self, input: Any, dim: int, index: Any) -> Strided:
        x = self.to.strided(input)
        dim = x.axis(dim)
        return self._selected(x, dim, self._index(index, x.shape[dim]))

    def index(self, input: Any, indices: Sequence[Any]) -> Strided:
        """x[:, ..., i, j, ...] of one index, or of several for neighbouring axes, broadcast against each other."""
        x = self.to.strided(input)
        given = [d for d, index in enumerate(indices) if index is not None]
        if given != list(range(given[0], given[0] + len(given))):
            raise Unfusable("a selection by indices of axes that are not adjacent is not fused")
        first, sizes = given[0], [x.shape[d] for d in given]
        wanted = [self._index(indices[d], size, negative=True) for d, size in zip(given, sizes, strict=True)]
        if len(given) == 1:
            return self._selected(x, first, wanted[0])
        x = self.to.seen_as(x, [*x.shape[:first], math.prod(sizes), *x.shape[first + len(given) :]])
        place = self._inside(wanted[0], sizes[0])
        for index, size in zip(wanted[1:], sizes[1:], strict=True):
            outer = self.to.map("affine", place, constants=(float(size), 0.0))
            place = self.to.map("add", outer, self._inside(index, size))
        return self._selected(x, first, place)

    _unsafe_index = index

    def _inside(self, index: Strided, size: int) -> Strided:
        """The same, NaN where it is outside of [0, size)."""
        middle = (size - 1) / 2
        distance = self.to.map("abs", self.to.map("affine", index, constants=(1.0, -middle)))
        return self.to.map("where", self.to.map("le", distance, middle), index, math.nan)

    def gather(self, input: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Strided:
        """y[i, j, k] = x[i, index[i, j, k], k] for dim 1."""
        x = self.to.strided(input)
        dim = x.axis(dim)
        places = self._index(index, x.shape[dim])
        for d, size in enumerate(places.shape):
            if d != dim and size != x.shape[d]:
                x = self.to.viewed(x, lambda x, d=d, size=size: x.slice(d, 0, size))  # type: ignore[misc]
        return gathered(self.to, x, places, Place(dim, 1))

    def take_along_dim(self, input: Any, indices: Any, dim: int | None = None) -> Strided:
        """gather, of operands that are broadcast against each other but for the axis."""
        x, index = self.to.strided(input), self.to.strided(indices)
        if dim is None:
            x, index, dim = (*(self.to.seen_as(t, (math.prod(t.shape),)) for t in (x, index)), 0)
        dim = x.axis(dim)
        return gathered(self.to, x, self._index(index, x.shape[dim], negative=True), Place(dim, 1))

    # -- sums at indices ----------------------------------------------------------------------------------------

    def scatter_add(self, input: Any, dim: int, index: Any, src: Any) -> Strided:
        """x[i, index[i, j, k], k] += source[i, j, k] for dim 1."""
        x, source = self.to.strided(input), self.to.strided(src)
        dim = x.axis(dim)
        places = self._index(index, x.shape[dim])
        for d, size in enumerate(places.shape):
            source = self.to.viewed(source, lambda s, d=d, size=size: s.slice(d, 0, size))  # type: ignore[misc]
        return self.to.map("add", x, scattered(self.to, source, places, x, Place(dim, 1)))

    def scatter(self, input: Any, dim: int, index: Any, src: Any, *, reduce: Any = None) -> Strided:
        """A number at indices. A tensor at indices is refused: which of several elements of one place stays, torch does
        not say."""
        if not isinstance(src, (int, float)) or reduce is not None:
            raise Unfusable("a scatter of a tensor is not fused; that of a number and scatter_add are")
        x = self.to.strided(input)
        dim = x.axis(dim)
        places = self._index(index, x.shape[dim])
        ones = self.to.map("affine", places, constants=(0.0, 1.0))
        hits = scattered(self.to, ones, places, x, Place(dim, 1))
        return self.to.map("where", self.to.map("gt", hits, 0.0), float(src), x)

    def index_add(self, input: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Strided:
        x, given = self.to.strided(input), self.to.strided(source)
        dim = x.axis(dim)
        places = self._index(index, x.shape[dim])
        places = places.with_axes([*[()] * dim, *places.axes, *[()] * (len(x.axes) - dim - 1)])
        if alpha != 1:
            given = self.to.map("affine", given, constants=(float(alpha), 0.0))
        return self.to.map("add", x, scattered(self.to, given, places, x, Place(dim, 1)))

    def index_put(self, input: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Strided:
        """x[:, ..., index, ...] += values"""
        given = [d for d, index in enumerate(indices) if index is not None]
        if not accumulate or len(given) != 1:
            raise Unfusable("values put at indices are fused with accumulate=True and one index")
        x, (dim,) = self.to.strided(input), given
        index = self._index(indices[dim], x.shape[dim], negative=True)
        shape = [*x.shape[:dim], *index.shape, *x.shape[dim + 1 :]]
        places = index.with_axes([*[()] * dim, *index.axes, *[()] * (len(x.axes) - dim - 1)])
        source = self.to.strided(values).expand(shape)
        return self.to.map("add", x, scattered(self.to, source, places, x, Place(dim, len(index.axes))))

    _index_put_impl = index_put

    # -- order --------------------------------------------------------------------------------------------------

    def sort(
        self, x: Any, dim: int = -1, descending: bool = False, *, stable: bool | None = None
    ) -> tuple[Strided, Strided]:
        values = self.to.strided(x)
        dim = values.axis(dim)
        order = order_along(self.to, values, dim, descending)
        return gathered(self.to, values, order, Place(dim, 1)), order

    def topk(self, x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Strided, Strided]:
        values = self.to.strided(x)
        dim = values.axis(dim)
        order = self.to.viewed(order_along(self.to, values, dim, largest), lambda order: order.slice(dim, 0, k))
        return gathered(self.to, values, order, Place(dim, 1)), order

    def argsort(self, x: Any, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Strided:
        return self.sort(x, dim, descending)[1]
