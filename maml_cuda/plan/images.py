"""Views of values of any shape as the images and features that other layers take, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Value
from maml_cuda.plan.schema import Layout
from maml_cuda.plan.sets import Sets
from maml_cuda.plan.strided import Atom, Strided, merged

_LAYOUTS: dict[int, Layout] = {2: "features", 3: "signal", 4: "image"}  # by the number of axes


class Images(Sets):
    """Writes layers over loops, and the images that other layers take."""

    def rows(self, given: Strided, axes: int) -> tuple[Value, Strided]:
        """The last axes as the features of images of one pixel, several a sample; and the same as a view."""
        x = given
        split = len(x.axes) - axes
        if not x.samples or any(atom.size is None for axis in x.axes[split:] for atom in axis):
            raise Unfusable("its input has no samples")
        if not x.is_dense:
            x = self.dense(x)
        features = math.prod(x.shape[split:])
        number = self.emit_on_any(
            "view", [x.number], image=(features, 1, 1), rows=x.size // features, out_layout="features"
        )
        return Value(number, (self.n, features), (features,), True, x.learned), x

    def of_rows(self, y: Value, x: Strided, axes: int, shape: Sequence[int]) -> Strided:
        """What a layer makes of `rows(x, axes)`: the last axes have this shape."""
        split = len(x.axes) - axes
        before, after = math.prod(x.shape[split:]), math.prod(shape)
        first = [tuple(Atom(a.size, a.stride // before * after) for a in axis) for axis in x.axes[:split]]
        last = [(Atom(s, math.prod(shape[d + 1 :])),) for d, s in enumerate(shape)]
        axes_of_y = tuple(map(merged, [*first, *last]))
        return Strided(y.number, x.size // before * after, True, 0, axes_of_y, self.n, y.learned)

    def image(self, x: Strided) -> Value:
        """A view [n, channels, ...] as an image with channels last in memory."""
        shape = x.shape
        if not 2 <= len(shape) <= 4:
            raise Unfusable(f"its input is of shape {list(shape)}; fused are inputs of at most 4 axes")
        if x.axes[0] != (Atom(None, x.size),):
            raise Unfusable(f"its input is of shape {list(shape)}, whose first axis does not count samples")
        order = [0, *range(2, len(shape)), 1]
        if not x.permute(order).is_dense:
            back = [0, len(shape) - 1, *range(1, len(shape) - 1)]
            x = self.dense(x.permute(order)).permute(back)
        sizes = (1, 1, *shape[2:])[-2:]
        number = self.emit_on_any(
            "view", [x.number], image=(shape[1], sizes[0], sizes[1]), out_layout=_LAYOUTS[len(shape)]
        )
        return Value(number, shape, shape[1:], True, x.learned)

    def as_features(self, x: Strided) -> Value:
        """A prediction [n, ...] as features in torch's order of elements."""
        if self.whole_sets:
            x = self.dense(x.with_axes([(Atom(None, 0),), *x.axes]))
        if not x.axes or x.axes[0] != (Atom(None, x.size),):
            raise Unfusable(f"the prediction is of shape {list(x.shape)}, whose first axis does not count samples")
        if not x.is_dense:
            x = self.dense(x)
        number = self.emit_on_any("view", [x.number], image=(x.size, 1, 1), out_layout="features")
        return Value(number, x.shape, (x.size,), True, x.learned)
