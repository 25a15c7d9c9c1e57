"""The one server interceptor: runs layers (tracing, metrics, errors, limits) around every handler.

A layer is an async context manager around a call. Streaming handlers are driven from here with
`context.write`, so that a cancelled call unwinds the handler at once, inside its own task, instead
of whenever its generator is garbage-collected. Messages are parsed here too, inside the layers: gRPC would
answer UNKNOWN to one that is malformed. Health checks and reflection bypass the layers: probes must work
under load, and neither is work to count or to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dspark_core.errors import DeadlineError, InvalidRequestError
from services.common.interruption import Interruption
from services.common.rpc_errors import RpcStatus, to_status

_log = logging.getLogger(__name__)
_UNTOUCHED = ("/grpc.health.", "/grpc.reflection.")
_WRITE_LIMIT = "write_limit_seconds"
ABORT_SECONDS = 5.0
"""A status is queued behind responses that the client has not read yet, perhaps forever. The call must not
hold its slot among the server's concurrent calls for that long."""

Context: TypeAlias = grpc.aio.ServicerContext
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behaviour = TypeVar("_Behaviour", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class RpcCall:
    """One call as a layer sees it."""

    method: str
    """Full name, `/package.Service/Method`."""
    streaming: bool
    """Requests or responses are a stream."""
    context: Context[Any, Any]


class Layer(Protocol):
    def around(self, call: RpcCall) -> AbstractAsyncContextManager[None]:
        """Wraps a call. Must let every exception propagate, unchanged or replaced by another."""
        ...


class LayeredInterceptor(grpc.aio.ServerInterceptor):
    """Applies layers to every handler, the first outermost."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_UNTOUCHED):
            return handler
        kind = _handler_kind(handler)
        run = self._wrap(method, handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: Handler = make(run, response_serializer=handler.response_serializer)
        return wrapped

    def _wrap(self, method: str, handler: Handler, kind: str) -> Callable[..., Any]:
        """Its requests are those of a handler without a deserialiser: bytes, or an iterator over bytes."""
        streaming = kind != "unary_unary"
        behaviour = getattr(handler, kind)
        run = _drive_generator(behaviour) if inspect.isasyncgenfunction(behaviour) else behaviour
        parse = _parser(handler.request_deserializer)
        read: Callable[[Any], object] = (
            (lambda raw: _Parsed(raw, parse)) if handler.request_streaming else parse
        )

        async def wrapped(raw: object, context: Context[Any, Any]) -> object:
            call = RpcCall(method, streaming, context)
            async with AsyncExitStack() as stack:
                for layer in self._layers:
                    await stack.enter_async_context(layer.around(call))
                return await run(read(raw), context)

        return wrapped


def _handler_kind(handler: Handler) -> str:
    requests = "stream" if handler.request_streaming else "unary"
    responses = "stream" if handler.response_streaming else "unary"
    return f"{requests}_{responses}"


def _parser(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """The same, but what cannot be parsed is the caller's mistake."""

    def run(raw: bytes) -> object:
        try:
            return raw if parse is None else parse(raw)
        except DecodeError as error:  # it names the type of the message
            raise InvalidRequestError(f"malformed request: {error}") from None

    return run


class _Parsed(AsyncIterator[Any]):
    """The messages of a stream."""

    def __init__(self, raw: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> None:
        self._raw = raw
        self._parse = parse

    async def __anext__(self) -> object:
        return self._parse(await anext(self._raw))


def limits_writes(seconds: float) -> Callable[[_Behaviour], _Behaviour]:
    """Marks a generator whose call ends with a DeadlineError if its client reads nothing for `seconds`.

    For calls of external clients: one that does not read holds slots that others wait for.
    """

    def mark(behaviour: _Behaviour) -> _Behaviour:
        setattr(behaviour, _WRITE_LIMIT, seconds)
        return behaviour

    return mark


def _drive_generator(behaviour: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
    limit_seconds: float | None = getattr(behaviour, _WRITE_LIMIT, None)

    async def run(request: object, context: Context[Any, Any]) -> None:
        with Interruption() as writes:
            if limit_seconds is not None:
                unread = DeadlineError(f"the client read nothing for {limit_seconds:g} s")
                writes.limit_each(limit_seconds, unread)
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    await writes.wait(context.write(response))

    return run


class ErrorLayer:
    """Ends failed calls with the status of their error; anything unexpected becomes INTERNAL."""

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            status = to_status(error)
            if status is not None:
                await _abort(call.context, status)
            # The reference links a caller's report to our log without revealing internals.
            reference = uuid.uuid4().hex[:12]
            _log.exception("unexpected error in %s (reference %s)", call.method, reference)
            message = f"internal error in {call.method}, reference {reference}"
            await _abort(call.context, RpcStatus(grpc.StatusCode.INTERNAL, message))


async def _abort(context: Context[Any, Any], status: RpcStatus) -> NoReturn:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ABORT_SECONDS):
            await context.abort(status.code, status.message, status.metadata)
    raise grpc.aio.AbortError("the client has not read its call's status yet")


class DeadlineLayer:
    """Gives unary calls that come without a deadline a default one; streams get none."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        # Typed as always present, but None if the client set no deadline.
        remaining: float | None = call.context.time_remaining()
        if call.streaming or remaining is not None:
            yield
            return
        try:
            async with asyncio.timeout(self._timeout_seconds) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError(
                f"{call.method} did not finish within {self._timeout_seconds:g} s, "
                "the server's limit for calls without a deadline"
            ) from error
