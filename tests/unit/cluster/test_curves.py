"""Step times of a kind: pooled so that no single replica decides, and given to newcomers."""

import pytest

from dspark_core.cluster.planning.curves import CurveBook
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import ReplicaKind, StepTime

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
OTHER = ReplicaKind(model="m", engine="native", hardware="gpu", dtype="float32")


def _profile(milliseconds: float) -> tuple[StepTime, ...]:
    return tuple(
        StepTime(requests=n, batch_tokens=n, context_tokens=0, seconds=milliseconds / 1000 * (1 + n / 10))
        for n in (1, 8, 32)
    )


def _pace(milliseconds: float) -> VerifierPace:
    pace = VerifierPace()
    pace.adopt(_profile(milliseconds))
    return pace


def test_one_misprofiled_replica_does_not_speak_for_its_kind():
    book = CurveBook()
    for name, milliseconds in (("a", 20.0), ("b", 21.0), ("stalled", 500.0)):
        book.join(KIND, name, _pace(milliseconds))
    pooled = book.pooled(KIND)
    assert pooled is not None
    assert pooled.seconds(8, 8) == pytest.approx(0.021 * 1.8, rel=0.01)
    assert book.pooled(OTHER) is None


def test_a_newcomer_without_a_curve_starts_with_that_of_its_kind():
    book = CurveBook()
    book.join(KIND, "a", _pace(20.0))
    stranger, newcomer = VerifierPace(), VerifierPace()
    assert not book.join(OTHER, "stranger", stranger)
    assert stranger.round_seconds(1) is None
    assert book.join(KIND, "newcomer", newcomer)
    assert newcomer.round_seconds(8) == pytest.approx(0.020 * 1.8)
    assert not newcomer.profiled


def test_a_profile_of_its_own_is_better_than_that_of_others():
    book = CurveBook()
    book.join(KIND, "a", _pace(20.0))
    own = _pace(40.0)
    assert not book.join(KIND, "b", own)
    assert own.round_seconds(8) == pytest.approx(0.040 * 1.8)


def test_curves_are_taken_over_from_their_documents():
    before, after = CurveBook(), CurveBook()
    before.join(KIND, "a", _pace(20.0))
    for name, document in before.documents().items():
        after.take(name, document)
    pooled = after.pooled(KIND)
    assert pooled is not None
    assert pooled.seconds(32, 32) == pytest.approx(0.020 * 4.2)
    assert after.documents() == before.documents()
