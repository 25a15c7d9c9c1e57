"""Misbehaving connections over real HTTP: none stays open for ever or fills the memory."""

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
import time

import pytest

from services.gateway.http import protocol as http_protocol
from services.gateway.http import server as http_server
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.support.fake_generation import FakeBackend
from tests.support.loop_clock import LoopClock
from tests.support.polling import eventually

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


async def connect(running: RunningGateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", running.http.port)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(15):
        return await reader.read()


async def test_a_connection_that_never_asks_is_closed(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_SECONDS", 0.1)
    reader, writer = await connect(await serve(FakeBackend()))
    assert await until_closed(reader) == b""
    writer.close()


async def test_an_idle_connection_is_kept_for_as_long_as_was_set(serve: Serve) -> None:
    reader, writer = await connect(await serve(FakeBackend(), http_keep_alive_seconds=1))
    begun = time.monotonic()
    writer.write(GET + b"\r\n")
    assert (await until_closed(reader)).endswith(b"ok\n")
    assert time.monotonic() - begun > 0.9
    writer.close()


async def test_a_client_that_reads_no_answer_is_cut_off(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(http_server, "LOST_SECONDS", 1)
    running = await serve(FakeBackend())
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        before = len(os.listdir("/proc/self/fd"))
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", running.http.port))
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        await eventually(lambda: len(os.listdir("/proc/self/fd")) > before)
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_headers_that_trickle_in_are_not_waited_for(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_SECONDS", 0.3)
    reader, writer = await connect(await serve(FakeBackend()))
    closed = asyncio.create_task(until_closed(reader))
    writer.write(GET)
    while not closed.done():  # a byte now and then: the connection is never idle
        writer.write(b"a")
        await asyncio.sleep(0.02)
    with contextlib.suppress(ConnectionResetError):  # a byte that met the closed connection
        assert await closed == b""
    writer.close()


async def test_headers_without_end_are_refused(serve: Serve) -> None:
    reader, writer = await connect(await serve(FakeBackend()))
    writer.write(GET + b"X-Long: ")
    for _ in range(4):  # just over the limit: more would hit a closed connection
        await asyncio.sleep(0.02)
        writer.write(b"a" * 16384)
    answer = await until_closed(reader)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"larger than 65536 bytes" in answer
    writer.close()


@pytest.mark.parametrize(
    "begun", [b"0\r\nX-Long: ", b"0\r\n", b"5;"], ids=["trailer", "trailers", "extension"]
)
async def test_what_stands_around_chunks_without_end_is_refused(serve: Serve, begun) -> None:
    reader, writer = await connect(await serve(FakeBackend()))
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2})
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(f"{head}{len(body):x}\r\n{body}\r\n".encode() + begun)
    piece = b"a: b\r\n" * 2731 if begun == b"0\r\n" else b"a" * 16386
    for _ in range(4):
        await asyncio.sleep(0.02)
        writer.write(piece)
    answer = await until_closed(reader)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"larger than 65536 bytes" in answer
    writer.close()


async def test_a_body_of_many_small_chunks_with_a_trailer_is_read(serve: Serve) -> None:
    reader, writer = await connect(await serve(FakeBackend()))
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}) + " " * 4000
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 40):  # more around them than may stand around one
        chunks = "".join(f"1;x={'a' * 30}\r\n{one}\r\n" for one in body[start : start + 40])
        writer.write(chunks.encode())
        await writer.drain()
    writer.write(b"0\r\nX-Sum: 1\r\n\r\n")
    async with asyncio.timeout(15):
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def test_fields_behind_a_body_are_no_headers(serve: Serve) -> None:
    reader, writer = await connect(await serve(FakeBackend(), api_keys=("key",)))
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2})
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    key, chunk = "Authorization: Bearer key\r\n", f"\r\n{len(body):x}\r\n{body}\r\n0\r\n"
    # With the trailer in the same read as the head, as then it is there before the headers are looked at.
    writer.write(f"{head}{chunk}{key}\r\n{head}{key}{chunk}\r\n".encode())
    async with asyncio.timeout(15):
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 2:
            answers += await reader.read(65536)
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"401", b"200"]
    writer.close()


