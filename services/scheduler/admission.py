"""Admits requests while every promised speed floor holds; the others wait in a bounded queue of their tier.

For use on one event loop. The fleet decides whether floors hold; `pump` retries waiting requests after
news from a verifier.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dspark_core.errors import DSparkError, QueueFullError, UnavailableError
from dspark_core.records import AssignRequest, Replica
from services.common.limits import MOST_TIERS
from services.common.retry_estimate import RetryEstimate
from services.scheduler.metrics import SchedulerMetrics

DEFAULT_TIER = "default"
PUMP_SHARE = 0.1
"""Largest share of time spent on retries after reports. Each retry evaluates every verifier, and every
verifier reports, so the cost would grow with the square of their number."""


@dataclass(slots=True)
class _Waiter:
    request: AssignRequest
    answer: asyncio.Future[Replica]
    blocks: bool

    def ahead_of(self, request: AssignRequest) -> bool:
        """Whether `request` must wait until this one is admitted."""
        return self.blocks and self.request.model == request.model


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
            within_reach: Whether any verifier can hold the request's own floor. If none can, the request
                waits for an idle verifier and does not block those behind it.
            max_waiting: Requests per tier that may wait.
        """
        self._assign = assign
        self._within_reach = within_reach
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._clock = clock
        self._queues: OrderedDict[str, deque[_Waiter]] = OrderedDict()
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
        tier = self._tier(request)
        queue = self._queues.setdefault(tier, deque())
        try:
            behind = any(waiter.ahead_of(request) for waiter in queue)
            replica = None if behind else self._assign(request)
            if replica is None:
                replica = await self._wait(request, tier, queue)
        except DSparkError as error:
            self._metrics.assigned(tier, _result(error))
            raise
        self._metrics.assigned(tier, "assigned")
        return replica

    def pump_soon(self) -> None:
        """Calls `pump` as soon as PUMP_SHARE allows."""
        if self._pumping is not None or not any(self._queues.values()):
            return
        if (wait_seconds := self._pump_at - self._clock()) > 0:
            self._pumping = asyncio.get_running_loop().call_later(wait_seconds, self.pump)
        else:
            self.pump()

    def pump(self) -> None:
        """Admits waiting requests in order, per tier and model, until one does not fit. Tiers take turns; the
        one admitted last is tried last."""
        if self._pumping is not None:
            self._pumping.cancel()
            self._pumping = None
        began = self._clock()
        turns = deque((tier, self._admitted(queue)) for tier, queue in self._queues.items() if queue)
        while turns:
            tier, turn = turns.popleft()
            if next(turn, None) is not None:
                self._queues.move_to_end(tier)
                turns.append((tier, turn))
            self._metrics.set_waiting(tier, len(self._queues[tier]))
        ended = self._clock()
        self._pump_at = ended + (ended - began) * (1 / PUMP_SHARE - 1)

    def _admitted(self, queue: deque[_Waiter]) -> Iterator[_Waiter]:
        """Admits and yields one waiter at a time; removes it, and any already answered, from the queue."""
        refused: set[tuple[str, bool]] = set()
        for waiter in tuple(queue):
            model = waiter.request.model
            if waiter.answer.done():
                queue.remove(waiter)
            elif (model, True) in refused or (model, waiter.blocks) in refused:
                continue
            elif self._answer(waiter):
                queue.remove(waiter)
                yield waiter
            else:
                waiter.blocks = self._within_reach(waiter.request)
                refused.add((model, waiter.blocks))

    def fail(self, error: DSparkError) -> None:
        """Fails every waiting request with `error`."""
        for queue in self._queues.values():
            for waiter in queue:
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

    async def _wait(self, request: AssignRequest, tier: str, queue: deque[_Waiter]) -> Replica:
        if len(queue) >= self._max_waiting or request.wait_seconds <= 0:
            raise QueueFullError(
                f"no request more can be taken without breaking a speed floor, and {len(queue)} of tier "
                f"{tier!r} wait (at most {self._max_waiting})",
                retry_after_seconds=self._retry.seconds(len(queue) + 1),
            )
        answer = asyncio.get_running_loop().create_future()
        waiter = _Waiter(request, answer, blocks=self._within_reach(request))
        queue.append(waiter)
        self._metrics.set_waiting(tier, len(queue))
        try:
            async with asyncio.timeout(request.wait_seconds):
                return await waiter.answer
        except TimeoutError:
            raise QueueFullError(
                f"no speed floor allowed another request of tier {tier!r} within {request.wait_seconds:g} s",
                retry_after_seconds=self._retry.seconds(len(queue) + 1),
            ) from None
        finally:
            if waiter in queue:
                queue.remove(waiter)
            self._metrics.set_waiting(tier, len(queue))

    def _tier(self, request: AssignRequest) -> str:
        tier = request.tier or DEFAULT_TIER
        if tier not in self._queues and len(self._queues) >= MOST_TIERS:
            unused = next((name for name, queue in self._queues.items() if not queue), None)
            if unused is None:
                raise QueueFullError(f"requests of {MOST_TIERS} tiers wait; no more can be told apart")
            del self._queues[unused]
            self._metrics.forget_tier(unused)
        return tier


def _result(error: DSparkError) -> str:
    if isinstance(error, QueueFullError):
        return "refused"
    return "unavailable" if isinstance(error, UnavailableError) else "invalid"
