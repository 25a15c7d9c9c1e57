"""A client that leaves while a message is written to it is no error of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from services.common.interceptors import ErrorLayer, RpcCall, _drive_generator


class _LeftContext:
    """Of a call whose client has left: gRPC fails the write, and cancels the handler a moment later."""

    def __init__(self) -> None:
        self.wrote = asyncio.Event()

    async def write(self, response: object) -> None:
        self.wrote.set()
        raise grpc.aio.InternalError("Failed execute_batch")


async def _responses(request: object, context: object) -> AsyncIterator[str]:
    yield "first"
    yield "second"


async def test_a_call_that_ends_under_a_message_is_cancelled_and_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = _LeftContext()

    async def handled() -> None:
        async with ErrorLayer().around(RpcCall("/Generate", True, context)):  # type: ignore[arg-type]
            await _drive_generator(_responses)("request", context)

    call = asyncio.create_task(handled())
    await context.wrote.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
