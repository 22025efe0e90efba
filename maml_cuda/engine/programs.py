"""Finds the program of a model for the data of a call: captures the model for this signature, reads the record as fused
layers, and proves the program (plan/proof.py). Each answer is found once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_cuda import targets
from maml_cuda.capture.capture import Captured, Like, capture
from maml_cuda.capture.errors import DoesNotFit, Unfusable, first_line
from maml_cuda.capture.record import Operand, Record
from maml_cuda.engine import data_checks, planning
from maml_cuda.engine.bounded import Bounded
from maml_cuda.engine.data_checks import OF_CLASSES
from maml_cuda.engine.problem import why_not
from maml_cuda.engine.program import Program
from maml_cuda.engine.signatures import SetLike, Signature, TreeLike
from maml_cuda.losses import Loss, cross_entropy
from maml_cuda.plan import proof
from maml_cuda.plan.graph import Graph
from maml_cuda.plan.own_loss import COMPUTED, Match, matches
from maml_cuda.plan.reader import graph_of
from maml_cuda.plan.sample_counts import counted
from maml_cuda.pytrees import Tree
from maml_cuda.sample_weights import Weighted

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
        self._captured: Bounded[SetLike, Captured] = Bounded(MOST_RECORDS)
        self._graphs: Bounded[tuple[SetLike, bool], Graph] = Bounded(MOST_RECORDS)
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
        readings = self._readings(sets)
        reason = ""
        for read, match in self._candidates(sets, readings):
            program = planning.program_of(self.snapshot, read, match)
            n_support, n_query = (
                0 if given is None else program.samples(given) for given in (signature.support, signature.query)
            )
            if reason := why_not(program.text, program.sample(sets[0]), n_support, n_query, program.dtype):
                raise Unfusable(reason)
            reason = self._disproof(program, signature.support, signature.second_order)
            reason = reason or self._disproof(program, signature.query, second_order=False)
            if not reason:
                return self._kept(program)
        raise Unfusable(reason)

    def _readings(self, sets: list[SetLike]) -> list[_Reading]:
        """The record of each set, and its graph. Where samples are combined with each other, each set is read as one
        sample.

        Raises:
            Unfusable, DoesNotFit: as `capture`; there is no graph.
        """
        for given in sets:
            self._capture(given)
        try:
            return self._by_samples(sets)
        except Unfusable as reason:
            try:
                whole = [self._read(given, whole_sets=True) for given in sets]
            except Unfusable:
                raise reason from None
            if whole[0].graph != whole[-1].graph:
                raise Unfusable(f"{reason}, which is fused where support and query sets are of one size") from None
            return whole

    def _by_samples(self, sets: list[SetLike]) -> list[_Reading]:
        found = [self._reading(given) for given in sets]
        records, graphs = counted([each.record for each in found]), [each.graph for each in found]
        if graphs[0] != graphs[-1]:
            graphs = [graph_of(self.snapshot.model, record) for record in records]
            if graphs[0] != graphs[-1]:
                raise Unfusable("the model runs other operations on the query set than on the support set")
            graphs = [replace(graph, ignored=found[0].graph.ignored) for graph in graphs]
        return list(map(_Reading, records, graphs))

    def _reading(self, given: SetLike) -> _Reading:
        """In a set of one sample, the axis of samples can be taken for another one; then that of two samples is read,
        which the proof compares on one."""
        try:
            return self._read(given)
        except Unfusable as reason:
            if given.n != 1:
                raise
            try:
                return self._read(given.of(2))
            except DoesNotFit:
                raise reason from None

    def _read(self, given: SetLike, whole_sets: bool = False) -> _Reading:
        record, changes = self._capture(given)
        if (given, whole_sets) not in self._graphs:
            self._graphs[given, whole_sets] = graph_of(self.snapshot.model, record, changes, whole_sets=whole_sets)
        return _Reading(record, self._graphs[given, whole_sets])

    def _capture(self, given: SetLike) -> Captured:
        model, loss = self.snapshot.model, self.snapshot.loss
        if given not in self._captured:
            with_loss = [] if given.y is None or isinstance(loss, str) else [loss, given.y.tree()]
            try:
                self._captured[given] = capture(model, given.x.tree(), *with_loss)
            except DoesNotFit as reason:
                reason.given = given
                raise
        return self._captured[given]

    def _candidates(self, sets: list[SetLike], readings: list[_Reading]) -> Iterator[tuple[Graph, Match | None]]:
        """What may compute the loss: a loss of the core, and then the operations of a loss, read as layers.

        Raises:
            Unfusable: nothing does.
        """
        graph, loss = readings[0].graph, self.snapshot.loss
        if not graph.whole_sets or loss not in OF_CLASSES:  # which count samples
            try:
                for match in self._matches(graph, [(r.record, g.y) for r, g in zip(readings, sets, strict=True)]):
                    yield graph, match
            except Unfusable:
                pass
        if isinstance(loss, str) and not graph.whole_sets:
            return
        read = [
            graph_of(self.snapshot.model, record, (), shapes, graph.whole_sets)
            for record, shapes in self._with_loss(sets, readings)
        ]
        if not read:
            return
        if read[0] != read[-1]:
            raise Unfusable("the loss is a callable of yours, which computes different things on the two sets")
        yield replace(read[0], ignored=graph.ignored), COMPUTED

    def _with_loss(self, sets: list[SetLike], readings: list[_Reading]) -> list[tuple[Record, list[Shape]]]:
        """Records with the operations of the loss, each with the shapes of the leaves of its target."""
        model, loss, returned = self.snapshot.model, self.snapshot.loss, readings[0].graph.returned
        if not isinstance(loss, str):
            found = [(r.record, given.of(r.record.n).y) for r, given in zip(readings, sets, strict=True)]
            return [(record, [like.shape for like in y.tensors]) for record, y in found if y is not None]
        if loss != "cross_entropy":
            return []
        if len(returned.sample) != 2:
            raise Unfusable(f"cross_entropy takes a prediction [n, classes], got {list(returned.sample)}")
        labels = Like(returned.sample[:1], torch.int64)
        return [(capture(model, sets[0].x.tree(), cross_entropy, labels).record, [labels.shape])]

    def _matches(self, graph: Graph, sets: Sequence[tuple[Record, TreeLike | None]]) -> list[Match | None]:
        """The losses of the core that the loss may be on each of the sets; None stands for a loss of ours."""
        loss = self.snapshot.loss
        if isinstance(loss, str):
            data_checks.returns_policy(loss, bool(graph.returned.log_std or graph.returned.nones))
            return [None]
        found: list[list[Match]] = []
        if any(y is not None and isinstance(y.tree(), Weighted) for _, y in sets):
            return []
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
        key = f"{program.text} {known} {program.whole_sets}"
        if key not in self._known:
            self._known[key] = f"program_{len(vars(self.by_name))}"
            setattr(self.by_name, self._known[key], program)
        return self._known[key]


class _Reading(NamedTuple):
    """What a model runs for a set.

    Attributes:
        record: the operations.
        graph: these as layers.
    """

    record: Record
    graph: Graph


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
