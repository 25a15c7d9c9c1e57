"""Admits requests while every promised speed floor holds; the others wait in a bounded queue of their tier.

For use on one event loop. The fleet decides whether floors hold, `FloorQueues` who comes next; `pump` retries
waiting requests after news from a verifier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from dspark_core.cluster.floor_queues import FloorQueues, Waiter
from dspark_core.errors import DSparkError, QueueFullError, UnavailableError
from dspark_core.records import AssignRequest, Replica
from services.common.limits import MOST_TIERS
from services.common.retry_estimate import RetryEstimate
from services.scheduler.metrics import SchedulerMetrics

PUMP_SHARE = 0.1
"""Largest share of time spent on retries after reports. Each retry evaluates every verifier, and every
verifier reports, so the cost would grow with the square of their number."""


_Waiter: TypeAlias = "Waiter[asyncio.Future[Replica]]"


class FloorAdmission:
    def __init__(
        self,
        assign: Callable[[AssignRequest], Replica | None],
        metrics: SchedulerMetrics,
        *,
        within_reach: Callable[[AssignRequest], bool],
        max_waiting: int,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            assign: Returns None while the request would break a floor.
            within_reach: Whether any verifier can hold the request's own floor.
            max_waiting: Requests per tier that may wait.
        """
        self._assign = assign
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._clock = clock
        self._queues: FloorQueues[asyncio.Future[Replica]] = FloorQueues(
            within_reach, most_tiers=MOST_TIERS, on_forgotten=metrics.forget_tier
        )
        self._pump_at = clock()
        self._pumping: asyncio.TimerHandle | None = None
        self._retry = RetryEstimate(clock)

    async def admit(self, request: AssignRequest) -> Replica:
        """Returns the verifier that shall serve the request, if need be after a wait; first come, first
        served within a tier.

        Raises:
            QueueFullError: The queue is full or the wait timed out; carries a retry hint.
            UnavailableError, InvalidRequestError: Waiting would not help.
        """
        tier = self._queues.open(request)
        try:
            replica = None if self._queues.is_blocked(tier, request) else self._assign(request)
            if replica is None:
                replica = await self._wait(request, tier)
        except DSparkError as error:
            self._metrics.assigned(tier, _result(error))
            raise
        self._metrics.assigned(tier, "assigned")
        return replica

    def pump_soon(self) -> None:
        """Calls `pump` as soon as PUMP_SHARE allows."""
        if self._pumping is not None or self._queues.empty:
            return
        if (wait_seconds := self._pump_at - self._clock()) > 0:
            self._pumping = asyncio.get_running_loop().call_later(wait_seconds, self.pump)
        else:
            self.pump()

    def pump(self) -> None:
        """Admits waiting requests as long as floors hold."""
        if self._pumping is not None:
            self._pumping.cancel()
            self._pumping = None
        began = self._clock()
        for tier in self._queues.admit(self._answer):
            self._metrics.set_waiting(tier, self._queues.waiting(tier))
        ended = self._clock()
        self._pump_at = ended + (ended - began) * (1 / PUMP_SHARE - 1)

    def fail(self, error: DSparkError) -> None:
        """Fails every waiting request with `error`."""
        for waiter in self._queues:
            if not waiter.answer.done():
                waiter.answer.set_exception(error)

    def _answer(self, waiter: _Waiter) -> bool:
        try:
            replica = self._assign(waiter.request)
        except DSparkError as error:
            waiter.answer.set_exception(error)
            return True
        if replica is None:
            return False
        self._retry.moved()
        waiter.answer.set_result(replica)
        return True

    async def _wait(self, request: AssignRequest, tier: str) -> Replica:
        waiting = self._queues.waiting(tier)
        if waiting >= self._max_waiting or request.wait_seconds <= 0:
            raise QueueFullError(
                f"no request more can be taken without breaking a speed floor, and {waiting} of tier "
                f"{tier!r} wait (at most {self._max_waiting})",
                retry_after_seconds=self._retry.seconds(waiting + 1),
            )
        answer = asyncio.get_running_loop().create_future()
        waiter = self._queues.add(tier, request, answer)
        self._metrics.set_waiting(tier, self._queues.waiting(tier))
        try:
            async with asyncio.timeout(request.wait_seconds):
                return await waiter.answer
        except TimeoutError:
            raise QueueFullError(
                f"no speed floor allowed another request of tier {tier!r} within {request.wait_seconds:g} s",
                retry_after_seconds=self._retry.seconds(self._queues.waiting(tier) + 1),
            ) from None
        finally:
            self._queues.remove(tier, waiter)
            self._metrics.set_waiting(tier, self._queues.waiting(tier))


def _result(error: DSparkError) -> str:
    if isinstance(error, QueueFullError):
        return "refused"
    return "unavailable" if isinstance(error, UnavailableError) else "invalid"
