"""Step times of every kind of replica, pooled over the replicas of that kind and kept for later ones.

A kind is (model, engine, hardware, dtype). A pooled model has the members' median time at each point, so one
throttled or misprofiled replica does not distort it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple
from statistics import median

from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import ReplicaKind

MAX_KINDS = 256
MAX_MEMBERS = 64
"""Per kind: more would hardly move the median."""


class CurveBook:
    def __init__(self) -> None:
        self._stored: OrderedDict[ReplicaKind, StepTimeModel] = OrderedDict()
        self._members: dict[ReplicaKind, OrderedDict[str, VerifierPace]] = {}

    def join(self, kind: ReplicaKind, replica_id: str, pace: VerifierPace) -> bool:
        """Makes a reporting replica a member of its kind; returns True if it took over the pooled curve,
        having no measured one. With neither it does not join: a few live steps of arbitrary shapes say
        nothing about other shapes."""
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
        """Removes a replica no longer of this kind; keeps the pooled curve if it was the last member."""
        members = self._members.get(kind)
        if members is None or replica_id not in members:
            return
        if len(members) == 1:
            if (pooled := self.pooled(kind)) is not None:
                self._keep(kind, pooled)
            del self._members[kind]
        else:
            del members[replica_id]

    def pooled(self, kind: ReplicaKind) -> StepTimeModel | None:
        """The members' median, or the stored curve while there are no members; None for an unknown kind."""
        paces = list(self._members[kind].values()) if kind in self._members else []
        models = [pace.model.verify for pace in paces if pace.model is not None]
        return _median(models, kind) if models else self._stored.get(kind)

    def documents(self) -> dict[str, str]:
        """A pooled curve for each kind."""
        for kind in self._members:
            if (pooled := self.pooled(kind)) is not None:
                self._keep(kind, pooled)
        return {_kind_to_text(kind): json.dumps(model.to_dict()) for kind, model in self._stored.items()}

    def take(self, name: str, document: str) -> None:
        """Takes over an earlier leader's curve. Raises ConfigError, ValueError, TypeError or KeyError for a
        malformed document."""
        self._keep(_kind_from_text(name), StepTimeModel.from_dict(json.loads(document)))

    def _keep(self, kind: ReplicaKind, model: StepTimeModel) -> None:
        self._stored[kind] = model
        self._stored.move_to_end(kind)
        if len(self._stored) > MAX_KINDS:
            self._stored.popitem(last=False)


def _median(models: Sequence[StepTimeModel], kind: ReplicaKind) -> StepTimeModel:
    """Median times at the points of the model that has the most."""
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
