"""Server-sent events against a hand-driven ASGI connection."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from dspark_core.errors import UnavailableError
from services.gateway.http import streaming
from services.gateway.http.streaming import (
    ClientGoneError,
    Event,
    EventStreamResponse,
    NamedEvent,
    StreamEnd,
    after_first,
    until_disconnect,
)


class Connection:
    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict] = []

    async def receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


class Source:
    """Yields payloads, then ends, fails or waits for ever."""

    def __init__(self, *payloads: Event, then: Exception | str | None = None) -> None:
        self._payloads = payloads
        self._then = then
        self.closed = False

    async def stream(self) -> AsyncIterator[Event]:
        try:
            for payload in self._payloads:
                yield payload
            if isinstance(self._then, Exception):
                raise self._then
            if self._then == "hang":
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def respond(source: Source, connection: Connection) -> None:
    await EventStreamResponse(source.stream(), {"X-Id": "1"})({}, connection.receive, connection.send)


async def test_each_payload_is_one_event_and_done_is_the_last() -> None:
    connection, source = Connection(), Source('{"a": "é"}', "{}")
    await respond(source, connection)
    assert connection.body == 'data: {"a": "é"}\n\ndata: {}\n\ndata: [DONE]\n\n'
    headers = dict(connection.sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert b"content-length" not in headers
    assert connection.sent[-1]["more_body"] is False


@pytest.mark.parametrize(
    ("error", "message"),
    [(UnavailableError("verifier gone"), "verifier gone"), (ValueError("secret"), "internal")],
)
async def test_an_error_in_the_middle_is_the_last_event(error, message) -> None:
    connection, source = Connection(), Source("{}", then=error)
    await respond(source, connection)
    first, last = connection.body.strip().split("\n\n")
    assert first == "data: {}"
    shown = json.loads(last.removeprefix("data: "))["error"]
    assert message in shown["message"]
    assert "secret" not in shown["message"]
    assert source.closed


async def test_a_client_that_leaves_ends_the_source_at_once() -> None:
    connection, source = Connection(), Source("{}", then="hang")
    response = asyncio.create_task(respond(source, connection))
    while not connection.body:
        await asyncio.sleep(0)
    connection.gone.set()
    await asyncio.wait_for(response, 15)
    assert source.closed
    assert "DONE" not in connection.body


async def test_a_client_that_is_gone_before_the_first_event_still_closes_what_was_started() -> None:
    connection, source = Connection(), Source("{}", then="hang")
    stream = await after_first(source.stream(), connection.receive)
    connection.gone.set()
    await EventStreamResponse(stream, {})({}, connection.receive, connection.send)
    assert source.closed


async def test_a_client_that_stops_reading_is_dropped(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "SEND_TIMEOUT_SECONDS", 0.01)
    connection, source = Connection(), Source("{}", "{}")

    async def blocked_send(message: dict) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await EventStreamResponse(source.stream(), {})({}, connection.receive, blocked_send)
    assert source.closed


async def test_errors_before_the_first_item_are_raised() -> None:
    connection, source = Connection(), Source(then=UnavailableError("nobody"))
    with pytest.raises(UnavailableError):
        await after_first(source.stream(), connection.receive)
    assert source.closed


async def test_a_client_that_leaves_before_the_first_item_cancels() -> None:
    connection, source = Connection(), Source(then="hang")
    waiting = asyncio.create_task(after_first(source.stream(), connection.receive))
    await asyncio.sleep(0)
    connection.gone.set()
    with pytest.raises(ClientGoneError):
        await asyncio.wait_for(waiting, 15)


async def test_the_first_item_is_not_lost() -> None:
    source = Source("1", "2")
    stream = await after_first(source.stream(), Connection().receive)
    assert [item async for item in stream] == ["1", "2"]


async def test_a_silent_stream_is_kept_alive_with_comments(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.01)
    connection, release = Connection(), asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        yield "1"
        await release.wait()
        yield "2"

    answered = asyncio.create_task(EventStreamResponse(slow(), {})({}, connection.receive, connection.send))
    while connection.body.count(": keep-alive\n\n") < 2:
        await asyncio.sleep(0.001)
    release.set()
    await asyncio.wait_for(answered, 15)
    events = [event for event in connection.body.split("\n\n") if not event.startswith(":")]
    assert events == ["data: 1", "data: 2", "data: [DONE]", ""]
    assert connection.sent[-1]["more_body"] is False


async def test_each_silence_brings_one_comment(monkeypatch) -> None:
    connection, loop, ahead = Connection(), asyncio.get_running_loop(), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + ahead)
    source = Source("1", then="hang")
    answered = asyncio.create_task(respond(source, connection))
    for silences in range(4):
        for _ in range(50):
            await asyncio.sleep(0)
        assert connection.body == "data: 1\n\n" + ": keep-alive\n\n" * silences
        ahead += streaming.KEEP_ALIVE_SECONDS
    connection.gone.set()
    await answered


async def test_a_late_first_item_does_not_hold_the_answer_back() -> None:
    release = asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        await release.wait()
        yield "1"

    stream = await after_first(slow(), Connection().receive, patience_seconds=0.01)
    release.set()
    assert [item async for item in stream] == ["1"]


async def test_an_error_after_the_patience_is_an_event() -> None:
    connection, release = Connection(), asyncio.Event()

    async def failing() -> AsyncIterator[str]:
        await release.wait()
        raise UnavailableError("nobody")
        yield ""

    stream = await after_first(failing(), connection.receive, patience_seconds=0.01)
    release.set()
    await EventStreamResponse(stream, {})({}, connection.receive, connection.send)
    assert '"code": "no_verifier"' in connection.body
    assert "DONE" not in connection.body


async def test_an_api_has_names_for_its_events_and_an_end_of_its_own() -> None:
    end = StreamEnd(None, lambda answer: NamedEvent("error", str(answer.code)))
    for then, last in ((None, ""), (UnavailableError("nobody"), "event: error\ndata: no_verifier\n\n")):
        connection, source = Connection(), Source(NamedEvent("a.b", '"\x85é"'), then=then)
        await EventStreamResponse(source.stream(), {}, end)({}, connection.receive, connection.send)
        assert connection.body == 'event: a.b\ndata: "\\u0085é"\n\n' + last


async def test_a_client_that_leaves_after_the_patience_still_cancels() -> None:
    connection, source = Connection(), Source(then="hang")
    stream = await after_first(source.stream(), connection.receive, patience_seconds=0.01)
    answered = asyncio.create_task(EventStreamResponse(stream, {})({}, connection.receive, connection.send))
    while not connection.sent:
        await asyncio.sleep(0)
    connection.gone.set()
    await asyncio.wait_for(answered, 15)
    assert source.closed


async def test_work_is_unwound_before_the_disconnect_is_reported() -> None:
    connection, unwound = Connection(), False

    async def work() -> None:
        nonlocal unwound
        try:
            connection.gone.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            unwound = True

    with pytest.raises(ClientGoneError):
        await until_disconnect(connection.receive, work())
    assert unwound
