"""The REST face: OpenAI's endpoints, probes, metrics and a page to try it all out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from importlib.resources import files
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dspark_core.errors import DeadlineError
from services.gateway.backend import closing
from services.gateway.gateway import Gateway
from services.gateway.http_errors import BodyTooLargeError, error_answer, install_error_handlers, invalid_body
from services.gateway.middleware import ObserveRequests
from services.gateway.openai_responses import ModelBody, ModelList
from services.gateway.openai_schema import AnyCompletionBody
from services.gateway.streaming import ClientGoneError, EventStreamResponse, after_first, until_disconnect
from services.gateway.tiers import FLOOR_HEADER, Caller, floor_from_header

_Body = TypeVar("_Body", bound=AnyCompletionBody)

BODY_TIMEOUT_SECONDS = 30.0

_CHAT, _COMPLETIONS, _MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
_ROUTES = frozenset({"/", "/healthz", "/readyz", "/metrics", _CHAT, _COMPLETIONS, _MODELS})

# The page loads nothing from anywhere; its own script and style are inline.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class CompletionUseCase(Protocol[_Body]):
    """Chat or plain completions."""

    @property
    def id_prefix(self) -> str: ...

    @property
    def body_type(self) -> type[_Body]: ...

    def complete(self, body: _Body, request_id: str, caller: Caller) -> Coroutine[Any, Any, BaseModel]: ...

    def stream(self, body: _Body, request_id: str, caller: Caller) -> AsyncIterator[BaseModel]: ...


def create_app(gateway: Gateway, *, ready: Callable[[], bool]) -> FastAPI:
    """ready: whether new requests can be served; `/readyz` says so too."""
    # The API is OpenAI's and documented there; FastAPI's own pages would load foreign scripts.
    app = FastAPI(title="DSpark gateway", openapi_url=None)
    install_error_handlers(app)
    app.include_router(_openai_routes(gateway))
    app.include_router(_operator_routes(gateway, ready))
    app.add_middleware(
        ObserveRequests, tracer=gateway.telemetry.tracer, metrics=gateway.metrics, routes=_ROUTES
    )
    return app


def _openai_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.post(_CHAT)
    async def chat_completions(request: Request) -> Response:
        return await _completion(gateway, gateway.chat, request)

    @router.post(_COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await _completion(gateway, gateway.completions, request)

    @router.get(_MODELS)
    async def list_models(request: Request) -> ModelList:
        gateway.api_keys.tier_of(request.headers.get("authorization"))
        return await gateway.models.list()

    @router.get(_MODELS + "/{name:path}")
    async def get_model(request: Request, name: str) -> ModelBody:
        gateway.api_keys.tier_of(request.headers.get("authorization"))
        return await gateway.models.get(name)

    return router


def _operator_routes(gateway: Gateway, ready: Callable[[], bool]) -> APIRouter:
    router = APIRouter()
    page = files("services.gateway").joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @router.get("/healthz", response_class=PlainTextResponse)
    async def live() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @router.get("/readyz", response_class=PlainTextResponse)
    async def readiness() -> PlainTextResponse:
        if ready() and not gateway.admission.draining:
            return PlainTextResponse("ready\n")
        return PlainTextResponse("not ready\n", status_code=503)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(gateway.metrics.registry), headers={"Content-Type": content_type})

    return router


async def _completion(gateway: Gateway, use_case: CompletionUseCase[_Body], request: Request) -> Response:
    request_id = gateway.answers.request_id(use_case.id_prefix)
    headers = {"X-Request-Id": request_id}
    try:
        tier = gateway.api_keys.tier_of(request.headers.get("authorization"))
        caller = Caller(tier=tier, asked_floor=floor_from_header(request.headers.get(FLOOR_HEADER)))
        body = await _read_body(request, use_case.body_type, gateway.max_body_bytes)
        if body.stream:
            payloads = _payloads(use_case.stream(body, request_id, caller))
            return EventStreamResponse(await after_first(payloads, request.receive), headers)
        answer = await until_disconnect(request.receive, use_case.complete(body, request_id, caller))
        return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
    except (ClientGoneError, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        response = error_answer(error).response()
        response.headers.update(headers)
        return response


async def _read_body(request: Request, body_type: type[_Body], max_bytes: int) -> _Body:
    """Raises BodyTooLargeError, and InvalidRequestError for what is not such a body."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(declared, max_bytes)
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for piece in request.stream():
                raw += piece
                if len(raw) > max_bytes:
                    raise _too_large(f"more than {max_bytes}", max_bytes)
    except TimeoutError:
        raise DeadlineError(f"the request body did not arrive within {BODY_TIMEOUT_SECONDS:g} s") from None
    try:
        return body_type.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise invalid_body(error) from error


def _too_large(size: str, max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body has {size} bytes, the limit is {max_bytes}")


async def _payloads(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    async with closing(chunks):
        async for chunk in chunks:
            yield chunk.model_dump_json(exclude_unset=True)
