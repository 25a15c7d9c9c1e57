"""The gRPC API: the same use case and the same refusals as REST."""

import asyncio

import grpc
import grpc.aio
import pytest
from dspark_proto.v1 import common_pb2, gateway_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.records import SamplingParams, SpeculationOptions, Verification
from services.common.rpc_errors import from_rpc_error
from services.gateway.config import GatewayLimits
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.support.byte_tokenizer import END, START
from tests.support.fake_generation import FakeBackend
from tests.support.polling import eventually
from tests.support.thinking_templates import QWEN3

TEXT = "Grüße 🙂 END more"


def request(**fields: object) -> gateway_pb2.GatewayGenerateRequest:
    return gateway_pb2.GatewayGenerateRequest(**{"prompt": "p", **fields})


def chat(*messages: tuple[str, str], **fields: object) -> gateway_pb2.GatewayGenerateRequest:
    entries = [gateway_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return gateway_pb2.GatewayGenerateRequest(messages=entries, **fields)


async def generate(
    running: RunningGateway, message: gateway_pb2.GatewayGenerateRequest
) -> list[gateway_pb2.GatewayGenerateChunk]:
    return [chunk async for chunk in running.stub.Generate(message, timeout=20)]


async def test_a_chat_streams_text_and_ends_with_totals(serve: Serve) -> None:
    backend = FakeBackend(TEXT, chunk_tokens=2)
    chunks = await generate(await serve(backend), chat(("system", "s"), ("user", "hi")))
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert [token for chunk in chunks for token in chunk.token_ids] == [*TEXT.encode(), END]
    prompt = (START, *b"system\ns", END, START, *b"user\nhi", END, START, *b"assistant\n")
    assert backend.requests[0].prompt_token_ids == prompt
    last = chunks[-1]
    assert last.finish_reason == common_pb2.FINISH_REASON_STOP
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), len(TEXT.encode()) + 1)
    assert last.stats.rounds == len(chunks)
    assert not any(chunk.HasField("usage") for chunk in chunks[:-1])


async def test_what_a_drain_cannot_wait_for_ends_as_unavailable(serve: Serve) -> None:
    backend = FakeBackend(TEXT)
    backend.hold_after_chunks = 1
    running = await serve(backend)
    call = running.stub.Generate(request(), timeout=20)
    assert (await call.read()).text
    assert not await running.http.drain(0.01)
    with pytest.raises(grpc.aio.AioRpcError, match="this gateway shuts down") as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_draining_gateway_says_so(serve: Serve) -> None:
    running = await serve(FakeBackend(TEXT))
    running.gateway.admission.drain()
    with pytest.raises(grpc.aio.AioRpcError, match="this gateway is draining") as caught:
        await generate(running, request())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ("dspark-error", "DrainingError") in tuple(caught.value.trailing_metadata())


async def test_stop_strings_and_options_work_as_in_rest(serve: Serve) -> None:
    backend = FakeBackend(TEXT)
    message = request(
        model=MODEL,
        stop=["END"],
        max_tokens=50,
        ignore_eos=True,
        temperature=0.25,
        top_p=0.5,
        top_k=4,
        min_p=0.1,
        seed=2**63 - 1,
        speculation=common_pb2.SpeculationOptions(
            enabled=False, verification=common_pb2.VERIFICATION_COUPLED, max_draft_tokens=0
        ),
    )
    chunks = await generate(await serve(backend), message)
    assert "".join(chunk.text for chunk in chunks) == "Grüße 🙂 "
    assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    sent = backend.requests[0]
    assert sent.stop_token_ids == ()
    assert sent.sampling == SamplingParams(temperature=0.25, top_p=0.5, top_k=4, min_p=0.1, seed=2**63 - 1)
    assert sent.speculation == SpeculationOptions(
        enabled=False, verification=Verification.COUPLED, max_draft_tokens=0
    )
    assert sent.max_tokens == 50


