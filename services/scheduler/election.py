"""Which of several schedulers leads: a lock with a time limit, renewed while its holder lives.

Every term of leadership has a number that only grows. Plans carry it, so that a leader which was
cut off and does not know yet that it was replaced is not listened to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from dspark_core.errors import ConfigError, NotLeaderError, UnavailableError
from services.common.lifecycle import end

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leadership:
    """Who leads now."""

    leading: bool
    """This process does."""
    term: int = 0
    leader_address: str = ""
    """`host:port` of the leader's gRPC server; empty: it did not tell."""


class LeaderLock(Protocol):
    async def hold(self) -> Leadership:
        """Takes the lock if it is free, renews it if it is ours. UnavailableError: nobody can tell.
        ConfigError: this process has no right to it."""
        ...

    async def release(self) -> None:
        """Lets the standby take over at once. UnavailableError: it will have to wait."""
        ...

    async def close(self) -> None: ...


class SoleLeader:
    """For a scheduler that is alone: it always leads, by a term that is newer than those before its start, of
    whatever lock."""

    def __init__(self) -> None:
        self._term = time.time_ns() // 1000

    async def hold(self) -> Leadership:
        return Leadership(leading=True, term=self._term)

    async def release(self) -> None:
        """There is nobody to release it to."""

    async def close(self) -> None:
        """Nothing is open."""


class Election:
    def __init__(
        self,
        lock: LeaderLock,
        *,
        renew_seconds: float,
        on_change: Callable[[Leadership], Awaitable[None]],
    ) -> None:
        """`on_change` is awaited whenever leading begins or ends; it must not fail."""
        self._lock = lock
        self._renew_seconds = renew_seconds
        self._on_change = on_change
        # While the lock was never reached nobody can be asked, and serving beats refusing.
        self._now = Leadership(leading=True)
        self._reached = False
        self._task: asyncio.Task[None] | None = None

    @property
    def now(self) -> Leadership:
        return self._now

    def require_leading(self) -> None:
        """Raises NotLeaderError on a standby, naming the leader."""
        if not self._now.leading:
            raise NotLeaderError(
                f"this scheduler is a standby, the leader is {self._now.leader_address or 'not known'}",
                leader_address=self._now.leader_address,
            )

    async def start(self) -> None:
        """Raises ConfigError when the lock refuses this process: it would never know who leads."""
        await self._hold(starting=True)
        self._task = asyncio.create_task(self._run(), name="election")

    async def stop(self) -> None:
        """Gives leadership up, so that a standby need not wait for the lock to run out."""
        if self._task is not None:
            await end(self._task)
            self._task = None
        if self._now.leading:
            try:
                await self._lock.release()
            except (UnavailableError, ConfigError) as error:
                _log.warning("could not release the leader lock, it will run out: %s", error)
        await self._lock.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._renew_seconds)
            await self._hold()

    async def _hold(self, *, starting: bool = False) -> None:
        before = self._now
        try:
            self._now = await self._lock.hold()
        except (UnavailableError, ConfigError) as error:
            if starting and isinstance(error, ConfigError):
                raise
            # Mostly nobody else can take the lock either: whoever led goes on. Where only this one is cut
            # off, two lead until it is back, whose terms tell them apart.
            if starting:
                _log.warning("the leader lock was not reached yet, leading until it tells: %s", error)
            elif self._reached:
                _log.warning("the leader lock cannot be reached, nothing changes: %s", error)
            self._reached = False
            return
        except Exception:
            # This task must live as long as the scheduler: without it nobody would ever take over.
            _log.exception("unexpected error while holding the leader lock")
            return
        if not (self._reached or starting):
            _log.info("the leader lock can be reached")
        self._reached = True
        if (before.leading, before.term) != (self._now.leading, self._now.term):
            role = "leader" if self._now.leading else "standby"
            _log.info("now %s (term %d)", role, self._now.term)
            try:
                await self._on_change(self._now)
            except Exception:
                _log.exception("unexpected error while becoming %s", role)
