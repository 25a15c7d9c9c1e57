"""How many requests a verifier can have before one's speed floor breaks."""

import pytest

from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.cluster.replicas.routing import FLOOR_MARGIN, MAX_CONCURRENCY, Candidate
from dspark_core.records import Replica, Role, StepTime

# One request: 10 ms a round, 100 tokens/s without drafts; each further one 2 ms more.
LINE = tuple(
    StepTime(requests=n, batch_tokens=n, context_tokens=0, seconds=0.008 + 0.002 * n) for n in (1, 2, 8, 32)
)


@pytest.mark.parametrize("most", [0, 1, 7, 300])
@pytest.mark.parametrize("floor", [1.0, 20.0, 40.0, 90.0, 500.0])
def test_the_most_requests_are_found_in_few_steps(most: int, floor: float) -> None:
    pace = VerifierPace()
    pace.adopt(LINE)
    asked: list[int] = []

    class Watched(VerifierPace):
        def tokens_per_second(self, requests: int) -> float | None:
            asked.append(requests)
            return pace.tokens_per_second(requests)

    watched = Watched()
    watched.adopt(LINE)
    verifier = Replica(replica_id="v", role=Role.VERIFIER, address="v:1", model="m")
    found = Candidate(replica=verifier, requests=1, max_running=most, pace=watched, highest_floor=floor)
    counts = range(1, (most or MAX_CONCURRENCY) + 1)
    expected = [n for n in counts if n == 1 or pace.tokens_per_second(n) >= FLOOR_MARGIN * floor]
    assert found.floor_concurrency() == max(expected)
    assert len(asked) <= 10
