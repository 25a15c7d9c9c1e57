"""Quotas of keys over REST and gRPC, and what the log and the metrics tell of usage."""

import asyncio
import logging
from pathlib import Path

import grpc.aio
import pytest
from dspark_proto.v1 import gateway_pb2

from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.fake_generation import FakeBackend

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
AS_K, AS_L = {"Authorization": "Bearer k"}, {"Authorization": "Bearer l"}


@pytest.fixture
def keys_file(tmp_path: Path):
    def write(**quota: int) -> str:
        path = tmp_path / "keys.toml"
        limits = "\n".join(f"{name} = {value}" for name, value in quota.items())
        path.write_text(
            f"[tiers.team]\n{limits}\n"
            + "".join(
                f"[keys.{name}]\nkey = '{key}'\ntier = 'team'\n"
                for name, key in (("kate", "k"), ("leo", "l"))
            )
        )
        return str(path)

    return write


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_of_a_minute_are_limited_by_key(serve: Serve, keys_file, stream) -> None:
    running = await serve(FakeBackend("Hello"), keys_file=keys_file(requests_per_minute=2))
    body = {**BODY, "stream": stream}
    answers = [await running.client.post(CHAT, json=body, headers=AS_K) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["2"] * 3
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    error = answers[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 10 <= int(answers[2].headers["retry-after"]) <= 30
    other = await running.client.post(CHAT, json=body, headers=AS_L)
    assert other.status_code == 200
    refused = await running.metric("dspark_gateway_quota_refusals_total")
    assert refused == 'dspark_gateway_quota_refusals_total{quota="requests_per_minute",tier="team"} 1.0'


async def test_refused_requests_do_not_count_as_let_in(serve: Serve, keys_file) -> None:
    running = await serve(FakeBackend("Hello"), keys_file=keys_file(requests_per_minute=1))
    wrong = [
        ({"model": "another"}, 404),
        ({"messages": [{"role": "user", "content": "long " * 9000}]}, 400),
    ]
    for fields, status in wrong:
        answer = await running.client.post(CHAT, json={**BODY, **fields}, headers=AS_K)
        assert answer.status_code == status, answer.text
    assert (await running.client.post(CHAT, json=BODY, headers=AS_K)).status_code == 200
    assert (await running.client.post(CHAT, json=BODY, headers=AS_K)).status_code == 429


async def test_requests_refused_for_their_grammar_count_for_it_was_checked(serve: Serve, keys_file) -> None:
    running = await serve(FakeBackend("Hello"), keys_file=keys_file(requests_per_minute=2))
    wrong = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
    for fields in ({"response_format": wrong}, {"tools": [tool]}):
        answer = await running.client.post(CHAT, json={**BODY, **fields}, headers=AS_K)
        assert answer.status_code == 400, answer.text
    assert (await running.client.post(CHAT, json=BODY, headers=AS_K)).status_code == 429


async def test_tokens_are_charged_when_they_were_sent(serve: Serve, keys_file) -> None:
    running = await serve(FakeBackend("Hello"), keys_file=keys_file(tokens_per_minute=30))
    first = await running.client.post(CHAT, json=BODY, headers=AS_K)
    used = first.json()["usage"]["total_tokens"]
    assert first.headers["x-ratelimit-remaining-tokens"] == str(max(0, 30 - used))
    for _ in range(5):
        last = await running.client.post(CHAT, json=BODY, headers=AS_K)
    assert last.status_code == 429
    assert "tokens_per_minute of 30" in last.json()["error"]["message"]


async def test_requests_at_a_time_are_limited_and_places_come_back(serve: Serve, keys_file) -> None:
    backend = FakeBackend("Hello")
    backend.hold_after_chunks = 0
    running = await serve(backend, keys_file=keys_file(max_concurrent_requests=2))
    asked = [asyncio.create_task(running.client.post(CHAT, json=BODY, headers=AS_K)) for _ in range(3)]
    done, left = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().status_code for task in done] == [429]
    too_many = await running.client.post(CHAT, json={**BODY, "n": 3}, headers=AS_K)
    assert too_many.status_code == 400
    assert "n must be <= 2, this key's limit, got 3" in too_many.text
    backend.release.set()
    assert [(await task).status_code for task in left] == [200, 200]
    assert (await running.client.post(CHAT, json={**BODY, "n": 2}, headers=AS_K)).status_code == 200


async def test_grpc_calls_are_held_to_the_same_quota(serve: Serve, keys_file) -> None:
    running = await serve(FakeBackend("Hello"), keys_file=keys_file(requests_per_minute=1))
    metadata = grpc.aio.Metadata(("authorization", "Bearer k"))
    message = gateway_pb2.GatewayGenerateRequest(prompt="p")
    assert [chunk async for chunk in running.stub.Generate(message, timeout=20, metadata=metadata)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [chunk async for chunk in running.stub.Generate(message, timeout=20, metadata=metadata)]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert float(dict(caught.value.trailing_metadata())["retry-after"]) > 30


async def test_usage_is_told_by_key_in_the_log_and_by_tier_in_metrics(
    serve: Serve, keys_file, caplog
) -> None:
    caplog.set_level(logging.INFO)
    running = await serve(FakeBackend("Hello"), keys_file=keys_file())
    answer = (await running.client.post(CHAT, json=BODY, headers=AS_K)).json()
    (line,) = [record for record in caplog.records if answer["id"] in record.getMessage()]
    usage = answer["usage"]
    assert (line.key, line.tier) == ("kate", "team")
    assert (line.prompt_tokens, line.completion_tokens, line.cached_prompt_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
    )
    for kind, tokens in (("prompt", line.prompt_tokens), ("completion", line.completion_tokens)):
        start = f'dspark_gateway_tier_tokens_total{{kind="{kind}",tier="team"}}'
        assert await running.metric(start) == f"{start} {float(tokens)}"
