"""`DraftSource` over gRPC: one stream to a drafter, kept open and reopened when it breaks.

Lives on an asyncio loop and is called from the round thread. Two rounds may be in flight: one cohort is
drafted for while the target computes the other. While the stream is down or two replies are outstanding,
proposals fail at once, so a lost drafter does not hold up every round.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from dspark_proto.v1 import drafter_pb2, drafter_pb2_grpc

from dspark_core.engine.protocols import DraftGeometry, DraftItem, DraftReply
from dspark_core.errors import CheckpointError, DraftUnavailableError, DSparkError, UnavailableError
from services.common.lifecycle import end
from services.common.limits import MAX_MESSAGE_BYTES
from services.common.rpc_errors import from_rpc_error
from services.verifier import convert
from services.verifier.request_traces import RequestTraces

_log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0
STEADY_SECONDS = 2.0
"""A stream that lasted this long resets the backoff, however it ended: servers limit the age of connections,
and every stream that reaches it ends in an error."""
STALL_SECONDS = 5.0
"""A stream is given up and reopened when a reply is outstanding for this long."""
STREAM_SECONDS = 24 * 3600.0
MAX_PENDING_RELEASES = 10_000
MAX_ROUNDS = 2
"""Rounds in flight at once."""
MOST_FEATURE_BYTES = MAX_MESSAGE_BYTES * 63 // 64
"""Limit per round: on an oversized message gRPC ends the stream, which frees the context of every sequence.
The remaining 1/64 is for the other fields. `Drafting` sends at most half as much."""


@dataclass(slots=True)
class _Pending:
    """A round whose reply is outstanding."""

    round: int
    sequence_ids: tuple[str, ...]
    future: Future[DraftReply] = field(default_factory=Future)


class RemoteDraftSource:
    def __init__(
        self,
        channel: grpc.aio.Channel,
        geometry: DraftGeometry,
        *,
        stall_seconds: float = STALL_SECONDS,
        traces: RequestTraces | None = None,
    ) -> None:
        """`geometry` belongs to the checkpoint whose projection this verifier applies. `traces`: of the
        requests that are drafted for, to take along."""
        self._stub: Any = drafter_pb2_grpc.DrafterServiceStub(channel)
        self._geometry = geometry
        self._stall_seconds = stall_seconds
        self._traces = traces or RequestTraces()
        self._loop = asyncio.get_running_loop()
        self._generation = 0
        self._round = 0
        self._requests: asyncio.Queue[drafter_pb2.DraftRequest | None] | None = None  # None: no stream
        self._owed: deque[_Pending] = deque()  # oldest first; replies come in this order
        self._releases: list[str] = []
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._problem = "no drafter has been reached yet"
        self._complaints: set[type[Exception]] = set()  # kinds of errors logged during this outage

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="draft-stream")

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def wait_connected(self) -> None:
        await self._connected.wait()

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def problem(self) -> str | None:
        """Why no drafts can be had now, or None."""
        return None if self.connected else self._problem

    @property
    def geometry(self) -> DraftGeometry:
        return self._geometry

    @property
    def apart(self) -> bool:
        return True

    @property
    def generation(self) -> int:
        return self._generation

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        """Called on the round thread."""
        if not self.connected:
            return _failed("no drafter is connected")
        owed = tuple(self._owed)
        if len(owed) >= MAX_ROUNDS:
            return _failed(f"the drafter still owes the reply of round {owed[0].round}")
        if (feature_bytes := sum([item.features.nbytes for item in items])) > MOST_FEATURE_BYTES:
            return _failed(f"{feature_bytes} bytes of features do not fit a message")
        self._round += 1
        pending = _Pending(self._round, tuple(item.sequence_id for item in items))
        releases, self._releases = self._releases, []
        message = drafter_pb2.DraftRequest(
            round=pending.round, items=convert.draft_items_to_proto(items), release=releases
        )
        if self._traces.any:
            for item in message.items:
                item.traceparent = self._traces.next_draft(item.sequence_id)
        self._owed.append(pending)
        self._loop.call_soon_threadsafe(self._send, message, pending)
        return pending.future

    def release(self, sequence_ids: Sequence[str]) -> None:
        """Sent with the next request. Without a stream there is nothing to release: its end freed it all."""
        if self.connected and len(self._releases) < MAX_PENDING_RELEASES:
            self._releases.extend(sequence_ids)

    def _send(self, message: drafter_pb2.DraftRequest, pending: _Pending) -> None:
        if self._requests is not None:
            self._requests.put_nowait(message)
        elif pending in self._owed:
            self._owed.remove(pending)
            _fail(pending, "the drafter's stream has just ended")

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            opened_at = math.inf
            failure: Exception | None = None
            try:
                await self._check_geometry()
                opened_at = self._loop.time()
                await self._stream()
            except Exception as error:  # keep the loop alive: without it this process would never draft again
                failure = error
            finally:
                self._disconnected()
            steady = self._loop.time() - opened_at >= STEADY_SECONDS
            if steady:
                backoff = FIRST_BACKOFF_SECONDS
                self._complaints.clear()
            if failure is None:
                self._problem = "the drafter has ended the stream"
            else:
                self._tell(failure, steady)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _check_geometry(self) -> None:
        response = await self._stub.Describe(
            drafter_pb2.DescribeDrafterRequest(), timeout=self._stall_seconds
        )
        served = convert.geometry_from_proto(response)
        if served != self._geometry:
            raise CheckpointError(f"the drafter serves {served}, this verifier projects for {self._geometry}")

    async def _stream(self) -> None:
        """Runs one stream from opening to end."""
        requests: asyncio.Queue[drafter_pb2.DraftRequest | None] = asyncio.Queue()
        call = self._stub.Draft(_drain(requests), timeout=STREAM_SECONDS)
        watchdog = asyncio.create_task(self._watch(call))
        try:
            self._releases = []
            self._generation += 1
            self._requests = requests
            self._connected.set()
            _log.info("connected to the drafter")
            async for response in call:
                self._receive(response)
        except asyncio.CancelledError:
            if watchdog.done():  # it cancelled the call; this task was not cancelled by its owner
                raise DraftUnavailableError(f"no reply for {self._stall_seconds:g} s") from None
            raise
        finally:
            watchdog.cancel()
            call.cancel()
            requests.put_nowait(None)  # even a broken call keeps waiting for its next request

    async def _watch(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Cancels a stream whose reply is overdue: its drafter hangs."""
        while True:
            oldest = self._owed[0] if self._owed else None
            await asyncio.sleep(self._stall_seconds)
            if oldest is not None and self._owed and oldest is self._owed[0]:
                call.cancel()
                return

    def _receive(self, response: drafter_pb2.DraftResponse) -> None:
        if not self._owed or response.round != self._owed[0].round:
            return
        pending = self._owed.popleft()
        try:
            blocks = [convert.draft_block_from_proto(block, self._geometry) for block in response.blocks]
            if tuple(block.sequence_id for block in blocks) != pending.sequence_ids:
                raise DraftUnavailableError("the drafter's reply does not match the request")
        except DraftUnavailableError as error:
            pending.future.set_exception(error)
        else:
            reply = DraftReply(blocks, response.compute_seconds, response.drafter_id)
            pending.future.set_result(reply)

    def _disconnected(self) -> None:
        self._connected.clear()
        self._requests = None
        self._generation += 1
        while self._owed:
            _fail(self._owed.popleft(), "the drafter's stream ended")

    def _tell(self, error: Exception, steady: bool) -> None:
        """Warns once per outage and kind of error: reconnecting every second or two must not fill the log,
        but a drafter that is back and does not fit is news.

        That a steady stream ends is no outage yet: servers limit the age of connections.
        """
        routine = False
        if isinstance(error, grpc.aio.AioRpcError):
            error = from_rpc_error(error)
            routine = steady and isinstance(error, UnavailableError)
        self._problem = str(error)
        if not isinstance(error, DSparkError):
            _log.error("the stream to the drafter failed", exc_info=error)
        elif routine:
            _log.info("the stream to the drafter has ended, opening another: %s", error)
        elif type(error) not in self._complaints:
            self._complaints.add(type(error))
            _log.warning("no drafter: %s", error)


async def _drain(
    requests: asyncio.Queue[drafter_pb2.DraftRequest | None],
) -> AsyncIterator[drafter_pb2.DraftRequest]:
    """Yields requests until None."""
    while (request := await requests.get()) is not None:
        yield request


def _fail(pending: _Pending, reason: str) -> None:
    pending.future.set_exception(DraftUnavailableError(reason))


def _failed(reason: str) -> Future[DraftReply]:
    future: Future[DraftReply] = Future()
    future.set_exception(DraftUnavailableError(reason))
    return future
