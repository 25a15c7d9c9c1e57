"""The REST API: OpenAI's endpoints, probes, metrics and a page for trying them out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.resources import files
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from services.common.streams import closing
from services.gateway.answers import software_version
from services.gateway.callers.quotas import RATE_LIMIT_HEADERS
from services.gateway.callers.tiers import FLOOR_HEADER, Caller
from services.gateway.gateway import Gateway
from services.gateway.http.body import read_body
from services.gateway.http.body_room import BodyRoom
from services.gateway.http.errors import error_answer, install_error_handlers
from services.gateway.http.middleware import ObserveRequests
from services.gateway.http.streaming import (
    KEEP_ALIVE_SECONDS,
    ClientGoneError,
    Event,
    EventStreamResponse,
    NamedEvent,
    StreamEnd,
    after_first,
    until_disconnect,
)
from services.gateway.openai.completion_answers import ModelBody, ModelList
from services.gateway.openai.fields import GenerationBody

_Body = TypeVar("_Body", bound=GenerationBody)

_CHAT, _COMPLETIONS, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_MODELS = "/v1/models"
_API = (_CHAT, _COMPLETIONS, _RESPONSES, _MODELS)
_PROBES = frozenset({"/healthz", "/readyz", "/health", "/metrics"})
_ROUTES = _PROBES | {"/", "/version", *_API}
_READ = ["GET", "HEAD"]

# The page loads nothing from elsewhere; its script and style are inline.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class CompletionUseCase(Protocol[_Body]):
    """Chat, plain completions or responses."""

    @property
    def id_prefix(self) -> str: ...

    @property
    def body_type(self) -> type[_Body]: ...

    @property
    def stream_end(self) -> StreamEnd: ...

    def complete(self, body: _Body, request_id: str, caller: Caller) -> Coroutine[Any, Any, BaseModel]: ...

    def stream(self, body: _Body, request_id: str, caller: Caller) -> AsyncIterator[BaseModel | Event]: ...


def create_app(gateway: Gateway, *, ready: Callable[[], bool]) -> FastAPI:
    """ready: whether new requests can be served, as reported by `/readyz`."""
    # The API is OpenAI's and documented there; FastAPI's own documentation pages load third-party scripts.
    # No redirects: behind a TLS proxy they would lead from https:// to http://.
    app = FastAPI(title="DSpark gateway", openapi_url=None, redirect_slashes=False)
    install_error_handlers(app, _API)
    app.include_router(_openai_routes(gateway))
    app.include_router(_operator_routes(gateway, ready))
    if gateway.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["X-Request-Id", "Retry-After", *RATE_LIMIT_HEADERS],
        )
    app.add_middleware(
        ObserveRequests,
        tracer=gateway.telemetry.tracer,
        metrics=gateway.metrics,
        routes=_ROUTES,
        probes=_PROBES,
    )
    return app


def _openai_routes(gateway: Gateway) -> APIRouter:
    router, room = APIRouter(), BodyRoom(gateway.max_body_bytes)

    @router.post(_CHAT)
    async def chat_completions(request: Request) -> Response:
        return await _completion(gateway, gateway.chat, request, room)

    @router.post(_COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await _completion(gateway, gateway.completions, request, room)

    @router.post(_RESPONSES)
    async def responses(request: Request) -> Response:
        return await _completion(gateway, gateway.responses, request, room)

    @router.api_route(_MODELS, methods=_READ)
    async def list_models(request: Request) -> ModelList:
        gateway.api_keys.caller_of(request.headers.get("authorization"))
        return await gateway.models.list()

    @router.api_route(_MODELS + "/{name:path}", methods=_READ)
    async def get_model(request: Request, name: str) -> ModelBody:
        if not name:  # a list with a slash behind it
            raise HTTPException(404)
        gateway.api_keys.caller_of(request.headers.get("authorization"))
        return await gateway.models.get(name)

    return router


def _operator_routes(gateway: Gateway, ready: Callable[[], bool]) -> APIRouter:
    router = APIRouter()
    page = files("services.gateway.http").joinpath("page.html").read_text(encoding="utf-8")

    @router.api_route("/", methods=_READ, response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @router.api_route("/healthz", methods=_READ, response_class=PlainTextResponse)
    async def live() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    # `/health` is the path that clients of other engines poll.
    @router.api_route("/health", methods=_READ, response_class=PlainTextResponse)
    @router.api_route("/readyz", methods=_READ, response_class=PlainTextResponse)
    async def readiness() -> PlainTextResponse:
        if ready() and not gateway.admission.draining:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("not ready\n", status_code=503)

    @router.api_route("/version", methods=_READ)
    async def version() -> dict[str, str]:
        return {"version": software_version(), "model": gateway.model_name}

    @router.api_route("/metrics", methods=_READ)
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(gateway.metrics.registry), headers={"Content-Type": content_type})

    return router


async def _completion(
    gateway: Gateway, use_case: CompletionUseCase[_Body], request: Request, room: BodyRoom
) -> Response:
    request_id = gateway.answers.request_id(use_case.id_prefix)
    headers, caller = {"X-Request-Id": request_id}, None
    try:
        given = request.headers
        caller = gateway.api_keys.caller_of(given.get("authorization"), given.get(FLOOR_HEADER))
        body = await read_body(request, use_case.body_type, gateway.max_body_bytes, room, caller.account.name)
        if body.stream:
            payloads = _payloads(use_case.stream(body, request_id, caller))
            started = await after_first(payloads, request.receive, KEEP_ALIVE_SECONDS)
            headers.update(caller.account.headers())
            return EventStreamResponse(started, headers, use_case.stream_end)
        answer = await until_disconnect(request.receive, use_case.complete(body, request_id, caller))
        headers.update(caller.account.headers())
        return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
    except (ClientGoneError, ClientDisconnect):
        return Response(status_code=499)  # for metrics only; nobody reads it
    except Exception as error:
        response = error_answer(error).response()
        response.headers.update(headers | (caller.account.headers() if caller else {}))
        return response


async def _payloads(chunks: AsyncIterator[BaseModel | Event]) -> AsyncIterator[Event]:
    async with closing(chunks):
        async for chunk in chunks:
            yield chunk if isinstance(chunk, str | NamedEvent) else chunk.model_dump_json(exclude_unset=True)
