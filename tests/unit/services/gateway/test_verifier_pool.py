"""Connections to verifiers: none is closed while in use, none is leaked."""

import asyncio

import pytest

from services.common.protocols import VerifierApi
from services.gateway.verifiers.verifier_pool import VerifierPool
from tests.support.polling import eventually


class SlowToClose:
    def __init__(self, address: str) -> None:
        self.address = address
        self.closing = self.closed = False
        self.go_on = asyncio.Event()
        self.error: Exception | None = None

    @property
    def verifier(self) -> VerifierApi:
        return self  # type: ignore[return-value]  # only to be told from others

    async def close(self) -> None:
        self.closing = True
        await self.go_on.wait()
        self.closed = True
        if self.error is not None:
            raise self.error


class Setup:
    def __init__(self) -> None:
        self.made: list[SlowToClose] = []
        self.pool = VerifierPool(self._connect)

    def _connect(self, address: str) -> SlowToClose:
        self.made.append(SlowToClose(address))
        return self.made[-1]

    async def used(self, *addresses: str) -> list[SlowToClose]:
        for address in addresses:
            async with self.pool.use(address):
                pass
        return self.made[-len(addresses) :]


async def test_who_comes_while_others_are_closed_gets_an_open_connection() -> None:
    setup = Setup()
    old = await setup.used("a", "b")
    retaining = asyncio.create_task(setup.pool.retain(()))
    await eventually(lambda: any(one.closing for one in old))
    for address in ("a", "b"):
        async with setup.pool.use(address) as verifier:
            assert verifier not in old
    async with setup.pool.use("b") as verifier:
        for connection in old:
            connection.go_on.set()
        await retaining
        assert not verifier.closing
    assert all(one.closed for one in old)
    assert not any(one.closing for one in setup.made[2:])


async def test_what_is_used_or_asked_for_stays() -> None:
    setup = Setup()
    kept, gone = await setup.used("a", "b")
    gone.go_on.set()
    async with setup.pool.use("c") as used:
        await setup.pool.retain(("a",))
        assert (kept.closing, gone.closed, used.closing) == (False, True, False)


async def test_one_that_cannot_be_closed_does_not_keep_others_open() -> None:
    setup = Setup()
    made = await setup.used("a", "b", "c")
    for connection in made:
        connection.go_on.set()
    made[1].error = OSError("broken")
    with pytest.raises(OSError, match="broken"):
        await setup.pool.retain(())
    assert all(one.closed for one in made)


async def test_a_connection_that_was_left_stays_open_for_its_users_alone() -> None:
    setup = Setup()
    async with setup.pool.use("a") as hangs:
        hangs.go_on.set()
        async with setup.pool.use("a") as streams:
            assert streams is hangs
            setup.pool.leave("a", hangs)
            async with setup.pool.use("a") as fresh:
                assert fresh is not hangs
            setup.pool.leave("a", streams)  # a second user notices: this must not affect the new connection
        await setup.pool.retain(("a",))
        assert not hangs.closing
    assert hangs.closed
    assert not fresh.closing
    async with setup.pool.use("a") as again:
        assert again is fresh


async def test_a_pool_that_closes_closes_connections_that_were_left() -> None:
    setup = Setup()
    async with setup.pool.use("a") as hangs:
        setup.pool.leave("a", hangs)
        hangs.go_on.set()
        await setup.pool.close()
        assert hangs.closed
