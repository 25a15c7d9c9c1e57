"""Speed floors set by body, header, tier and gRPC, and what answers report about them."""

import grpc
import grpc.aio
import pytest
from dspark_proto.v1 import gateway_pb2

from services.gateway.callers.tiers import Tier
from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.fake_generation import FakeBackend

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
GOLD = {"gold": Tier(name="gold", min_tokens_per_second=30.0)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "header", "message"),
    [
        (0, None, "min_tokens_per_second must be > 0"),
        (-2.5, None, "got -2.5"),
        ("fast", None, "min_tokens_per_second: Input should be a valid number, got 'fast'"),
        (None, "fast", "X-Min-Tokens-Per-Second must be a number, got 'fast'"),
        (None, "0", "X-Min-Tokens-Per-Second must be > 0"),
        (31, None, "at most 30, the floor of tier 'gold', got 31"),
    ],
)
async def test_wrong_floors_name_field_and_value(serve: Serve, stream, field, header, message) -> None:
    running = await serve(FakeBackend(), api_keys=("k@gold",), tiers=GOLD)
    headers = {"Authorization": "Bearer k"} | ({"X-Min-Tokens-Per-Second": header} if header else {})
    body = {**CHAT, "stream": stream} | ({} if field is None else {"min_tokens_per_second": field})
    response = await running.client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"] == ("min_tokens_per_second" if field is not None else "X-Min-Tokens-Per-Second")


async def test_a_tiers_floor_reaches_the_verifier_and_the_answer(serve: Serve) -> None:
    backend = FakeBackend("Hello, world!")
    running = await serve(backend, api_keys=("k@gold", "plain"), tiers=GOLD)
    answers = []
    asked = {"min_tokens_per_second": 12}
    for key, extra in (("k", {}), ("k", asked), ("plain", asked), ("plain", {})):
        headers = {"Authorization": f"Bearer {key}"}
        response = await running.client.post("/v1/chat/completions", json={**CHAT, **extra}, headers=headers)
        answers.append(response.json()["speculation"])
    assert [request.min_tokens_per_second for request in backend.requests] == [30.0, 12.0, 12.0, None]
    assert [request.floor_promised for request in backend.requests] == [True, True, False, False]
    assert [answer["min_tokens_per_second"] for answer in answers] == [30.0, 12.0, 12.0, None]
    assert all(answer["decode_tokens_per_second"] > 30 for answer in answers)
    held = await running.metric('dspark_gateway_speed_floors_total{held="yes",tier="gold"}')
    assert held.endswith(" 2.0")
    text = (await running.client.get("/metrics")).text
    assert 'dspark_gateway_speed_floors_total{held="yes",tier="default"}' not in text  # a wish is no promise


async def test_grpc_takes_the_floor_from_the_field_or_the_metadata(serve: Serve) -> None:
    backend = FakeBackend("Hello, world!")
    running = await serve(backend)
    metadata = grpc.aio.Metadata(("x-min-tokens-per-second", "7"))
    for message in (
        gateway_pb2.GatewayGenerateRequest(prompt="p"),
        gateway_pb2.GatewayGenerateRequest(prompt="p", min_tokens_per_second=9),
    ):
        chunks = [chunk async for chunk in running.stub.Generate(message, timeout=20, metadata=metadata)]
        assert chunks[-1].decode_tokens_per_second > 0
        assert chunks[-1].min_tokens_per_second == backend.requests[-1].min_tokens_per_second
    assert [request.min_tokens_per_second for request in backend.requests] == [7.0, 9.0]

    wrong = gateway_pb2.GatewayGenerateRequest(prompt="p", min_tokens_per_second=-1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [chunk async for chunk in running.stub.Generate(wrong, timeout=20)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "min_tokens_per_second must be > 0" in (caught.value.details() or "")
