"""Requests that are answered before their bodies have arrived."""

import asyncio
import json
from functools import partial

from services.gateway.config import GatewayLimits
from services.gateway.http import app as http_app
from services.gateway.http import protocol as http_protocol
from services.gateway.http.body_room import BodyRoom
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.support.fake_generation import FakeBackend
from tests.support.loop_clock import LoopClock
from tests.support.polling import eventually

REFUSED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 1000000\r\n\r\n"
)
BODY = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()


async def connect(running: RunningGateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", running.http.port)


async def answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(15):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        return head.split(b"\r\n")[0]


async def test_a_body_that_trickles_in_after_its_answer_is_not_waited_for(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "REST_SECONDS", 0.3)
    reader, writer = await connect(await serve(FakeBackend()))
    writer.write(REFUSED)
    assert await answer(reader) == b"HTTP/1.1 415 Unsupported Media Type"
    closed = asyncio.create_task(reader.read())
    async with asyncio.timeout(15):
        while not closed.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
    writer.close()


async def test_a_body_that_ends_soon_after_its_answer_keeps_the_connection(serve: Serve) -> None:
    clock = LoopClock()
    reader, writer = await connect(await serve(FakeBackend()))
    writer.write(REFUSED)
    assert b" 415 " in await answer(reader)
    writer.write(b"x" * 1_000_000)
    for _ in range(2):  # the first answer tells that the body has arrived
        writer.write(HEAD + BODY)
        assert await answer(reader) == b"HTTP/1.1 200 OK"
        await clock.advance(2 * http_protocol.REST_SECONDS)
    writer.close()


async def test_the_body_of_a_request_sent_ahead_has_its_own_time(serve: Serve) -> None:
    clock = LoopClock()
    backend = FakeBackend("ab")
    backend.hold_after_chunks = 0
    reader, writer = await connect(await serve(backend))
    writer.write(HEAD + BODY + HEAD + BODY[:5])
    await eventually(lambda: backend.running == 1)
    backend.release.set()
    assert await answer(reader) == b"HTTP/1.1 200 OK"
    await clock.advance(2 * http_protocol.REST_SECONDS)
    writer.write(BODY[5:])
    assert await answer(reader) == b"HTTP/1.1 200 OK"
    writer.close()


async def test_bodies_that_are_held_back_leave_room_for_others(serve: Serve, monkeypatch) -> None:
    small = partial(BodyRoom, total_bytes=4_000_000, key_bytes=2_000_000)
    monkeypatch.setattr(http_app, "BodyRoom", small)
    running = await serve(FakeBackend(), limits=GatewayLimits(max_body_bytes=1_000_000), api_keys=("a", "b"))
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n"
        b"Content-Length: 900000\r\n\r\n"
    )
    held = [await connect(running) for _ in range(3)]
    for _, writer in held:
        writer.write(head % b"a" + b"x" * 899_999)
        await writer.drain()
    answers = [asyncio.create_task(answer(reader)) for reader, _ in held]
    done, left = await asyncio.wait(answers, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert [one.result() for one in done] == [b"HTTP/1.1 429 Too Many Requests"]
    reader, writer = await connect(running)
    writer.write(head % b"b" + b" " * (900_000 - len(BODY)) + BODY)
    assert await answer(reader) == b"HTTP/1.1 200 OK"
    for one in left:
        one.cancel()
    writer.close()
    for _, other in held:
        other.close()
