"""One contract for two draft sources, in process and over a real gRPC stream, with every kind of drafter."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dspark_proto.v1 import drafter_pb2

from dspark_core.engine.building import EngineOptions, build_drafter
from dspark_core.engine.draft_engines.base import ContextDraftEngine
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.protocols import DraftBlock, DraftItem, DraftSource
from dspark_core.errors import DraftUnavailableError, InvalidRequestError
from dspark_core.records import SamplingParams, Verification
from services.common.channels import open_channel
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.drafter import convert
from services.drafter.servicer import DrafterServicer
from services.verifier.clients import RemoteDraftSource
from tests.support.polling import eventually
from tests.unit.models.autoregressive_tiny import MTP, random_drafter, save

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
OPTIONS = EngineOptions(
    target_model=str(GOLDEN / "qwen3_tiny_target"),
    drafter=str(GOLDEN / "dspark_vanilla"),
    dtype="float32",
    kv_cache_bytes=2**22,
)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module", params=["dspark_vanilla", "eagle3", "mtp1"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ContextDraftEngine:
    directory = GOLDEN / request.param
    if request.param == "mtp1":  # DeepSpec has none
        directory = save(tmp_path_factory.mktemp("mtp1"), random_drafter(MTP))
    return build_drafter(dataclasses.replace(OPTIONS, drafter=str(directory)))


@asynccontextmanager
async def drafter_server(
    engine: ContextDraftEngine, port: int = 0, telemetry: Telemetry | None = None
) -> AsyncIterator[GrpcServer]:
    telemetry = telemetry or Telemetry(service="drafter")
    servicer = DrafterServicer(engine, telemetry, "drafter-of-the-test")
    server = GrpcServer(ServerOptions(port=port, host="127.0.0.1"), [servicer.register], telemetry)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
        servicer.close()


@asynccontextmanager
async def connected(
    port: int, engine: ContextDraftEngine, **options: Any
) -> AsyncIterator[RemoteDraftSource]:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        source = RemoteDraftSource(channel, engine.geometry, **options)
        source.start()
        try:
            yield source
        finally:
            await source.close()


@pytest.fixture(params=["local", "remote"])
async def source(request: pytest.FixtureRequest, engine: ContextDraftEngine) -> AsyncIterator[DraftSource]:
    if request.param == "local":
        yield LocalDraftSource(engine)
        return
    async with drafter_server(engine) as server, connected(server.port, engine) as remote:
        await remote.wait_connected()
        yield remote


async def propose(source: DraftSource, items: Sequence[DraftItem]) -> list[DraftBlock]:
    async with asyncio.timeout(15):
        return list((await asyncio.wrap_future(source.propose(items))).blocks)


def item(
    name: str,
    start: int,
    end: int,
    sampling: SamplingParams = GREEDY,
    verification: Verification = Verification.REJECTION,
) -> DraftItem:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    features = torch.randn(200, 64, generator=generator)
    tokens = torch.randint(512, (200,), generator=generator).tolist()
    return DraftItem(
        sequence_id=name,
        anchor_token_id=tokens[end],
        anchor_position=end,
        features_start=start,
        features=features[start:end],
        token_ids=tuple(tokens[start:end]),
        sampling=sampling,
        verification=verification,
    )


async def test_a_reply_tells_whose_it_is_and_what_the_pass_took(engine: ContextDraftEngine) -> None:
    async with drafter_server(engine) as server, connected(server.port, engine) as remote:
        await remote.wait_connected()
        started = time.perf_counter()
        reply = await asyncio.wait_for(asyncio.wrap_future(remote.propose([item("a", 0, 20)])), 15)
        assert 0.0 < reply.compute_seconds < time.perf_counter() - started
        assert reply.drafter_id == "drafter-of-the-test"


async def test_replies_are_made_where_passes_are(
    engine: ContextDraftEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may wait for a GPU, which must not hold up the event loop."""
    threads: list[str] = []
    make = convert.draft_blocks_to_proto

    def observed(blocks: Sequence[DraftBlock]) -> list[drafter_pb2.DraftBlock]:
        threads.append(threading.current_thread().name)
        return make(blocks)

    monkeypatch.setattr(convert, "draft_blocks_to_proto", observed)
    async with drafter_server(engine) as server, connected(server.port, engine) as remote:
        await remote.wait_connected()
        await propose(remote, [item("a", 0, 9, SamplingParams(temperature=0.9))])
    assert [name.startswith("draft") for name in threads] == [True]


async def test_appending_in_steps_equals_priming_at_once(
    source: DraftSource, engine: ContextDraftEngine
) -> None:
    (whole,) = await propose(source, [item("a", 0, 30)])
    await propose(source, [item("b-then-a", 0, 11)])
    source.release(["a", "b-then-a"])
    for end in (1, 12, 13, 30):
        start = {1: 0, 12: 1, 13: 12, 30: 13}[end]
        (stepped,) = await propose(source, [item("a", start, end)])
    assert stepped.token_ids == whole.token_ids
    assert stepped.confidences == pytest.approx(whole.confidences, rel=1e-5)
    assert len(whole.token_ids) == engine.geometry.block_size


async def test_a_batch_at_different_positions_drafts_what_each_would_alone(source: DraftSource) -> None:
    names = {"x": 3, "y": 40, "z": 17}
    alone = [(await propose(source, [item(name, 0, end)]))[0] for name, end in names.items()]
    together = await propose(source, [item(name, 0, end) for name, end in names.items()])
    assert [block.token_ids for block in together] == [block.token_ids for block in alone]
    assert [block.sequence_id for block in together] == list(names)