async def test_what_arrives_in_pieces_and_in_time_is_answered(serve: Serve) -> None:
    """Two requests on one connection whose pauses add up to more than the time limit of one head."""
    clock = LoopClock()
    reader, writer = await connect(await serve(FakeBackend()))
    body = json.dumps({"model": MODEL, "prompt": "x" * 100, "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(2):
        for piece in (head[:9], head[9:], body[:5], body[5:]):
            writer.write(piece)
            await asyncio.sleep(0.02)
            await clock.advance(0.4 * http_protocol.HEAD_TIMEOUT_SECONDS)
        async with asyncio.timeout(15):
            answered = await reader.readuntil(b"\r\n\r\n")
            assert answered.startswith(b"HTTP/1.1 200 ")
            length = int(answered.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
    writer.close()


async def test_a_part_of_a_next_request_does_not_cut_the_answer_before_it(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_SECONDS", 0.1)
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    reader, writer = await connect(await serve(backend))
    body = json.dumps({"model": MODEL, "prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body + b"GET /heal")
    await asyncio.sleep(0.5)
    backend.release.set()
    assert b"[DONE]" in await until_closed(reader)  # then the next request's head is too late
    writer.close()


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
@pytest.mark.parametrize("pieces", [1, 5])
async def test_an_offer_of_another_protocol_is_passed_over(serve: Serve, offer, pieces) -> None:
    """Java's client offers HTTP/2 in the first request of a connection, and sends the body as usual."""
    reader, writer = await connect(await serve(FakeBackend("ok")))
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
    offered = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAA\r\nContent-Type: application/json\r\n" % offer
    )
    framed = [
        offered + b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
        offered + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        GET + b"Connection: close\r\n\r\n",
    ]
    sent = b"".join(framed)
    length = -(-len(sent) // pieces)
    for start in range(0, len(sent), length):
        writer.write(sent[start : start + length])
        await asyncio.sleep(0.02)
    answers = await until_closed(reader)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(b'"text":"ok"') == 2
    writer.close()


@pytest.mark.parametrize("head", [b"HTTP/1.0\r\n", b"HTTP/1.1\r\nConnection: close\r\n"])
async def test_an_offer_in_the_last_request_of_a_connection_is_passed_over(serve: Serve, head) -> None:
    reader, writer = await connect(await serve(FakeBackend("ok")))
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write(b"POST /v1/completions " + head + b"Host: x\r\n" + offer + body + GET + b"\r\n")
    answers = await until_closed(reader)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b'"text":"ok"' in answers
    assert answers.count(b"HTTP/1.1") == 1  # nothing after the last request is answered
    writer.close()


async def test_connect_is_no_offer(serve: Serve) -> None:
    reader, writer = await connect(await serve(FakeBackend()))
    writer.write(b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert (await until_closed(reader)).startswith(b"HTTP/1.1 400 ")
    writer.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_of_http_1_0_gets_no_chunks(serve: Serve, stream: bool) -> None:
    reader, writer = await connect(await serve(FakeBackend("abcdef")))
    body = json.dumps({"model": MODEL, "prompt": "x", "stream": stream})
    writer.write(f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    head, _, answer = (await until_closed(reader)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"\r\nconnection: close" in head
    assert answer.startswith(b"data: {" if stream else b"{")
    assert answer.endswith(b"data: [DONE]\n\n" if stream else b"}")
    assert (b"content-length: %d" % len(answer) in head) is not stream
    writer.close()


async def test_a_process_without_files_left_says_so_once_a_second_and_serves_when_it_has_some(
    serve: Serve, caplog
) -> None:
    running = await serve(FakeBackend())
    limits, begun = resource.getrlimit(resource.RLIMIT_NOFILE), time.monotonic()
    with socket.socket() as client:
        client.setblocking(False)
        free = os.dup(client.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", running.http.port))
            await eventually(lambda: bool(caplog.records))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        told = [one.getMessage().splitlines()[0] for one in caplog.records]
        assert set(told) == {"socket.accept() out of system resource"}
        assert len(told) <= 1 + (time.monotonic() - begun)
        reader, writer = await asyncio.open_connection(sock=client)
        writer.write(GET + b"Connection: close\r\n\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()
