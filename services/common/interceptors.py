"""The one server interceptor: runs layers (tracing, metrics, errors, limits) around every handler.

A layer is an async context manager around a call. Streaming handlers are driven from here with
`context.write`, so that a cancelled call unwinds the handler at once, inside its own task, instead
of whenever its generator is garbage-collected. Messages are read and parsed here too, inside the layers: gRPC
would answer UNKNOWN to one that is malformed, and would read one before anybody can refuse its call. Health
checks and reflection have a chain of their own: probes must work under load, and neither is work to count or
to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from dspark_core.errors import DeadlineError, InvalidRequestError
from services.common.interruption import Interruption
from services.common.places import Places, Unlimited
from services.common.rpc_errors import RpcStatus, to_status

_log = logging.getLogger(__name__)
_PROBES = ("/grpc.health.", "/grpc.reflection.")
_WRITE_LIMIT = "write_limit_seconds"
_CHECK = "check_before_message"
ABORT_SECONDS = 5.0
"""A status is queued behind responses that the client has not read yet, perhaps forever. The call must not
hold its slot among the server's concurrent calls for that long."""
GONE_SECONDS = 5.0
"""How long a call whose client is gone waits to be cancelled."""
MESSAGE_SECONDS = 30.0
"""For a request to arrive."""

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


@dataclass(frozen=True, slots=True)
class Chain:
    """What handlers run in."""

    layers: Sequence[Layer]
    """The first is outermost."""
    arrivals: Places = field(default_factory=Unlimited)
    """For receiving the request of a call without a stream of them; in a chain of probes, any request."""


class LayeredInterceptor(grpc.aio.ServerInterceptor):
    """Runs every handler in a chain: `probes` if it is one of health or reflection, else `calls`."""

    def __init__(self, calls: Chain, probes: Chain) -> None:
        self._calls = calls
        self._probes = probes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        run = self._wrap(handler_call_details.method, handler)
        # A stream of requests to gRPC, which would read a single one before it calls the handler.
        make = grpc.stream_stream_rpc_method_handler
        if not handler.response_streaming:
            make = grpc.stream_unary_rpc_method_handler
        wrapped: Handler = make(run, response_serializer=handler.response_serializer)
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Callable[..., Any]:
        probe = method.startswith(_PROBES)
        chain = self._probes if probe else self._calls
        kind = _handler_kind(handler)
        behaviour = getattr(handler, kind)
        check = _check_of(behaviour)
        run = _drive_generator(behaviour) if inspect.isasyncgenfunction(behaviour) else behaviour
        parse = _parser(handler.request_deserializer)
        # Streams of work may pause for as long as they like between two messages.
        places = chain.arrivals if probe or not handler.request_streaming else None

        async def wrapped(raw: AsyncIterator[bytes], context: Context[Any, Any]) -> object:
            call = RpcCall(method, kind != "unary_unary", context)
            async with AsyncExitStack() as stack:
                for layer in chain.layers:
                    await stack.enter_async_context(layer.around(call))
                check(context)
                messages = _Parsed(raw, parse, places)
                return await run(messages if handler.request_streaming else await _only(messages), context)

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
    """The messages of a call, each received in one of `places` if there are any."""

    def __init__(
        self, raw: AsyncIterator[bytes], parse: Callable[[bytes], Any], places: Places | None
    ) -> None:
        self._raw = raw
        self._parse = parse
        self._places = places

    async def __anext__(self) -> object:
        if self._places is None:
            return self._parse(await anext(self._raw))
        async with self._places.place("the arrival of a request", MESSAGE_SECONDS):
            raw = await anext(self._raw, None)
        if raw is None:
            raise StopAsyncIteration
        return self._parse(raw)


async def _only(messages: AsyncIterator[Any]) -> object:
    async for message in messages:
        return message
    raise InvalidRequestError("the call has no request")


def limits_writes(seconds: float) -> Callable[[_Behaviour], _Behaviour]:
    """Marks a generator whose call ends with a DeadlineError if its client reads nothing for `seconds`.

    For calls of external clients: one that does not read holds slots that others wait for.
    """

    def mark(behaviour: _Behaviour) -> _Behaviour:
        setattr(behaviour, _WRITE_LIMIT, seconds)
        return behaviour

    return mark


def checks_first(check: Callable[[Any, Context[Any, Any]], object]) -> Callable[[_Behaviour], _Behaviour]:
    """Marks a method whose calls are refused by what `check(servicer, context)` raises, before their message
    is read: until then, gRPC holds no more of it than its flow control allows."""

    def mark(behaviour: _Behaviour) -> _Behaviour:
        setattr(behaviour, _CHECK, check)
        return behaviour

    return mark


def _check_of(behaviour: Any) -> Callable[[Context[Any, Any]], object]:  # noqa: ANN401 - a method or function
    check = getattr(behaviour, _CHECK, None)
    return (lambda _: None) if check is None else partial(check, behaviour.__self__)


def _drive_generator(behaviour: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
    limit_seconds: float | None = getattr(behaviour, _WRITE_LIMIT, None)

    async def run(request: object, context: Context[Any, Any]) -> None:
        with Interruption() as writes:
            if limit_seconds is not None:
                unread = DeadlineError(f"the client read nothing for {limit_seconds:g} s")
                writes.limit_each(limit_seconds, unread)
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    await writes.wait(_written(context, response))

    return run


async def _written(context: Context[Any, Any], response: object) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError:  # the call ended under the message
        await asyncio.sleep(GONE_SECONDS)  # gRPC cancels its handler now
        raise


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
