"""How a gateway learns what the verifiers serve."""

import pytest

from dspark_core.errors import UnavailableError
from tests.unit.services.gateway.test_routed_backend import Cluster


async def test_the_description_is_asked_for_once() -> None:
    cluster = Cluster("a")
    description = await cluster.backend.describe()
    assert description.max_context_tokens == 64
    cluster["a"].error = UnavailableError("killed")
    assert await cluster.backend.describe() == description


async def test_a_description_asks_for_no_assignment() -> None:
    cluster = Cluster("a", "b")
    found, cluster.scheduler.replicas = cluster.scheduler.replicas, []
    with pytest.raises(UnavailableError, match="no verifier for model 'm' is registered"):
        await cluster.backend.describe()
    cluster.scheduler.replicas = found
    cluster["a"].describe_error = UnavailableError("still loading")
    with pytest.raises(UnavailableError, match="still loading"):
        await cluster.backend.describe()
    assert (await cluster.backend.describe()).max_context_tokens == 64  # another verifier is asked
    assert cluster.scheduler.asked == 0
