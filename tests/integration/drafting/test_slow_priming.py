"""Priming over a real stream: contexts larger than a message, and drafters slower than the deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import torch
from torch import Tensor

from dspark_core.engine.draft_engines.draft_context import DraftContext
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem
from dspark_core.engine.sequence import SequenceState
from dspark_core.errors import DraftUnavailableError
from dspark_core.records import GenerateRequest, SamplingParams, Verification
from services.common.channels import open_channel
from services.common.limits import MAX_MESSAGE_BYTES
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.drafter.servicer import DrafterServicer
from services.verifier.clients import MOST_FEATURE_BYTES, RemoteDraftSource
from tests.support.clock import ManualClock

SIZE = 4096
GEOMETRY = DraftGeometry(fingerprint="f", block_size=4, feature_size=SIZE, vocab_size=9, context_window=None)
POSITION_BYTES = 2 * SIZE
TOO_LONG = MAX_MESSAGE_BYTES // POSITION_BYTES + 8
"""Positions whose features do not fit a message."""


class Engine:
    """Keeps track of contexts as drafters do, without their keys and values; may be held up."""

    geometry = GEOMETRY

    def __init__(self) -> None:
        self.context = DraftContext(num_pages=2000, page_tokens=16, window=None)
        self.gate = threading.Event()
        self.gate.set()
        self.starts: list[int] = []

    @property
    def num_sequences(self) -> int:
        return self.context.num_sequences

    def release(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            self.context.forget(sequence_id)

    def propose(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        self.gate.wait(timeout=10)
        self.starts.extend(item.features_start for item in items)
        return [self._block(item) for item in items]

    def _block(self, item: DraftItem) -> DraftBlock:
        name, start, end = item.sequence_id, item.features_start, item.anchor_position
        if not self.context.reserve(name, start, end, in_use={name}):
            return DraftBlock(name, needs_context=True)
        return DraftBlock(name, (1, 2, 3, 4), (0.9,) * 4)


class Target:
    def read_features_of(self, spans: Sequence[tuple[Sequence[int], int, int]]) -> list[Tensor]:
        return [torch.zeros((end - start, SIZE), dtype=torch.bfloat16) for _, start, end in spans]


@asynccontextmanager
async def remote(engine: Engine) -> AsyncIterator[RemoteDraftSource]:
    telemetry = Telemetry(service="drafter")
    servicer = DrafterServicer(engine, telemetry)  # type: ignore[arg-type]
    server = GrpcServer(ServerOptions(port=0, host="127.0.0.1"), [servicer.register], telemetry)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        source = RemoteDraftSource(channel, GEOMETRY)
        source.start()
        await asyncio.wait_for(source.wait_connected(), 15)
        try:
            yield source
        finally:
            await source.close()
            await server.stop()
            servicer.close()


def drafting_of(source: RemoteDraftSource, deadline_seconds: float, clock: Callable[[], float]) -> Drafting:
    return Drafting(source, Target(), deadline_seconds=deadline_seconds, clock=clock)  # type: ignore[arg-type]


def sequence(name: str, length: int) -> SequenceState:
    request = GenerateRequest(
        request_id=name, prompt_token_ids=(1,) * length, sampling=SamplingParams(temperature=0.0)
    )
    return SequenceState(request=request, order=0, noise_seed=0, max_length=10**6)


async def test_a_context_larger_than_a_message_is_primed_over_one_stream() -> None:
    engine = Engine()
    async with remote(engine) as source:
        generation = source.generation
        drafting = drafting_of(source, 10.0, ManualClock())
        sequences = [sequence("long", TOO_LONG), sequence("short", 50)]
        for _ in range(10):
            drafts = await asyncio.to_thread(drafting.propose, sequences)
            for one in sequences:
                one.tokens.append(1)
            if len(drafts.blocks) == 2:
                break
        assert set(drafts.blocks) == {"long", "short"}
        assert source.generation == generation


async def test_what_does_not_fit_a_message_is_refused_without_ending_the_stream_of_others() -> None:
    engine = Engine()
    async with remote(engine) as source:
        generation = source.generation
        source.release(["ended"])
        with pytest.raises(DraftUnavailableError, match="do not fit a message"):
            source.propose([_item("a", TOO_LONG)]).result(timeout=0)
        for positions in (MOST_FEATURE_BYTES // POSITION_BYTES, 5):  # just fits, and a small one
            asked = source.propose([_item(f"{positions}", positions)])
            reply = await asyncio.wait_for(asyncio.wrap_future(asked), 20)
            assert reply.blocks[0].token_ids
        assert source.generation == generation


async def test_after_a_late_reply_priming_goes_on_where_it_was() -> None:
    engine, clock = Engine(), ManualClock()
    async with remote(engine) as source:
        drafting = drafting_of(source, 0.05, clock)
        one = sequence("s", 300)
        engine.gate.clear()
        assert not (await asyncio.to_thread(drafting.propose, [one])).blocks
        one.tokens.append(1)
        engine.gate.set()
        async with asyncio.timeout(15):
            while not (await asyncio.to_thread(drafting.propose, [one])).blocks:
                one.tokens.append(1)
                clock.advance(60.0)  # whatever the backoff is
                await asyncio.sleep(0.005)
        assert engine.starts[0] == 0
        assert min(engine.starts[1:]) == 299


def _item(name: str, positions: int) -> DraftItem:
    return DraftItem(
        sequence_id=name,
        anchor_token_id=1,
        anchor_position=positions,
        features_start=0,
        features=torch.zeros((positions, SIZE), dtype=torch.bfloat16),
        token_ids=(1,) * positions,
        sampling=SamplingParams(temperature=0.0),
        verification=Verification.REJECTION,
    )
