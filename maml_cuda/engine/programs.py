"""Finds the program of a model for the data of a call: captures the model for this signature, reads the record as fused
layers, and proves the program (plan/proof.py). Each answer is found once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maml_cuda import targets
from maml_cuda.capture.capture import capture
from maml_cuda.capture.errors import DoesNotFit, Unfusable, first_line
from maml_cuda.capture.record import Operand, Record
from maml_cuda.engine import data_checks, planning
from maml_cuda.engine.bounded import Bounded
from maml_cuda.engine.problem import why_not
from maml_cuda.engine.program import Program
from maml_cuda.engine.signatures import SetLike, Signature, TreeLike
from maml_cuda.losses import Loss
from maml_cuda.plan import proof
from maml_cuda.plan.graph import Graph
from maml_cuda.plan.own_loss import COMPUTED, Match, matches
from maml_cuda.plan.reader import graph_of
from maml_cuda.plan.sample_counts import counted
from maml_cuda.pytrees import Tree

MOST_ANSWERS = 1024  # kept; a forgotten one is found again
MOST_PROGRAMS = 64
MOST_RECORDS = 64

Shape = tuple[int, ...]


class Programs:
    """The programs of a model in one state.

    Attributes:
        snapshot: of the FusedMAML.
        by_name: holds each program as an attribute, by the name that `name_for` returns.
    """

    def __init__(self, snapshot: planning.Snapshot) -> None:
        self.snapshot = snapshot
        self.by_name = _Holder()
        self.reasons: Bounded[Signature, str] = Bounded(MOST_ANSWERS)
        self._names: Bounded[Signature, str] = Bounded(MOST_ANSWERS)
        self._records: Bounded[SetLike, tuple[Record, Graph]] = Bounded(MOST_RECORDS)
        self._known: Bounded[str, str] = Bounded(MOST_PROGRAMS)  # text of a program -> its name
        self._proven: Bounded[tuple[Any, ...], None] = Bounded(MOST_ANSWERS)

    def name_for(self, signature: Signature) -> str:
        """The name of the program that serves data of this signature; "" where none does, for `reasons`.

        Raises:
            DoesNotFit: the model itself raises an exception for such data.
            ValueError: an adapted parameter does not reach the support loss; the loss does not fit the prediction.
        """
        if signature not in self._names:
            try:
                self._names[signature] = self._found(signature)
            except Unfusable as reason:
                self.reasons[signature] = str(reason)
                self._names[signature] = ""
        return self._names[signature]

    def _found(self, signature: Signature) -> str:
        sets = [given for given in (signature.support, signature.query) if given is not None]
        captured = [self._record(given) for given in sets]
        records, graphs = counted([record for record, _ in captured]), [graph for _, graph in captured]
        graph = graphs[0]
        if graph != graphs[-1]:
            graphs = [graph_of(self.snapshot.model, record) for record in records]
            if graphs[0] != graphs[-1]:
                raise Unfusable("the model runs other operations on the query set than on the support set")
            graph = replace(graphs[0], ignored=graph.ignored)
        n_support, n_query = (0 if given is None else given.n for given in (signature.support, signature.query))
        reason = ""
        for read, match in self._candidates(sets, records, graph):
            program = planning.program_of(self.snapshot, read, match)
            if reason := why_not(program.text, program.sample(sets[0].x), n_support, n_query, program.dtype):
                raise Unfusable(reason)
            reason = self._disproof(program, signature.support, signature.second_order)
            reason = reason or self._disproof(program, signature.query, second_order=False)
            if not reason:
                return self._kept(program)
        raise Unfusable(reason)

    def _candidates(
        self, sets: list[SetLike], records: list[Record], graph: Graph
    ) -> Iterator[tuple[Graph, Match | None]]:
        """What may compute the loss: a loss of the core, and then the operations of a loss of the user's own, read as
        layers.

        Raises:
            Unfusable: nothing does.
        """
        try:
            for match in self._matches(graph, [(r, given.y) for r, given in zip(records, sets, strict=True)]):
                yield graph, match
        except Unfusable:
            pass
        with_target = [(r, given.y) for r, given in zip(records, sets, strict=True) if given.y is not None]
        if isinstance(self.snapshot.loss, str) or not with_target:
            return
        graphs = [graph_of(self.snapshot.model, record, (), _shapes(y, record.n)) for record, y in with_target]
        if graphs[0] != graphs[-1]:
            raise Unfusable("the loss is a callable of yours, which computes different things on the two sets")
        yield replace(graphs[0], ignored=graph.ignored), COMPUTED

    def _record(self, given: SetLike) -> tuple[Record, Graph]:
        """The record of a set, and its graph. In a set of one sample, the axis of samples can be taken for another one;
        then that of two samples is read, which the proof compares on one.

        Raises:
            Unfusable, DoesNotFit: as `capture`; there is no graph.
        """
        try:
            return self._record_of(given)
        except Unfusable:
            if given.n != 1:
                raise
            return self._record_of(given.of(2))

    def _record_of(self, given: SetLike) -> tuple[Record, Graph]:
        if given not in self._records:
            model, loss = self.snapshot.model, self.snapshot.loss
            try:
                if given.y is None or isinstance(loss, str):
                    captured = capture(model, given.x.tree())
                else:
                    captured = capture(model, given.x.tree(), loss, given.y.tree())
            except DoesNotFit as reason:
                reason.given = given
                raise
            self._records[given] = captured.record, graph_of(model, captured.record, captured.changes)
        return self._records[given]

    def _matches(self, graph: Graph, sets: Sequence[tuple[Record, TreeLike | None]]) -> list[Match | None]:
        """The losses of the core that the loss may be on each of the sets; None stands for a loss of ours."""
        loss = self.snapshot.loss
        if isinstance(loss, str):
            data_checks.returns_policy(loss, bool(graph.returned.log_std or graph.returned.nones))
            return [None]
        found: list[list[Match]] = []
        for record, y in sets:
            if y is not None:
                leaves = [Operand(like.shape, like.dtype) for like in y.tensors]
                found.append(list(matches(record, graph.returned, math.prod(graph.returned.sample), leaves)))
        if not found:  # the prediction alone is asked for
            return [None]
        return [match for match in found[0] if match in found[-1]]

    def _disproof(self, program: Program, given: SetLike | None, second_order: bool) -> str:
        """The reason why a program must not be used on a set, or ""."""
        key = program.text, program.returned, program.match, given, second_order
        if given is None or key in self._proven or (*key[:-1], True) in self._proven:
            return ""
        model = self.snapshot.model
        loss: Loss | None = self.snapshot.loss
        target = None if given.y is None else given.y.tree()
        if target is None and not isinstance(loss, str):  # the prediction alone is asked for
            loss = None
        results = _Results(program, self.snapshot)
        draws = 1
        if program.match is not None:  # labels of every class
            draws = len(proof.OWN_LOSS_SIZES)
            if program.match != COMPUTED:
                draws = max(draws, -(-program.features // given.n))
            if draws > proof.MOST_DRAWS:
                return f"the loss is a callable of yours, of {program.features} classes for {given.n} samples"
        try:
            classes = {label.leaf: label.classes for label in program.labels}
            reason = proof.why_not(
                model, loss, results, given.x.tree(), second_order, target, draws, classes, program.of_loss,
                program.integers,
            )  # fmt: skip
        except Exception as error:
            if isinstance(loss, str):
                raise
            reason = f"the loss could not be called on a prediction that the model has not made: {first_line(error)}"
        if not reason:
            self._proven[key] = None
        return reason

    def _kept(self, program: Program) -> str:
        """The name of a program; equal ones have one name."""
        known = program.names, program.returned, program.match, program.identities, program.written, program.integers
        key = f"{program.text} {known}"
        if key not in self._known:
            self._known[key] = f"program_{len(vars(self.by_name))}"
            setattr(self.by_name, self._known[key], program)
        return self._known[key]


def _shapes(y: TreeLike, n: int) -> list[Shape]:
    """The shapes of the leaves of a target of n samples."""
    return [(n, *like.shape[1:]) if like.shape else () for like in y.tensors]


class _Holder:
    """An object with attributes. torch.compile guards the attribute that it reads, and no other."""


class _Results:
    """What a program computes, for its proof: on the CPU, wherever the model is."""

    def __init__(self, program: Program, snapshot: planning.Snapshot) -> None:
        self._program = program
        self._trainable = [name for name, p in snapshot.model.named_parameters() if p.requires_grad]
        self._trainable += program.of_loss
        self._text = replace(program.plan, backend="cpu", precision="float32").text
        self._seed = torch.tensor(proof.SEED) if program.draws else None

    def predict(self, fast: Mapping[str, Tensor], x: Tree) -> Any:
        own, x = self._own(fast), self._input(x)
        op = torch.ops.maml_cuda.predict if any(t.requires_grad for t in own) else torch.ops.maml_cuda.predict_forward
        return self._program.as_returned(op(own, x, self._text, self._seed))

    def loss_and_grad(self, fast: Mapping[str, Tensor], x: Tree, y: targets.Target) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = self._input(x), self._program.target(y, torch.float64)
        losses, grads = torch.ops.maml_cuda.loss_and_grad(self._own(fast), x, y, self._text, self._seed)
        return losses, self._whole(grads, fast)

    def hvp(self, fast: Mapping[str, Tensor], x: Tree, y: targets.Target, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        directions = self._program.directions(v, 1, 0)
        x, y = self._input(x), self._program.target(y, torch.float64)
        products = torch.ops.maml_cuda.hvp(self._own(fast), x, y, directions, self._text, self._seed)
        return self._whole(products, fast)

    def _input(self, x: Tree) -> Tensor:
        return self._program.input("x", x, True, torch.float64)

    def _own(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        return self._program.own(given, 1, 0)

    def _whole(self, parts: list[Tensor], fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like = {name: fast[name] for name in self._trainable}
        found = self._program.whole(parts, like, 0)
        return {name: found.get(name, torch.zeros_like(t)) for name, t in like.items()}
