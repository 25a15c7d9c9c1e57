"""Step times of a kind: pooled so that no single replica decides, kept, and given to newcomers."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime
from services.scheduler.planning.curves import CurveBook
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.documents import MemoryDocumentStore

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
OTHER = ReplicaKind(model="m", engine="native", hardware="gpu", dtype="float32")
REQUESTS = (RequestSurvival(sequence_id="s", survival=(0.9, 0.8), verify_length=0, accepted=0),)


def _profile(milliseconds: float) -> tuple[StepTime, ...]:
    return tuple(
        StepTime(requests=n, batch_tokens=n, context_tokens=0, seconds=milliseconds / 1000 * (1 + n / 10))
        for n in (1, 8, 32)
    )


def _pace(milliseconds: float) -> VerifierPace:
    pace = VerifierPace()
    pace.adopt(_profile(milliseconds))
    return pace


class Store(MemoryDocumentStore):
    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.saves = 0

    async def load(self) -> dict[str, str]:
        return dict(self.documents)

    async def save(self, documents: dict[str, str], term: int) -> bool:
        self.saves += 1
        self.documents.update(documents)
        return True


def test_one_misprofiled_replica_does_not_speak_for_its_kind():
    book = CurveBook(MemoryDocumentStore())
    for name, milliseconds in (("a", 20.0), ("b", 21.0), ("stalled", 500.0)):
        book.join(KIND, name, _pace(milliseconds))
    pooled = book.pooled(KIND)
    assert pooled is not None
    assert pooled.seconds(8, 8) == pytest.approx(0.021 * 1.8, rel=0.01)
    assert book.pooled(OTHER) is None


def test_a_newcomer_without_a_curve_starts_with_that_of_its_kind():
    book = CurveBook(MemoryDocumentStore())
    book.join(KIND, "a", _pace(20.0))
    stranger, newcomer = VerifierPace(), VerifierPace()
    assert not book.join(OTHER, "stranger", stranger)
    assert stranger.round_seconds(1) is None
    assert book.join(KIND, "newcomer", newcomer)
    assert newcomer.round_seconds(8) == pytest.approx(0.020 * 1.8)
    assert not newcomer.profiled


def test_a_profile_of_its_own_is_better_than_that_of_others():
    book = CurveBook(MemoryDocumentStore())
    book.join(KIND, "a", _pace(20.0))
    own = _pace(40.0)
    assert not book.join(KIND, "b", own)
    assert own.round_seconds(8) == pytest.approx(0.040 * 1.8)


async def test_curves_outlive_the_scheduler_and_only_changes_are_stored():
    store = Store()
    before = CurveBook(store)
    before.join(KIND, "a", _pace(20.0))
    await before.save(1)
    await before.save(1)
    assert store.saves == 1
    store.documents[json.dumps(["broken", "x", "y", "z"])] = '{"points": 3}'
    store.documents["no kind at all"] = "{}"
    after = CurveBook(store)
    await after.load()
    pooled = after.pooled(KIND)
    assert pooled is not None
    assert pooled.seconds(32, 32) == pytest.approx(0.020 * 4.2)


async def _reports(
    name: str, profile: tuple[StepTime, ...] = (), rounds: tuple[int, ...] = (1, 2, 3)
) -> AsyncIterator[RoundReport]:
    for number in rounds:
        yield RoundReport(
            replica_id=name,
            round=number,
            requests=REQUESTS,
            batch_tokens=1,
            step_seconds=0.02,
            kind=KIND if number == rounds[0] else None,
            profile=profile if number == rounds[0] else (),
        )


async def _curves(
    scheduler: Scheduler, name: str, profile: tuple[StepTime, ...] = ()
) -> list[tuple[StepTime, ...]]:
    return [plan.curve async for plan in scheduler.coordinate(_reports(name, profile)) if plan.curve]


async def test_a_verifier_without_a_profile_is_sent_the_curve_once_per_stream():
    scheduler = Scheduler()
    assert await _curves(scheduler, "profiled", _profile(20.0)) == []
    (curve,) = await _curves(scheduler, "newcomer")
    assert [point.requests for point in curve] == [1, 8, 32]
    (again,) = await _curves(scheduler, "newcomer")  # it may have restarted
    assert again == curve


async def test_few_rounds_of_its_own_are_no_curve_for_a_verifier_without_a_profile():
    scheduler = Scheduler()
    assert await _curves(scheduler, "alone") == []
    assert await _curves(scheduler, "profiled", _profile(40.0)) == []
    (curve,) = await _curves(scheduler, "alone")
    assert [point.batch_tokens for point in curve] == [1, 8, 32]


async def test_a_curve_reaches_who_was_there_before_in_the_stream_that_is_open():
    scheduler, due = Scheduler(), asyncio.Queue[RoundReport]()

    async def reports() -> AsyncIterator[RoundReport]:
        while True:
            yield await due.get()

    plans, sent = scheduler.coordinate(reports()), []
    async for report in _reports("early", rounds=(1, 2, 3, 4)):
        if report.round == 3:
            assert await _curves(scheduler, "late", _profile(40.0)) == []
        due.put_nowait(report)
        sent.append(len((await anext(plans)).curve))
    assert sent == [0, 0, 3, 0]
    await plans.aclose()


async def test_who_starts_again_without_measuring_is_sent_the_curve_too():
    """At the same address, as a pod's successor."""
    scheduler = Scheduler()
    assert await _curves(scheduler, "pod", _profile(20.0)) == []
    (curve,) = await _curves(scheduler, "pod")
    assert [point.batch_tokens for point in curve] == [1, 8, 32]
