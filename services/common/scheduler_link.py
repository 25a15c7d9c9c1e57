"""A `SchedulerApi` over several schedulers: follows the leader, tries the others when it is gone."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dspark_core.errors import (
    ConfigError,
    DeadlineError,
    DSparkError,
    NotLeaderError,
    NoVerifierError,
    UnavailableError,
)
from dspark_core.records import AssignRequest, Replica, Role, RoundReport, VerifyPlan
from services.common.channels import open_channel
from services.common.clients import SchedulerClient
from services.common.protocols import SchedulerApi
from services.common.telemetry import Telemetry
from services.common.tls import Tls

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_HINTED = 4
"""Connections kept to leaders that are not configured but were named by a standby; the oldest is dropped."""
MAX_RETIRED = 4
"""Replaced connections that are kept open, so that calls on them can end."""
SILENCE_SECONDS = 3.0
"""A live scheduler sends plans or heartbeats several times within this. One that hangs keeps its connection
open, and nothing else would reveal it for most of a minute."""
MAX_OLDER_STREAMS = 8
"""A replaced leader may not know it yet, so an older term is refused. If it persists over this many streams,
it is believed: clocks that make terms were set back, or the election method was changed."""
PATIENCE_SECONDS = 1.0
"""How often a request waiting for its turn at a scheduler checks that the scheduler is alive."""
RECONNECT_SECONDS = 1.0
"""Shortest time between new connections to a name because the scheduler behind it could not help."""


class _OlderTermError(UnavailableError):
    """The scheduler's term is older than one already seen."""


class SchedulerConnection(Protocol):
    @property
    def scheduler(self) -> SchedulerApi: ...

    async def close(self) -> None: ...


class GrpcSchedulerConnection:
    def __init__(self, address: str, telemetry: Telemetry | None = None, tls: Tls | None = None) -> None:
        self._channel = open_channel(address, telemetry, tls=tls)
        self.scheduler: SchedulerApi = SchedulerClient(self._channel)

    async def close(self) -> None:
        await self._channel.close()


@dataclass(slots=True)
class _Known:
    address: str
    connection: SchedulerConnection
    configured: bool


