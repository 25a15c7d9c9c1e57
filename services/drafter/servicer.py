"""Serves the drafter over gRPC: one stream per verifier, whose end frees all context primed on it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio
from dspark_proto.v1 import drafter_pb2, drafter_pb2_grpc

from dspark_core.engine.draft_engines.base import ContextDraftEngine
from dspark_core.engine.protocols import DraftBlock, DraftItem
from dspark_core.errors import DSparkError
from services.common.streams import until
from services.common.telemetry import Telemetry
from services.drafter import convert
from services.drafter.metrics import DrafterMetrics
from services.drafter.pass_spans import pass_spans

_log = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 3
"""After this many failed passes in a row the drafter counts as broken: a process cannot recover from some GPU
errors."""
STALL_SECONDS = 30.0
"""A longer pass counts as hung. Verifiers have given up their streams by then."""
LOOK_SECONDS = 1.0
"""Interval between checks whether the drafter is broken."""


class DrafterServicer(drafter_pb2_grpc.DrafterServiceServicer):
    def __init__(self, engine: ContextDraftEngine, telemetry: Telemetry, drafter_id: str = "") -> None:
        self._engine = engine
        self._drafter_id = drafter_id
        self._tracer = telemetry.tracer
        self._metrics = DrafterMetrics(telemetry.registry)
        self._metrics.watch_sequences(lambda: engine.num_sequences)
        # One worker: passes of different verifiers follow each other, and the engine sees one thread.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draft")
        self._streams = itertools.count()
        self._draining = asyncio.Event()
        self._closed = False
        self._failures = 0
        self._pass_began: float | None = None
        self._problem: str | None = None

    def register(self, server: grpc.aio.Server) -> str:
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self, server)
        return drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name

    async def Describe(
        self, request: drafter_pb2.DescribeDrafterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> drafter_pb2.DescribeDrafterResponse:
        return convert.geometry_to_proto(self._engine.geometry)

    async def Draft(
        self,
        request_iterator: AsyncIterator[drafter_pb2.DraftRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[drafter_pb2.DraftResponse]:
        session = _Session(f"{next(self._streams)}/")
        try:
            async for message in until(self._draining, request_iterator):
                items = [session.own(convert.draft_item_from_proto(item)) for item in message.items]
                traces = [item.traceparent for item in message.items]
                with pass_spans(self._tracer, traces) as spans:
                    blocks, seconds = await self._propose(items, session.release(message.release), session)
                    for span in spans:
                        span.set_attribute("dspark.compute_ms", 1000 * seconds)
                yield drafter_pb2.DraftResponse(
                    round=message.round,
                    blocks=blocks,
                    compute_seconds=seconds,
                    drafter_id=self._drafter_id,
                )
        finally:
            if not self._closed:
                self._worker.submit(self._engine.release, session.all_ids())

    @property
    def problem(self) -> str | None:
        """Why no more drafts can be expected, or None. Once set it stays, even if later passes succeed."""
        began, now = self._pass_began, time.perf_counter()
        if self._problem is None and began is not None and now - began > STALL_SECONDS:
            self._problem = f"a pass has not ended for {now - began:.0f} s"
        return self._problem

    async def until_broken(self) -> None:
        """Returns when no more drafts can be expected; the process should then exit to be restarted."""
        while self.problem is None:
            await asyncio.sleep(LOOK_SECONDS)
        _log.critical("the drafter is broken: %s", self.problem)

    async def drain(self) -> None:
        """Ends the streams after their current round; verifiers go on with another replica."""
        self._draining.set()

    def close(self) -> None:
        """Does not wait for a running pass, which may never end."""
        self._closed = True
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _propose(
        self, items: Sequence[DraftItem], released: Sequence[str], session: _Session
    ) -> tuple[list[drafter_pb2.DraftBlock], float]:
        # A cancelled job stays in the executor's queue; its items, whose features are large, must not.
        given = [items]
        proposing = self._worker.submit(lambda: self._pass(given.pop(), released, session))
        proposing.add_done_callback(lambda _: given.clear())
        try:
            proposed = await asyncio.wrap_future(proposing)
        except DSparkError:  # the request is at fault, not the drafter
            raise
        except Exception:
            self._failures += 1
            if self._failures >= MAX_CONSECUTIVE_FAILURES:
                self._problem = f"the last {self._failures} passes failed"
            raise
        self._failures = 0
        return proposed

    def _pass(
        self, items: Sequence[DraftItem], released: Sequence[str], session: _Session
    ) -> tuple[list[drafter_pb2.DraftBlock], float]:
        """Returns the blocks and the seconds for which they kept the drafter busy."""
        self._pass_began = began = time.perf_counter()
        try:
            self._engine.release(released)
            with self._metrics.timed_pass(len(items)):
                blocks = self._engine.propose(items)
            self._metrics.observe(blocks)
            # Here, as it may wait for a GPU: on the event loop, everybody would, and for the next pass too.
            sent = convert.draft_blocks_to_proto([session.disown(block) for block in blocks])
            return sent, time.perf_counter() - began
        finally:
            self._pass_began = None


class _Session:
    """Keeps sequence ids of different streams apart and tracks those that this stream introduced."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._ids: set[str] = set()

    def own(self, item: DraftItem) -> DraftItem:
        sequence_id = self._prefix + item.sequence_id
        self._ids.add(sequence_id)
        return dataclasses.replace(item, sequence_id=sequence_id)

    def disown(self, block: DraftBlock) -> DraftBlock:
        return dataclasses.replace(block, sequence_id=block.sequence_id.removeprefix(self._prefix))

    def release(self, sequence_ids: Sequence[str]) -> list[str]:
        released = [self._prefix + sequence_id for sequence_id in sequence_ids]
        self._ids.difference_update(released)
        return released

    def all_ids(self) -> list[str]:
        return list(self._ids)
