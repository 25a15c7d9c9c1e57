"""A traced request shows its rounds: a span for drafting and one for verifying, bounded in number."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind

from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.records import GenerateChunk, SpeculationOptions, SpeculationStats, VerifierDescription
from services.common.channels import open_channel
from services.common.clients import VerifierClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.verifier.round_spans import SINGLE_ROUNDS, with_round_spans
from services.verifier.servicer import LocalVerifier, VerifierServicer
from tests.support.polling import eventually
from tests.unit.engine.tiny import ScriptedDrafts, make_loop, naive_greedy, prompts, request, tiny_decoder

PROMPT = prompts(1, seed=3)[0]
TOKENS = 60


@pytest.fixture
async def client(traced_telemetry: Telemetry) -> AsyncIterator[VerifierClient]:
    """Of a verifier whose drafter is right seven times in ten."""
    known = naive_greedy(tiny_decoder(), PROMPT, TOKENS)
    drafts = ScriptedDrafts({"r": known}, prompt_lengths={"r": len(PROMPT)}, error_rate=0.3)
    verifier = Verifier(make_loop(drafts=drafts))
    described = VerifierDescription(model="tiny", vocab_size=9, max_context_tokens=200)
    servicer = VerifierServicer(LocalVerifier(verifier, described, tracer=traced_telemetry.tracer))
    async with AsyncExitStack() as stack:
        verifier.start()
        stack.callback(verifier.stop)
        server = GrpcServer(ServerOptions(port=0, host="127.0.0.1"), [servicer.register], traced_telemetry)
        port = await server.start()
        stack.push_async_callback(server.stop)
        channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{port}", traced_telemetry))
        yield VerifierClient(channel)


def of_request(spans: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The server's span of the call and its children as they were made."""
    found = spans.get_finished_spans()
    (call,) = [one for one in found if one.kind is SpanKind.SERVER]
    children = [one for one in found if one.parent and one.parent.span_id == call.context.span_id]
    return call, children


def ended(spans: InMemorySpanExporter) -> bool:
    return any(one.kind is SpanKind.SERVER for one in spans.get_finished_spans())


def summed(children: list[ReadableSpan], name: str, attribute: str) -> float:
    return sum(one.attributes[f"dspark.{attribute}"] for one in children if one.name == name)


def follow_one_another(spans: list[ReadableSpan]) -> None:
    """Each begins with the round after the last of the one before."""
    held = [one.attributes["dspark.rounds"] for one in spans]
    assert [one.attributes["dspark.round"] for one in spans] == [
        1 + sum(held[:place]) for place in range(len(held))
    ]


@pytest.mark.parametrize("speculating", [True, False])
async def test_the_rounds_of_a_request_are_children_of_its_call(client, spans, speculating: bool) -> None:
    options = SpeculationOptions(enabled=speculating)
    asked = client.generate(request("r", PROMPT, TOKENS, speculation=options), deadline_seconds=30)
    chunks = [chunk async for chunk in asked]
    await eventually(lambda: ended(spans))
    call, children = of_request(spans)
    stats = chunks[-1].stats
    assert stats is not None
    assert children[0].name == "prefill"
    assert {one.name for one in children} == {"prefill", "verify"} | ({"draft"} if speculating else set())
    # Whatever shares a span, nothing is lost.
    assert summed(children, "verify", "rounds") == stats.rounds
    assert summed(children, "verify", "committed") == stats.committed_tokens
    assert summed(children, "verify", "accepted") == stats.accepted_tokens
    assert summed(children, "verify", "verified") == stats.verified_tokens
    assert summed(children, "draft", "drafted") == stats.drafted_tokens
    assert summed(children, "verify", "verify_ms") == pytest.approx(1000 * stats.verify_seconds)
    # A verifier that falls behind joins chunks: a span may hold several rounds from the first on.
    follow_one_another([one for one in children if one.name == "verify"])
    for one in children:
        assert call.start_time <= one.start_time <= one.end_time <= call.end_time


async def test_a_call_that_is_left_has_its_rounds_too(client, spans) -> None:
    asked = client.generate(request("r", PROMPT, TOKENS), deadline_seconds=30)
    async with aclosing(asked) as chunks:
        async for chunk in chunks:
            if chunk.stats is not None and chunk.stats.rounds >= 4:
                break
    await eventually(lambda: ended(spans))
    _, children = of_request(spans)
    assert summed(children, "verify", "rounds") >= 4


def rounds(count: int) -> list[GenerateChunk]:
    stats, chunks = SpeculationStats(), [GenerateChunk(token_ids=(1,), stats=SpeculationStats())]
    for _ in range(count):
        stats = stats.add_round(
            drafted=4, verified=2, accepted=1, committed=2, draft_seconds=0.001, verify_seconds=0.004
        )
        chunks.append(GenerateChunk(token_ids=(1, 2), stats=stats))
    return chunks


class Ticking:
    """Six milliseconds a look: a round, and something else."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000_000

    def __call__(self) -> int:
        self.now += 6_000_000
        return self.now


async def replayed(traced_telemetry: Telemetry, count: int) -> list[GenerateChunk]:
    async def stream() -> AsyncIterator[GenerateChunk]:
        for chunk in rounds(count):
            yield chunk

    with traced_telemetry.tracer.start_as_current_span("call"):
        return [chunk async for chunk in with_round_spans(stream(), traced_telemetry.tracer, Ticking())]


@pytest.mark.parametrize("count", [0, 1, 3, SINGLE_ROUNDS, SINGLE_ROUNDS + 5, 1000, 20_000])
async def test_spans_stay_few_and_tell_of_every_round(traced_telemetry, spans, count: int) -> None:
    assert await replayed(traced_telemetry, count) == rounds(count)
    found = [one for one in spans.get_finished_spans() if one.name in ("draft", "verify")]
    verified = [one for one in found if one.name == "verify"]
    follow_one_another(verified)
    assert {one.attributes["dspark.rounds"] for one in verified[:SINGLE_ROUNDS]} <= {1}
    assert len(found) <= 2 * (SINGLE_ROUNDS + 1 + math.log2(max(count, 1)))
    assert summed(found, "verify", "rounds") == summed(found, "draft", "rounds") == count
    assert summed(found, "verify", "accepted") == count
    assert summed(found, "draft", "draft_ms") == pytest.approx(count)


async def test_a_round_is_drafted_before_it_is_verified(traced_telemetry, spans) -> None:
    await replayed(traced_telemetry, 3)
    phases = [one for one in spans.get_finished_spans() if one.name in ("draft", "verify")]
    assert [one.name for one in phases] == ["draft", "verify"] * 3
    for one, milliseconds in zip(phases, [1, 4] * 3, strict=True):
        assert one.end_time - one.start_time == pytest.approx(1e6 * milliseconds)
    for before, after in pairwise(phases):
        assert before.end_time <= after.start_time


async def test_an_unsampled_call_makes_no_spans(spans) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    assert await replayed(Telemetry(service="verifier", provider=provider), 3) == rounds(3)
    assert spans.get_finished_spans() == ()
