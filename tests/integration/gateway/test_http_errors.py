"""Every way in which a request can be invalid or impossible to serve, over real HTTP."""

import gzip
import json

import openai
import pytest

from dspark_core.errors import DSparkError, QueueFullError, UnavailableError
from services.gateway.config import GatewayLimits
from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.fake_generation import FakeBackend

HELLO = [{"role": "user", "content": "hi"}]
CHAT = {"model": MODEL, "messages": HELLO}


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "message"),
    [
        ({"model": "gpt-9"}, 404, "model", "model_not_found", "'gpt-9' does not exist"),
        ({"max_tokens": -1}, 400, "max_tokens", None, "got -1"),
        ({"max_tokens": 0}, 400, "max_tokens", None, "got 0"),
        ({"messages": []}, 400, "messages", None, "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", None, "'robot'"),
        (
            {"messages": [{"role": "user", "content": "x" * 300}]},
            400,
            "messages",
            "context_length_exceeded",
            "the prompt is too long, as this model's maximum context length is 200 tokens",
        ),
        ({"temperature": -1}, 400, "temperature", None, "got -1"),
        (
            {"chat_template_kwargs": {"messages": []}},
            400,
            "chat_template_kwargs",
            None,
            "cannot set 'messages'",
        ),
        ({"chat_template_kwargs": [1]}, 400, "chat_template_kwargs", None, "an object, got [1]"),
        ({"n": 30}, 400, "n", None, "n must be <= 16"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None, "in [0, 20], got 21"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty", None, "got 2.5"),
        (
            {"structured_outputs": {"regex": "[ab"}},
            400,
            "structured_outputs",
            None,
            "structured_outputs: at 1(8): invalid regex",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "x"}},
                }
            },
            400,
            "response_format",
            None,
            "response_format: Invalid type: x",
        ),
        (
            {"structured_outputs": {"json": "[" * 60_000}},
            400,
            "structured_outputs",
            None,
            "structured_outputs: the schema is no JSON",
        ),
        (
            {"structured_outputs": {"regex": "x" * 70_000}},
            400,
            "structured_outputs",
            None,
            "70000 characters",
        ),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias", None, "token ids must be in [0, 257], got 999"),
        (
            {"seed": 1, "speculation": {"verification": "rejection"}},
            400,
            "speculation.verification",
            None,
            "cannot be combined with seed 1",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_wrong_requests_are_refused_in_openais_shape(
    serve: Serve, stream, change, status, param, code, message
) -> None:
    running = await serve(FakeBackend())
    response = await running.client.post("/v1/chat/completions", json={**CHAT, **change, "stream": stream})
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert message in error["message"]


async def test_the_official_client_raises_its_own_errors(serve: Serve) -> None:
    running = await serve(FakeBackend())
    create = running.openai.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="gpt-9", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as negative:
        await create(model=MODEL, messages=HELLO, max_tokens=-1)
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        await create(model=MODEL, messages=[{"role": "user", "content": "x" * 300}])
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": "m", ]}', b"\xff\xfe", b"[]", b'"x"'])
async def test_broken_json_is_a_bad_request(serve: Serve, content) -> None:
    running = await serve(FakeBackend())
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = await running.client.post(path, content=content)
        assert response.status_code == 400
        assert "request body" in response.json()["error"]["message"]


async def test_a_compressed_body_is_told_apart_from_broken_json(serve: Serve) -> None:
    running = await serve(FakeBackend("ok"))
    for encoding, status in (("gzip", 415), ("identity", 200)):
        content = gzip.compress(json.dumps(CHAT).encode()) if status == 415 else json.dumps(CHAT).encode()
        headers = {"content-encoding": encoding, "content-type": "application/json"}
        response = await running.client.post("/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == status
    assert (
        "Content-Encoding 'gzip'"
        in (
            await running.client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})
        ).json()["error"]["message"]
    )


