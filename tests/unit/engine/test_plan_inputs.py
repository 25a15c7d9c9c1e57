"""How sequences are described to the planners: floors, drafts granted so far, who may look ahead."""

import pytest

from dspark_core.engine.drafts.plan_inputs import (
    draft_candidates,
    plan_requests,
    sampling_group,
    speed_floors,
)
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import (
    DraftOrigin,
    GenerateRequest,
    SamplingParams,
    SpeculationOptions,
    SpeculationStats,
    Verification,
)
from tests.unit.engine.tiny import request


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


GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)


@pytest.mark.parametrize(
    ("sampling", "verification", "origin", "coupled"),
    [
        (GREEDY, Verification.REJECTION, DraftOrigin.DRAFTER, True),
        (SAMPLED, Verification.COUPLED, DraftOrigin.DRAFTER, True),
        (SAMPLED, Verification.REJECTION, DraftOrigin.LOOKUP, True),
        (SAMPLED, Verification.REJECTION, DraftOrigin.DRAFTER, False),
    ],
)
def test_only_drawn_drafts_under_rejection_sampling_must_not_be_looked_at(
    sampling: SamplingParams, verification: Verification, origin: DraftOrigin, coupled: bool
) -> None:
    options = SpeculationOptions(verification=verification)
    one = SequenceState(request("a", [1], sampling=sampling, speculation=options), 0, 0, 9)
    (planned,) = plan_requests([one], [(0.9,)], [origin])
    assert planned.coupled == coupled
    assert planned.temperature == sampling.temperature


def test_a_request_is_granted_what_was_verified_for_it_per_round() -> None:
    new, old = _sequences((None, False), (None, False))
    old.stats = SpeculationStats(rounds=4, verified_tokens=6)
    planned = plan_requests([new, old], [(), ()], [DraftOrigin.DRAFTER] * 2)
    assert [one.granted for one in planned] == [0.0, 1.5]


def test_requests_are_grouped_by_how_they_are_sampled_but_not_finely() -> None:
    def group(verification: Verification = Verification.REJECTION, **sampling: float) -> str:
        options = SpeculationOptions(verification=verification)
        return sampling_group(
            request("a", [1], sampling=SamplingParams(**sampling), speculation=options)  # type: ignore[arg-type]
        )

    plain = group(temperature=1.0)
    assert group(temperature=1.04) == plain
    assert group(temperature=5.0) == group(temperature=2.0)
    others = [
        group(temperature=0.7),
        group(temperature=1.0, top_k=40),
        group(temperature=1.0, top_p=0.9),
        group(Verification.COUPLED, temperature=1.0),
    ]
    assert len({plain, *others}) == 5
