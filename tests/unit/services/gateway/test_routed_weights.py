"""A stream continues on the weights it began on, or ends: two models must not share an answer."""

import itertools

import pytest

from dspark_core.errors import UnavailableError
from tests.unit.services.gateway.test_routed_backend import EXPECTED, REQUEST, Cluster, tokens


async def test_a_stream_continues_on_equal_weights_only() -> None:
    cluster = Cluster("a", "b", "c")
    cluster.serve_weights(a="old", b="new", c="old")
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), 2
    assert tokens(await cluster.run()) == EXPECTED
    assert (len(cluster["b"].requests), len(cluster["c"].requests)) == (0, 1)
    assert cluster["c"].requests[0].weights == "old"


@pytest.mark.parametrize("scheduler", ["serves", "is down"])
async def test_a_stream_whose_weights_are_gone_ends_rather_than_mix_two_models(scheduler: str) -> None:
    cluster = Cluster("a", "b")
    cluster.serve_weights(a="old", b="new")
    await cluster.backend.refresh_view()
    calls = itertools.count()

    def dies_for_good() -> None:
        if next(calls) >= 2:
            if scheduler == "is down":
                cluster.scheduler.error = UnavailableError("gone")
            raise UnavailableError("killed")

    cluster["a"].serves = dies_for_good
    with pytest.raises(UnavailableError, match="no verifier for model 'm' is left"):
        await cluster.run()
    assert cluster["b"].requests == []


async def test_a_request_without_tokens_may_move_to_other_weights() -> None:
    cluster = Cluster("a", "b")
    cluster.serve_weights(a="old", b="new")
    cluster["a"].error = UnavailableError("killed")
    assert tokens(await cluster.run()) == EXPECTED
    assert cluster["b"].requests[0].weights == ""


async def test_a_verifier_that_came_back_with_other_weights_does_not_continue_the_stream() -> None:
    """Its registration is still the old one's."""
    cluster = Cluster("a")
    cluster.serve_weights(a="old")
    verifier = cluster["a"]
    verifier.error, verifier.fails_after = UnavailableError("killed"), 2

    def is_replaced() -> None:
        verifier.weights = "new"

    stream = aiter(cluster.backend.generate(REQUEST))
    await anext(stream)
    is_replaced()
    with pytest.raises(UnavailableError):
        async for _ in stream:
            pass
    assert all(request.weights == "old" for request in verifier.requests[1:])
