"""Elects one of several schedulers as leader: a lock that expires, renewed while its holder lives.

Every term of leadership has a number, and numbers only grow. Plans carry the term, so that verifiers ignore a
leader that was cut off and does not yet know that it was replaced.
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
    """Whether this process leads."""
    term: int = 0
    """0: the lock was never reached."""
    leader_address: str = ""
    """`host:port` of the leader's gRPC server; empty if it advertises none."""


class LeaderLock(Protocol):
    async def hold(self) -> Leadership:
        """Takes the lock if it is free, renews it if it is ours.

        Raises UnavailableError if the lock cannot be reached, ConfigError if this process is not permitted
        to use it.
        """
        ...

    async def release(self) -> None:
        """Lets a standby take over at once; after an UnavailableError it waits until the lock expires."""
        ...

    async def close(self) -> None: ...


class SoleLeader:
    """For a scheduler without others: it always leads. Its term is its start time, so it is newer than every
    earlier term, of whichever kind of lock."""

    def __init__(self) -> None:
        self._term = time.time_ns() // 1000

    async def hold(self) -> Leadership:
        return Leadership(leading=True, term=self._term)

    async def release(self) -> None:
        """There is no standby."""

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
        """`on_change` is awaited whenever leadership or the term changes; what it raises is only logged."""
        self._lock = lock
        self._renew_seconds = renew_seconds
        self._on_change = on_change
        # Until the lock is first reached nobody knows who leads, and serving beats refusing.
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
        """Raises ConfigError if the lock refuses this process, which would then never know who leads."""
        await self._hold(starting=True)
        self._task = asyncio.create_task(self._run(), name="election")

    async def until_refused(self) -> None:
        """Raises ConfigError if the lock was out of reach at the start, and then refuses this process."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def stop(self) -> None:
        """Gives up leadership, so that a standby need not wait for the lock to expire."""
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
            if isinstance(error, ConfigError) and self._now.term == 0:
                raise
            # Usually nobody else can take the lock either, so the leader carries on. If only this process is
            # cut off, two lead until it is back; their terms tell them apart.
            if starting:
                _log.warning("the leader lock was not reached yet, leading until it tells: %s", error)
            elif self._reached:
                _log.warning("the leader lock cannot be reached, nothing changes: %s", error)
            self._reached = False
            return
        except Exception:
            # This task must not end before the scheduler does: without it nobody would take over.
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
