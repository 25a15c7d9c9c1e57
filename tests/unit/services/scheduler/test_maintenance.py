"""What a leader keeps up and shows: nothing unexpected ends it, and who leads no more shows none of it."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.cluster.planning.calibration import MIN_ROUNDS, CalibrationBook, CalibrationState
from dspark_core.cluster.planning.curves import CurveBook
from dspark_core.cluster.planning.draft_market import FORGET_SECONDS
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime
from services.scheduler.leadership.election import Leadership
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.documents import MemoryDocumentStore, SavedDocuments
from tests.support.clock import ManualClock
from tests.support.polling import eventually

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
PROFILE = (StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=0.02),)
DRAFTER, VERIFIERS = "drafter-10.0.0.1:50054", ("a", "b")
CALIBRATION = '{"0": {"error": 0.2, "scaled_error": 0.1, "scaling": null}}'
SHOWN = (
    ("dspark_scheduler_calibration_error", {"model": "m", "temperature": "0", "confidences": "drafter"}),
    ("dspark_scheduler_calibration_drift", {"model": "m", "temperature": "0"}),
    ("dspark_scheduler_rescaling", {"model": "m", "temperature": "0"}),
    ("dspark_scheduler_draft_price", {"drafter": DRAFTER}),
)


class Lock:
    """Leads while it is told so."""

    def __init__(self, *, leading: bool = True) -> None:
        self.now = Leadership(leading=leading, term=1)

    async def hold(self) -> Leadership:
        return self.now

    async def release(self) -> None:
        """Nobody else wants it."""

    async def close(self) -> None:
        """Nothing is open."""


class Documents(MemoryDocumentStore):
    """Keeps what is saved, and fails unexpectedly while `broken`."""

    def __init__(self, **documents: str) -> None:
        self.documents = documents
        self.broken = False
        self.saves = 0

    async def load(self) -> dict[str, str]:
        return dict(self.documents)

    async def save(self, documents: dict[str, str], term: int) -> bool:
        self.saves += 1
        if self.broken:
            raise RuntimeError("nobody thought of this")
        self.documents.update(documents)
        return True


@asynccontextmanager
async def _started(**options) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(renew_seconds=0.005, maintain_seconds=0.005, **options)
    await scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.close()


async def _hear(scheduler: Scheduler, *reports: RoundReport) -> None:
    async def stream() -> AsyncIterator[RoundReport]:
        for report in reports:
            yield report

    await scheduler.listen(stream())


def _drafted(name: str, number: int, drafter: str = DRAFTER) -> RoundReport:
    return RoundReport(
        replica_id=name,
        round=number,
        kind=KIND,
        profile=PROFILE,
        requests=(RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=1, accepted=1),),
        batch_tokens=2,
        step_seconds=0.02,
        draft_seconds=0.005,
        draft_compute_seconds=0.004,
        drafter_id=drafter,
    )


def _shown(metrics: CollectorRegistry) -> list[bool]:
    return [metrics.get_sample_value(name, labels) is not None for name, labels in SHOWN]


async def test_what_nobody_thought_of_does_not_end_maintenance(caplog: pytest.LogCaptureFixture):
    curves, calibrations = Documents(), Documents()
    curves.broken = True
    async with _started(curves=curves, calibrations=calibrations) as scheduler:
        with caplog.at_level(logging.ERROR):
            await _hear(scheduler, _drafted("a", 1))
            await eventually(lambda: curves.saves >= 2)  # it goes on
        assert "nobody thought of this" in caplog.text
        curves.broken = False
        await eventually(lambda: len(curves.documents) == 1)


async def test_a_model_that_cannot_be_examined_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch):
    def examine(requests: tuple[RequestSurvival, ...]) -> CalibrationState:
        if requests[0].sequence_id == "bad":
            raise RuntimeError("nobody thought of this")
        return CalibrationState(error=0.2, scaled_error=0.1)

    monkeypatch.setattr("services.scheduler.scheduler.examine", examine)
    metrics = CollectorRegistry()
    async with _started(metrics=metrics) as scheduler:
        for name in ("bad", "good"):
            request = RequestSurvival(sequence_id=name, survival=(0.9,), verify_length=1, accepted=1)
            kind = ReplicaKind(model=name, engine="native", hardware="cpu", dtype="float32")
            await _hear(
                scheduler,
                RoundReport(replica_id=name, round=1, kind=kind, requests=(request,) * MIN_ROUNDS),
            )
        await eventually(
            lambda: (
                metrics.get_sample_value(
                    "dspark_scheduler_calibration_drift", {"model": "good", "temperature": "0"}
                )
                == 1
            )
        )


async def test_who_leads_no_more_shows_none_of_what_it_knew_as_the_leader():
    metrics, lock = CollectorRegistry(), Lock()
    async with _started(metrics=metrics, lock=lock, calibrations=Documents(m=CALIBRATION)) as scheduler:
        await _hear(scheduler, *(_drafted("a", number) for number in (1, 2)))
        await eventually(lambda: all(_shown(metrics)))
        lock.now = Leadership(leading=False, term=2, leader_address="b:1")
        await eventually(lambda: metrics.get_sample_value("dspark_scheduler_leading") == 0)
        assert not any(_shown(metrics))
        await scheduler.examine_calibration()
        lock.now = Leadership(leading=True, term=3)
        await eventually(lambda: _shown(metrics)[:3] == [True] * 3)


async def test_a_standby_shows_no_calibration_that_it_only_read():
    metrics, lock = CollectorRegistry(), Lock(leading=False)
    async with _started(metrics=metrics, lock=lock, calibrations=Documents(m=CALIBRATION)):
        assert not any(_shown(metrics))
        lock.now = Leadership(leading=True, term=2)
        await eventually(lambda: _shown(metrics)[:3] == [True] * 3)


async def test_prices_of_drafters_that_went_away_are_not_kept():
    metrics, clock = CollectorRegistry(), ManualClock()

    def priced() -> list[str]:
        return [
            sample.labels["drafter"]
            for family in metrics.collect()
            for sample in family.samples
            if sample.name == "dspark_scheduler_draft_price"
        ]

    async with _started(metrics=metrics, clock=clock) as scheduler:
        for generation in range(3):
            clock.advance(1.0)
            drafter = f"drafter-10.0.0.{generation}:50054"
            await _hear(scheduler, *(_drafted(name, generation + 1, drafter) for name in VERIFIERS[:1]))
            await eventually(lambda drafter=drafter: priced() == [drafter])
        clock.advance(FORGET_SECONDS)
        await eventually(lambda: priced() == [])  # nobody asks for a price, either


async def test_all_that_is_known_is_saved_again_when_the_store_may_have_lost_it():
    store, calibrations = Documents(), Documents(m=CALIBRATION)
    before, pace = CurveBook(), VerifierPace()
    pace.adopt(PROFILE)
    before.join(KIND, "a", pace)
    await SavedDocuments(before, store, "step times").save(1)
    # The next leader has no replica of that kind and learns nothing new. It saves once: that shuts out the
    # leader before, whose term is older.
    curves = SavedDocuments(CurveBook(), store, "step times")
    book = SavedDocuments(CalibrationBook(), calibrations, "calibrations")
    await curves.load()
    await book.load()
    for _ in range(2):
        await curves.save(2)
        await book.save(2)
    assert (store.saves, calibrations.saves) == (2, 1)
    known = (dict(store.documents), dict(calibrations.documents))
    store.documents, calibrations.documents = {}, {}
    curves.forget()
    book.forget()
    await curves.save(2)
    await book.save(2)
    assert (store.documents, calibrations.documents) == known
