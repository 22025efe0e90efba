"""LSTM, GRU and RNN layers: one method for each of torch's functions, which the recorder records as one operation.

A node of the kind `recurrence` computes one layer in one direction (csrc/layers/recurrence.h). Backwards in time, it
reads a sequence whose view has a negative stride, and its output is seen in the same way. Layers and directions are
joined by views and copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maml_cuda.capture.errors import Unfusable
from maml_cuda.plan.graph import Constant, Held, text_of
from maml_cuda.plan.layers import Layers
from maml_cuda.plan.masks import Drawn, dropped
from maml_cuda.plan.schema import Loops, View
from maml_cuda.plan.strided import Atom, Strided, aligned

_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


class Recurrences:
    """Reads torch.lstm, gru, rnn_tanh and rnn_relu.

    Attributes:
        to: writes the graph.
    """

    to: Layers

    def lstm(self, input: Any, hx: Sequence[Any], params: Any, *options: Any) -> tuple[Strided, Strided, Strided]:
        y, h_n, c_n = self._recurrent("lstm", input, hx, params, *options)
        return y, h_n, c_n

    def gru(self, input: Any, hx: Any, params: Any, *options: Any) -> tuple[Strided, Strided]:
        y, h_n = self._recurrent("gru", input, [hx], params, *options)
        return y, h_n

    def rnn_tanh(self, input: Any, hx: Any, params: Any, *options: Any) -> tuple[Strided, Strided]:
        y, h_n = self._recurrent("rnn_tanh", input, [hx], params, *options)
        return y, h_n

    def rnn_relu(self, input: Any, hx: Any, params: Any, *options: Any) -> tuple[Strided, Strided]:
        y, h_n = self._recurrent("rnn_relu", input, [hx], params, *options)
        return y, h_n

    def _recurrent(
        self, cell: str, input: Any, states: Sequence[Any], params: Sequence[Any], has_biases: Any, num_layers: Any,
        dropout: float, train: bool, bidirectional: bool, batch_first: bool = False,
    ) -> list[Strided]:  # fmt: skip
        """The output of the last layer, and the last states of all layers and directions."""
        if not isinstance(has_biases, bool):
            raise Unfusable("packed sequences are not fused")
        drops = dropout > 0 and train
        if drops and dropout == 1:
            raise Unfusable("dropout=1 between its layers is not fused")
        directions, tensors = (2 if bidirectional else 1), (4 if has_biases else 2)
        if len(params) != num_layers * directions * tensors:
            raise Unfusable("proj_size is not fused")
        x = self.to.strided(input)
        x = self._sequence(x if batch_first else x.permute((1, 0, 2)))
        first = self._initial_states(states)
        last: list[list[Strided]] = [[] for _ in states]
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                given = [self._initial_state(states, index) for states in first]
                own = [*params[index * tensors : (index + 1) * tensors], None, None][:4]
                y, *ends = self._recurrence(cell, _reversed(x, 1) if direction else x, given, own)
                outputs.append(_reversed(y, 1) if direction else y)
                for ends_of_state, end in zip(last, ends, strict=True):
                    ends_of_state.append(end.unsqueeze(0))
            y = outputs[0] if directions == 1 else self.to.concatenated(outputs, 2)
            if layer + 1 < num_layers:
                x = self._sequence(self._dropped(y, dropout, layer) if drops else y)
        self.to.serve(cell)
        y = y if batch_first else y.permute((1, 0, 2))
        return [y, *(ends[0] if len(ends) == 1 else self.to.concatenated(ends, 0) for ends in last)]

    def _dropped(self, y: Strided, p: float, layer: int) -> Strided:
        """Dropout between two layers. torch draws its mask for [length, n, features]."""
        y = y.permute((1, 0, 2))
        mask = Drawn(y.shape, self.to.drawn + layer, 1 - p, 1 / (1 - p))
        return dropped(self.to, y, mask).permute((1, 0, 2))

    def _initial_states(self, states: Sequence[Any]) -> list[Strided]:
        """The initial states [layers * directions, n, hidden]; none where all are zeros."""
        if all(isinstance(s, Constant) and s.make is not None and not s.make().any() for s in states):
            return []
        return [self.to.strided(s) for s in states]

    def _sequence(self, x: Strided) -> Strided:
        """A sequence [n, length, features] whose steps the loops can read: in each, the features are contiguous."""
        if x.axes[0] != (Atom(None, x.size),):
            raise Unfusable(f"its input is of shape {list(x.shape)}, whose batch axis is not that of the samples")
        _, length, features = x.shape
        steps, elements = x.axes[1:]
        apart = length == 1 or (len(steps) == 1 and abs(steps[0].stride) >= features)
        return x if apart and elements in ((), (Atom(features, 1),)) else self.to.dense(x)

    def _recurrence(self, cell: str, x: Strided, states: Sequence[Strided], params: Sequence[Any]) -> list[Strided]:
        """One layer in one direction: the output [n, length, hidden] and the last states [n, hidden]."""
        _, length, features = x.shape
        for p, what in zip(params, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), strict=True):
            if p is not None and not (isinstance(p, Held) and p.whole):
                raise Unfusable(f"its {what} is {text_of(p)}, not a parameter")
        width = params[0].shape[0]
        hidden = width // _GATES[cell]
        if params[1].shape != (width, hidden):
            raise Unfusable("proj_size is not fused")
        parameters = (
            self.to.tensor(params[0], "weight_ih", width), self.to.tensor(params[1], "weight_hh", width),
            self.to.vector(params[2], "bias_ih", width), self.to.vector(params[3], "bias_hh", width),
        )  # fmt: skip
        size = (length + (cell == "lstm")) * hidden
        stride = x.axes[1][0].stride if length > 1 else features
        of_x = View(x.size, True, x.offset, (x.size, stride, 1))
        nests = [Loops((None, length, features), (of_x,), View(size, True, 0, (size, hidden, 0)))]
        for state in states:
            nests.append(Loops((None, hidden), (self._view_of_state(state),), View(size, True, 0, (size, 1))))
        inputs = [x.number, *(state.number for state in states)]
        number = self.to.emit_on_any("recurrence", inputs, parameters=parameters, loops=tuple(nests), cell=cell)
        learned = any(v.learned for v in (x, *states)) or any(p.trained for p in params if p is not None)
        samples, units = (Atom(None, size),), (Atom(hidden, 1),)
        y = Strided(number, size, True, 0, (), self.to.n, learned)
        starts = [length - 1, length] if cell == "lstm" else [length - 1]
        ends = [y.with_axes((samples, units), start * hidden) for start in starts]
        return [y.with_axes((samples, (Atom(length, hidden),), units)), *ends]

    def _initial_state(self, all_states: Strided, index: int) -> Strided:
        """The initial state [n, hidden] of a layer and direction, whose units are contiguous. It may be the same for
        all samples."""
        state = self.to.viewed(all_states, lambda x: x.select(0, index))
        samples, units = state.axes
        if units in ((), (Atom(state.shape[1], 1),)):
            return state
        same = all(atom.stride == 0 for atom in samples)
        return self.to.dense(state.with_axes(((), units)) if same else state)

    def _view_of_state(self, x: Strided) -> View:
        hidden = x.shape[1]
        steps = aligned([x.axes, ((Atom(None, 0),), (Atom(hidden, 1),))], self.to.n)
        return View(x.size, x.samples, x.offset, (steps[0].strides[0], 1))


def _reversed(x: Strided, dim: int) -> Strided:
    size = x.shape[dim]
    return x.slice(dim, size - 1, size, -1) if size > 1 else x