@pytest.mark.parametrize(
    ("message", "code", "field", "text"),
    [
        (request(model="x" * 20_000), grpc.StatusCode.NOT_FOUND, "model", "model 'xxx"),
        (
            chat(("👻" * 20_000, "x")),
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages[0].role",
            "👻" * 100,
        ),
        (request(model="x"), grpc.StatusCode.NOT_FOUND, "model", "'x' does not exist"),
        (request(max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens", "got 0"),
        (request(temperature=-1), grpc.StatusCode.INVALID_ARGUMENT, "temperature", "got -1"),
        (request(prompt="x" * 300), grpc.StatusCode.INVALID_ARGUMENT, "prompt", "300 tokens"),
        (request(prompt=""), grpc.StatusCode.INVALID_ARGUMENT, "prompt", "empty"),
        (chat(), grpc.StatusCode.INVALID_ARGUMENT, "messages", "at least one"),
        (chat(("robot", "x")), grpc.StatusCode.INVALID_ARGUMENT, "messages[0].role", "'robot'"),
        (chat(("user", "x"), prompt="y"), grpc.StatusCode.INVALID_ARGUMENT, "prompt", "got both"),
        (request(stop=["a"] * 5), grpc.StatusCode.INVALID_ARGUMENT, "stop", "got 5"),
    ],
)
async def test_wrong_requests_name_field_and_value(serve: Serve, message, code, field, text) -> None:
    running = await serve(FakeBackend())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(running, message)
    assert caught.value.code() is code
    assert text in caught.value.details()
    assert from_rpc_error(caught.value).field == field


async def test_a_full_queue_is_resource_exhausted(serve: Serve) -> None:
    backend = FakeBackend()
    backend.hold_after_chunks = 0
    running = await serve(backend, limits=GatewayLimits(max_running_requests=1, max_waiting_requests=0))
    first = asyncio.create_task(generate(running, request()))
    await eventually(lambda: backend.running == 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(running, request())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    backend.release.set()
    assert (await first)[-1].finish_reason == common_pb2.FINISH_REASON_STOP


async def test_a_cancelled_call_cancels_the_backend(serve: Serve) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend)
    call = running.stub.Generate(request(), timeout=20)
    assert (await call.read()).text == "abc"
    call.cancel()
    await eventually(lambda: backend.running == 0)
    assert backend.cancelled == 1


async def test_models_and_keys(serve: Serve) -> None:
    running = await serve(FakeBackend(), api_keys=("key-1",))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(running, request())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    metadata = (("authorization", "Bearer key-1"),)
    answer = await running.stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=10, metadata=metadata)
    assert list(answer.models) == [MODEL]


async def test_tools_can_ask_what_is_served(serve: Serve) -> None:
    running = await serve(FakeBackend())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_server.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**request: str) -> reflection_pb2.ServerReflectionResponse:
            asked = iter([reflection_pb2.ServerReflectionRequest(**request)])
            (answer,) = [answer async for answer in stub.ServerReflectionInfo(asked, timeout=20)]
            return answer

        listed = (await ask(list_services="")).list_services_response.service
        assert "dspark.v1.GatewayService" in {service.name for service in listed}
        described = await ask(file_containing_symbol="dspark.v1.GatewayService")
        assert b"min_tokens_per_second" in b"".join(described.file_descriptor_response.file_descriptor_proto)


async def test_a_message_over_the_body_limit_is_refused_before_it_is_read(serve: Serve) -> None:
    backend = FakeBackend()
    running = await serve(backend, limits=GatewayLimits(max_body_bytes=10_000))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(running, request(prompt="x" * 20_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "10000" in caught.value.details()
    assert backend.requests == []


@pytest.mark.parametrize("method", ["ListModels", "Generate"])
async def test_whoever_has_no_key_is_refused_before_a_message_is_read(serve: Serve, method: str) -> None:
    running = await serve(FakeBackend(), api_keys=("key",))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.grpc_server.port}") as channel:
        call = channel.stream_unary(f"/dspark.v1.GatewayService/{method}")()  # nothing is sent
        async with asyncio.timeout(15):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_answer_may_have_to_be_something(serve: Serve) -> None:
    backend = FakeBackend()
    running = await serve(backend)
    await generate(running, request(grammar=common_pb2.Grammar(regex="[a-z]+")))
    assert backend.requests[0].grammar == Grammar(kind=GrammarKind.REGEX, text="[a-z]+")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(running, request(grammar=common_pb2.Grammar(json_schema="{")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "grammar: the schema is no JSON" in str(caught.value.details())


@pytest.mark.parametrize("chunk_tokens", [1, 500])
async def test_a_thought_is_apart_from_the_text(serve: Serve, chunk_tokens) -> None:
    said = "<think>\nGrüße?\n</think>\n\n"
    backend = FakeBackend(said + TEXT, chunk_tokens=chunk_tokens)
    running = await serve(backend, chat_template=QWEN3)
    chunks = await generate(running, chat(("user", "hi")))
    assert "".join(chunk.reasoning for chunk in chunks) == "Grüße?"
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert len("Grüße?".encode()) < chunks[-1].usage.reasoning_tokens < len(said.encode())
    thinking = chat(("user", "hi"), ("assistant", "Well"))
    thinking.messages[1].reasoning = "Hm."
    await generate(running, thinking)
    prompt = bytes(token for token in backend.requests[-1].prompt_token_ids if token < END)
    assert b"<think>\nHm.\n</think>\n\nWell" in prompt
    thinking.messages[0].reasoning = "Hm."
    with pytest.raises(
        grpc.aio.AioRpcError, match=r"messages\[0\].reasoning belongs to messages of the assistant"
    ):
        await generate(running, thinking)
    raw = await generate(running, request(prompt="<think>"))
    assert "".join(chunk.text for chunk in raw) == said + TEXT
