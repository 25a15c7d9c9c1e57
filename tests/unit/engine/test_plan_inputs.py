"""Which speed floors a round plans for."""

from dspark_core.engine.drafts.plan_inputs import draft_candidates, plan_requests, speed_floors
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import DraftOrigin, GenerateRequest


def _sequences(*floors: tuple[float | None, bool]) -> list[SequenceState]:
    requests = [
        GenerateRequest(
            request_id=f"r{place}",
            prompt_token_ids=(1, 2),
            min_tokens_per_second=floor,
            floor_promised=promised,
        )
        for place, (floor, promised) in enumerate(floors)
    ]
    return [SequenceState(request, order, 0, 99) for order, request in enumerate(requests)]


def test_wishes_count_where_nothing_is_promised() -> None:
    assert speed_floors(_sequences((90.0, False), (None, False), (20.0, False))) == [90.0, None, 20.0]


def test_a_wish_does_not_compete_with_a_promise() -> None:
    sequences = _sequences((90.0, False), (30.0, True), (None, False))
    assert speed_floors(sequences) == [None, 30.0, None]
    candidates = draft_candidates(sequences, 4, {})
    assert [one.floor_tokens_per_second for one in candidates] == [None, 30.0, None]
    planned = plan_requests(sequences, [(), (), ()], [DraftOrigin.DRAFTER] * 3)
    assert [one.floor_tokens_per_second for one in planned] == [None, 30.0, None]