class SchedulerLink:
    """A standby answers NotLeaderError and may name the leader, which is then tried next."""

    def __init__(
        self,
        addresses: Sequence[str],
        connect: Callable[[str], SchedulerConnection],
        *,
        silence_seconds: float = SILENCE_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`addresses`: at least one `host:port`; one name that stands for several schedulers is enough."""
        if not addresses:
            raise ConfigError("at least one scheduler address is needed")
        self._silence_seconds = silence_seconds
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._retired: deque[SchedulerConnection] = deque()
        self._reconnect_at = -math.inf
        self._term = 0
        self._older_streams = 0
        self._connect = connect
        self._known = [_Known(address, connect(address), True) for address in dict.fromkeys(addresses)]
        self._current = self._known[0]

    async def close(self) -> None:
        for connection in (*self._retired, *(known.connection for known in self._known)):
            await connection.close()

    async def register(self, replica: Replica) -> float:
        return await self._ask(lambda scheduler: scheduler.register(replica))

    async def deregister(self, replica_id: str) -> None:
        await self._ask(lambda scheduler: scheduler.deregister(replica_id))

    async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
        return await self._ask(lambda scheduler: scheduler.list_replicas(role))

    async def assign(self, request: AssignRequest) -> Replica:
        """Bounded by the request's own wait; a scheduler that hangs meanwhile is abandoned sooner."""
        return await self._ask(lambda scheduler: self._assign(scheduler, request))

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        """One stream to the presumed leader. A failure is raised, and the next call tries another scheduler:
        reports that a broken stream has consumed cannot be sent again. A plan whose term is older than one
        already seen counts as a failure."""
        asked = self._current
        connection = asked.connection
        try:
            async with aclosing(connection.scheduler.coordinate(reports)) as plans:
                while (plan := await self._next_plan(plans, asked.address)) is not None:
                    self._check_term(plan.term, asked.address)
                    yield plan
        except (UnavailableError, DeadlineError) as error:
            await self._turn_from(asked, connection, error, {asked.address})
            raise

    def _check_term(self, term: int, address: str) -> None:
        if term < self._term and self._older_streams < MAX_OLDER_STREAMS:
            self._older_streams += 1
            raise _OlderTermError(f"the scheduler at {address} leads by a term that is over ({term})")
        if term < self._term:
            _log.warning("following the scheduler at %s, whose term %d is older", address, term)
        self._term, self._older_streams = term, 0

    async def _next_plan(self, plans: AsyncGenerator[VerifyPlan, None], address: str) -> VerifyPlan | None:
        """None at the end of the stream. Raises DeadlineError if nothing comes in time."""
        try:
            async with asyncio.timeout(self._silence_seconds):
                return await anext(plans, None)
        except TimeoutError:
            raise DeadlineError(
                f"the scheduler at {address} said nothing for {self._silence_seconds:g} s"
            ) from None

    async def _assign(self, scheduler: SchedulerApi, request: AssignRequest) -> Replica:
        asking = asyncio.ensure_future(scheduler.assign(request))
        try:
            while not (await asyncio.wait({asking}, timeout=self._patience_seconds))[0]:
                await scheduler.list_replicas(Role.VERIFIER)  # fails within its own deadline
            return asking.result()
        finally:
            asking.cancel()

    async def _ask(self, call: Callable[[SchedulerApi], Awaitable[_T]]) -> _T:
        """The first answer. If all fail, raises the error of a leader or an unreachable scheduler rather than
        a standby's."""
        failed: DSparkError | None = None
        tried: set[str] = set()
        while True:
            asked = self._current
            connection = asked.connection
            try:
                return await call(connection.scheduler)
            except (UnavailableError, DeadlineError) as error:
                if failed is None or isinstance(failed, NotLeaderError):
                    failed = error
                tried.add(asked.address)
                await self._turn_from(asked, connection, error, tried)
                if self._current.address in tried:
                    raise failed from None

    async def _turn_from(
        self, asked: _Known, used: SchedulerConnection, error: DSparkError, tried: set[str]
    ) -> None:
        """Chooses which scheduler to ask next: the leader that was named, else the next one not tried."""
        if self._current is not asked:
            return  # another call has already switched
        if asked.connection is used:
            if isinstance(error, DeadlineError):
                await self._retire(asked)
            elif asked.configured and _is_cut_off(error) and self._clock() >= self._reconnect_at:
                self._reconnect_at = self._clock() + RECONNECT_SECONDS
                await self._retire(asked)
        named = error.leader_address if isinstance(error, NotLeaderError) else ""
        if named and named not in tried:
            self._current = await self._at(named)
            return
        start = self._known.index(asked) if asked in self._known else 0
        order = [*self._known[start + 1 :], *self._known[: start + 1]]
        self._current = next((known for known in order if known.address not in tried), order[0])

    async def _retire(self, known: _Known) -> None:
        """Reconnects: if a name stands for several schedulers, the next connection may reach another one."""
        self._retired.append(known.connection)
        known.connection = self._connect(known.address)
        if len(self._retired) > MAX_RETIRED:
            await self._retired.popleft().close()

    async def _at(self, address: str) -> _Known:
        for known in self._known:
            if known.address == address:
                return known
        hinted = [known for known in self._known if not known.configured]
        if len(hinted) >= MAX_HINTED:
            self._known.remove(hinted[0])
            await hinted[0].connection.close()
        self._known.append(_Known(address, self._connect(address), False))
        return self._known[-1]


def _is_cut_off(error: DSparkError) -> bool:
    """Whether a scheduler answered that may be split off from the others: it leads beside the real leader,
    or is a standby that cannot name it."""
    return isinstance(error, (NoVerifierError, _OlderTermError)) or (
        isinstance(error, NotLeaderError) and not error.leader_address
    )


def link_to_schedulers(text: str, telemetry: Telemetry, tls: Tls | None) -> SchedulerLink:
    """A link over gRPC to schedulers given like `a:50052, b:50052`."""
    return SchedulerLink(
        addresses_from_text(text), lambda address: GrpcSchedulerConnection(address, telemetry, tls)
    )


def addresses_from_text(text: str) -> tuple[str, ...]:
    """`a:50052, b:50052` -> its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
