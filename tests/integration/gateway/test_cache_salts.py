"""Whose cached prompts a request may use, by key and by `cache_salt`, over REST and gRPC."""

import grpc.aio
import pytest
from dspark_proto.v1 import gateway_pb2

from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.fake_generation import FakeBackend

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize("path", BODIES)
async def test_every_api_takes_a_salt_and_keys_have_one_each(serve: Serve, path) -> None:
    backend = FakeBackend("Hello")
    running = await serve(backend, api_keys=("a", "b"))
    for key, fields in (("a", {}), ("b", {}), ("a", {"cache_salt": "x"})):
        answer = await running.client.post(
            path, json={"model": MODEL, **BODIES[path], **fields}, headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 200, answer.text
    alone, other, salted = (request.cache_salt for request in backend.requests)
    assert len({"", alone, other}) == 3
    assert salted == f"{alone}/x"


async def test_grpc_takes_the_same_and_without_keys_only_a_salt_parts_clients(serve: Serve) -> None:
    backend = FakeBackend("Hello")
    running = await serve(backend)
    for message in (
        gateway_pb2.GatewayGenerateRequest(prompt="p"),
        gateway_pb2.GatewayGenerateRequest(prompt="p", cache_salt="x"),
    ):
        assert [chunk async for chunk in running.stub.Generate(message, timeout=20)]
    assert [request.cache_salt for request in backend.requests] == ["", "/x"]

    wrong = gateway_pb2.GatewayGenerateRequest(prompt="p", cache_salt="")
    with pytest.raises(grpc.aio.AioRpcError, match="cache_salt must have 1 to 256 characters, got 0"):
        [chunk async for chunk in running.stub.Generate(wrong, timeout=20)]


async def test_a_wrong_salt_is_refused_by_name(serve: Serve) -> None:
    running = await serve(FakeBackend())
    body = {"model": MODEL, "prompt": "hi", "cache_salt": "x" * 257}
    refused = await running.client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "cache_salt"
