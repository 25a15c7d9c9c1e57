"""Clients of verifiers by address: opened on first use, closed when their replica is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import grpc.aio

from services.common.channels import open_channel
from services.common.clients import VerifierClient
from services.common.protocols import VerifierApi
from services.common.telemetry import Telemetry
from services.common.tls import Tls


class Connection(Protocol):
    @property
    def verifier(self) -> VerifierApi: ...

    async def close(self) -> None: ...


class GrpcConnection:
    def __init__(self, address: str, telemetry: Telemetry | None = None, tls: Tls | None = None) -> None:
        self._channel: grpc.aio.Channel = open_channel(address, telemetry, tls=tls)
        self._verifier = VerifierClient(self._channel)

    @property
    def verifier(self) -> VerifierApi:
        return self._verifier

    async def close(self) -> None:
        await self._channel.close()


class LocalConnection:
    """What a pool holds instead of a channel, for a verifier in this process."""

    def __init__(self, verifier: VerifierApi) -> None:
        self._verifier = verifier

    @property
    def verifier(self) -> VerifierApi:
        return self._verifier

    async def close(self) -> None:
        """Nothing is open."""


class VerifierPool:
    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._connections: dict[str, Connection] = {}
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[VerifierApi]:
        """A client that stays open at least until the block ends."""
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = self._connect(address)
        self._users[address] += 1
        try:
            yield connection.verifier
        finally:
            self._users[address] -= 1

    async def retain(self, addresses: Collection[str]) -> None:
        """Closes every other connection that nobody uses."""
        gone = [a for a in self._connections if a not in addresses and not self._users[a]]
        async with AsyncExitStack() as closed:
            # All are let go of before any is closed: whoever comes meanwhile has to open a new one.
            for address in gone:
                self._users.pop(address, None)
                closed.push_async_callback(self._connections.pop(address).close)

    async def close(self) -> None:
        self._users.clear()
        await self.retain(())
