"""Step times of every kind of replica, pooled over its members and kept for the next one.

A kind is (model, engine, hardware, dtype). A pooled model has the median time of the members at each
point, so that one throttled or misprofiled replica does not speak for its kind.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple
from statistics import median

from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.records import ReplicaKind
from services.scheduler.documents import DocumentStore, SavedDocuments
from services.scheduler.pace import VerifierPace

MAX_KINDS = 256
MAX_MEMBERS = 64
"""Of a kind: more would not move a median."""


class CurveBook:
    def __init__(self, store: DocumentStore) -> None:
        self._saved = SavedDocuments(store, "step times")
        self._stored: OrderedDict[ReplicaKind, StepTimeModel] = OrderedDict()
        self._members: dict[ReplicaKind, OrderedDict[str, VerifierPace]] = {}

    def join(self, kind: ReplicaKind, replica_id: str, pace: VerifierPace) -> bool:
        """A replica of this kind reports; True when it was not measured and got the pooled curve. It is
        a member once it was: a few live steps of whatever shapes say nothing of other shapes."""
        taken_over = False
        if not pace.measured:
            pooled = self.pooled(kind)
            if pooled is None:
                return False
            pace.start_from(pooled)
            taken_over = True
        if kind not in self._members and len(self._members) >= MAX_KINDS:
            self._members.pop(next(iter(self._members)))
        members: OrderedDict[str, VerifierPace] = self._members.setdefault(kind, OrderedDict())
        members[replica_id] = pace
        members.move_to_end(replica_id)
        if len(members) > MAX_MEMBERS:
            members.popitem(last=False)
        return taken_over

    def leave(self, kind: ReplicaKind, replica_id: str) -> None:
        """A replica of this kind is one no more; what it told of the kind stays while it is all there is."""
        members = self._members.get(kind, OrderedDict())
        pooled = self.pooled(kind)
        members.pop(replica_id, None)
        if not members and self._members.pop(kind, None) is not None and pooled is not None:
            self._keep(kind, pooled)

    def pooled(self, kind: ReplicaKind) -> StepTimeModel | None:
        """The median of the members; what was stored while there are none; None: an unknown kind."""
        paces = list(self._members[kind].values()) if kind in self._members else []
        models = [pace.model.verify for pace in paces if pace.model is not None]
        return _median(models, kind) if models else self._stored.get(kind)

    async def load(self) -> None:
        """Takes over what an earlier leader stored; a store that is down leaves the book as it is."""
        await self._saved.load(self._take)

    def _take(self, name: str, document: str) -> None:
        self._keep(_kind_from_text(name), StepTimeModel.from_dict(json.loads(document)))

    def forget_saved(self) -> None:
        """The store may have lost everything: the next `save` writes all that is known."""
        self._saved.forget()

    async def save(self, term: int) -> None:
        """Stores what changed since the last time. Never fails."""
        for kind in self._members:
            if (pooled := self.pooled(kind)) is not None:
                self._keep(kind, pooled)
        documents = {_kind_to_text(kind): json.dumps(model.to_dict()) for kind, model in self._stored.items()}
        await self._saved.save(documents, term)

    async def close(self) -> None:
        await self._saved.close()

    def _keep(self, kind: ReplicaKind, model: StepTimeModel) -> None:
        self._stored[kind] = model
        self._stored.move_to_end(kind)
        if len(self._stored) > MAX_KINDS:
            self._stored.popitem(last=False)


def _median(models: Sequence[StepTimeModel], kind: ReplicaKind) -> StepTimeModel:
    """At the points of the member that has most of them."""
    widest = max(models, key=lambda model: len(model.points))
    points = tuple(
        StepPoint(
            point.requests,
            point.batch_tokens,
            point.context_tokens,
            median(
                model.seconds(point.requests, point.batch_tokens, point.context_tokens) for model in models
            ),
        )
        for point in widest.points
    )
    return StepTimeModel(points, kind)


def _kind_to_text(kind: ReplicaKind) -> str:
    return json.dumps(astuple(kind))


def _kind_from_text(text: str) -> ReplicaKind:
    model, engine, hardware, dtype = json.loads(text)
    return ReplicaKind(model=str(model), engine=str(engine), hardware=str(hardware), dtype=str(dtype))
