"""Generates on a cluster: the scheduler assigns a verifier, and another takes over if it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping

from dspark_core.algorithms.prefix_hashes import prefix_hashes
from dspark_core.errors import (
    ContextLengthError,
    DeadlineError,
    DSparkError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
    UnreachableError,
)
from dspark_core.records import (
    MAX_SEED,
    AssignRequest,
    GenerateChunk,
    GenerateRequest,
    Replica,
    Role,
    VerifierDescription,
)
from services.common.protocols import SchedulerApi, VerifierApi
from services.common.streams import closing
from services.gateway.verifiers.replay import Replay
from services.gateway.verifiers.replica_view import ReplicaView
from services.gateway.verifiers.silence import ANSWER_SECONDS, SILENCE_SECONDS, answers, while_answering
from services.gateway.verifiers.verifier_pool import VerifierPool

_log = logging.getLogger(__name__)

# A request may lose this many verifiers in a row: one that takes them all down must end. Verifiers that it
# never reached do not count, each once; nor do those with too short a context.
MAX_ATTEMPTS = 3
# A verifier that served a request this long was not lost because of it: a rollout restarts all, one by one.
STEADY_SECONDS = 30.0
# After the scheduler failed to answer, requests route by the last view this long before it is asked again.
SCHEDULER_PAUSE_SECONDS = 1.0


class RoutedBackend:
    """A `GenerationBackend`. Run `keep_view` as a task beside it."""

    def __init__(
        self,
        *,
        model: str,
        scheduler: SchedulerApi,
        pool: VerifierPool,
        deadline_seconds: float = 600.0,
        admission_wait_seconds: float = 10.0,
        silence_seconds: float = SILENCE_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """model: the name under which verifiers register. deadline_seconds: per request, replays included.
        admission_wait_seconds: how long a request may wait at the scheduler until speed floors admit it.
        silence_seconds: a verifier that sends nothing for this long is probed, and has answer_seconds to
        respond."""
        self._model = model
        self._scheduler = scheduler
        self._pool = pool
        self._deadline_seconds = deadline_seconds
        self._admission_wait_seconds = min(admission_wait_seconds, deadline_seconds)
        self._silence_seconds = silence_seconds
        self._answer_seconds = answer_seconds
        self._clock = clock
        self._rng = random.SystemRandom()
        self._view = ReplicaView(clock)
        self._ask_scheduler_at = clock()
        self._description: VerifierDescription | None = None

    async def describe(self) -> VerifierDescription:
        """Asks a verifier once and caches the answer. None is assigned: this is no user's request."""
        if self._description is None:
            replica = await self._any_replica()
            try:
                async with self._pool.use(replica.address) as verifier:
                    self._description = await verifier.describe()
            except UnavailableError:
                self._view.suspect(replica.replica_id)
                raise
        return self._description

    async def _any_replica(self) -> Replica:
        if (known := self._view.choose(())) is not None:
            return known
        try:
            await self.refresh_view()
        except (UnavailableError, DeadlineError) as error:
            raise UnavailableError(f"no verifier for model {self._model!r}: {error}") from error
        if (known := self._view.choose(())) is None:
            raise UnavailableError(f"no verifier for model {self._model!r} is registered")
        return known

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        replay = Replay(request, seed=self._rng.randrange(MAX_SEED + 1))
        deadline = self._clock() + self._deadline_seconds
        failed: dict[str, DSparkError] = {}  # the newest last
        lost = 0  # in a row
        while True:
            replica = await self._next_replica(request, replay.weights, failed)
            began = self._clock()
            try:
                async with closing(self._attempt(replica, replay, deadline, failed)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except (UnavailableError, QueueFullError, ContextLengthError) as error:
                if replay.finished:
                    return
                first_time = failed.pop(replica.replica_id, None) is None
                failed[replica.replica_id] = error
                if isinstance(error, UnavailableError):
                    self._view.suspect(replica.replica_id)
                last = replay.end()
                if last is not None:
                    yield last
                    return
                _log.warning(
                    "request %s leaves verifier %s: %s", request.request_id, replica.replica_id, error
                )
                if first_time and isinstance(error, (UnreachableError, ContextLengthError)):
                    continue
                lost = lost + 1 if self._clock() - began < STEADY_SECONDS else 1
                if lost >= MAX_ATTEMPTS:
                    if isinstance(error, QueueFullError):
                        raise
                    raise self._none_available(lost) from error

    async def keep_view(self, interval_seconds: float = 2.0) -> None:
        """Refreshes the view until cancelled; while the scheduler is down the view stays as it is."""
        while True:
            try:
                await self.refresh_view()
            except DSparkError as error:
                _log.debug("the view of verifiers was not refreshed: %s", error)
            except Exception:  # must not end: a stale view routes to pods that are gone
                _log.exception("the view of verifiers was not refreshed")
            await asyncio.sleep(interval_seconds)

    async def refresh_view(self) -> None:
        """Raises what the scheduler's client raises."""
        replicas = await self._scheduler.list_replicas(Role.VERIFIER)
        mine = [replica for replica in replicas if replica.model == self._model]
        if not mine:
            return  # a scheduler that has just started knows no replicas yet
        self._view.update(mine)
        await self._pool.retain(self._view.addresses())

    async def _attempt(
        self, replica: Replica, replay: Replay, deadline: float, failed: Collection[str]
    ) -> AsyncIterator[GenerateChunk]:
        """Runs the request on one verifier. Ends with a finish reason, or raises."""
        remaining = deadline - self._clock()
        if remaining <= 0:
            raise DeadlineError(f"the request did not finish within {self._deadline_seconds:g} s")
        self._view.started(replica.replica_id)

        async def alive() -> bool:
            if await self._better_here(verifier, {*failed, replica.replica_id}, replay.weights):
                return True
            self._pool.leave(replica.address, verifier)  # or the next request sent there would wait as long
            return False

        try:
            async with (
                self._pool.use(replica.address) as verifier,
                closing(verifier.generate(replay.request(), deadline_seconds=remaining)) as sent,
                closing(while_answering(sent, alive, silence_seconds=self._silence_seconds)) as chunks,
            ):
                async for chunk in chunks:
                    self._view.trust(replica.replica_id)
                    yield replay.add(chunk)
        finally:
            self._view.ended(replica.replica_id)
        if not replay.finished:
            raise UnavailableError(f"verifier {replica.replica_id} ended the stream without a finish reason")

    async def _better_here(self, verifier: VerifierApi, tried: Collection[str], weights: str) -> bool:
        """Whether to stay with a silent verifier. Leaving it helps only if it does not respond while another
        one, which could continue, does: when the whole machine is stalled, none would."""
        other = self._view.choose(tried, weights)
        if other is None:
            return True
        async with self._pool.use(other.address) as candidate:
            here, there = await asyncio.gather(
                answers(verifier.describe, self._answer_seconds),
                answers(candidate.describe, self._answer_seconds),
            )
        return here or not there

    async def _next_replica(
        self, request: GenerateRequest, weights: str, failed: Mapping[str, DSparkError]
    ) -> Replica:
        try:
            return await self._assign(
                AssignRequest(
                    request_id=request.request_id,
                    model=self._model,
                    prompt_tokens=len(request.prompt_token_ids),
                    exclude_replica_ids=tuple(failed),
                    prefix_hashes=prefix_hashes(request.prompt_token_ids, request.cache_salt),
                    min_tokens_per_second=request.min_tokens_per_second or 0.0,
                    floor_promised=request.floor_promised,
                    tier=request.tier,
                    wait_seconds=0.0 if failed else self._admission_wait_seconds,
                    weights=weights,
                )
            )
        except (QueueFullError, InvalidRequestError):
            # A request that was admitted before continues on any known verifier: losing one must not cut its
            # stream, even if the others are too slow for its floor or admitting it again would take time.
            known = self._view.choose(failed, weights) if failed else None
            if known is None:
                raise
            return known
        except UnavailableError:
            # "Full" tells the caller more than "none is left", and when to retry.
            for error in failed.values():
                if isinstance(error, QueueFullError):
                    raise error from None
            short = {name: error for name, error in failed.items() if isinstance(error, ContextLengthError)}
            if short and len(short) == len(failed):
                raise max(short.values(), key=lambda error: error.limit) from None
            # A rollout replaces one verifier after another, and a network fault breaks the connections to all
            # of them: one that failed earlier may be back. Exclude only the latest, if others failed before.
            lost = [name for name in failed if name not in short]
            known = self._view.choose((*lost[1:][-1:], *short), weights) if failed else None
            if known is None:
                raise
            return known

    async def _assign(self, request: AssignRequest) -> Replica:
        """The scheduler's choice, or one from the last known view if it has none or does not answer."""
        failed = request.exclude_replica_ids
        known = self._view.choose(failed, request.weights)
        if known is not None and self._clock() < self._ask_scheduler_at:
            return known
        try:
            replica = await self._scheduler.assign(request)
        except (UnavailableError, DeadlineError) as error:
            if known is None:
                raise UnavailableError(f"no verifier for model {self._model!r}: {error}") from error
            self._ask_scheduler_at = self._clock() + SCHEDULER_PAUSE_SECONDS
            return known
        if replica.replica_id in failed:
            raise self._none_available(len(failed))
        self._view.chosen(replica)
        return replica

    def _none_available(self, failures: int) -> UnavailableError:
        """Leaves out the addresses in gRPC's messages, which are not for clients."""
        return UnavailableError(f"no verifier for model {self._model!r} is left after {failures} failed")
