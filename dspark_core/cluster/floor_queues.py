"""Who comes next of the requests that wait until speed floors allow them: a queue for each tier.

Within a tier it is first come, first served; tiers take turns. Whether floors hold is left to the fleet, and
how a request waits to the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from dspark_core.errors import QueueFullError
from dspark_core.records import AssignRequest

DEFAULT_TIER = "default"


class Answer(Protocol):
    """What a request waits for."""

    def done(self) -> bool:
        """Whether it has been answered, or waits no more."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(slots=True, eq=False)
class Waiter(Generic[AnswerT]):
    request: AssignRequest
    answer: AnswerT
    blocks: bool

    def ahead_of(self, request: AssignRequest) -> bool:
        """Whether `request` must wait until this one is admitted."""
        return self.blocks and self.request.model == request.model


class FloorQueues(Generic[AnswerT]):
    def __init__(
        self,
        within_reach: Callable[[AssignRequest], bool],
        *,
        most_tiers: int,
        on_forgotten: Callable[[str], None] = lambda tier: None,
    ) -> None:
        """
        Args:
            within_reach: Whether any verifier can hold the request's own floor. If none can, the request
                waits for an idle verifier and does not block those behind it.
            most_tiers: Queues that are kept.
            on_forgotten: Gets the tier of each queue that made room for another's.
        """
        self._within_reach = within_reach
        self._most_tiers = most_tiers
        self._on_forgotten = on_forgotten
        self._tiers: OrderedDict[str, deque[Waiter[AnswerT]]] = OrderedDict()
        """The tier that was admitted last is last."""

    def __iter__(self) -> Iterator[Waiter[AnswerT]]:
        for queue in self._tiers.values():
            yield from queue

    def open(self, request: AssignRequest) -> str:
        """Returns the request's tier, which has a queue from now on. Raises QueueFullError if requests of too
        many others wait."""
        tier = request.tier or DEFAULT_TIER
        if tier not in self._tiers and len(self._tiers) >= self._most_tiers:
            unused = next((name for name, queue in self._tiers.items() if not queue), None)
            if unused is None:
                raise QueueFullError(f"requests of {self._most_tiers} tiers wait; no more can be told apart")
            del self._tiers[unused]
            self._on_forgotten(unused)
        self._tiers.setdefault(tier, deque())
        return tier

    @property
    def empty(self) -> bool:
        return not any(self._tiers.values())

    def waiting(self, tier: str) -> int:
        """0 for a tier that has no queue any more."""
        return len(self._tiers.get(tier, ()))

    def is_blocked(self, tier: str, request: AssignRequest) -> bool:
        """Whether the request has to wait for others of its tier."""
        return any(waiter.ahead_of(request) for waiter in self._tiers[tier])

    def add(self, tier: str, request: AssignRequest, answer: AnswerT) -> Waiter[AnswerT]:
        waiter = Waiter(request, answer, blocks=self._within_reach(request))
        self._tiers[tier].append(waiter)
        return waiter

    def remove(self, tier: str, waiter: Waiter[AnswerT]) -> None:
        """Ignores one that was admitted."""
        if waiter in self._tiers.get(tier, ()):
            self._tiers[tier].remove(waiter)

    def admit(self, answer: Callable[[Waiter[AnswerT]], bool]) -> Iterator[str]:
        """Passes waiters to `answer` in order, per tier and model until one does not fit. Yields the tier
        after each of its turns; the one admitted last is tried last."""
        turns = deque((tier, self._admitted(queue, answer)) for tier, queue in self._tiers.items() if queue)
        while turns:
            tier, turn = turns.popleft()
            if next(turn, None) is not None:
                self._tiers.move_to_end(tier)
                turns.append((tier, turn))
            yield tier

    def _admitted(
        self, queue: deque[Waiter[AnswerT]], answer: Callable[[Waiter[AnswerT]], bool]
    ) -> Iterator[Waiter[AnswerT]]:
        """Admits and yields one waiter at a time; removes it, and any already answered, from the queue."""
        refused: set[tuple[str, bool]] = set()
        for waiter in tuple(queue):
            model = waiter.request.model
            if waiter.answer.done():
                queue.remove(waiter)
            elif (model, True) in refused or (model, waiter.blocks) in refused:
                continue
            elif answer(waiter):
                queue.remove(waiter)
                yield waiter
            else:
                waiter.blocks = self._within_reach(waiter.request)
                refused.add((model, waiter.blocks))
