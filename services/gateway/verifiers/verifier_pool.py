"""Verifier clients by address: opened on first use, closed when their replica is gone or hangs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
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
    """Stands in for a channel when the verifier runs in this process."""

    def __init__(self, verifier: VerifierApi) -> None:
        self._verifier = verifier

    @property
    def verifier(self) -> VerifierApi:
        return self._verifier

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True, eq=False)
class _Open:
    connection: Connection
    users: int = 0


class VerifierPool:
    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._open: dict[str, _Open] = {}
        self._left: set[_Open] = set()
        """Connections to hung verifiers, kept until their last user is done."""

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[VerifierApi]:
        """Yields a client that stays open at least until the block ends."""
        opened = self._open.get(address)
        if opened is None:
            opened = self._open[address] = _Open(self._connect(address))
        opened.users += 1
        try:
            yield opened.connection.verifier
        finally:
            opened.users -= 1
            if opened in self._left and not opened.users:
                self._left.discard(opened)
                await opened.connection.close()

    def leave(self, address: str, verifier: VerifierApi) -> None:
        """Makes the next `use` open a new connection, because the verifier on this one does not respond.

        A connection that the network has dropped looks open for most of a minute. Streams still using it
        detect that themselves.
        """
        opened = self._open.get(address)
        if opened is not None and opened.connection.verifier is verifier:
            self._left.add(self._open.pop(address))

    async def retain(self, addresses: Collection[str]) -> None:
        """Closes all other connections that are not in use."""
        gone = [a for a, opened in self._open.items() if a not in addresses and not opened.users]
        async with AsyncExitStack() as closed:
            # Remove all of them before closing any, so that a concurrent `use` opens a new one.
            for address in gone:
                closed.push_async_callback(self._open.pop(address).connection.close)

    async def close(self) -> None:
        async with AsyncExitStack() as closed:
            for opened in (*self._open.values(), *self._left):
                closed.push_async_callback(opened.connection.close)
            self._open.clear()
            self._left.clear()
