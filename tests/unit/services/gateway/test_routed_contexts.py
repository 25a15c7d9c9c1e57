"""Requests among verifiers whose contexts differ in length."""

import pytest

from dspark_core.errors import ContextLengthError, UnavailableError
from tests.unit.services.gateway.test_routed_backend import EXPECTED, Cluster, LostOnce, tokens


def too_long(limit: int) -> ContextLengthError:
    return ContextLengthError(f"the limit is {limit}", field="prompt_token_ids", limit=limit)


@pytest.mark.parametrize("after", [0, 2])
async def test_verifiers_of_a_shorter_context_are_passed_over(after) -> None:
    """More of them than a request may lose."""
    cluster = Cluster(*"abcdef")
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), after
    for name in "bcde":
        cluster[name].error = too_long(3)
    assert tokens(await cluster.run()) == EXPECTED
    assert [len(verifier.requests) for verifier in cluster.verifiers.values()] == [1] * 6


async def test_a_verifier_of_a_shorter_context_stays_as_good_as_others_for_other_requests() -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster.scheduler.error = UnavailableError("down")
    cluster["a"].error = too_long(3)
    assert tokens(await cluster.run()) == EXPECTED
    cluster["a"].error = None
    assert tokens(await cluster.run()) == EXPECTED
    assert [len(cluster[name].requests) for name in "ab"] == [2, 1]


async def test_what_is_too_long_for_all_hears_so_with_the_longest_context() -> None:
    cluster = Cluster(*"abcd")
    for name, limit in zip("abcd", (16, 64, 32, 8), strict=True):
        cluster[name].error = too_long(limit)
    with pytest.raises(ContextLengthError, match="the limit is 64"):
        await cluster.run()
    assert [len(verifier.requests) for verifier in cluster.verifiers.values()] == [1] * 4


@pytest.mark.parametrize("after", [0, 2])
async def test_a_verifier_that_is_back_continues_what_the_others_have_no_room_for(after) -> None:
    cluster = Cluster("a", "b")
    cluster.verifiers["a"] = cluster.connections["a"].verifier = LostOnce()
    cluster["b"].error = too_long(3)
    assert tokens(await cluster.run()) == EXPECTED
    assert [len(cluster[name].requests) for name in "ab"] == [2, 1]


@pytest.mark.parametrize("after", [0, 1])
async def test_a_loss_that_the_others_have_no_room_for_is_not_the_callers_error(after) -> None:
    cluster = Cluster("a", "b")
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), after
    cluster["b"].error = too_long(3)
    with pytest.raises(UnavailableError, match="left after 3 failed"):
        await cluster.run()
    assert len(cluster["b"].requests) == 1