async def test_a_body_without_a_content_type_is_still_json(serve: Serve) -> None:
    running = await serve(FakeBackend("ok"))
    response = await running.client.post("/v1/chat/completions", content=json.dumps(CHAT).encode())
    assert response.json()["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example.org"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://evil.example.org", "Content-Type": ""},
    ],
)
async def test_a_web_page_must_name_the_content_type_for_then_browsers_ask_first(
    serve: Serve, headers
) -> None:
    running = await serve(FakeBackend("ok"))
    content = json.dumps(CHAT).encode()
    response = await running.client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 415
    error = response.json()["error"]
    assert error["message"] == "web pages must send the content type application/json, got none"
    headers = {**headers, "Content-Type": "application/json"}
    response = await running.client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
async def test_only_json_is_read(serve: Serve, content_type, status) -> None:
    running = await serve(FakeBackend("ok"))
    response = await running.client.post(
        "/v1/chat/completions", content=json.dumps(CHAT).encode(), headers={"Content-Type": content_type}
    )
    assert response.status_code == status
    if status == 415:
        error = response.json()["error"]
        assert error["code"] == "unsupported_media_type"
        assert content_type in error["message"]


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_refused_without_being_read(serve: Serve, declared) -> None:
    running = await serve(FakeBackend(), limits=GatewayLimits(max_body_bytes=1000))
    body = json.dumps({**CHAT, "user": "x" * 2000}).encode()

    async def pieces():
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    content = body if declared else pieces()
    response = await running.client.post("/v1/chat/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "the limit is 1000" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (UnavailableError("no verifier for model 'm'"), 503, "no_verifier", "2"),
        (QueueFullError("all verifiers are full", retry_after_seconds=2.5), 429, "queue_full", "3"),
        (DSparkError("INTERNAL: /secret"), 500, "internal_error", None),
        (ValueError("/secret"), 500, "internal_error", None),
    ],
)
async def test_a_backend_that_cannot_serve_gets_its_own_status(
    serve: Serve, stream, error, status, code, retry_after
) -> None:
    backend = FakeBackend()
    backend.error = error
    running = await serve(backend)
    response = await running.client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "/secret" not in response.text


async def test_a_request_past_its_deadline_is_a_timeout(serve: Serve) -> None:
    backend = FakeBackend()
    backend.hold_after_chunks = 0
    running = await serve(backend, limits=GatewayLimits(request_timeout_seconds=0.05))
    response = await running.client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert backend.running == 0


async def test_unknown_methods_answer_in_the_same_shape(serve: Serve) -> None:
    running = await serve(FakeBackend())
    wrong_method = await running.client.get("/v1/chat/completions")
    assert wrong_method.status_code == 405
    assert wrong_method.json()["error"]["type"] == "invalid_request_error"
    assert wrong_method.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/chat/completions", "/v1/chat/completions/"])
async def test_a_path_that_is_not_there_is_told_from_those_that_are(serve: Serve, path) -> None:
    response = await (await serve(FakeBackend())).client.post(path, json=CHAT)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["message"] == (
        f"POST {path}: Not Found; served are /v1/chat/completions, /v1/completions, /v1/responses, /v1/models"
    )
    assert (error["code"], error["type"]) == ("unknown_url", "invalid_request_error")


async def test_a_list_of_models_with_a_slash_behind_it_is_no_model(serve: Serve) -> None:
    response = await (await serve(FakeBackend())).client.get("/v1/models/")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"


async def test_api_keys_are_asked_for_where_they_are_configured(serve: Serve) -> None:
    running = await serve(FakeBackend("ok"), api_keys=("key-1", "key-2"), key="key-2")
    answer = await running.openai.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "ok"
    with pytest.raises(openai.AuthenticationError) as caught:
        await running.openai.with_options(api_key="guess-3").models.list()
    assert caught.value.code == "invalid_api_key"
    assert "guess-3" not in str(caught.value)
    for headers in ({}, {"Authorization": "Basic key-1"}, {"Authorization": "Bearer"}):
        response = await running.client.post("/v1/completions", json={}, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/health", "/version", "/metrics"):
        assert (await running.client.get(path)).status_code == 200
