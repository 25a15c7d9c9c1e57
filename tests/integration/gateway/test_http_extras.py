"""What browsers, load balancers and clients of other engines expect beyond the OpenAI API itself."""

import json

import pytest

from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.fake_generation import FakeBackend

PAGE = "https://chat.example.org"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


PATHS = ["/", "/healthz", "/readyz", "/health", "/version", "/metrics", "/v1/models"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_head_is_a_get_without_its_body(serve: Serve, path) -> None:
    running = await serve(FakeBackend())
    head, get = await running.client.head(path), await running.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


async def test_health_is_readiness(serve: Serve) -> None:
    running = await serve(FakeBackend())
    assert (await running.client.get("/health")).status_code == 200
    running.gateway.admission.drain()
    assert (await running.client.get("/health")).status_code == 503
    assert (await running.client.get("/healthz")).status_code == 200


async def test_the_version_tells_software_and_model(serve: Serve) -> None:
    running = await serve(FakeBackend())
    answer = (await running.client.get("/version")).json()
    assert answer.keys() == {"version", "model"}
    assert answer["version"]
    assert answer["model"] == MODEL


async def test_web_pages_of_listed_origins_may_call(serve: Serve) -> None:
    running = await serve(FakeBackend("ok"), cors_origins=(PAGE,), api_keys=("key",))
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
        "Access-Control-Request-Private-Network": "true",  # as from a public page to a gateway at home
    }
    preflight = await running.client.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert preflight.headers["access-control-allow-private-network"] == "true"
    headers = {"Origin": PAGE, "Authorization": "Bearer key"}
    answer = await running.client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


async def test_pages_of_other_origins_may_not(serve: Serve) -> None:
    for origins in ((), (PAGE,)):
        running = await serve(FakeBackend(), cors_origins=origins)
        asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
        preflight = await running.client.options("/v1/chat/completions", headers=asked)
        assert preflight.is_client_error
        assert "access-control-allow-origin" not in preflight.headers


async def test_an_event_is_one_line_by_anybodys_idea_of_lines(serve: Serve) -> None:
    """httpx, like anything that uses `str.splitlines`, ends lines at more than line feeds."""
    text = "a\x85b\u2028c\u2029d\x0be\x1cf\u00e9"
    running = await serve(FakeBackend(text))
    async with running.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