async def test_an_unknown_or_holed_context_asks_to_be_primed(source: DraftSource) -> None:
    (block,) = await propose(source, [item("never-seen", 5, 9)])
    assert block.needs_context
    assert block.token_ids == ()
    await propose(source, [item("holed", 0, 4)])
    (block,) = await propose(source, [item("holed", 6, 9)])
    assert block.needs_context
    (block,) = await propose(source, [item("holed", 0, 9)])
    assert not block.needs_context


async def test_sampled_blocks_declare_the_distribution_they_came_from(source: DraftSource) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=20)
    (block,) = await propose(source, [item("s", 0, 9, sampling)])
    distribution = block.distribution
    assert distribution is not None
    assert distribution.probabilities.sum(-1) == pytest.approx([1.0] * len(block.token_ids), abs=1e-5)
    for position, token_id in enumerate(block.token_ids):
        row = distribution.token_ids[position] == token_id
        assert float(distribution.probabilities[position][row]) > 0
        assert int((distribution.probabilities[position] > 0).sum()) <= 20


async def test_coupled_blocks_depend_on_the_seed_only_and_carry_no_distribution(source: DraftSource) -> None:
    def seeded(name: str, seed: int) -> DraftItem:
        given = item("same-features", 0, 9, SamplingParams(temperature=1.0, seed=seed), Verification.COUPLED)
        return dataclasses.replace(given, sequence_id=name)

    first, second, *others = await propose(
        source, [seeded("p", 1), *(seeded(f"q{seed}", seed) for seed in range(1, 6))]
    )
    assert first.token_ids == second.token_ids
    assert any(other.token_ids != first.token_ids for other in others)
    assert first.distribution is None


async def test_wrong_feature_shapes_are_refused_by_name(engine: ContextDraftEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"features of 'w' must be \(9, 64\).*got \(8, 64\)"):
        engine.propose([dataclasses.replace(item("w", 0, 9), features=torch.zeros(8, 64))])


async def test_a_restarted_drafter_is_reconnected_and_primed_again(engine: ContextDraftEngine) -> None:
    async with drafter_server(engine) as server:
        port = server.port
        async with connected(port, engine) as source:
            await source.wait_connected()
            (before,) = await propose(source, [item("a", 0, 30)])
            generation = source.generation
            await server.stop()
            await eventually(lambda: not source.connected)
            with pytest.raises(DraftUnavailableError, match="no drafter is connected"):
                await propose(source, [item("a", 30, 31)])
            async with drafter_server(engine, port):
                await eventually(lambda: source.connected)
                assert source.generation > generation
                (block,) = await propose(source, [item("a", 30, 31)])
                assert block.needs_context  # the stream's end freed what it had primed
                (again,) = await propose(source, [item("a", 0, 30)])
                assert again.token_ids == before.token_ids


async def test_the_end_of_a_stream_frees_its_sequences() -> None:
    engine = build_drafter(OPTIONS)
    telemetry = Telemetry(service="drafter")

    def told() -> float | None:
        return telemetry.registry.get_sample_value("dspark_primed_sequences")

    async with drafter_server(engine, telemetry=telemetry) as server:
        async with connected(server.port, engine) as source:
            await source.wait_connected()
            await propose(source, [item("gone-1", 0, 3), item("gone-2", 0, 4)])
            assert (engine.num_sequences, told()) == (2, 2)
        await eventually(lambda: engine.num_sequences == 0)
        assert told() == 0


class Slow:
    """Holds every pass until told."""

    def __init__(self, inner: ContextDraftEngine, gate: threading.Event) -> None:
        self.geometry, self.release = inner.geometry, inner.release
        self.num_sequences = 0
        self.inner, self.gate = inner, gate

    def propose(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        self.gate.wait(timeout=10)
        return self.inner.propose(items)


async def _offered(source: DraftSource, one: DraftItem) -> list[DraftBlock]:
    """Nothing while no drafter is there, as after a moment in which the machine stopped."""
    with contextlib.suppress(DraftUnavailableError):
        return await propose(source, [one])
    return []


async def test_a_hanging_drafter_is_dropped_and_never_waited_for_twice(engine: ContextDraftEngine) -> None:
    gate = threading.Event()
    async with (
        drafter_server(Slow(engine, gate)) as server,
        connected(server.port, engine, stall_seconds=0.3) as source,
    ):
        await source.wait_connected()
        generation = source.generation
        hanging = [source.propose([item(name, 0, 5)]) for name in ("g", "h")]
        with pytest.raises(DraftUnavailableError, match="still owes the reply of round 1"):
            await propose(source, [item("i", 0, 5)])  # a third
        for one in hanging:
            with pytest.raises(DraftUnavailableError, match="the drafter's stream ended"):
                await asyncio.wait_for(asyncio.wrap_future(one), 15)
        gate.set()
        async with asyncio.timeout(15):
            while source.generation == generation or not (blocks := await _offered(source, item("h", 0, 5))):
                await asyncio.sleep(0.005)
        assert len(blocks[0].token_ids) == engine.geometry.block_size


async def test_two_rounds_under_way_are_answered_each_with_its_own(
    source: DraftSource, engine: ContextDraftEngine
) -> None:
    alone = [await propose(source, [item(name, 0, 20)]) for name in ("a", "b")]
    source.release(["a", "b"])
    rounds = [source.propose([item(name, 0, 20)]) for name in ("a", "b")]
    async with asyncio.timeout(15):
        assert [list((await asyncio.wrap_future(one)).blocks) for one in rounds] == alone


async def test_a_drafter_of_another_checkpoint_is_refused(engine: ContextDraftEngine, caplog) -> None:
    other = dataclasses.replace(engine.geometry, fingerprint="somebody-else")
    async with drafter_server(engine) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        source = RemoteDraftSource(channel, other)
        source.start()
        await eventually(lambda: "this verifier projects for" in caplog.text)
        assert not source.connected
        await source.close()
