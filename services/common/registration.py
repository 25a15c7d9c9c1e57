"""Keeps a drafter or verifier registered: renews the lease, retries while the scheduler is gone."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from dspark_core.errors import DSparkError
from dspark_core.records import Replica
from services.common.lifecycle import end
from services.common.protocols import RegistrationApi

_log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 5.0
# Two renewals may be lost before the lease runs out.
_RENEWALS_PER_LEASE = 3


class RegistrationLoop:
    """A task that registers what `describe` returns, called anew each time, until `stop`."""

    def __init__(
        self,
        scheduler: RegistrationApi,
        describe: Callable[[], Replica],
        *,
        max_backoff_seconds: float = MAX_BACKOFF_SECONDS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._scheduler = scheduler
        self._describe = describe
        self._max_backoff_seconds = max_backoff_seconds
        self._jitter = jitter
        self._task: asyncio.Task[None] | None = None
        self._registered = asyncio.Event()
        self._wake = asyncio.Event()

    @property
    def registered(self) -> bool:
        """The last attempt succeeded."""
        return self._registered.is_set()

    async def wait_registered(self) -> None:
        await self._registered.wait()

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="registration")

    def renew_soon(self) -> None:
        """Renews at once, for changes that should not wait (draining, a jump in load)."""
        self._wake.set()

    async def stop(self, *, deregister: bool = True) -> None:
        """Ends the loop and makes a best effort to deregister the replica."""
        if self._task is not None:
            await end(self._task)
            self._task = None
        was_registered = self._registered.is_set()
        self._registered.clear()
        if deregister and was_registered:
            try:
                await self._scheduler.deregister(self._describe().replica_id)
            except DSparkError as error:
                _log.warning("could not deregister, the lease will run out: %s", error)

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            self._wake.clear()
            try:
                lease_seconds = await self._scheduler.register(self._describe())
            except Exception as error:
                # No error may end this loop: a replica that stops renewing is forgotten for good.
                if not isinstance(error, DSparkError):
                    _log.exception("unexpected error while registering, retrying")
                elif self._registered.is_set() or backoff == FIRST_BACKOFF_SECONDS:
                    _log.warning("cannot register with the scheduler, retrying: %s", error)
                self._registered.clear()
                # Half to full backoff, so that replicas do not all return at the same moment.
                await self._pause(backoff * (0.5 + 0.5 * self._jitter()))
                backoff = min(backoff * 2, self._max_backoff_seconds)
                continue
            if not self._registered.is_set():
                _log.info("registered with the scheduler, lease %g s", lease_seconds)
            self._registered.set()
            backoff = FIRST_BACKOFF_SECONDS
            await self._pause(lease_seconds / _RENEWALS_PER_LEASE)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
